"""`daemonctl`: the command that asks the daemon. `program` lists the commands; each stands in one file."""

from __future__ import annotations

from .program import main

__all__ = ["main"]
