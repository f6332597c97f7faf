"""How much more is asked of a worker than it does: what its record announces as its queue. Pure.

Requests that wait, on average over the last while, and sessions that it had to refuse for lack of room: each counts as
a request that waits, since it does so elsewhere. Routes go round a long queue, and placement counts such a span as less
than it is (`coverage.speed_of`), so that others come to its blocks.
"""

from __future__ import annotations

import math
from typing import Final

HALF_LIFE_S: Final = 20.0  # as records are announced anew: shorter would be noise, longer old news
REFUSED_HALF_LIFE_S: Final = 60.0  # a refusal is rarer, and placement looks every 15 s only
MAX_QUEUE: Final = 1000.0  # nobody needs to know more


class Demand:
    """The demand for one worker. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._waiting = 0.0
        self._refused = 0.0
        self._num_refused = 0
        self._noted_at: float | None = None

    def note(self, queue: int, num_refused: int, now_s: float) -> None:
        """queue: requests there now; num_refused: sessions refused so far."""
        if self._noted_at is None:
            self._noted_at, self._num_refused = now_s, num_refused
        passed_s = max(0.0, now_s - self._noted_at)
        kept = math.exp2(-passed_s / HALF_LIFE_S)
        self._waiting = kept * self._waiting + (1 - kept) * queue
        fresh = max(0, num_refused - self._num_refused)
        self._refused = math.exp2(-passed_s / REFUSED_HALF_LIFE_S) * self._refused + fresh
        self._noted_at, self._num_refused = now_s, num_refused

    @property
    def queue(self) -> int:
        """Requests that wait, and sessions refused lately."""
        return round(min(MAX_QUEUE, self._waiting + self._refused))
