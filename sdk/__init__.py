"""What asks: a thin client of the daemon on this machine, and `daemonctl`.

Opens the Unix socket and speaks `protocol/control`. numpy and torch are optional, and imported only by whoever
brought their own arrays.
"""
