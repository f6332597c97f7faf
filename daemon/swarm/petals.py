"""Placement as Petals publishes it: the baseline that `placement.py` is measured against. Pure.

A newcomer takes the stretch whose block throughputs, sorted, are smallest. Now and then each peer imagines that
it, and then all others in turn, moved by that rule; if the present throughput is below `QUALITY` of what would
come out, it moves. Source: Borzunov et al. 2023, Distributed Inference and Fine-tuning of Large Language Models
Over The Internet (NeurIPS), section 3.2 and appendix on load balancing; the period and the share of 0.75 are
those of its published defaults.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

from .coverage import coverage, speed_of, stays
from .view import Span, SwarmView

QUALITY: Final = 0.75
CHECK_EVERY_S: Final = 120.0  # on average; the time between two checks is even between 0 and twice this
MAX_ROUNDS: Final = 4  # over all peers, when imagining where they would go


def petals_span(supply: tuple[float, ...] | list[float], length: int) -> tuple[int, int]:
    """The `length` blocks whose throughputs, sorted, are smallest, of equal ones the first."""
    starts: Sequence[int] = range(len(supply) - length + 1)
    for _, alike in groupby(sorted(range(len(supply)), key=supply.__getitem__), key=supply.__getitem__):
        first, *more = alike
        if more:  # the more blocks of one throughput a stretch has, the later comes a larger one
            held = [sum(start <= block < start + length for block in (first, *more)) for start in starts]
            kept = [start for start, count in zip(starts, held, strict=True) if count == max(held)]
        else:
            kept = [start for start in starts if start <= first < start + length]
        starts = kept or starts
        if len(starts) == 1:
            break
    return starts[0], starts[0] + length


def petals_quality(supply: Sequence[float], imagined_tokens_per_s: Callable[[], float]) -> float:
    """The present throughput as a share of what would come out if all moved. 1 where more is not to be had."""
    before, mean = min(supply), sum(supply) / len(supply)
    if before >= QUALITY * mean:  # no layout reaches more than the mean
        return 1.0
    return before / (imagined_tokens_per_s() or math.inf)


def petals_move(supply: Sequence[float], own: Span, quality: float) -> tuple[int, int] | None:
    """Where this peer's span should go; None to stay. supply: of all blocks, by its span as well."""
    if quality >= QUALITY:
        return None
    others = list(supply)
    _add(others, own, -1)
    if min(others) <= 0 < min(supply):
        return None  # the swarm would fall apart
    start, end = petals_span(others, own.num_blocks)
    return None if start == own.start else (start, end)


def petals_imagined(view: SwarmView, rng: random.Random) -> float:
    """The throughput after everybody moved by the same rule, in a random order, until nobody does.

    One imagination serves all peers that see the same; in the source each makes its own, beginning with itself.
    """
    spans = [span for span in view.spans if stays(span)]
    supply = list(coverage(spans, view.num_blocks).supply)
    for _ in range(MAX_ROUNDS):
        has_moved = False
        for index in rng.sample(range(len(spans)), len(spans)):
            span = spans[index]
            _add(supply, span, -1)
            start, end = petals_span(supply, span.num_blocks)
            has_moved |= start != span.start
            spans[index] = span if start == span.start else replace(span, start=start, end=end)
            _add(supply, spans[index], 1)
        if not has_moved:
            break
    return min(supply)


def _add(supply: list[float], span: Span, sign: int) -> None:
    speed = sign * speed_of(span)
    for block in range(span.start, min(span.end, len(supply))):
        value = supply[block] + speed
        supply[block] = value if value > 1e-9 else 0.0  # crumbs of floats
