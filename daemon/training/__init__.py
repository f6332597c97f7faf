"""Training through the swarm, on the client's side: wiring of micro-batches, their hops, what is kept."""
