"""Who would take over from each hop of a route, and which hop is better left before it fails. Pure.

A standby is the route of least expected time for a hop's blocks without that hop. Clients compare from what records and
round trips tell them anyway, and ask nobody for it: a thousand clients that look cost the swarm nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from ...protocol.errors import CorollaError
from ...protocol.records import SpanState
from ...protocol.steps import Hop
from .routing import Leg, Path, Wanted, find_path
from .view import SwarmView

OWN_STEPS: Final = 4  # of a hop's queue that may be this very session's: they would come along
LEAVE_RATIO: Final = 2.0  # times as long as by the standby: replaying a session's tokens must pay off
LEAVE_S: Final = 0.02  # and so much longer for each token at least: less is nothing that anybody notices
LOOKS: Final = 2  # in a row that have to agree: a queue of a moment is no reason
LOOK_EVERY_S: Final = (20.0, 40.0)  # records are announced every 20 s; spread, so that not all leave at once


@dataclass(frozen=True, slots=True)
class Standing:
    """A hop of a route: seconds of a token through it, as expected now, and who would take over."""

    leg: Leg
    expected_s: float
    standby: Path | None

    @property
    def is_worth_leaving(self) -> bool:
        """Would the standby be so much faster that the session should go there now?"""
        other = self.standby
        if other is None or other.precision_changed:
            return False
        return self.expected_s > max(LEAVE_RATIO * other.expected_s, other.expected_s + LEAVE_S)


def stand(
    view: SwarmView, wanted: Wanted, places: Sequence[tuple[Hop, int, int]], *, seed: int = 0
) -> list[Standing]:
    """How each hop of a route stands: who serves [start, end), hop by hop in order.

    A hop that the view does not know, or that drains, is left out: others see to that.
    """
    peers = [wanted.upstream, *(hop.peer for hop, _, _ in places), wanted.downstream]
    used = frozenset(hop for hop, _, _ in places)
    found = []
    for index, (hop, start, end) in enumerate(places):
        part = replace(
            wanted, start=start, end=end, upstream=peers[index], downstream=peers[index + 2], cache_tokens=0
        )
        own = tuple(
            replace(span, queue=max(0, span.queue - OWN_STEPS))
            for span in view.spans
            if span.hop == hop and span.is_online
        )
        if not own:
            continue
        part = replace(part, dtype=own[0].dtype, quantization=own[0].quantization)
        # How far the two around it are still counts, though they do not serve this.
        ends = part.upstream, part.downstream
        beside = tuple(replace(span, state=SpanState.DRAINING) for span in view.spans if span.peer in ends)
        here = _path(replace(view, spans=(*own, *beside)), part, seed)
        if here is not None and len(here.legs) == 1:
            others = replace(part, avoid=wanted.avoid | used, cache_tokens=wanted.cache_tokens)
            found.append(Standing(here.legs[0], here.expected_s, _path(view, others, seed)))
    return found


def _path(view: SwarmView, wanted: Wanted, seed: int) -> Path | None:
    try:
        return find_path(view, wanted, seed=seed)
    except CorollaError:  # nobody else serves these blocks, which is an answer as well
        return None


class Unrest:
    """Which hop of one session was found worth leaving, how often in a row, and when to look again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._suspect: Hop | None = None
        self._count = 0

    def next_look_s(self) -> float:
        """Until the next look."""
        return self._rng.uniform(*LOOK_EVERY_S)

    def look(self, standings: Sequence[Standing]) -> Standing | None:
        """The hop to leave now; None to stay. At most one at a time: the one that is slowest beside its standby."""
        slow = [standing for standing in standings if standing.is_worth_leaving]
        worst = max(slow, key=_lost_s, default=None)
        hop = worst.leg.span.hop if worst is not None else None
        self._count = self._count + 1 if hop is not None and hop == self._suspect else int(hop is not None)
        self._suspect = hop
        if worst is None or self._count < LOOKS:
            return None
        self._suspect, self._count = None, 0
        return worst


def _lost_s(standing: Standing) -> float:
    return standing.expected_s - (standing.standby.expected_s if standing.standby is not None else 0.0)
