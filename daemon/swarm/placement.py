"""Which blocks a worker should serve, and who moves when that changes. Pure.

First that every block is served, then that each is served twice, then that the whole model becomes faster: by what
a layout carries if routes share its work out (`capacity.py`), and by its slowest block if they take whole spans. All
that see the same swarm make the same plan of a few moves, best first, and each carries out its own part only: so a
gap that ten thousand see at once is closed by one. Who is named but does not move is passed over by leaving it out
(`excluded`).

How good a layout is: its risk, which counts blocks served by nobody or by one; and, among equals, its strain, the
sum over blocks of exp(-SHARPNESS * supply / mean supply), a smooth stand-in for the slowest block. Speeds multiply
in the strain, so that the gain of any move comes from sums over intervals: a plan for ten thousand workers takes a
fraction of a second. A few workers are planned for together (`joint.py`), since none of them alone can do much. The
rule that this is measured against is `petals.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from operator import itemgetter
from typing import Final

from ...protocol.errors import Code, error
from ...protocol.steps import Hop
from .capacity import UNITS, carried, most_carried, units
from .census import Census, Entry, census_of
from .coverage import UNKNOWN_TOKENS_PER_S, Coverage, speed_of, stays
from .joint import Mover, Standing, plan_jointly, worth_of
from .view import SwarmView

SHARPNESS: Final = 60.0  # two blocks that differ by 2 % of the mean differ threefold in strain
MAX_MOVES: Final = 16  # in one plan; the next plan goes on from there
MIN_GAIN: Final = 0.05  # of the model's tokens/s: moves for speed that bring less are not made
LACKING: Final = 0.03  # of the most that could be carried: a layout of few workers that lacks no more is good
GOOD_GAIN: Final = (
    1.2  # times a worker's mean share is what a move must bring there: soon somebody comes or goes
)
MIN_SPARED: Final = 0.25  # of a span's blocks that must gain a second replica to be worth a move
FEW: Final = 40  # workers whose moves for speed are planned together
MAX_TRIED: Final = 4_000  # group and start pairs looked at exactly in one step; beyond, the best start only
_MAX_EXPONENT: Final = 600.0  # of a float that is still finite


class Purpose(StrEnum):
    """What a move is for, the most urgent first."""

    GAP = "gap"  # blocks that nobody serves
    SPARE = "spare"  # blocks that only one serves
    SPEED = "speed"


@dataclass(frozen=True, slots=True)
class Move:
    """A worker's span becomes [start, end)."""

    hop: Hop
    start: int
    end: int
    purpose: Purpose


@dataclass(frozen=True, slots=True)
class Gain:
    """What a move changes: coverage, and the tokens per second that the whole model carries, before and after."""

    before: Coverage
    after: Coverage
    carried_before: float
    carried_after: float

    @property
    def tokens_per_s(self) -> float:
        """Of the whole model; may be negative."""
        return self.carried_after - self.carried_before


def choose_span(seen: SwarmView | Census, num_fitting: int, tokens_per_s: float = 0.0) -> tuple[int, int]:
    """The blocks [start, end) that a new worker with room for `num_fitting` of them should serve.

    tokens_per_s: of it, through so many blocks; 0 if unknown. Spans that are loading count as serving, so that
    workers that start together spread out. Of equal stretches the first is taken, so that spans touch.
    Raises `DOES_NOT_FIT` if there is no room for a single block.
    """
    if num_fitting < 1:
        raise error(
            Code.DOES_NOT_FIT,
            f"no block of this model fits: room for {num_fitting}",
            "free memory, or choose a smaller --dtype or a --quantization",
        )
    layout = _Layout(census_of(seen))
    length = min(num_fitting, layout.num_blocks)
    start = layout.best_start(length, tokens_per_s or layout.usual_speed(length))
    return start, start + length


