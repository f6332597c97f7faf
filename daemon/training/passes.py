"""A micro-batch on its way through the swarm and back: each interval on some hop, elsewhere when that fails.

It owns the inputs of every interval that a pass went through, which is all that backward needs: should a replica
be gone, another gets the same inputs; should it hold fewer blocks, forward is computed anew for the rest. Who is
guilty is decided here: a missing part, a full queue or a span that moved are nobody's fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final, TypeAlias

import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.partfiles import check_gradients
from ...protocol.steps import Hop
from ...protocol.tensors import Encoding, is_finite
from ...protocol.training import NO_PART, Dropout, Sequence, SpanBackward, SpanForward, missing_parts
from ..network.seam import Network
from ..session.wiring import Precision
from ..swarm.blame import HEAVY, LIGHT
from ..swarm.view import Span
from .hops import Answer, ask_hop
from .parts import put_parts
from .wiring import Leg, common_precision, next_leg, usable

MAX_ATTEMPTS: Final = 16  # of one interval; then its last error is the user's to see
RETRY_EVERY_S: Final = 0.5  # while nobody serves a block, or all who do are busy
MAX_UPLOADS: Final = 3  # of parts to one hop for one request: it may drop one while another comes

# What a hop may say without being to blame; it is asked again after the others.
_WEATHER: Final = frozenset(
    {Code.BUSY, Code.DRAINING, Code.NOT_READY, Code.BLOCKS_OUT_OF_RANGE, Code.UNKNOWN_MODEL}
    | {Code.WORKER_LOST, Code.UNSUPPORTED, Code.OUT_OF_MEMORY, Code.ADAPTER_MISSING}
)
_WRONG: Final = frozenset({Code.BAD_ANSWER, Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED})

Charge = Callable[[str, float, str], None]
FindSpans = Callable[[], Awaitable[tuple[Span, ...]]]
_Request: TypeAlias = SpanForward | SpanBackward


@dataclass(frozen=True, slots=True)
class Batch:
    """What stays the same on all hops.

    parts: one name for each block of [start, end), or nothing. data: what these parts are, to be put where they lack.
    """

    fingerprint: str
    hidden_size: int
    start: int
    end: int
    encoding: Encoding
    sequences: tuple[Sequence, ...]
    parts: tuple[bytes, ...] = ()
    dropout: Dropout | None = None
    data: Mapping[bytes, bytes] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of its hidden states."""
        return sum(s.n for s in self.sequences) * self.encoding.token_bytes(self.hidden_size)

    def parts_of(self, start: int, end: int) -> tuple[bytes, ...]:
        """The names for blocks [start, end)."""
        return self.parts[start - self.start : end - self.start] if self.parts else ()


@dataclass(frozen=True, slots=True)
class Interval:
    """Blocks [start, end) that one hop computed from these inputs."""

    start: int
    end: int
    inputs: bytes


@dataclass(slots=True)
class _Search:
    """Where one interval was tried. tried: hops not to be asked again for now."""

    tried: set[Hop] = field(default_factory=set)
    problem: CorollaError | None = None
    num_attempts: int = 0


