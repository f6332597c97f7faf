"""Silence, and what is behind it: when to ask every hop where a step is, and what their answers mean. Pure.

A hop that does not answer hangs. A step that one hop sent and the next never saw is a failed link, of which
neither is guilty. A step that stays with a hop is its worker's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from ...protocol.steps import At, Stage
from .deadlines import Settings
from .roster import Member


class Await(Enum):
    """What is being waited for."""

    NOTHING = auto()
    LINKS = auto()
    REPLAY = auto()
    STEP = auto()


@dataclass(frozen=True, slots=True)
class Hung:
    """These hops do not answer."""

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class BadLink:
    """What `upstream` sent did not arrive at `downstream`."""

    upstream: Member
    downstream: Member


@dataclass(frozen=True, slots=True)
class Stuck:
    """The hop's worker gets no further."""

    member: Member


@dataclass(frozen=True, slots=True)
class Odd:
    """The hop says what cannot be; a new wiring may cure it."""

    member: Member
    reason: str


Finding = Hung | BadLink | Stuck | Odd


@dataclass(slots=True)
class _Probe:
    """A question to all hops. link: a failed link was reported. hard: the step takes too long anyway."""

    question: tuple[int, int]  # epoch, step
    deadline: float
    link: tuple[Member, Member] | None
    hard: bool


class Watch:
    """How long it has been silent, and the question that is open, if any."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._awaits = Await.NOTHING
        self._last_sign = 0.0
        self._hard_deadline = float("inf")
        self._probe: _Probe | None = None
        self._slow: tuple[int, int] | None = None  # a question that found a step slow, but going

    def expect(self, what: Await, now_s: float) -> None:
        """From now on this is awaited; whatever was asked before is void."""
        self._awaits = what
        self._last_sign = now_s
        self._hard_deadline = now_s + self._settings.step_hard_timeout_s
        self._probe = None

    def sign(self, now_s: float) -> None:
        """A hop showed that what is awaited makes progress."""
        self._last_sign = now_s
        if self._probe is not None and self._probe.link is None and not self._probe.hard:
            self._probe = None

    @property
    def deadline(self) -> float | None:
        """When to call `tick`."""
        if self._probe is not None:
            return self._probe.deadline
        match self._awaits:
            case Await.NOTHING:
                return None
            case Await.LINKS:
                return self._last_sign + self._settings.open_timeout_s
            case Await.REPLAY:
                return self._last_sign + self._settings.step_timeout_s
            case Await.STEP:
                return min(self._last_sign + self._settings.step_timeout_s, self._hard_deadline)

    @property
    def is_asking(self) -> bool:
        """Whether a question is open."""
        return self._probe is not None

    def ask(
        self,
        members: Sequence[Member],
        question: tuple[int, int],
        now_s: float,
        link: tuple[Member, Member] | None = None,
    ) -> bool:
        """Ask where a step is (epoch, step id); False if that is being asked already."""
        if self._probe is not None:
            self._probe.link = self._probe.link or link
            return False
        hard = self._awaits is Await.STEP and now_s >= self._hard_deadline
        self._probe = _Probe(question, now_s + self._settings.where_timeout_s, link, hard)
        for member in members:
            member.stage = None
        return True

    def hear(self, member: Member, answer: At) -> None:
        """A hop's answer."""
        if self._probe is not None and self._probe.question == (answer.epoch, answer.step_id):
            member.stage = answer.stage

    def conclude(self, members: Sequence[Member], chain: Sequence[Member], now_s: float) -> Finding | None:
        """What the answers tell; None for patience.

        members: the whole route. chain: the part of it that what is awaited has to pass, in order.
        """
        probe, self._probe = self._probe, None
        hung = tuple(member for member in members if member.stage is None)
        if probe is None or hung:
            return Hung(hung) if hung else None
        if probe.link is not None:
            return BadLink(*probe.link)
        if self._awaits is Await.LINKS:
            return _unlinked(members)
        for member in chain:
            if member.stage is Stage.UNKNOWN:
                index = next(i for i, other in enumerate(members) if other is member)
                return BadLink(members[index - 1], member) if index else Odd(member, "did not get the step")
            if member.stage is Stage.WORKING and not probe.hard and self._slow != probe.question:
                self._slow = probe.question  # once; a second silence is one too many
                self._last_sign = now_s
                return None
            if member.stage is not Stage.SENT:
                return Stuck(member)
        return Odd(chain[-1], "sent an answer that never came")


def _unlinked(members: Sequence[Member]) -> Finding | None:
    for index, member in enumerate(members):
        if not member.linked:
            if index + 1 < len(members):
                return BadLink(member, members[index + 1])
            return Odd(member, "did not link in time")
    return None
