"""How this machine is used besides us: since when nobody sits at it, and since when no other program uses the GPU.

It looks and remembers; what follows from it, `schedule.py` decides. Where something cannot be told, nobody
is in the way.
Sources: logind's IdleHint (org.freedesktop.login1(5)); proc(5); `nvidia-smi pmon`.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

LOOK_TIMEOUT_S: Final = 10.0  # a driver that hangs must not hang us
BUSY_SHARE: Final = 0.2  # of all cores, used by other programs between two looks: somebody works here
BUSY_GPU_PERCENT: Final = 5  # a desktop that draws its clock uses less
_LOGIND: Final = ("loginctl", "show-session", "--property=IdleHint", "--property=IdleSinceHintMonotonic")
_PMON: Final = ("nvidia-smi", "pmon", "--count", "1", "--select", "u")

_log = structlog.get_logger("corolla.occupancy")


class Occupancy:
    """What is known of one machine. clock: monotonic seconds, as the kernel counts them for logind."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._used_at = clock()  # by people; until we know better, just now
        self._cpu_before: tuple[float, float] | None = None
        self._gpu_used_at = -math.inf

    async def idle_s(self) -> float:
        """Seconds since somebody used this machine: logind's word, else the processors' load without ours."""
        hint = parse_idle_hint(await run_tool(_LOGIND) or "", self._clock())
        if hint is not None:
            return hint
        total, others = cpu_seconds()
        before, self._cpu_before = self._cpu_before, (total, others)
        if (
            before is not None
            and total > before[0]
            and (others - before[1]) / (total - before[0]) > BUSY_SHARE
        ):
            self._used_at = self._clock()
        return self._clock() - self._used_at

    async def gpu_free_s(self, ours: Collection[int]) -> float:
        """Seconds since another program used a GPU; inf if none did. ours: the processes of our workers."""
        listing = await run_tool(_PMON)
        if listing is not None and is_gpu_wanted(listing, ours):
            self._gpu_used_at = self._clock()
        return self._clock() - self._gpu_used_at


def parse_idle_hint(text: str, now_s: float) -> float | None:
    """Seconds of idleness as logind tells; None where it tells nothing."""
    fields = dict(line.partition("=")[::2] for line in text.splitlines())
    match fields.get("IdleHint"):
        case "yes":
            since = fields.get("IdleSinceHintMonotonic", "")
            return max(0.0, now_s - int(since) / 1e6) if since.isdecimal() else math.inf
        case "no":
            return 0.0
    return None


def is_gpu_wanted(listing: str, ours: Collection[int]) -> bool:
    """Whether `nvidia-smi pmon` shows a process that is not ours at work.

    If it lists none of ours that run, it speaks of another namespace's numbers, and nothing can be told.
    """
    rows = [line.split() for line in listing.splitlines() if line.strip() and not line.startswith("#")]
    used = {int(row[1]): row[3] for row in rows if len(row) > 3 and row[1].isdecimal()}
    if ours and not set(ours) & set(used):
        return False
    return any(
        percent.isdecimal() and int(percent) >= BUSY_GPU_PERCENT
        for process, percent in used.items()
        if process not in ours
    )


def cpu_seconds() -> tuple[float, float]:
    """Of all cores together: seconds that passed, and those in which programs other than ours computed."""
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    total, idle = sum(fields), fields[3] + fields[4]
    own = _own_ticks(Path("/proc/self"))
    for task in Path("/proc/self/task").glob("*/children"):
        for child in task.read_text().split():
            own += _own_ticks(Path("/proc") / child)
    return total / ticks, max(0, total - idle - own) / ticks


def _own_ticks(process: Path) -> int:
    """Of a process and of its children that have ended."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended; its parent counts it now
        return 0
    return sum(int(field) for field in fields[11:15])


async def run_tool(command: Sequence[str]) -> str | None:
    """What a program of this machine says; None if it is not there, fails, or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    with trio.move_on_after(LOOK_TIMEOUT_S):
        try:
            done = await trio.run_process(
                list(command),
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        except OSError as problem:
            _log.debug("tool_failed", command=command[0], problem=str(problem))
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None
    return None
