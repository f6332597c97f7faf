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
from dataclasses import replace
from typing import Final

from ...protocol.steps import Hop
from .coverage import coverage, speed_of, stays
from .view import Span, SwarmView

QUALITY: Final = 0.75
CHECK_EVERY_S: Final = 120.0  # on average; the time between two checks is even between 0 and twice this
MAX_ROUNDS: Final = 4  # over all peers, when imagining where they would go


def petals_span(supply: tuple[float, ...] | list[float], length: int) -> tuple[int, int]:
    """The `length` blocks whose throughputs are smallest, of equal ones the first."""
    starts = range(len(supply) - length + 1)
    start = min(starts, key=lambda start: (sorted(supply[start : start + length]), start))
    return start, start + length


def petals_quality(view: SwarmView, rng: random.Random) -> float:
    """The present throughput as a share of what would come out if all moved. 1 where more is not to be had.

    One imagination serves all peers that see the same; in the source each makes its own, beginning with itself.
    """
    spans = [span for span in view.spans if stays(span)]
    supply = list(coverage(spans, view.num_blocks).supply)
    before, mean = min(supply), sum(supply) / len(supply)
    if before >= QUALITY * mean:  # no layout reaches more than the mean
        return 1.0
    return before / (_imagine(spans, supply, rng) or math.inf)


def petals_move(view: SwarmView, hop: Hop, quality: float) -> tuple[int, int] | None:
    """Where this peer's span should go; None to stay."""
    if quality >= QUALITY:
        return None
    spans = [span for span in view.spans if stays(span)]
    own = next((span for span in spans if span.hop == hop), None)
    if own is None:
        return None
    supply = list(coverage(spans, view.num_blocks).supply)
    before = min(supply)
    _add(supply, own, -1)
    if min(supply) <= 0 < before:
        return None  # the swarm would fall apart
    start, end = petals_span(supply, own.num_blocks)
    return None if start == own.start else (start, end)


def _imagine(spans: list[Span], supply: list[float], rng: random.Random) -> float:
    """The throughput after everybody moved by the same rule, in a random order, until nobody does."""
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
