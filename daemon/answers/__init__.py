"""Answers on the control socket: what each method does. They ask the node and hold little."""
