"""The chain of spans that answers soonest. Pure: a function of the view, what is wanted, and a seed.

The expected time of one token is the one-way trips between neighbours, plus each hop's computing behind its
queue. Since computing is linear in the number of blocks, the best places to change hops are the ends of spans,
and the route is a shortest path over these boundaries (Dijkstra 1959; the idea for spans: Borzunov et al. 2023,
Petals, section on routing). A hop may serve a part of its worker's span.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ...protocol.errors import Code, CorollaError, error
from ...protocol.records import SpanState
from ...protocol.steps import Hop
from ...protocol.tensors import DType, Encoding
from .view import DEFAULT_RTT_S, Span, SwarmView, gaps_in

HOP_S: Final = 0.002  # what any hop costs besides distance and computing: sockets, framing, scheduling
DEFAULT_BLOCK_S: Final = 0.01  # a block on a machine whose speed is not known: slow, so that known ones win
SPREAD: Final = 0.1  # clients with different seeds see costs differ by up to this share, and so spread out
MISMATCH_S: Final = 3600.0  # any route without a change of precision is better than one with it
MAX_ALIKE: Final = 32  # spans of the same ends that are looked at, the cheapest first
MAX_CANDIDATES: Final = 256  # beyond so many, only the best for each block are looked at
MAX_PER_BLOCK: Final = 16
MAX_NAMED: Final = 4  # peers named in an error

Link = tuple[str | None, str | None]  # from peer, to peer; None is the client


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a route shall be: blocks [start, end), in one wire encoding (any, if None).

    dtype, quantization: of the span that is replaced; other precisions only if nothing else serves.
    avoid, avoid_peers, avoid_links: what failed lately, or takes part in the session already.
    upstream, downstream: the peers before and after the interval; None is the client.
    cache_tokens: what each hop has to have room for, as far as its record tells.
    """

    start: int
    end: int
    encoding: Encoding | None = None
    dtype: DType | None = None
    quantization: str | None = None
    avoid: frozenset[Hop] = frozenset()
    avoid_peers: frozenset[str] = frozenset()
    avoid_links: frozenset[Link] = frozenset()
    upstream: str | None = None
    downstream: str | None = None
    cache_tokens: int = 0
    majors: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class Leg:
    """A hop of a path: blocks [start, end) of a span."""

    span: Span
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Path:
    """Legs in order, the expected seconds of one token, and whether any leg's precision is not as wanted."""

    legs: tuple[Leg, ...]
    expected_s: float
    precision_changed: bool


def find_path(view: SwarmView, wanted: Wanted, *, seed: int = 0) -> Path:
    """The path of least expected time. The same arguments give the same path.

    Raises `BLOCKS_OUT_OF_RANGE`, and `BLOCKS_UNSERVED` naming the blocks and who is loading them.
    """
    if not 0 <= wanted.start < wanted.end <= view.num_blocks:
        raise error(
            Code.BLOCKS_OUT_OF_RANGE,
            f"blocks {wanted.start}:{wanted.end} of a model that has {view.num_blocks}",
            f"choose blocks within 0:{view.num_blocks}",
        )
    candidates = _prune([_Candidate.of(span, wanted, seed) for span in view.spans if _usable(span, wanted)])
    last = _search(view, wanted, candidates)
    if last is None:
        raise unserved(view, wanted, [candidate.span for candidate in candidates])
    legs = tuple(last.legs())
    changed = any(_mismatches(leg.span, wanted) for leg in legs)
    return Path(legs, last.cost_s - MISMATCH_S * sum(_mismatches(leg.span, wanted) for leg in legs), changed)


def _usable(span: Span, wanted: Wanted) -> bool:
    return (
        span.is_online
        and span.start < wanted.end
        and span.end > wanted.start
        and span.peer not in wanted.avoid_peers
        and span.hop not in wanted.avoid
        and (wanted.encoding is None or wanted.encoding in span.encodings)
        and not (0 < span.cache_tokens < wanted.cache_tokens)
        and bool(set(span.majors) & set(wanted.majors))
    )


