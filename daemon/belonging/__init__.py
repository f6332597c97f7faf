"""Our belonging to a swarm: how it is founded and entered, who is invited, and the routes through it."""