def plan_moves(
    seen: SwarmView | Census, *, excluded: frozenset[Hop] = frozenset(), max_moves: int = MAX_MOVES
) -> tuple[Move, ...]:
    """The moves that help the swarm most, the best first; usually none.

    excluded: workers that are not to be asked. Moves for speed come only if all of them together raise the
    model's tokens per second by `MIN_GAIN`, and no more of them than it takes. The same view, without regard to
    the order of spans and to what only its reader sees (distance, penalties), gives the same plan.
    """
    layout = _Layout(census_of(seen), excluded)
    moves: list[Move] = []
    while len(moves) < max_moves and layout.is_at_risk and (move := layout.best_move()) is not None:
        if move.purpose is Purpose.SPEED:
            break
        layout.carry_out(move)
        moves.append(move)
    return (*moves, *_moves_for_speed(layout, max_moves - len(moves)))


def _moves_for_speed(layout: _Layout, max_moves: int) -> list[Move]:
    """Of few workers the best moves together; of many one after the other."""
    if not layout.is_uneven():
        return []
    if layout.num_movable <= FEW:
        return layout.joint_moves(max_moves)
    return _moves_one_by_one(layout, max_moves)


def _moves_one_by_one(layout: _Layout, max_moves: int) -> list[Move]:
    """Moves until nothing is gained, cut where almost all has been gained; none if that is too little."""
    before = layout.carried
    moves: list[Move] = []
    reached = [before]
    while len(moves) < max_moves and (move := layout.best_move()) is not None:
        layout.carry_out(move)
        moves.append(move)
        reached.append(layout.carried)
    gained = max(reached) - before
    if gained < MIN_GAIN * before or gained <= 0:
        return []
    enough = next(i for i, speed in enumerate(reached) if speed >= before + 0.9 * gained)
    return moves[:enough]


def gain_of(view: SwarmView, hop: Hop, start: int, end: int) -> Gain:
    """What it would change if a worker served [start, end). Raises `BLOCKS_OUT_OF_RANGE`, `UNKNOWN_SESSION`."""
    if not 0 <= start < end <= view.num_blocks:
        raise error(
            Code.BLOCKS_OUT_OF_RANGE,
            f"blocks {start}:{end} of a model that has {view.num_blocks}",
            f"choose blocks within 0:{view.num_blocks}",
        )
    layout = _Layout(census_of(view))
    before, carried_before = layout.coverage(), layout.carried
    own = next((span for span in view.spans if span.hop == hop and stays(span)), None)
    if own is not None:
        speed = speed_of(own)
        layout.add(own.start, min(own.end, view.num_blocks), -speed, -1)
        layout.add(start, end, speed * own.num_blocks / (end - start), 1)
    return Gain(before, layout.coverage(), carried_before, layout.carried)


