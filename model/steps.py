"""Steps under way in a worker: what was asked, what of it has begun, and what of its answer is there.

Owns a step from the moment it is asked for until it is answered or has failed: that its rows get their pages once,
when its first part runs, and are set back if it fails; that its output is gathered part by part. It computes nothing;
which parts run is decided by `batch`, who has pages by `sessions`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from torch import Tensor

from ..protocol.errors import Code, CorollaError, error
from ..protocol.steps import Reply, Row, check_payload
from ..protocol.work import Compute
from . import turns
from .attention import Segment
from .batch import Job, Part
from .encodings import check_finite, decode, encode
from .pool import PageCopy, PageMove
from .sessions import Begun, Sessions, undo

# A row that brings so few tokens is being written on: one, or a guess of a few that is to be confirmed.
_DECODE_TOKENS: Final = 8


class Blocks(turns.Blocks, Protocol):
    """What the engine needs of `span.Span`: besides what training does, the pages of its cache."""

    num_blocks_computed: int

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Carry out a step's copies."""

    def move_pages(self, moves: Iterable[PageMove]) -> None:
        """Copy pages to host memory, and back."""


@dataclass(slots=True)
class Step:
    """A step that has begun: its input, and what is computed of its answer."""

    begun: Begun
    hidden: Tensor  # (num_tokens, hidden_size)
    wanted: tuple[int, ...] | None  # tokens whose output is asked for; None is all of them
    answer: list[bytes] = field(default_factory=list)

    def input_of(self, part: Part) -> Tensor:
        """(part.num, hidden_size)."""
        return self.hidden[part.first : part.first + part.num]

    def segments_of(self, part: Part) -> tuple[Segment, ...]:
        """Where the tokens of a part belong."""
        return cut(self.begun.applied.segments, part.first, part.num)


class Steps:
    """All of one worker, by the number of the request that asked for each."""

    def __init__(self, sessions: Sessions, clock: Callable[[], float]) -> None:
        self._sessions = sessions
        self._clock = clock
        self._asked: dict[int, Compute] = {}
        self._begun: dict[int, Step] = {}  # those of them that have
        self._blocked: dict[int, Part] = {}  # those that wait for pages, in the order in which they came

    @property
    def blocked(self) -> Mapping[int, Part]:
        """Those that wait for pages, and the part with which each goes on."""
        return self._blocked

    @property
    def are_blocked(self) -> bool:
        """Whether there are steps, and all of them wait for pages."""
        return bool(self._blocked) and self._blocked.keys() >= self._asked.keys()

    def ask(self, ask: Compute, hidden_size: int) -> Job:
        """Take a step; what the scheduler needs to know of it. Raises `UNKNOWN_SESSION`, `BAD_SHAPE`."""
        session = self._sessions.get(ask.session)
        check_payload(ask.rows, ask.payload, session.encoding.token_bytes(hidden_size))
        self._asked[ask.request] = ask
        return Job(
            request=ask.request,
            session=ask.session,
            blocks=session.blocks,
            num_tokens=sum(row.n for row in ask.rows),
            is_decode=all(row.n <= _DECODE_TOKENS for row in ask.rows),
        )

    def begun(self, part: Part, span: Blocks, working: Collection[bytes]) -> Step | None:
        """The step of a part, which its first part begins; None, and it is blocked, if it has to wait for pages.

        working: sessions of which steps wait. Raises as `Sessions.begin`, and `NOT_FINITE`.
        """
        request = part.job.request
        if request not in self._begun:
            ask = self._asked[request]
            begun = self._sessions.begin(ask, self._clock(), working)
            if begun is None:
                self._blocked[request] = part
                return None
            try:
                encoding = begun.session.encoding
                hidden = decode(ask.payload, encoding, span.hidden_size, span.dtype, span.device)
            except CorollaError:
                undo(begun)
                raise
            self._begun[request] = Step(begun, hidden, _wanted(ask.reply, ask.rows))
            span.copy_pages(begun.applied.copies)
        self._blocked.pop(request, None)
        return self._begun[request]

    def take_output(self, part: Part, output: Tensor) -> bytes | None:
        """Add a part's output (part.num, hidden_size) to its step's answer; the answer, once it is whole.

        Raises `INTERNAL` if the output cannot be encoded.
        """
        request = part.job.request
        step = self._begun[request]
        step.answer.append(_encoded(output, part, step))
        if not part.is_last:
            return None
        del self._begun[request], self._asked[request]
        self._sessions.end(step.begun, self._clock())
        return b"".join(step.answer)

    def give_up(self, request: int) -> None:
        """Forget a step; if it had begun, its session is as it was before."""
        self._asked.pop(request, None)
        self._blocked.pop(request, None)
        step = self._begun.pop(request, None)
        if step is not None:
            undo(step.begun)


def cut(segments: tuple[Segment, ...], first: int, num: int) -> tuple[Segment, ...]:
    """Tokens [first, first + num) of a step, counted over its segments; those left empty are left out."""
    parts = []
    offset = 0
    for segment in segments:
        start, end = max(first - offset, 0), min(first + num - offset, segment.n)
        if start < end:
            parts.append(segment._replace(start=segment.start + start, n=end - start))
        offset += segment.n
    return tuple(parts)


def _wanted(reply: Reply, rows: tuple[Row, ...]) -> tuple[int, ...] | None:
    """Indexes of the tokens that an answer holds; None is all of them."""
    if reply is Reply.ALL:
        return None
    indexes = []
    end = 0
    for row in rows:
        end += row.n
        if row.n and reply is Reply.LAST:
            indexes.append(end - 1)
    return tuple(indexes)


def _encoded(states: Tensor, part: Part, step: Step) -> bytes:
    """What the answer holds of a part's output (part.num, hidden_size).

    Raises `INTERNAL`, not `NOT_FINITE`, for what the blocks themselves made: the sender is innocent.
    """
    session = step.begun.session
    wanted = states
    if step.wanted is not None:
        indexes = [i - part.first for i in step.wanted if part.first <= i < part.first + part.num]
        if len(indexes) < part.num:
            wanted = states[indexes]
    try:
        if wanted is not states:
            check_finite(states)
        return encode(wanted, session.encoding)
    except CorollaError as problem:
        start, end = session.blocks
        raise error(
            Code.INTERNAL,
            f"blocks {start}:{end} made numbers that are not finite or too large for {session.encoding}:"
            f" {problem.message}",
            "use a wider encoding or dtype; if it stays, this worker's weights or memory are damaged",
            not_finite="output",
        ) from problem
