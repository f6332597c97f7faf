"""How many tokens per second a layout of spans carries, if routes share the work out as well as can be. Pure.

A hop may serve a part of its worker's span: a worker gives its work, in blocks of one token per second, to those of
its blocks that are short of it. So it is no loss that spans overlap unevenly, as the sum of speeds over each block
(`coverage.py`) has it; what counts is that no set of blocks is left to too few. A layout carries T if every set S of
blocks is reached by work of at least T |S| (Hall 1935; Gale 1957 for flows). Since spans are intervals, what does
not reach S lies within the intervals between, and the worst S is found by dynamic programming over these, the
largest T by Dinkelbach's (1967) iteration: blocks squared a round, however many workers there are.

It decides nothing. Work is counted in whole `UNITS`, so that sums do not depend on their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from .coverage import speed_of, stays
from .view import SwarmView

UNITS: Final = 1024  # of work in one block-token per second
_MAX_ROUNDS: Final = 64  # of Dinkelbach's iteration, which takes three to six
_SLACK: Final = 1e-9  # of all work: what floats may be wrong by

Place = tuple[int, int]  # blocks [start, end)


@dataclass(frozen=True, slots=True)
class Carried:
    """Tokens per second of the whole model, and the blocks that hold it down, as intervals."""

    tokens_per_s: float
    short: tuple[Place, ...]


def work_of(view: SwarmView) -> Counter[Place]:
    """The work at each place, in `UNITS`: of spans that serve or load."""
    work: Counter[Place] = Counter()
    for span in view.spans:
        if stays(span) and span.start < view.num_blocks:
            work[span.start, min(span.end, view.num_blocks)] += units(speed_of(span) * span.num_blocks)
    return work


def units(block_tokens_per_s: float) -> int:
    """Work as it is counted here; at least one unit, since it serves."""
    return max(1, round(block_tokens_per_s * UNITS))


def carried_by(view: SwarmView) -> float:
    """Tokens per second that the spans of a view carry, once all have loaded."""
    return carried(work_of(view), view.num_blocks).tokens_per_s


def carried(work: Mapping[Place, int], num_blocks: int) -> Carried:
    """The most that a layout carries. work: at each place, in `UNITS`; places lie within [0, num_blocks)."""
    total = sum(work.values())
    inside = _inside(work, num_blocks)
    speed = total / num_blocks
    short: tuple[Place, ...] = ((0, num_blocks),)
    for _ in range(_MAX_ROUNDS):
        apart, length, between = _surplus(inside, num_blocks, speed)
        num_short = num_blocks - length
        if not num_short or total - apart >= speed * num_short - _SLACK * total:
            break
        speed = (total - apart) / num_short
        short = _outside(between, num_blocks)
    return Carried(speed / UNITS, short)


def _inside(work: Mapping[Place, int], num_blocks: int) -> list[list[int]]:
    """inside[a][b]: work of the spans that lie within blocks [a, b)."""
    begin: list[list[tuple[int, int]]] = [[] for _ in range(num_blocks)]
    for (start, end), amount in work.items():
        begin[start].append((end, amount))
    rows: list[list[int]] = []
    row = [0] * (num_blocks + 1)
    for start in reversed(range(num_blocks)):
        if begin[start]:
            ends = [0] * (num_blocks + 1)
            for end, amount in begin[start]:
                ends[end] += amount
            row, before, running = [], row, 0
            for more, old in zip(ends, before, strict=True):
                running += more
                row.append(old + running)
        rows.append(row)
    rows.reverse()
    return rows


def _surplus(inside: list[list[int]], num_blocks: int, speed: float) -> tuple[int, int, list[Place]]:
    """The disjoint intervals that have most work to themselves beyond `speed` a block: work, blocks, and which."""
    values = [0.0]  # of the best choice within [0, b), plus speed * b: that makes the inner loop short
    chosen: list[int] = [-1]  # where the interval that ends at b begins; -1: none does
    for end in range(1, num_blocks + 1):
        value, begin = values[-1] + speed, -1
        for start in range(end):
            with_it = values[start] + inside[start][end]
            if with_it > value + speed * 1e-9:
                value, begin = with_it, start
        values.append(value)
        chosen.append(begin)
    apart, length, end = 0, 0, num_blocks
    between: list[Place] = []
    while end > 0:
        start = chosen[end]
        if start < 0:
            end -= 1
            continue
        apart += inside[start][end]
        length += end - start
        between.append((start, end))
        end = start
    return apart, length, between[::-1]


def _outside(between: Iterable[Place], num_blocks: int) -> tuple[Place, ...]:
    """The intervals that `between` leaves of [0, num_blocks)."""
    at = 0
    left: list[Place] = []
    for start, end in between:
        if start > at:
            left.append((at, start))
        at = end
    if at < num_blocks:
        left.append((at, num_blocks))
    return tuple(left)


def most_carried(workers: Iterable[tuple[int, int]], num_blocks: int) -> float:
    """The most that any layout could carry. workers: blocks held, work in `UNITS`.

    The linear program in which a worker may hold any shares of blocks, `length` of them in all: a fast one that holds
    few cannot give all its work. T is the largest with sum of min(work, length T) >= num_blocks T.
    """
    listed = list(workers)
    speed = sum(work for _, work in listed) / num_blocks
    for _ in range(_MAX_ROUNDS):
        slow = sum(work for length, work in listed if work <= length * speed)
        held = sum(length for length, work in listed if work > length * speed)
        if held >= num_blocks or (lower := slow / (num_blocks - held)) >= speed:
            break
        speed = lower
    return speed / UNITS
