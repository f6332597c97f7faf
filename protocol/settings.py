"""What becomes of settings that are changed while the daemon runs: the answer of `config.set`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Applied:
    """Keys that changed. now: in force. workers: workers start again for them, after moving their sessions.

    daemon: in force when the daemon is started again. overridden: the value is kept, but a flag or an
    environment variable of this run wins over it.
    """

    now: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    daemon: tuple[str, ...] = ()
    overridden: bool = False
