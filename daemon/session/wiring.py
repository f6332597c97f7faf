"""What a session's route is made of, and what the session asks of whoever finds routes. Pure.

It knows neither records nor scores: `Router` is what the registry and `swarm/routing` look like from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ...protocol.steps import Hop
from ...protocol.tensors import DType, Encoding


class Precision(NamedTuple):
    """What a worker computes in; two hops of unequal precision give slightly different hidden states."""

    dtype: DType
    quantization: str | None


@dataclass(frozen=True, slots=True)
class RouteHop:
    """One hop of a route: blocks [start, end) on a worker whose span holds them, and perhaps more."""

    hop: Hop
    start: int
    end: int
    dtype: DType
    quantization: str | None = None

    @property
    def precision(self) -> Precision:
        """What it computes in."""
        return Precision(self.dtype, self.quantization)


@dataclass(frozen=True, slots=True)
class Route:
    """Hops in the order of their blocks, without gap or overlap."""

    hops: tuple[RouteHop, ...]


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """Which blocks have to be covered, and what is known already.

    start, end: the interval wanted: all of the session's blocks, or those that a repair lost. A hop whose
        span reaches beyond is good: it is opened on the part that lies inside.
    upstream, downstream: the hops next to the interval, which stay; None is the client itself.
    avoid, avoid_peers: hops and peers that must not be used now.
    avoid_links: pairs of peers (from, to) known not to reach each other; the pinned neighbours count.
    precision: of the hops lost. Equal ones are preferred to everything else; without any, others do.
    max_rows, max_tokens: what each hop will be asked to reserve, in rows and tokens of one row.
    """

    fingerprint: str
    start: int
    end: int
    encoding: Encoding
    max_rows: int
    max_tokens: int
    upstream: Hop | None = None
    downstream: Hop | None = None
    avoid: frozenset[Hop] = field(default=frozenset())
    avoid_peers: frozenset[str] = field(default=frozenset())
    avoid_links: frozenset[tuple[str, str]] = field(default=frozenset())
    precision: Precision | None = None


class Router(Protocol):
    """Finds routes: the registry and the pure function behind it."""

    async def find_route(self, request: RouteRequest) -> Route:
        """The best route for a request.

        Its hops cover [start, end) exactly and in order, and no hop comes twice. Raises `BLOCKS_UNSERVED`
        or `NO_PEERS`, after which the session may wait and ask again, and errors whose fault is the user's.
        """


def gaps(start: int, end: int, covered: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of [start, end) that the given intervals, in order and disjoint, leave open."""
    holes = []
    at = start
    for first, last in covered:
        if first > at:
            holes.append((at, first))
        at = last
    if at < end:
        holes.append((at, end))
    return holes


def covers(route: Route, start: int, end: int) -> bool:
    """Whether a route covers [start, end) exactly, in order, each hop once."""
    at = start
    for hop in route.hops:
        if hop.start != at or hop.end <= hop.start:
            return False
        at = hop.end
    return at == end and len({hop.hop for hop in route.hops}) == len(route.hops)
