"""Simulated time: callbacks in the order of their moments, then of their making. No threads, no real clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """The simulation's only notion of time, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back once that much time has passed."""
        self.at(self.now + delay_s, callback)

    def at(self, moment_s: float, callback: Callable[[], None]) -> None:
        """Call back at that very moment, or now if it has passed."""
        self._count += 1
        heapq.heappush(self._queue, (max(self.now, moment_s), self._count, callback))

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Let time pass until a condition holds; False if it does not by `limit_s`, or nothing is left."""
        while not until():
            if not self._queue or self._queue[0][0] > limit_s:
                return False
            self.now, _, callback = heapq.heappop(self._queue)
            callback()
        return True
