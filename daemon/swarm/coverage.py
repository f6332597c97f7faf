"""How well each block of a model is served: replicas and tokens per second, block by block. Pure.

The common ground of the placement policies (`placement.py`, `petals.py`) and of the simulator. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from ...protocol.records import SpanState
from .view import Span, SwarmView

UNKNOWN_TOKENS_PER_S: Final = 1.0  # of a span whose speed is not known: it serves, so it is not nothing
_FINE: Final = 1 << 20  # of a token per second, in sums
QUEUE_AT_EASE: Final = 8.0  # requests waiting at which a span counts as half of what it is: demand uses it up


@dataclass(frozen=True, slots=True)
class Coverage:
    """Per block: spans that serve it or are about to, those that do so now, and tokens per second of the former.

    A block is as fast as the sum of its spans, each of which computes whole spans, and a model as fast as its
    slowest block. Source: Borzunov et al. 2023 (NeurIPS), section 3.2.
    """

    replicas: tuple[int, ...]
    online: tuple[int, ...]
    supply: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        """Of the model: of its slowest block."""
        return min(self.supply, default=0.0)

    @property
    def num_gaps(self) -> int:
        """Blocks that nobody serves nor loads."""
        return sum(count == 0 for count in self.replicas)

    @property
    def num_single(self) -> int:
        """Blocks that one failure would take away."""
        return sum(count == 1 for count in self.replicas)


def coverage_of(view: SwarmView) -> Coverage:
    """The coverage in a view. Spans that load count as served, spans that drain or are suspect do not."""
    return coverage(view.spans, view.num_blocks)


def coverage(spans: Iterable[Span], num_blocks: int) -> Coverage:
    """The coverage of `num_blocks` blocks by these spans, in one pass over them."""
    tally = Tally(num_blocks)
    for span in spans:
        if stays(span) and span.start < num_blocks:
            tally.count(span, speed_of(span), 1)
    return tally.coverage()


class Tally:
    """Coverage that is kept up to date while spans come and go, at the same small cost for each however many there are.

    Speeds are added up in whole fractions of a token per second: so the order does not matter, and what is taken away
    leaves no crumbs.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._replicas, self._online, self._flow = (
            [0] * (num_blocks + 1) for _ in range(3)
        )  # changes at each block

    def count(self, span: Span, tokens_per_s: float, sign: int) -> None:
        """One span that serves or will soon, and begins within the model, more (1) or less (-1)."""
        start, end = span.start, min(span.end, self._num_blocks)
        flow = sign * (round(tokens_per_s * _FINE) or 1)
        self._replicas[start] += sign
        self._replicas[end] -= sign
        self._flow[start] += flow
        self._flow[end] -= flow
        if span.state is SpanState.ONLINE:
            self._online[start] += sign
            self._online[end] -= sign

    def coverage(self) -> Coverage:
        """As it is now."""
        replicas, online, flow = (
            tuple(accumulate(changes[:-1])) for changes in (self._replicas, self._online, self._flow)
        )
        return Coverage(replicas, online, tuple(speed / _FINE for speed in flow))


def stays(span: Span) -> bool:
    """Does it serve its blocks, or will it soon?"""
    return span.state in (SpanState.ONLINE, SpanState.LOADING) and not span.suspect


def speed_of(span: Span) -> float:
    """Tokens per second that a span has to give: less if requests wait for it already."""
    return (span.tokens_per_s or UNKNOWN_TOKENS_PER_S) / (1 + span.queue / QUEUE_AT_EASE)