class Swarm:
    """How passes reach the hops of one model: the spans known, our load on each, the precision of the job.

    used: is told of each peer that gave a
    good answer. patience_s: how long to wait
    for blocks that nobody serves.
    """

    def __init__(
        self,
        network: Network,
        find_spans: FindSpans,
        charge: Charge,
        *,
        used: Callable[[str], None],
        patience_s: float,
        rng: Random | None = None,
    ) -> None:
        self._network = network
        self._find_spans = find_spans
        self._charge = charge
        self._used = used
        self._patience_s = patience_s
        self._rng = rng or Random()  # noqa: S311 - spreads load, guards nothing
        self._load: Counter[Hop] = Counter()
        self._precision: Precision | None = None

    async def forward(self, batch: Batch, inputs: bytes) -> tuple[bytes, tuple[Interval, ...]]:
        """The outputs, and the intervals that backward needs. Raises what the last hop asked said."""
        intervals = []
        at, hidden = batch.start, inputs
        while at < batch.end:
            leg, answer = await self._compute(
                batch, at, batch.end, lambda leg: self._forward(batch, leg), hidden
            )
            intervals.append(Interval(at, leg.end, hidden))
            at, hidden = leg.end, answer.hidden
        return hidden, tuple(intervals)

    async def backward(
        self, batch: Batch, intervals: tuple[Interval, ...], gradient: bytes
    ) -> tuple[bytes, tuple[bytes, ...]]:
        """The gradients of the inputs, and of each part."""
        left = list(intervals)
        parts: list[bytes] = []
        while left:
            interval = left.pop()
            leg, answer = await self._compute(
                batch,
                interval.start,
                interval.end,
                self._back(batch, interval.end),
                interval.inputs,
                gradient,
            )
            if leg.end < interval.end:  # nobody holds all these blocks now: go on from the middle
                left.append(Interval(interval.start, leg.end, interval.inputs))
                left.append(Interval(leg.end, interval.end, answer.hidden))
                continue
            gradient = answer.hidden
            parts[:0] = answer.parts
        return gradient, tuple(parts)

    # one interval

    async def _compute(
        self,
        batch: Batch,
        start: int,
        end: int,
        request_of: Callable[[Leg], _Request],
        inputs: bytes,
        gradient: bytes = b"",
    ) -> tuple[Leg, Answer]:
        """The first good answer for blocks from `start` on."""
        search = _Search()
        while True:
            leg = await self._leg(batch, start, end, search, whole=bool(gradient))
            request = request_of(leg)
            payload = inputs + gradient if isinstance(request, SpanBackward) else inputs
            self._load[leg.hop] += 1
            try:
                answer = await self._ask(batch, leg, request, payload)
                self._used(leg.hop.peer)
                return leg, answer
            except CorollaError as problem:
                self._note(leg, problem)
                search.tried.add(leg.hop)
                search.problem = problem
                search.num_attempts += 1
                if search.num_attempts >= MAX_ATTEMPTS:
                    raise
            finally:
                self._load[leg.hop] -= 1

    async def _leg(self, batch: Batch, start: int, end: int, search: _Search, *, whole: bool) -> Leg:
        """The next hop to try, waiting for one if need be. whole: prefer one that holds all the blocks."""
        deadline = trio.current_time() + self._patience_s
        while True:
            spans = await self._find_spans()
            if self._precision is None:
                self._precision = common_precision(spans, batch.start, batch.end)
            found = usable(spans, start, search.tried, self._precision)
            covering = [span for span in found if span.end >= end]
            leg = next_leg(covering if whole and covering else found, start, end, self._load, self._rng)
            if leg is not None:
                return leg
            problem = search.problem
            can_pass = problem is None or problem.code in _WEATHER or problem.code in _LOST
            if not can_pass or _is_too_large(problem) or trio.current_time() >= deadline:
                raise _no_hop(problem, start, end)
            await trio.sleep(RETRY_EVERY_S)
            search.tried.clear()  # who was busy may be free by now

    async def _ask(self, batch: Batch, leg: Leg, request: _Request, payload: bytes) -> Answer:
        for _ in range(MAX_UPLOADS):
            try:
                answer = await ask_hop(self._network, leg.hop.peer, request, payload)
                break
            except CorollaError as problem:
                if problem.code is not Code.ADAPTER_MISSING:
                    raise
                await self._upload(batch, leg, problem)
        else:
            raise error(
                Code.ADAPTER_MISSING,
                f"{leg.hop.peer} has no room for the adapter's parts",
                "use a smaller rank",
            )
        if len(answer.hidden) != batch.size_bytes or not is_finite(
            answer.hidden, batch.encoding, batch.hidden_size
        ):
            raise error(
                Code.BAD_ANSWER,
                f"{leg.hop.peer} answered {request.KIND} of blocks {leg.start}:{leg.end} with"
                f" {len(answer.hidden)} bytes, expected {batch.size_bytes} of finite numbers",
            )
        if isinstance(request, SpanBackward):
            _check_parts(leg, request, answer, batch.data)
        return answer

    async def _upload(self, batch: Batch, leg: Leg, problem: CorollaError) -> None:
        """Put the parts that a hop lacks. Raises as `put_parts`."""
        missing = missing_parts(problem)
        names = enumerate(batch.parts_of(leg.start, leg.end), leg.start)
        wanted = [(block, name) for block, name in names if name.hex() in missing]
        await put_parts(self._network, batch.fingerprint, leg.hop, wanted, batch.data)

    def _note(self, leg: Leg, problem: CorollaError) -> None:
        """Charge the guilty. Of what is wrong with the request itself, the other hops will say the same."""
        if problem.code in _WRONG:
            self._charge(leg.hop.peer, HEAVY, problem.message)
        elif problem.code in _LOST:
            self._charge(leg.hop.peer, LIGHT, problem.message)

    def _back(self, batch: Batch, end: int) -> Callable[[Leg], _Request]:
        """Backward on a leg that reaches the end of its interval, else forward to the next."""

        def request(leg: Leg) -> _Request:
            return self._backward(batch, leg) if leg.end == end else self._forward(batch, leg)

        return request

    def _forward(self, batch: Batch, leg: Leg) -> SpanForward:
        return SpanForward(
            batch.fingerprint,
            leg.hop.worker,
            leg.start,
            leg.end,
            batch.encoding,
            batch.sequences,
            batch.size_bytes,
            batch.parts_of(leg.start, leg.end),
            batch.dropout,
        )

    def _backward(self, batch: Batch, leg: Leg) -> SpanBackward:
        return SpanBackward(
            batch.fingerprint,
            leg.hop.worker,
            leg.start,
            leg.end,
            batch.encoding,
            batch.sequences,
            2 * batch.size_bytes,
            batch.parts_of(leg.start, leg.end),
            batch.dropout,
        )


def _check_parts(leg: Leg, request: SpanBackward, answer: Answer, data: Mapping[bytes, bytes]) -> None:
    """Raise `BAD_ANSWER` unless these may be the gradients of the request's parts."""
    for block, (name, file) in enumerate(zip(request.parts, answer.parts, strict=True), leg.start):
        try:
            if name != NO_PART:
                check_gradients(data.get(name), file)
            elif file:
                raise ValueError(f"{len(file)} bytes of gradients of no part")
        except ValueError as problem:
            raise error(
                Code.BAD_ANSWER,
                f"{leg.hop.peer} answered {request.KIND} of blocks {leg.start}:{leg.end} wrongly: block"
                f" {block}: {problem}",
            ) from problem


_LOST: Final = frozenset({Code.PEER_LOST, Code.TIMEOUT})


def _is_too_large(problem: CorollaError | None) -> bool:
    return problem is not None and problem.code is Code.OUT_OF_MEMORY


def _no_hop(problem: CorollaError | None, start: int, end: int) -> CorollaError:
    return problem or error(
        Code.BLOCKS_UNSERVED,
        f"nobody serves block {start} of {start}:{end} now",
        "serve it: corollad --model …, or wait for somebody who does",
    )
