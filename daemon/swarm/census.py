"""What placement asks of a swarm: coverage, work by place, and who may move from where. Kept up to date span by span.

To count ten thousand spans takes some hundredth of a second, to note that one changed next to nothing. All of it is
exact, so that it is the same whatever came in which order. It decides nothing: that is `placement.py`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

from ...protocol.records import SpanState
from ...protocol.steps import Hop
from .capacity import Place, units
from .coverage import Coverage, Tally, speed_of, stays
from .view import Span, SwarmView

Entry = tuple[float, str, int]  # of a worker that may move: tokens/s, peer, number


class Census:
    """Sums and lists over the spans of one model. Who asks it changes nothing in it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.work: Counter[Place] = Counter()  # in the `UNITS` of `capacity.py`
        self.workers: Counter[tuple[int, int]] = Counter()  # by blocks held and work
        self.movers: dict[Place, list[Entry]] = {}  # in order
        self.places: dict[Hop, tuple[Place, float]] = {}  # of those who may move, with their tokens/s
        self._tally = Tally(num_blocks)

    def coverage(self) -> Coverage:
        """As it is now."""
        return self._tally.coverage()

    @property
    def num_workers(self) -> int:
        """Spans that serve, or will soon."""
        return self.workers.total()

    def add(self, span: Span) -> None:
        """One span more."""
        if not stays(span) or span.start >= self.num_blocks:
            return
        place, held, work, speed = self._measures(span)
        self._tally.count(span, speed, 1)
        self.work[place] += work
        self.workers[held] += 1
        if _may_move(span, self.num_blocks):
            insort(self.movers.setdefault(place, []), (speed, span.peer, span.worker))
            self.places[span.hop] = place, speed

    def remove(self, span: Span) -> None:
        """One span less: as it was added."""
        if not stays(span) or span.start >= self.num_blocks:
            return
        place, held, work, speed = self._measures(span)
        self._tally.count(span, speed, -1)
        self.work[place] -= work
        if not self.work[place]:
            del self.work[place]
        self.workers[held] -= 1
        if not self.workers[held]:
            del self.workers[held]
        if _may_move(span, self.num_blocks):
            group = self.movers[place]
            del group[bisect_left(group, (speed, span.peer, span.worker))]
            if not group:
                del self.movers[place]
            del self.places[span.hop]

    def _measures(self, span: Span) -> tuple[Place, tuple[int, int], int, float]:
        """Its place, what it holds and works as a worker, its work, its tokens/s."""
        place = span.start, min(span.end, self.num_blocks)
        speed = speed_of(span)
        work = units(speed * span.num_blocks)
        return place, (place[1] - place[0], work), work, speed


def census_of(seen: SwarmView | Census) -> Census:
    """The census of a view; what is one already is given back."""
    if isinstance(seen, Census):
        return seen
    census = Census(seen.num_blocks)
    for span in seen.spans:
        census.add(span)
    return census


def _may_move(span: Span, num_blocks: int) -> bool:
    return span.movable and span.state is SpanState.ONLINE and span.end <= num_blocks
