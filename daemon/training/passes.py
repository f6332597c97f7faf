"""A micro-batch on its way through the swarm and back: each interval on some hop, elsewhere when that fails.

It owns the inputs of every interval that a pass went through, which is all that backward needs: should a replica
be gone, another gets the same inputs; should it hold fewer blocks, forward is computed anew for the rest; should it be
late, another is asked too, and the first answer counts. Who is guilty is decided here: a missing part, a full queue, a
slow machine or a span that moved are nobody's fault.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
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
from .jobs import WINDOW_S
from .pace import Pace
from .parts import put_parts
from .wiring import Leg, common_precision, covers, next_leg, usable

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
    """One interval to be computed, and where it was tried.

    gradient: of its outputs, if it is to go back. tried: hops not to be asked again for now.
    """

    batch: Batch
    start: int
    end: int
    request_of: Callable[[Leg], _Request]
    inputs: bytes
    gradient: bytes = b""
    tried: set[Hop] = field(default_factory=set)
    problem: CorollaError | None = None
    num_attempts: int = 0

    def work_of(self, leg: Leg) -> tuple[str, int]:
        """What is asked of a hop, as `Pace` counts it."""
        num_tokens = sum(sequence.n for sequence in self.batch.sequences)
        return self.request_of(leg).KIND, num_tokens * (leg.end - leg.start)


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
        self._pace = Pace()
        self._answered_at = -math.inf

    async def forward(self, batch: Batch, inputs: bytes) -> tuple[bytes, tuple[Interval, ...]]:
        """The outputs, and the intervals that backward needs. Raises what the last hop asked said."""
        self._begin(batch, await self._find_spans())
        intervals = []
        at, hidden = batch.start, inputs
        while at < batch.end:
            search = _Search(batch, at, batch.end, lambda leg: self._forward(batch, leg), hidden)
            leg, answer = await self._compute(search)
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
            request_of = self._back(batch, interval.end)
            search = _Search(batch, interval.start, interval.end, request_of, interval.inputs, gradient)
            leg, answer = await self._compute(search)
            if leg.end < interval.end:  # nobody holds all these blocks now: go on from the middle
                left.append(Interval(interval.start, leg.end, interval.inputs))
                left.append(Interval(leg.end, interval.end, answer.hidden))
                continue
            gradient = answer.hidden
            parts[:0] = answer.parts
        return gradient, tuple(parts)

    def _begin(self, batch: Batch, spans: Iterable[Span]) -> None:
        """Choose a precision anew where the job before is over, and nobody computes in its precision any more."""
        is_over = trio.current_time() - self._answered_at >= WINDOW_S
        if is_over and not covers(spans, batch.start, batch.end, self._precision):
            self._precision = None

    # one interval

    async def _compute(self, search: _Search) -> tuple[Leg, Answer]:
        """The first good answer for blocks from its start on."""
        while True:
            leg = await self._leg(search)
            found = await self._first(search, leg)
            if found is not None:
                return found
            if search.problem is not None and search.num_attempts >= MAX_ATTEMPTS:
                raise search.problem

    async def _first(self, search: _Search, leg: Leg) -> tuple[Leg, Answer] | None:
        """The answer of this hop; once it is late, of the first that gives one. None if no good one came."""
        found: list[tuple[Leg, Answer]] = []
        is_over = trio.Event()  # this hop's own try

        async def run(leg: Leg, race: trio.CancelScope) -> None:
            answer = await self._attempt(search, leg)
            if answer is not None and not found:
                found.append((leg, answer))
                race.cancel()

        async def lead(race: trio.CancelScope) -> None:
            await run(leg, race)
            is_over.set()

        async def overtake(race: trio.CancelScope) -> None:
            with trio.move_on_after(self._pace.patience_s(*search.work_of(leg))):
                await is_over.wait()
            if not is_over.is_set():
                self._pace.note_late(leg.hop, trio.current_time())
            while not is_over.is_set():
                other = self._choose(await self._find_spans(), search, leg.hop)
                if other is not None:
                    await run(other, race)
                    continue
                with trio.move_on_after(RETRY_EVERY_S):
                    await is_over.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lead, nursery.cancel_scope)
            nursery.start_soon(overtake, nursery.cancel_scope)
        return found[0] if found else None

    async def _attempt(self, search: _Search, leg: Leg) -> Answer | None:
        """What one hop answers; None if that is no good, which is then noted."""
        request = search.request_of(leg)
        payload = search.inputs + search.gradient if isinstance(request, SpanBackward) else search.inputs
        began = trio.current_time()
        self._load[leg.hop] += 1
        try:
            answer = await self._ask(search.batch, leg, request, payload)
        except CorollaError as problem:
            self._note(leg, problem)
            search.tried.add(leg.hop)
            search.problem = problem
            search.num_attempts += 1
            return None
        finally:
            self._load[leg.hop] -= 1
        self._answered_at = trio.current_time()
        self._pace.note(*search.work_of(leg), self._answered_at - began)
        self._used(leg.hop.peer)
        return answer

    async def _leg(self, search: _Search) -> Leg:
        """The next hop to try, waiting for one if need be."""
        deadline = trio.current_time() + self._patience_s
        while True:
            spans = await self._find_spans()
            if self._precision is None:
                self._precision = common_precision(spans, search.batch.start, search.batch.end)
            leg = self._choose(spans, search)
            if leg is not None:
                return leg
            problem = search.problem
            can_pass = problem is None or problem.code in _WEATHER or problem.code in _LOST
            if not can_pass or _is_too_large(problem) or trio.current_time() >= deadline:
                raise _no_hop(problem, search.start, search.end)
            await trio.sleep(RETRY_EVERY_S)
            search.tried.clear()  # who was busy may be free by now

    def _choose(self, spans: Iterable[Span], search: _Search, asked: Hop | None = None) -> Leg | None:
        """Of those not tried, one that is not known to be slow and holds all the blocks, where there is such a one."""
        avoid = search.tried if asked is None else search.tried | {asked}
        found = usable(spans, search.start, avoid, self._precision)
        late = self._pace.late(trio.current_time())
        found = [span for span in found if span.hop not in late] or found
        covering = [span for span in found if span.end >= search.end]
        # Backward goes from the end of an interval to its start, so a hop that holds less is of little use.
        found = covering if search.gradient and covering else found
        return next_leg(found, search.start, search.end, self._load, self._rng)

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
