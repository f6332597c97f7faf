"""How fast a span is on its own device: one quick measurement when the worker starts.

A decode of one row, one of several rows and a prefill of one chunk, over scratch pages of the still empty cache; and
how fast the host gives the device work, which bounds small batches on a GPU. The numbers guide routing and
placement; they need to be right within some ten percent, not exact. `Watch` tells when they are not any more.
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
_LOADED_S: Final = 0.1  # of several rows: whoever asks has seen the speed of one
_PREFILL_TOKENS: Final = 128
_LOADED_ROWS: Final = 8
_LAUNCHES: Final = 1000
_PREPARING: Final = 2  # passes: the second time a size comes it is recorded
_DRIFT: Final = 1.3  # times faster or slower than measured
_PASSES: Final = 256  # in a row, of which the fastest counts: it is what the device can do now
_NEAR_TOKENS: Final = 512  # of context: beyond, attention counts for more than in the measurement


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second through all blocks of the span; 0 where there are none."""

    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    loaded_tokens_per_s: float = 0.0
    launches_per_s: float = 0.0


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
    one = text._replace(start=num_tokens - 1, n=1)
    return Speed(
        decode_tokens_per_s=_tokens_per_s(span, (one,), clock),
        prefill_tokens_per_s=_tokens_per_s(span, (text,), clock),
        # All of them write the same slot with the same values; what they read is as far apart as with real ones.
        loaded_tokens_per_s=_tokens_per_s(span, (one,) * _LOADED_ROWS, clock, for_s=_LOADED_S),
        launches_per_s=launches_per_s(span.device, clock),
    )


def _tokens_per_s(
    span: Span, segments: tuple[Segment, ...], clock: Callable[[], float], for_s: float = _MEASURE_S
) -> float:
    """The fastest of several passes: whatever else the machine does only slows them."""
    num_tokens = sum(segment.n for segment in segments)
    hidden = torch.full((num_tokens, span.hidden_size), 0.01, dtype=span.dtype, device=span.device)
    batch = Batch(segments)
    if span.device.type != "cpu":  # there kernels are compiled first and passes recorded, which takes seconds
        for _ in range(_PREPARING):
            _finish(span.forward(hidden, batch))
    fastest, begun = float("inf"), clock()
    is_first = True  # it allocates and warms up, so it counts only if there is no time for another
    while is_first or clock() - begun < for_s:
        at = clock()
        _finish(span.forward(hidden, batch))
        took = max(clock() - at, 1e-9)
        if is_first and took < for_s:
            begun = clock()
        else:
            fastest = min(fastest, took)
        is_first = False
    return num_tokens / fastest


def launches_per_s(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """So many operations of next to no work the host gives the device each second."""
    number = torch.zeros(1, device=device)
    _finish(number.add_(1))
    began = clock()
    for _ in range(_LAUNCHES):
        number.add_(1)
    took = max(clock() - began, 1e-9)
    _finish(number)
    return _LAUNCHES / took


class Watch:
    """Whether decodes of one row still take what they took at first; told of each pass that ran with one alone.

    A pass holds more than what `measure` timed, so the first of them are the yardstick for the others.
    """

    def __init__(self, decode_tokens_per_s: float) -> None:
        self._tokens_per_s = decode_tokens_per_s
        self._usual_s = 0.0
        self._fastest_s, self._num_passes = float("inf"), 0

    def note(self, took_s: float, context_tokens: int) -> float | None:
        """One such pass through the whole span. Gives the speed as it is now, if it has become another by much."""
        if context_tokens > _NEAR_TOKENS:
            return None
        self._fastest_s, self._num_passes = min(self._fastest_s, max(took_s, 1e-9)), self._num_passes + 1
        if self._num_passes < _PASSES:
            return None
        fastest_s = self._fastest_s
        self._fastest_s, self._num_passes = float("inf"), 0
        ratio = self._usual_s / fastest_s
        if self._usual_s and 1 / _DRIFT <= ratio <= _DRIFT:
            return None
        was_known, self._usual_s = self._usual_s, fastest_s
        if not was_known:
            return None
        self._tokens_per_s *= ratio
        return self._tokens_per_s


def _finish(hidden: torch.Tensor) -> None:
    """Wait for the device."""
    if hidden.device.type != "cpu":
        hidden.flatten()[0].item()
