"""Which blocks a new worker should serve. Pure.

First whatever nobody serves; then the weakest stretch: each block's throughput is the sum over the spans that
serve it, and a stretch is as weak as its weakest blocks. Source of the second rule: Borzunov et al. 2023,
Distributed Inference and Fine-tuning of Large Language Models Over The Internet (NeurIPS), load balancing.
"""

from __future__ import annotations

from typing import Final

from ...protocol.errors import Code, error
from ...protocol.records import SpanState
from .view import Span, SwarmView

UNKNOWN_TOKENS_PER_S: Final = 1.0  # of a span whose speed is not known: it serves, so it is not nothing


def choose_span(view: SwarmView, num_fitting: int) -> tuple[int, int]:
    """The blocks [start, end) that a worker with room for `num_fitting` of them should serve.

    Spans that are loading count as serving, so that several workers that start together spread out. Of equal
    stretches the first is taken, so that spans touch rather than overlap.
    Raises `DOES_NOT_FIT` if there is no room for a single block.
    """
    if num_fitting < 1:
        raise error(
            Code.DOES_NOT_FIT,
            f"no block of this model fits: room for {num_fitting}",
            "free memory, or choose a smaller --dtype or a --quantization",
        )
    length = min(num_fitting, view.num_blocks)
    throughputs = block_throughputs(view)

    def weakness(start: int) -> tuple[int, list[float], int]:
        stretch = throughputs[start : start + length]
        num_unserved = sum(throughput == 0 for throughput in stretch)
        return (-num_unserved, sorted(stretch), start)

    start = min(range(view.num_blocks - length + 1), key=weakness)
    return start, start + length


def block_throughputs(view: SwarmView) -> tuple[float, ...]:
    """For each block, the tokens per second of all spans that serve it, or are about to."""
    totals = [0.0] * view.num_blocks
    for span in view.spans:
        if _stays(span):
            for block in range(span.start, min(span.end, view.num_blocks)):
                totals[block] += span.tokens_per_s or UNKNOWN_TOKENS_PER_S
    return tuple(totals)


def _stays(span: Span) -> bool:
    return span.state in (SpanState.ONLINE, SpanState.LOADING) and not span.suspect
