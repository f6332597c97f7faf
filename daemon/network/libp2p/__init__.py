"""The network over py-libp2p: its host, its connections and streams, and finding peers."""
