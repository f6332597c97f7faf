"""What Corolla's programs may say to each other. Sans-IO: bytes in, messages out.

Nothing here opens a socket, reads a clock, or knows of tensors beyond their bytes. The other three
folders import this one and nothing of each other.
"""