def best_for(view: SwarmView, hop: Hop) -> tuple[int, int] | None:
    """Where a worker would help most if it alone could move; None if it is not in the view."""
    own = next((span for span in view.spans if span.hop == hop), None)
    if own is None:
        return None
    others = SwarmView(
        view.fingerprint, view.num_blocks, tuple(span for span in view.spans if span.hop != hop)
    )
    return choose_span(others, own.num_blocks, own.tokens_per_s)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums from the first block on: sums[b] - sums[a] is that of blocks [a, b). Exact for integers."""

    sums: Sequence[float]

    @classmethod
    def of(cls, values: Iterable[float]) -> _Sums:
        return cls(tuple(accumulate(values, initial=0)))

    def over(self, start: int, end: int) -> float:
        return self.sums[end] - self.sums[start]


@dataclass(frozen=True, slots=True)
class _Prices:
    """What a span more (`add`) or less (`remove`) at each block does to the risk; strain; sole online servers."""

    add: _Sums
    remove: _Sums
    strain: list[float]  # summed directly: differences of running sums would drown the small ones
    sole: _Sums

    def strain_over(self, start: int, end: int) -> float:
        return sum(self.strain[start:end])


class _Layout:
    """Spans over blocks while a plan is made: coverage that changes, and who may move, by place."""

    def __init__(self, census: Census, excluded: frozenset[Hop] = frozenset()) -> None:
        found = census.coverage()
        self.num_blocks = census.num_blocks
        self._replicas = list(found.replicas)
        self._online = list(found.online)
        self._supply = list(found.supply)
        self._scale = sum(found.supply) / self.num_blocks or UNKNOWN_TOKENS_PER_S
        self._census = census
        self._work = census.work.copy()
        self._groups = dict(census.movers)  # by place: who may move, in the order of speeds
        for hop in excluded:
            self._strike(hop)
        self._prices = self._price()

    def _strike(self, hop: Hop) -> None:
        """A worker is not to be asked, or not again. The census keeps its own lists."""
        if hop not in self._census.places:
            return
        place, speed = self._census.places[hop]
        group = [entry for entry in self._groups.get(place, ()) if entry != (speed, *hop)]
        if group:
            self._groups[place] = group
        else:
            self._groups.pop(place, None)

    @property
    def is_at_risk(self) -> bool:
        """Is there a block that not two serve?"""
        return min(self._replicas) < 2

    @property
    def num_movable(self) -> int:
        """Workers that may move and have not done so in this plan."""
        return sum(map(len, self._groups.values()))

    @property
    def carried(self) -> float:
        """Tokens per second of the whole model, as routes can share them out."""
        return carried(self._work, self.num_blocks).tokens_per_s

    def is_uneven(self) -> bool:
        """May there be anything to gain?"""
        self._most = most_carried(self._census.workers.elements(), self.num_blocks)
        return worth_of(self.carried, min(self._supply)) * (1 + MIN_GAIN) < self._most

    def joint_moves(self, max_moves: int) -> list[Move]:
        """Moves that help together, by those who have not moved yet."""
        movers = [
            Mover(Hop(peer, worker), (start, end), units(speed * (end - start)))
            for (start, end), group in sorted(self._groups.items())
            for speed, peer, worker in group
        ]
        supply = tuple(round(speed * UNITS) for speed in self._supply)
        standing = Standing(self._work, supply, tuple(self._replicas), tuple(self._online))
        lengths = {mover.hop: mover.place[1] - mover.place[0] for mover in movers}
        is_good = self.carried >= (1 - LACKING) * self._most
        min_gain = max(MIN_GAIN, GOOD_GAIN / self._census.num_workers) if is_good else MIN_GAIN
        moves = plan_jointly(standing, movers, most=self._most, max_moves=max_moves, min_gain=min_gain)
        return [Move(hop, start, start + lengths[hop], Purpose.SPEED) for hop, start in moves]

    def coverage(self) -> Coverage:
        """As it is now."""
        return Coverage(tuple(self._replicas), tuple(self._online), tuple(self._supply))

    def usual_speed(self, length: int) -> float:
        """A guess for a worker of unknown speed: what brings the weakest stretch up to the mean, at most."""
        return self._scale * length / self.num_blocks

    def best_start(self, length: int, speed: float) -> int:
        """Where one more span helps most."""
        part = 1 - self._shrink(speed)
        prices = self._prices
        starts = range(self.num_blocks - length + 1)
        is_small = self._census.num_workers <= FEW

        def worth(start: int) -> tuple[float, float, float, int]:
            with_it = self._carried_with(start, start + length, speed) if is_small else 0.0
            strain = round(part * prices.strain_over(start, start + length), 12)
            return prices.add.over(start, start + length), with_it, strain, -start

        return max(starts, key=worth)

    def _carried_with(self, start: int, end: int, speed: float) -> float:
        """Tokens per second with one span more, to the hundredth: less is no reason to prefer a place."""
        supply = self._supply
        slowest = min((*supply[:start], *supply[end:], min(supply[start:end]) + speed))
        if not slowest:
            return 0.0
        work = self._work.copy()
        work[start, end] += units(speed * (end - start))
        return round(worth_of(carried(work, self.num_blocks).tokens_per_s, slowest) / self._scale, 2)

    def best_move(self) -> Move | None:
        """The move that gains most; None if none is worth making."""
        best: tuple[float, float] = (0, 0.0)
        chosen: Move | None = None
        everywhere = len(self._groups) * self.num_blocks <= MAX_TRIED
        best_starts: dict[int, int] = {}
        is_safe = not self.is_at_risk
        prices, steep = self._prices, SHARPNESS / self._scale
        for (start, end), group in sorted(self._groups.items()):
            if prices.sole.over(start, end):
                continue
            length = end - start
            starts: Iterable[int]
            fastest = group[-1][0] * steep
            if everywhere:
                starts = range(self.num_blocks - length + 1)
            else:
                if length not in best_starts:
                    best_starts[length] = self.best_start(length, self._scale)
                starts = (best_starts[length],)
                if is_safe and prices.strain_over(starts[0], starts[0] + length) * fastest <= best[1]:
                    continue
            for target in starts:
                left, taken = _difference(start, target, length)
                risk = prices.add.over(*taken) - prices.remove.over(*left)
                if target == start or risk < best[0]:
                    continue
                gained, lost = prices.strain_over(*taken), prices.strain_over(*left)
                # As 1 - q < steep speed < 1/q - 1, nobody there takes away more strain than this.
                if risk == best[0] and (gained - lost) * fastest <= best[1]:
                    continue
                strain, hop = self._lightest(group, gained, lost)
                if (risk, strain) > best and self._is_worth(risk, length):
                    best = (risk, strain)
                    chosen = Move(hop, target, target + length, self._purpose(risk))
        return chosen

    def carry_out(self, move: Move) -> None:
        """Suppose that a move was made. Nobody moves twice in a plan."""
        (start, end), speed = self._census.places[move.hop]
        self._strike(move.hop)
        self.add(start, end, -speed, -1, online=-1)
        self.add(move.start, move.end, speed, 1)

    def add(self, start: int, end: int, speed: float, count: int, *, online: int = 0) -> None:
        """One span more or less."""
        self._work[start, end] += units(abs(speed) * (end - start)) * (1 if count > 0 else -1)
        if self._work[start, end] <= 0:
            del self._work[start, end]
        for block in range(start, end):
            self._replicas[block] += count
            self._online[block] += online
            self._supply[block] = max(0.0, self._supply[block] + speed) if self._replicas[block] else 0.0
        self._prices = self._price()

    def _price(self) -> _Prices:
        slowest = min(self._supply)
        steep = SHARPNESS / self._scale
        has_gap = 0 in self._replicas
        gap_price = 2 * self.num_blocks  # one gap outweighs a second replica of every block
        return _Prices(
            _Sums.of({0: gap_price, 1: 1}.get(count, 0) for count in self._replicas),
            _Sums.of({1: gap_price, 2: 1}.get(count, 0) for count in self._replicas),
            [math.exp(-min(_MAX_EXPONENT, steep * (s - slowest))) for s in self._supply],
            # A span that is moved serves nothing while it loads: with no gap, it must not make one meanwhile.
            _Sums.of(not has_gap and count == 1 for count in self._online),
        )

    def _shrink(self, speed: float) -> float:
        """What a span of this speed multiplies the strain of its blocks by."""
        return math.exp(-min(_MAX_EXPONENT, SHARPNESS * speed / self._scale))

    def _lightest(self, group: Sequence[Entry], gained: float, lost: float) -> tuple[float, Hop]:
        """Who of those at one place should move, and how much strain that takes away.

        With q what its speed multiplies strain by, a move takes away a (1 - q) - c (1/q - 1), where a and c are
        the strain where it goes and where it leaves: concave in q, and largest at q = sqrt(c / a).
        """
        best_q = math.sqrt(lost / gained) if gained > 0 else 1.0
        speed = -math.log(max(best_q, 1e-250)) * self._scale / SHARPNESS
        index = bisect_left(group, speed, key=itemgetter(0))
        best, chosen = -math.inf, group[0]
        for entry in group[max(0, index - 1) : index + 1] or group[-1:]:
            q = self._shrink(entry[0])
            strain = gained * (1 - q) - lost * (1 / q - 1)
            if strain > best:
                best, chosen = strain, entry
        return best, Hop(*chosen[1:])

    def _is_worth(self, risk: float, length: int) -> bool:
        return risk == 0 or risk >= self.num_blocks or risk >= MIN_SPARED * length

    def _purpose(self, risk: float) -> Purpose:
        if risk >= self.num_blocks:
            return Purpose.GAP
        return Purpose.SPARE if risk > 0 else Purpose.SPEED


def _difference(start: int, target: int, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The blocks that are left and those that are taken when a span of `length` moves; overlap cancels out."""
    if target >= start:
        left_end = min(start + length, target)
        return (start, left_end), (max(target, start + length), target + length)
    return (max(start, target + length), start + length), (target, min(target + length, start))
