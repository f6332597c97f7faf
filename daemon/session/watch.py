"""Silence, and what is behind it: when to ask every hop where a step is, and what their answers mean. Pure.

A hop that does not answer hangs. A step that one hop sent and the next never saw is a failed link, of which
neither is guilty. A step that stays with a hop is its worker's. All that is said at a deadline; earlier, when it is
merely late (`lateness.py`), the same question tells with whom the step is, and nobody is found at fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from ...protocol.steps import At, Stage
from .deadlines import Settings
from .lateness import SHOWN_S, Lateness, answer_s
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


@dataclass(frozen=True, slots=True)
class Late:
    """The step is with this hop, which shows nothing of it; is_silent: nor does it answer. Not its fault, so far."""

    member: Member
    is_silent: bool


Finding = Hung | BadLink | Stuck | Odd | Late


@dataclass(slots=True)
class _Probe:
    """A question to all hops. link: a failed link was reported. hard: the step takes too long anyway.

    early: no deadline has passed.
    """

    question: tuple[int, int]  # epoch, step
    deadline: float
    link: tuple[Member, Member] | None
    hard: bool
    early: bool


class Watch:
    """How long it has been silent, and the question that is open, if any."""

    def __init__(self, settings: Settings, lateness: Lateness) -> None:
        self._settings = settings
        self._lateness = lateness
        self._num_tokens = 0  # of the step that is awaited
        self._longest_s = 0.0  # silence since it is
        self._patience_s = float("inf")
        self._num_looks = 0  # early ones, since the last sign
        self._awaits = Await.NOTHING
        self._last_sign = 0.0
        self._hard_deadline = float("inf")
        self._probe: _Probe | None = None
        self._slow: tuple[int, int] | None = None  # a question that found a step slow, but going

    def expect(self, what: Await, now_s: float, num_tokens: int = 0, num_bytes: int = 0) -> None:
        """From now on this is awaited; whatever was asked before is void.

        num_tokens: of a step. num_bytes: that are on their way to the hops.
        """
        self._awaits = what
        self._last_sign = now_s
        self._hard_deadline = now_s + self._settings.step_hard_timeout_s
        self._probe = None
        self._num_tokens = num_tokens
        self._longest_s = 0.0
        self._num_looks = 0
        match what:
            case Await.STEP:
                self._patience_s = self._lateness.patience_s(num_tokens, num_bytes, now_s)
            case Await.LINKS:
                self._patience_s = self._lateness.linking_s(num_bytes, now_s)
            case _:
                self._patience_s = float("inf")  # what a replay takes is not known from steps

    def sign(self, now_s: float) -> None:
        """A hop showed that what is awaited makes progress."""
        self._longest_s = max(self._longest_s, now_s - self._last_sign)
        self._last_sign = now_s
        self._num_looks = 0
        if self._probe is not None and self._probe.link is None and not self._probe.hard:
            self._probe = None

    def answered(self, now_s: float) -> None:
        """The step that is awaited is done."""
        if self._awaits is Await.STEP:
            self.sign(now_s)
            self._lateness.note(self._num_tokens, self._longest_s)

    @property
    def deadline(self) -> float | None:
        """When to call `tick`."""
        if self._probe is not None:
            return self._probe.deadline
        if self._awaits is Await.NOTHING:
            return None
        return min(self._deadline, self._last_sign + self._patience_s * 2.0**self._num_looks)

    @property
    def _deadline(self) -> float:
        """When it is more than late."""
        match self._awaits:
            case Await.STEP:
                return min(self._last_sign + self._settings.step_timeout_s, self._hard_deadline)
            case Await.LINKS:
                return self._last_sign + self._settings.open_timeout_s
            case _:
                return self._last_sign + self._settings.step_timeout_s

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
        where_s = self._settings.where_timeout_s
        if self._probe is not None:
            if link is not None and self._probe.early:
                self._probe.early, self._probe.deadline = False, now_s + where_s
            self._probe.link = self._probe.link or link
            return False
        hard = self._awaits is Await.STEP and now_s >= self._hard_deadline
        early = link is None and now_s < self._deadline
        wait_s = answer_s(self._patience_s) if early else where_s
        self._probe = _Probe(question, now_s + wait_s, link, hard, early)
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
        if probe is not None and probe.early:
            return self._look(chain, hung, now_s, all_hung=len(hung) == len(members))
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

    def _look(
        self, chain: Sequence[Member], hung: Sequence[Member], now_s: float, *, all_hung: bool
    ) -> Finding | None:
        """What the answers tell before a deadline; None to wait on."""
        self._num_looks += 1
        if all_hung and len(hung) > 1:
            return None  # rather it is we who hear nothing
        if hung:
            return Late(hung[0], is_silent=True)
        has_it = next((member for member in chain if member.stage is not Stage.SENT), None)
        if self._awaits is not Await.STEP or has_it is None or has_it.stage is Stage.UNKNOWN:
            return None
        return Late(has_it, is_silent=False) if now_s - self._last_sign >= SHOWN_S else None


def _unlinked(members: Sequence[Member]) -> Finding | None:
    for index, member in enumerate(members):
        if not member.linked:
            if index + 1 < len(members):
                return BadLink(member, members[index + 1])
            return Odd(member, "did not link in time")
    return None
