"""A client's fault-tolerant session over a route of hops. `client.open_session` is its door."""
