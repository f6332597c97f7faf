"""May this machine lend now: its owner's hours, whether somebody uses it, whether another program wants the GPU.

Pure: the time of day and what was seen are arguments. The time of day is asked anew at each look, so that a clock
that jumps, by an hour or for summer time, costs one wrong look at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

DAY_MIN: Final = 24 * 60
GPU_QUIET_S: Final = 120.0  # after another program used the GPU: it may only be loading its next scene


class Lends(StrEnum):
    """Whether this machine lends, or why not; what `daemonctl status` shows."""

    YES = "yes"
    DRAINING = "draining"  # no new sessions
    PAUSED = "paused"  # the owner said so
    OUTSIDE_HOURS = "outside hours"
    NOT_IDLE = "not idle"
    GPU_WANTED = "gpu in use"


@dataclass(frozen=True, slots=True)
class Hours:
    """Times of a day, each [start, end) in minutes of local time; over midnight if it ends before it starts.

    None at all is always.
    """

    times: tuple[tuple[int, int], ...] = ()

    def hold(self, minute: int) -> bool:
        """Whether this minute of the day lies in them."""
        return not self.times or any(
            start <= minute < end if start < end else minute >= start or minute < end
            for start, end in self.times
        )

    def minutes_to_change(self, minute: int) -> int | None:
        """From this minute until they begin or end; None if they never do."""
        now = self.hold(minute)
        edges = ((edge - minute) % DAY_MIN for times in self.times for edge in times)
        return min((d for d in edges if d and self.hold((minute + d) % DAY_MIN) != now), default=None)


def parse_hours(text: str) -> Hours:
    """Hours from `22:00-07:00`, or several with commas. Raises ValueError."""
    runs = [run.strip() for run in text.split(",") if run.strip()]
    return Hours(tuple(_parse_run(run) for run in runs))


def _parse_run(text: str) -> tuple[int, int]:
    start, dash, end = text.partition("-")
    if not dash:
        raise ValueError(f"{text!r} has no end")
    run = _parse_time(start), _parse_time(end) % DAY_MIN
    if run[0] == run[1]:
        raise ValueError(f"{text!r} is no time, or all of them")
    return run


def _parse_time(text: str) -> int:
    hour, colon, minute = text.strip().partition(":")
    if not (colon and hour.isdecimal() and minute.isdecimal() and len(minute) == 2):
        raise ValueError(f"{text!r} is no time of day")
    minutes = int(hour) * 60 + int(minute)
    if int(minute) > 59 or minutes > DAY_MIN:
        raise ValueError(f"{text!r} is no time of day")
    return minutes


@dataclass(frozen=True, slots=True)
class Rules:
    """What the owner wants. idle_s: for so long nobody must have used the machine; 0 does not ask."""

    hours: Hours = Hours()
    idle_s: float = 0.0
    yields_gpu: bool = True


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found. minute: of the local day. idle_s: since somebody used this machine.

    gpu_free_s: since another program used a GPU of ours; inf where none did, or where that cannot be told.
    """

    minute: int
    idle_s: float = math.inf
    gpu_free_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to lend, and in words until when. until_s: after so long another look is due; inf is unknown."""

    lends: Lends
    words: str = ""
    until_s: float = math.inf


def may_lend(rules: Rules, seen: Seen) -> Verdict:
    """The rules in the order in which an owner would name the reason."""
    to_change = rules.hours.minutes_to_change(seen.minute)
    until_s = math.inf if to_change is None else 60.0 * to_change
    if not rules.hours.hold(seen.minute):
        at = clock_time(seen.minute + (to_change or 0))
        return Verdict(Lends.OUTSIDE_HOURS, f"outside its hours; lends again at {at}", until_s)
    if seen.idle_s < rules.idle_s:
        left_s = rules.idle_s - seen.idle_s
        words = f"somebody uses this machine; lends when nobody has for {rules.idle_s / 60:g} min"
        return Verdict(Lends.NOT_IDLE, words, left_s)
    if rules.yields_gpu and seen.gpu_free_s < GPU_QUIET_S:
        left_s = GPU_QUIET_S - seen.gpu_free_s
        words = f"another program uses the GPU; lends when none has for {GPU_QUIET_S / 60:g} min"
        return Verdict(Lends.GPU_WANTED, words, left_s)
    return Verdict(Lends.YES, until_s=until_s)


def clock_time(minute: int) -> str:
    """A minute of the day as people write it."""
    return f"{minute // 60 % 24:02}:{minute % 60:02}"
