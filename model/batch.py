"""Which steps run next: the scheduler of one worker.

Owns the queue of steps that wait and how far each has come. It decides and returns plain values; it knows
no tensors, no device and no clock (age is counted in passes), and never fails.

A pass is one run through a range of blocks, with tokens of many sessions side by side. Steps of one session
run one after the other, in order. Decodes go first and a long prefill runs in parts: in small ones beside
decodes, and while the next decodes of sessions that just had one are on their way, so that nobody's next
token waits for somebody's prompt. Whoever was passed over too often leads the next pass.

Training requests stand in a line of their own, behind everybody: one block of the first of them runs when
nothing else waits, or after so many passes in a row, so that they starve as little as they stall.

Source: Yu et al. 2022, Orca, for batching by iteration; Agrawal et al. 2024, Sarathi-Serve, for prefills
in parts beside decodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, NamedTuple

# Below, a prefill beside decodes would hardly move; so few rows cost a pass next to nothing.
_FEWEST_MIXED: Final = 8


@dataclass(frozen=True, slots=True)
class Policy:
    """How large passes get.

    decode_tokens: of decodes in one pass. prefill_tokens: of prefills in a pass without decodes; enough to
    keep the device busy. mixed_tokens: of prefills beside decodes; each decode waits for them.
    patience: passes that a step may be passed over before it leads one. memory: passes for which a session
    that had a decode is expected to bring the next. training_patience: passes after which training has a turn.
    """

    decode_tokens: int = 512
    prefill_tokens: int = 512
    mixed_tokens: int = 128
    patience: int = 4
    memory: int = 8
    training_patience: int = 8

    @classmethod
    def of(cls, decode_tokens_per_s: float, prefill_tokens_per_s: float) -> Policy:
        """For a device of these speeds; 0 is unknown.

        A decode then waits for prefills about as long as one pass takes without them, in its own pass and in one
        before it: prompts of others slow a text to a third at worst.
        """
        if not decode_tokens_per_s or not prefill_tokens_per_s:
            return cls()
        num_tokens = round(prefill_tokens_per_s / decode_tokens_per_s)
        return cls(mixed_tokens=max(_FEWEST_MIXED, min(num_tokens, cls().mixed_tokens)))


class Job(NamedTuple):
    """A step as the scheduler sees it. blocks: the range that it runs through; num_tokens: of all rows."""

    request: int
    session: bytes
    blocks: tuple[int, int]
    num_tokens: int
    is_decode: bool  # few new tokens in each row, and somebody waits for each of them


class Part(NamedTuple):
    """Tokens [first, first + num) of a job, which run in one pass."""

    job: Job
    first: int
    num: int

    @property
    def is_last(self) -> bool:
        """Whether the job is through after this part."""
        return self.first + self.num == self.job.num_tokens


class Pass(NamedTuple):
    """What runs together: parts of jobs of different sessions, all through the same blocks."""

    blocks: tuple[int, int]
    parts: tuple[Part, ...]


@dataclass(slots=True)
class _Waiting:
    job: Job
    arrival: int
    num_done: int = 0
    num_passed_over: int = 0


@dataclass(slots=True)
class Scheduler:
    """The queue of one worker, in lanes: one for each session."""

    policy: Policy = field(default_factory=Policy)
    _lanes: dict[bytes, deque[_Waiting]] = field(default_factory=dict)
    _num_arrived: int = 0
    _num_gone: int = 0
    _num_run: int = 0
    _num_passes: int = 0  # since training had a turn
    _training: deque[int] = field(default_factory=deque)
    _decoded: dict[bytes, int] = field(default_factory=dict)  # session → the pass of its last one
    _latest: dict[int, _Waiting] = field(default_factory=dict)  # the jobs of the last pass, by request

    @property
    def num_waiting(self) -> int:
        """Jobs and training requests that are not through yet. Another thread may ask."""
        return self._num_arrived - self._num_gone + len(self._training)

    @property
    def has_steps(self) -> bool:
        """Whether a step waits."""
        return bool(self._lanes)

    def add(self, job: Job) -> None:
        """Queue a job behind those of its session."""
        self._lanes.setdefault(job.session, deque()).append(_Waiting(job, self._num_arrived))
        self._num_arrived += 1

    def add_training(self, request: int) -> None:
        """Queue a training request behind the others; it has turns until `finish_training`."""
        self._training.append(request)

    def finish_training(self, request: int) -> None:
        """Give it no more turns."""
        self._training.remove(request)

    def next_training(self) -> int | None:
        """The training request of which a block is to run now, before any pass; None if it is not its turn."""
        if not self._training or (self._lanes and self._num_passes < self.policy.training_patience):
            return None
        self._num_passes = 0
        return self._training[0]

    @property
    def sessions(self) -> frozenset[bytes]:
        """Those that have jobs here."""
        return frozenset(self._lanes)

    def next(self, blocked: Collection[int] = ()) -> Pass | None:
        """The pass to run now; None if nothing waits. What it holds counts as done.

        blocked: requests that cannot run yet, and hold up their sessions alone.
        """
        heads = [lane[0] for lane in self._lanes.values() if lane[0].job.request not in blocked]
        if not heads:
            return None
        self._num_passes += 1
        leader = min(heads, key=self._rank)
        mates = [head for head in heads if head.job.blocks == leader.job.blocks]
        parts = self._fill(sorted(mates, key=self._rank))
        taken = {part.job.request for part in parts}
        for head in heads:
            head.num_passed_over = 0 if head.job.request in taken else head.num_passed_over + 1
        self._num_run += 1
        self._latest = {head.job.request: head for head in heads if head.job.request in taken}
        for part in parts:
            if part.job.is_decode:
                self._decoded[part.job.session] = self._num_run
            self._advance(part)
        return Pass(leader.job.blocks, tuple(parts))

    def put_back(self, part: Part) -> None:
        """A part of the last pass did not run: it waits where it waited, as long as it did."""
        head = self._latest[part.job.request]
        head.num_done = part.first
        if part.is_last:
            self._lanes.setdefault(part.job.session, deque()).appendleft(head)
            self._num_gone -= 1

    def cancel(self, job: Job) -> None:
        """Forget what is left of a job, if anything is."""
        lane = self._lanes.get(job.session)
        if lane and lane[0].job.request == job.request:
            self._pop(job.session)

    def drop(self, session: bytes) -> tuple[Job, ...]:
        """Forget a session's jobs; returns those that were not through, in order."""
        self._decoded.pop(session, None)
        dropped = tuple(waiting.job for waiting in self._lanes.pop(session, ()))
        self._num_gone += len(dropped)
        return dropped

    def _rank(self, head: _Waiting) -> tuple[int, int]:
        """Smaller goes first."""
        if head.num_passed_over >= self.policy.patience:
            return 0, head.arrival
        return (1 if head.job.is_decode else 2), head.arrival

    def _fill(self, mates: list[_Waiting]) -> list[Part]:
        """Parts of these jobs, best first, within what the policy allows. The first always gets something."""
        is_mixed = any(head.job.is_decode for head in mates) or self._expects(mates)
        decode_room = self.policy.decode_tokens
        prefill_room = self.policy.mixed_tokens if is_mixed else self.policy.prefill_tokens
        parts = []
        for head in mates:
            rest = head.job.num_tokens - head.num_done
            num = min(rest, decode_room if head.job.is_decode else prefill_room)
            if rest and not num:
                continue
            if head.job.is_decode:
                decode_room -= num
            else:
                prefill_room -= num
            parts.append(Part(head.job, head.num_done, num))
        return parts

    def _expects(self, mates: list[_Waiting]) -> bool:
        """Whether sessions that just had a decode, and have no job among these, may bring the next one soon."""
        oldest = self._num_run - self.policy.memory
        self._decoded = {session: at for session, at in self._decoded.items() if at > oldest}
        return not self._decoded.keys() <= {head.job.session for head in mates}

    def _advance(self, part: Part) -> None:
        self._lanes[part.job.session][0].num_done += part.num
        if part.is_last:
            self._pop(part.job.session)

    def _pop(self, session: bytes) -> None:
        lane = self._lanes[session]
        lane.popleft()
        self._num_gone += 1
        if not lane:
            del self._lanes[session]
