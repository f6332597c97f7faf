"""How a worker that serves others stands behind everything else on its machine.

Niceness also orders a process's reads and writes, and its batch class says that it never needs to answer at once.
Where Linux groups processes by session (`autogroup`, sched(7)), niceness orders those of one session alone, and the
group has a niceness of its own: a worker leads its session, so that it is lowered too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import structlog

NICENESS: Final = 10  # as the service's; more would stop a worker altogether beside one busy program

_log = structlog.get_logger("corolla.workers")


def lower(process: int) -> None:
    """Put a process that has just been started behind others. What the system forbids is left as it is.

    Threads and programs that it starts later inherit it.
    """
    try:
        os.setpriority(os.PRIO_PROCESS, process, max(NICENESS, os.getpriority(os.PRIO_PROCESS, process)))
        if hasattr(os, "SCHED_BATCH"):  # Linux
            os.sched_setscheduler(process, os.SCHED_BATCH, os.sched_param(0))
        group = autogroup(process)
        if os.getsid(process) == process and group.exists():
            group.write_text(str(NICENESS))
    except OSError as problem:
        _log.warning("priority_kept", process=process, problem=str(problem))


def autogroup(process: int) -> Path:
    """Where Linux keeps the niceness of a process's session."""
    return Path(f"/proc/{process}/autogroup")


def half_of_cores() -> int:
    """How many threads leave its owner half of the cores that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // 2)
