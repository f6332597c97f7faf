"""What happened since the daemon started: a bounded list that can be followed."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import AsyncGenerator
from typing import Any, Final

import structlog
import trio

from ..protocol.views import DaemonEvent

MAX_EVENTS: Final = 1000  # of the latest; about a day of a busy daemon

_log = structlog.get_logger("corolla.events")


class EventLog:
    """The daemon's events, latest last."""

    def __init__(self) -> None:
        self._events: deque[DaemonEvent] = deque(maxlen=MAX_EVENTS)
        self._num_ever = 0
        self.counts: Final[Counter[str]] = Counter()  # by kind
        self._more = trio.Event()

    def emit(self, kind: str, text: str, **detail: Any) -> None:
        """Something happened. kind: a stable word; text: one line for people; detail: plain values."""
        self._events.append(DaemonEvent(kind, time.time(), text, detail or None))
        self._num_ever += 1
        self.counts[kind] += 1
        self._more.set()
        self._more = trio.Event()
        _log.info(kind, text=text, **{f"detail_{key}": value for key, value in detail.items()})

    async def read(self, *, follow: bool) -> AsyncGenerator[DaemonEvent, None]:
        """The events so far; with `follow`, then each that comes. A reader too slow misses the oldest.

        Whoever stops reading before the end closes it (`contextlib.aclosing`).
        """
        at = self._num_ever - len(self._events)
        while True:
            at = max(at, self._num_ever - len(self._events))
            while at < self._num_ever:
                event = self._events[at - self._num_ever]
                at += 1
                yield event
                at = max(at, self._num_ever - len(self._events))
            if not follow:
                return
            await self._more.wait()
