"""Any route that fulfils a request, chosen by chance: a router that knows who is there and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from corolla.daemon.session.wiring import Route, RouteHop, RouteRequest
from corolla.protocol.steps import Hop
from corolla.protocol.tensors import DType


class Offer(NamedTuple):
    """Blocks [start, end) of a worker."""

    hop: Hop
    start: int
    end: int


def random_route(rng: random.Random, offers: Sequence[Offer], request: RouteRequest) -> Route | None:
    """A route over these offers; None if there is none."""
    before = request.upstream.peer if request.upstream else None
    hops = _path(rng, offers, request, request.start, before, frozenset())
    return Route(tuple(hops)) if hops is not None else None


def _path(
    rng: random.Random,
    offers: Sequence[Offer],
    request: RouteRequest,
    at: int,
    before: str | None,
    used: frozenset[Hop],
) -> list[RouteHop] | None:
    if at == request.end:
        after = request.downstream.peer if request.downstream else None
        return None if (before, after) in request.avoid_links else []
    for offer in rng.sample(offers, len(offers)):
        peer = offer.hop.peer
        if (
            not offer.start <= at < offer.end
            or offer.hop in request.avoid
            or offer.hop in used
            or peer in request.avoid_peers
            or (before, peer) in request.avoid_links
        ):
            continue
        end = min(offer.end, request.end)
        rest = _path(rng, offers, request, end, peer, used | {offer.hop})
        if rest is not None:
            return [RouteHop(offer.hop, at, end, DType.FLOAT32), *rest]
    return None
