"""How others come to us and we to them: where we are seen, relays, punching, ports forwarded, neighbours."""
