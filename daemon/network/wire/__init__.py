"""What runs over one connection: Noise, multistream and Yamux, and the rules of each."""
