"""Which replica computes the next blocks of a micro-batch: a draw weighted by speed and queue. Pure.

Each micro-batch finds its way hop by hop, so that many of them load all replicas as their speed allows, and one
that fails costs no more than a second draw (stochastic wiring: Ryabinin et al. 2023, SWARM Parallelism,
section 3.2). All replicas of one job compute in the same precision. It knows no clock and sends nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Final

from ...protocol.steps import Hop
from ..session.wiring import Precision
from ..swarm.view import DEFAULT_RTT_S, Span

MAJOR: Final = 1
# Replicas are drawn by this power of the speed that they would have for us. 1 leaves some idle while others queue; a
# large one sends everybody to the same peer, whose queue is known late. So two equal ones take turns mostly.
SHARPNESS: Final = 3
DEFAULT_TOKENS_PER_S: Final = 1.0  # of a worker that never said: slower than any that did


@dataclass(frozen=True, slots=True)
class Leg:
    """Blocks [start, end) on one worker."""

    hop: Hop
    start: int
    end: int
    precision: Precision


def usable(
    spans: Iterable[Span], block: int, avoid: Collection[Hop], precision: Precision | None
) -> list[Span]:
    """The spans that hold a block and may be asked now. precision: None if any will do."""
    return [
        span
        for span in spans
        if span.is_online
        and span.start <= block < span.end
        and span.hop not in avoid
        and MAJOR in span.majors
        and (precision is None or precision_of(span) == precision)
    ]


def next_leg(
    candidates: Iterable[Span], start: int, end: int, load: Mapping[Hop, int], rng: Random
) -> Leg | None:
    """The worker for blocks from `start` on, and how far towards `end` it goes; None without candidates.

    load: requests of ours that each hop has now. A span that covers all that is left is preferred to one that
    does not only through its reach: a longer leg saves a crossing.
    """
    spans = list(candidates)
    if not spans:
        return None
    speeds = [_speed(span, min(span.end, end) - start, load.get(span.hop, 0)) for span in spans]
    weights = [(speed / max(speeds)) ** SHARPNESS for speed in speeds]
    chosen = rng.choices(spans, weights)[0]
    return Leg(chosen.hop, start, min(chosen.end, end), precision_of(chosen))


def _speed(span: Span, num_blocks: int, load: int) -> float:
    """Blocks a second that this hop would give us: its speed is that of its whole span, shared by its queue."""
    rate = (span.tokens_per_s or DEFAULT_TOKENS_PER_S) * span.num_blocks
    waiting_s = (1 + load + span.queue) / rate
    crossing_s = (span.rtt_s if span.rtt_s is not None else DEFAULT_RTT_S) + span.penalty_s
    return num_blocks / (num_blocks * waiting_s + crossing_s)


def common_precision(spans: Collection[Span], start: int, end: int) -> Precision | None:
    """The precision in which the most replicas serve every block of [start, end); None if there is no such one."""
    counts: dict[Precision, int] = {}
    for precision in dict.fromkeys(precision_of(span) for span in spans):
        per_block = [len(usable(spans, block, (), precision)) for block in range(start, end)]
        if all(per_block):
            counts[precision] = sum(per_block)
    return max(counts, key=lambda precision: counts[precision]) if counts else None


def covers(spans: Iterable[Span], start: int, end: int, precision: Precision | None) -> bool:
    """Whether every block of [start, end) is served in this precision, or in any."""
    known = tuple(spans)
    return all(usable(known, block, (), precision) for block in range(start, end))


def precision_of(span: Span) -> Precision:
    """What its worker computes in."""
    return Precision(span.dtype, span.quantization)
