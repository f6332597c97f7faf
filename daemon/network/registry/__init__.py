"""Signed records of what the swarm serves: announced, held for others, looked up."""
