"""How this machine is used besides us: since when nobody sits at it, and since when no other program uses the GPU.

It looks and remembers; what follows from it, `schedule.py` decides. Where something cannot be told, nobody
is in the way.
Sources: logind's IdleHint (org.freedesktop.login1(5)); proc(5); `nvidia-smi pmon` (nvidia-smi(1)).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from .tool import Tool

BUSY_SHARE: Final = 0.2  # of all cores, used by other programs between two looks: somebody works here
BUSY_GPU_PERCENT: Final = 5  # a desktop that draws its clock uses less
_LOGIND: Final = ("loginctl", "show-session", "--property=IdleHint", "--property=IdleSinceHintMonotonic")
_PMON: Final = ("nvidia-smi", "pmon", "--count", "1", "--select", "u")


class Occupancy:
    """What is known of one machine. clock: monotonic seconds, as the kernel counts them for logind.

    logind, pmon: who is asked.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        logind: Tool | None = None,
        pmon: Tool | None = None,
    ) -> None:
        self._clock = clock
        self._logind = logind or Tool(*_LOGIND)
        self._pmon = pmon or Tool(*_PMON)
        self._used_at = clock()  # by people; until we know better, just now
        self._cpu_before: tuple[float, float] | None = None
        self._gpu_used_at = -math.inf
        self._our_gpus: frozenset[str] = frozenset()  # those on which a process of ours was seen last
        self._ours_before: frozenset[int] = frozenset()

    async def idle_s(self) -> float:
        """Seconds since somebody used this machine: logind's word, else the processors' load without ours."""
        hint = parse_idle_hint(await self._logind.ask() or "", self._clock())
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
        """Seconds since another program used a GPU of ours; inf if none did. ours: the processes of our workers.

        Which GPUs are ours, is learnt from where our processes were seen: numbers of devices are not the driver's
        everywhere. If they never were, it speaks of another namespace's processes, and nothing can be told. What was
        ours at the look before may be about to end.
        """
        listing = await self._pmon.ask()
        ours_now, ours_ever = frozenset(ours), self._ours_before.union(ours)
        self._ours_before = ours_now
        if listing is not None:
            uses = parse_pmon(listing)
            self._our_gpus = frozenset(use.gpu for use in uses if use.process in ours_ever) or self._our_gpus
            if is_gpu_wanted(uses, self._our_gpus, ours_ever):
                self._gpu_used_at = self._clock()
        return self._clock() - self._gpu_used_at


class GpuUse(NamedTuple):
    """What a process does to one GPU. percent: of the time in which anything was computed there, for this process."""

    gpu: str
    process: int
    percent: int


def parse_pmon(listing: str) -> tuple[GpuUse, ...]:
    """The processes that `nvidia-smi pmon` shows; one that rests has `-` for a percentage."""
    rows = [line.split() for line in listing.splitlines() if not line.startswith("#")]
    return tuple(
        GpuUse(row[0], int(row[1]), int(row[3]) if row[3].isdecimal() else 0)
        for row in rows
        if len(row) > 3 and row[1].isdecimal()
    )


def is_gpu_wanted(uses: Iterable[GpuUse], our_gpus: Collection[str], ours: Collection[int]) -> bool:
    """Whether a process that is not ours is at work on one of our GPUs."""
    return any(
        use.gpu in our_gpus and use.process not in ours and use.percent >= BUSY_GPU_PERCENT for use in uses
    )


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
