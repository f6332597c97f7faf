"""Who is about to ask again: sessions that were just answered, and when the next request of each is due.

A device computes eight tokens in little more than the time of one, so it pays to wait a moment for sessions that
are on their way back, instead of starting a pass without them, after which they wait for that pass. Without this,
sessions that came apart by chance stay apart. Pure; it knows no clock and counts in seconds that it is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

_REMEMBERED: Final = 3  # absences, of which the median counts: one long pause says nothing of the next
_LATE: Final = 1.5  # times the usual absence: whoever is not back then is not waited for
_SLACK_S: Final = 0.001


@dataclass(slots=True)
class _Member:
    left_s: float | None = None  # None while it is here
    absences_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))


class Company:
    """Sessions, or whatever else asks, is answered and asks again."""

    def __init__(self) -> None:
        self._members: dict[Hashable, _Member] = {}

    def leave(self, name: Hashable, now_s: float) -> None:
        """It was answered."""
        self._members.setdefault(name, _Member()).left_s = now_s

    def come(self, name: Hashable, now_s: float) -> None:
        """It asks."""
        member = self._members.get(name)
        if member is not None and member.left_s is not None:
            member.absences_s.append(now_s - member.left_s)
            member.left_s = None

    def forget(self, name: Hashable) -> None:
        """It is gone for good."""
        self._members.pop(name, None)

    def wait_s(self, now_s: float, within_s: float) -> float:
        """How long it pays to wait for those that are away; 0 if none is due within so many seconds."""
        return max((self._due_s(member, now_s, within_s) for member in self._members.values()), default=0.0)

    def _due_s(self, member: _Member, now_s: float, within_s: float) -> float:
        if member.left_s is None or not member.absences_s:
            return 0.0
        usual_s = median(member.absences_s)
        if member.left_s + usual_s > now_s + within_s:
            return 0.0
        return min(within_s, max(0.0, member.left_s + usual_s * _LATE + _SLACK_S - now_s))
