"""How fast a span is on its own device: one quick measurement when the worker starts.

A decode of one row and a prefill of one chunk, over scratch pages of the still empty cache. The numbers
guide routing and placement; they need to be right within some ten percent, not exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from .attention import Batch, Segment
from .span import Span

_MEASURE_S: Final = 0.25  # of each kind; a slow span stops after its first run
_PREFILL_TOKENS: Final = 128


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second through all blocks of the span; 0 where there are none."""

    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0


def measure(span: Span, clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Run the span for about half a second; twice one pass where that takes longer.

    It writes into the first pages of the cache, which nobody may hold yet.
    """
    cache = span.cache
    if cache is None or span.start == span.end:
        return Speed()
    num_groups = cache.grouping.num_groups
    num_tokens = min(_PREFILL_TOKENS, cache.num_pages // num_groups * cache.page_tokens)
    num_pages = -(-num_tokens // cache.page_tokens)
    first, *others = (tuple(range(group * num_pages, (group + 1) * num_pages)) for group in range(num_groups))
    text = Segment(first, 0, num_tokens, others=tuple(others))
    return Speed(
        decode_tokens_per_s=_tokens_per_s(span, text._replace(start=num_tokens - 1, n=1), clock),
        prefill_tokens_per_s=_tokens_per_s(span, text, clock),
    )


def _tokens_per_s(span: Span, segment: Segment, clock: Callable[[], float]) -> float:
    """The fastest of several passes: whatever else the machine does only slows them."""
    hidden = torch.full((segment.n, span.hidden_size), 0.01, dtype=span.dtype, device=span.device)
    batch = Batch((segment,))
    fastest, begun = float("inf"), clock()
    is_first = True  # it allocates and warms up, so it counts only if there is no time for another
    while is_first or clock() - begun < _MEASURE_S:
        at = clock()
        _finish(span.forward(hidden, batch))
        took = max(clock() - at, 1e-9)
        if is_first and took < _MEASURE_S:
            begun = clock()
        else:
            fastest = min(fastest, took)
        is_first = False
    return segment.n / fastest


def _finish(hidden: torch.Tensor) -> None:
    """Wait for the device."""
    if hidden.device.type != "cpu":
        hidden.flatten()[0].item()
