"""Who is about to ask again: sessions that were just answered, and how long a pass waits for them.

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
# A pass may wait so long for sessions that are due: apart, two halves of them take two passes for each token.
_GRACE: Final = 0.5  # of the last pass
_MAX_GRACE_S: Final = 0.05


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


class Rhythm:
    """A worker's passes, and all who come back between two of them: sessions with steps, generations to sample.

    Absences are counted without the passes amid them. Two halves that take turns wait for each other's passes, and
    would seem to be away for so long; they are back at once where nothing runs.
    """

    def __init__(self) -> None:
        self._pass_s = 0.0  # that the last pass took
        self._passes_s = 0.0  # that all of them took
        self._ready_s = 0.0  # since when the next pass could run
        self._decoding = Company()  # sessions, by id
        self._sampling = Company()  # generations, by number, which are due after a pass
        self._sampled: set[int] = set()  # since the last pass
        self._answered: set[bytes] = set()  # by the pass that runs

    def grace_s(self, now_s: float, *, to_sample: bool) -> float:
        """How long to wait for more requests than there are: a part of what a pass takes, at most.

        to_sample: somebody waits for a sample, which comes before the next pass.
        """
        within_s = self._ready_s + min(self._pass_s * _GRACE, _MAX_GRACE_S) - now_s
        if within_s <= 0:
            return 0.0
        between_s = self._between_s(now_s)
        due_s = self._sampling.wait_s(between_s, within_s)
        return due_s if to_sample else max(due_s, self._decoding.wait_s(between_s, within_s))

    def begin(self, now_s: float) -> None:
        """From now on the next pass could run."""
        self._ready_s = now_s

    def passed(self, began_s: float, now_s: float) -> None:
        """A pass ran; whoever was sampled before it is due after it, and whose step it answered has left."""
        self._ready_s, self._pass_s = now_s, now_s - began_s
        self._passes_s += self._pass_s
        between_s = self._between_s(now_s)
        for generation in self._sampled:
            self._sampling.leave(generation, between_s)
        for session in self._answered:
            self._decoding.leave(session, between_s)
        self._sampled.clear()
        self._answered.clear()

    def step_comes(self, session: bytes, now_s: float) -> None:
        """A session asks for a step."""
        self._decoding.come(session, self._between_s(now_s))

    def step_answered(self, session: bytes) -> None:
        """It has its answer, of the pass that runs."""
        self._answered.add(session)

    def sample_comes(self, generation: int, now_s: float) -> None:
        """A generation asks for a sample."""
        self._sampling.come(generation, self._between_s(now_s))
        self._sampled.add(generation)

    def session_ends(self, session: bytes) -> None:
        """It does not come again."""
        self._decoding.forget(session)
        self._answered.discard(session)

    def generation_ends(self, generation: int) -> None:
        """It does not come again."""
        self._sampling.forget(generation)
        self._sampled.discard(generation)

    def _between_s(self, now_s: float) -> float:
        """The time that no pass ran, for which alone the clock of absences goes."""
        return now_s - self._passes_s
