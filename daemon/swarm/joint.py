"""Moves of a few workers together, so that a small swarm carries more. Pure.

Of ten machines none can leave without being missed: one move alone gains little, and two or three together much.
Any plan that gains must bring work to the blocks that hold the layout down (`Carried.short`) from where they are not
reached; so from each layout only such moves are followed, and of the layouts that come out only the best few
(a beam search: Lowerre 1976). Many machines need no such search: whoever comes evens them out.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from ...protocol.steps import Hop
from .capacity import UNITS, Carried, Place, carried

WHOLE: Final = 0.5  # how far real routes are from sharing perfectly: measured in tests/simulation
WIDTH: Final = 8  # layouts that are followed further
DEPTH: Final = 4  # moves in one plan: the more, the sooner something else happens meanwhile
MAX_WORK: Final = 200_000  # layouts tried times blocks squared: a tenth of a second or so


@dataclass(frozen=True, slots=True)
class Mover:
    """A worker that may move. work: in `UNITS` of `capacity.py`."""

    hop: Hop
    place: Place
    work: int


@dataclass(frozen=True, slots=True)
class Standing:
    """A layout: work by place; of each block the sum of speeds (in `UNITS`), spans, and those online that go on
    serving it while others move.
    """

    work: Counter[Place]
    supply: tuple[int, ...]
    replicas: tuple[int, ...]
    online: tuple[int, ...]

    @property
    def risk(self) -> tuple[int, int]:
        """Blocks that nobody serves, and that one does."""
        return self.replicas.count(0), self.replicas.count(1)

    def moved(self, mover: Mover, start: int) -> Standing | None:
        """The layout after a move; None if a block would be served by nobody meanwhile."""
        left, end = mover.place
        replicas, online, supply = list(self.replicas), list(self.online), list(self.supply)
        speed = mover.work // (end - left)
        for block in range(left, end):
            if online[block] == 1:
                return None
            online[block] -= 1
            replicas[block] -= 1
            supply[block] -= speed
        place = start, start + end - left
        for block in range(*place):
            replicas[block] += 1
            supply[block] += speed
        work = self.work.copy()
        work[mover.place] -= mover.work
        if not work[mover.place]:
            del work[mover.place]
        work[place] += mover.work
        return Standing(work, tuple(supply), tuple(replicas), tuple(online))


@dataclass(frozen=True, slots=True)
class _Plan:
    """A layout, how it was reached (who, and where its span starts now), and what it is worth in tokens/s.

    Routes that take whole spans draw what the slowest block gives, routes that share perfectly what is carried. With
    what clients know of queues, real ones come half way: so a layout is worth the mean of the two.
    """

    standing: Standing
    moves: tuple[tuple[Hop, int], ...]
    carried: Carried

    @classmethod
    def of(cls, standing: Standing, moves: tuple[tuple[Hop, int], ...]) -> _Plan:
        return cls(standing, moves, carried(standing.work, len(standing.replicas)))

    @property
    def tokens_per_s(self) -> float:
        return worth_of(self.carried.tokens_per_s, min(self.standing.supply) / UNITS)

    @property
    def rank(self) -> tuple[float, int]:
        gaps, single = self.standing.risk
        return self.tokens_per_s, -gaps * len(self.standing.replicas) - single


def worth_of(carried_tokens_per_s: float, slowest_tokens_per_s: float) -> float:
    """What a layout is worth; see `_Plan`."""
    return (1 - WHOLE) * carried_tokens_per_s + WHOLE * slowest_tokens_per_s


def plan_jointly(
    standing: Standing, movers: Sequence[Mover], *, most: float, max_moves: int, min_gain: float
) -> tuple[tuple[Hop, int], ...]:
    """Who should move where; nobody, unless each move on average brings `min_gain` of what there is now.

    most: tokens per second that no layout passes. No plan leaves more blocks unserved, or to one, than before.
    """
    num_blocks = len(standing.replicas)
    first = _Plan.of(standing, ())
    now, risk, best, chosen = first.tokens_per_s, standing.risk, 0.0, first
    tries_left = MAX_WORK // num_blocks**2
    beam = [first]
    for depth in range(min(DEPTH, max_moves)):
        if most < now * (1 + min_gain * (depth + 1)):
            break
        found: dict[frozenset[tuple[Hop, int]], _Plan] = {}
        for plan in beam:
            for mover, start in _towards(plan, movers):
                moves = (*plan.moves, (mover.hop, start))
                after = plan.standing.moved(mover, start)
                if after is None or frozenset(moves) in found:
                    continue
                if tries_left <= 0:
                    break
                tries_left -= 1
                found[frozenset(moves)] = _Plan.of(after, moves)
        beam = heapq.nlargest(WIDTH, found.values(), key=attrgetter("rank"))
        for plan in beam:
            gain = plan.tokens_per_s - now * (1 + min_gain * len(plan.moves))
            if gain > best and plan.standing.risk <= risk:
                best, chosen = gain, plan
    return chosen.moves


def _towards(plan: _Plan, movers: Sequence[Mover]) -> Iterator[tuple[Mover, int]]:
    """Moves that bring work to blocks that are short of it, or to the slowest, from where it does not reach them."""
    supply, named = plan.standing.supply, {hop for hop, _ in plan.moves}
    slowest = supply.index(min(supply))
    wanted = (plan.carried.short, ((slowest, slowest + 1),))
    for mover in movers:
        start, end = mover.place
        missing = [places for places in wanted if not _touches(start, end, places)]
        if mover.hop in named or not missing:
            continue
        length = end - start
        for target in range(len(supply) - length + 1):
            if any(_touches(target, target + length, places) for places in missing):
                yield mover, target


def _touches(start: int, end: int, places: Sequence[Place]) -> bool:
    return any(start < last and first < end for first, last in places)
