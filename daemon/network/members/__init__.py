"""Who belongs to our swarm, and what is remembered of whom."""