def _mismatches(span: Span, wanted: Wanted) -> bool:
    return wanted.dtype is not None and (span.dtype, span.quantization) != (wanted.dtype, wanted.quantization)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A span with its costs: fixed for being a hop at all, and for each block."""

    span: Span
    start: int  # clipped to what is wanted
    end: int
    rtt_s: float
    fixed_s: float
    block_s: float

    @classmethod
    def of(cls, span: Span, wanted: Wanted, seed: int) -> _Candidate:
        noise = zlib.crc32(f"{seed}/{span.peer}/{span.worker}".encode()) / 2**32
        factor = 1 + SPREAD * noise
        whole_s = 1 / span.tokens_per_s if span.tokens_per_s > 0 else DEFAULT_BLOCK_S * span.num_blocks
        mismatch_s = MISMATCH_S if _mismatches(span, wanted) else 0.0
        return cls(
            span,
            max(span.start, wanted.start),
            min(span.end, wanted.end),
            DEFAULT_RTT_S if span.rtt_s is None else span.rtt_s,
            HOP_S * factor + span.penalty_s + mismatch_s,
            whole_s / span.num_blocks * (1 + span.queue) * factor,
        )

    @property
    def total_s(self) -> float:
        """What it costs if it serves all that it can, reached from the client."""
        return self.rtt_s / 2 + self.fixed_s + self.block_s * (self.end - self.start)


def _prune(candidates: Iterable[_Candidate]) -> list[_Candidate]:
    """The cheapest of those that serve the same blocks, in a fixed order: a swarm may have thousands.

    Of very many, for each block the `MAX_PER_BLOCK` that cost least per block, or more that others need.
    """
    alike: dict[tuple[int, int], list[_Candidate]] = {}
    for candidate in candidates:
        alike.setdefault((candidate.start, candidate.end), []).append(candidate)
    kept = []
    for ends in sorted(alike):
        group = sorted(alike[ends], key=lambda c: (c.total_s, c.span.peer, c.span.worker))
        kept += group[:MAX_ALIKE]
    return kept if len(kept) <= MAX_CANDIDATES else _best_for_each_block(kept)


def _best_for_each_block(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    counts: dict[int, int] = {}
    kept = []
    for candidate in sorted(candidates, key=lambda c: c.total_s / (c.end - c.start)):
        blocks = range(candidate.start, candidate.end)
        if any(counts.get(block, 0) < MAX_PER_BLOCK for block in blocks):
            kept.append(candidate)
            for block in blocks:
                counts[block] = counts.get(block, 0) + 1
    return kept


@dataclass(frozen=True, slots=True)
class _Reached:
    """The cheapest way found to have computed up to a block, with `candidate` as the last hop so far."""

    cost_s: float
    candidate: _Candidate | None  # None: the start of the path
    entered: int
    before: _Reached | None
    peer: str | None
    rtt_s: float

    def used(self, hop: Hop) -> bool:
        """Is this worker on the way already? A session has it once only."""
        return any(leg.span.hop == hop for leg in self._backwards(self.entered))

    def legs(self) -> Iterator[Leg]:
        """From the first to the last, which ends where its candidate does."""
        return reversed(list(self._backwards(self.candidate.end if self.candidate else self.entered)))

    def _backwards(self, end: int) -> Iterator[Leg]:
        reached: _Reached | None = self
        while reached is not None and reached.candidate is not None:
            yield Leg(reached.candidate.span, reached.entered, end)
            end, reached = reached.entered, reached.before


def _search(view: SwarmView, wanted: Wanted, candidates: Sequence[_Candidate]) -> _Reached | None:
    """Walk the boundaries upwards, keeping for each candidate the cheapest way to be in it."""
    boundaries = sorted(
        {wanted.start, wanted.end, *(c.start for c in candidates), *(c.end for c in candidates)}
    )
    origin = _Reached(0.0, None, wanted.start, None, wanted.upstream, view.rtt_s(wanted.upstream))
    here = [origin]
    running: dict[int, _Reached] = {}  # by the candidate's place in the list
    for boundary, following in itertools.pairwise(boundaries):
        frontier = _Frontier(here, wanted.avoid_links)
        inside: dict[int, _Reached] = {}
        for index, candidate in enumerate(candidates):
            if candidate.start <= boundary < candidate.end:
                ways = [frontier.enter(candidate, boundary), running.get(index)]
                best = min((way for way in ways if way is not None), key=_cost, default=None)
                if best is not None:
                    inside[index] = _advance(best, following - boundary)
        running = inside
        here = list(running.values())
    return _leave(here, view, wanted)


class _Frontier:
    """The ways to have reached a boundary, thinned out to those that can be part of a cheapest path.

    Of two ways, the one that costs more and is no nearer to us is never the better start of a next hop, unless
    the other's link to it is avoided, or it is on the same peer: these are kept besides.
    """

    def __init__(self, reached: Iterable[_Reached], avoid_links: frozenset[Link]) -> None:
        self._avoid_links = avoid_links
        awkward = {upstream for upstream, _ in avoid_links}
        self._general: list[_Reached] = []
        self._of_peer: dict[str | None, _Reached] = {}
        nearest = float("inf")
        for way in sorted(reached, key=_cost):
            self._of_peer.setdefault(way.peer, way)
            if way.peer in awkward:
                self._general.append(way)
            elif way.rtt_s < nearest:
                nearest = way.rtt_s
                self._general.append(way)

    def enter(self, candidate: _Candidate, boundary: int) -> _Reached | None:
        """The cheapest way to begin a hop on `candidate` here; None if there is none."""
        best: _Reached | None = None
        same_peer = self._of_peer.get(candidate.span.peer)
        for way in (*self._general, *((same_peer,) if same_peer else ())):
            cost_s = way.cost_s + _link_s(way, candidate.span.peer, candidate.rtt_s) + candidate.fixed_s
            if (best is None or cost_s < best.cost_s) and self._may_follow(way, candidate):
                peer, rtt_s = candidate.span.peer, candidate.rtt_s
                best = _Reached(cost_s, candidate, boundary, way, peer, rtt_s)
        return best

    def _may_follow(self, way: _Reached, candidate: _Candidate) -> bool:
        link = (way.peer, candidate.span.peer)
        return (link[0] == link[1] or link not in self._avoid_links) and not way.used(candidate.span.hop)


def _cost(way: _Reached) -> float:
    return way.cost_s


def _link_s(way: _Reached, peer: str | None, rtt_s: float) -> float:
    """Seconds one way between two peers of which only the distances from us are known.

    Half the larger round trip: the mean of what the triangle inequality allows, |a - b| / 2 and (a + b) / 2.
    """
    return 0.0 if way.peer == peer else max(way.rtt_s, rtt_s) / 2


def _advance(way: _Reached, num_blocks: int) -> _Reached:
    block_s = way.candidate.block_s if way.candidate is not None else 0.0
    return dataclasses.replace(way, cost_s=way.cost_s + num_blocks * block_s)


def _leave(ways: Iterable[_Reached], view: SwarmView, wanted: Wanted) -> _Reached | None:
    """The cheapest of the ways that reach the end, on to whoever comes after."""
    rtt_s = view.rtt_s(wanted.downstream)
    ends = [
        dataclasses.replace(way, cost_s=way.cost_s + _link_s(way, wanted.downstream, rtt_s))
        for way in ways
        if way.peer == wanted.downstream or (way.peer, wanted.downstream) not in wanted.avoid_links
    ]
    return min(ends, key=_cost, default=None)


def unserved(view: SwarmView, wanted: Wanted, usable: Iterable[Span]) -> CorollaError:
    """The error that says which blocks nobody serves, and what is known of those who could."""
    counts = [0] * view.num_blocks
    for span in usable:
        for block in range(span.start, min(span.end, view.num_blocks)):
            counts[block] += 1
    gaps = gaps_in(tuple(counts), wanted.start, wanted.end)
    if not gaps:
        return error(
            Code.BLOCKS_UNSERVED,
            f"blocks {wanted.start}:{wanted.end} are served, but not by peers that reach each other",
            "wait for other peers with `--wait`",
            gaps=[[wanted.start, wanted.end]],
        )
    named = ", ".join(f"{start}:{end}" for start, end in gaps)
    reasons = _reasons(view, wanted, gaps)
    start, end = gaps[0]
    return error(
        Code.BLOCKS_UNSERVED,
        f"blocks {named} are served by nobody" + (f"; {reasons}" if reasons else ""),
        f"wait for them with `--wait`, or serve them: corollad --blocks {start}:{end}",
        gaps=[list(gap) for gap in gaps],
    )


def _reasons(view: SwarmView, wanted: Wanted, gaps: Sequence[tuple[int, int]]) -> str:
    """Why the spans that touch the gaps do not count, peer by peer."""
    told: dict[str, list[str]] = {}
    for span in sorted(view.spans, key=lambda span: (span.peer, span.worker)):
        if any(span.start < end and span.end > start for start, end in gaps):
            told.setdefault(_reason(span, wanted), []).append(span.peer)
    texts = []
    for reason, peers in sorted(told.items()):
        names = list(dict.fromkeys(peers))
        others = f" and {len(names) - MAX_NAMED} others" if len(names) > MAX_NAMED else ""
        who = ("peers " if len(names) > 1 else "peer ") + ", ".join(names[:MAX_NAMED]) + others
        texts.append(f"{who} {'are' if len(names) > 1 else 'is'} {reason}")
    return "; ".join(texts)


def _reason(span: Span, wanted: Wanted) -> str:
    if span.state is SpanState.LOADING:
        return "loading them"
    if span.state is SpanState.DRAINING:
        return "giving them up"
    if span.suspect:
        return "no longer connected"
    if span.peer in wanted.avoid_peers or span.hop in wanted.avoid:
        return "avoided, after a failure or as a part of the session already"
    if wanted.encoding is not None and wanted.encoding not in span.encodings:
        return f"unable to speak {wanted.encoding}"
    if 0 < span.cache_tokens < wanted.cache_tokens:
        return f"short of room for {wanted.cache_tokens} tokens"
    return "of another version of the protocol"
