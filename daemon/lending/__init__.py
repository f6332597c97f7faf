"""What this machine gives: its workers and their spans, within its owner's limits, measured and counted."""
