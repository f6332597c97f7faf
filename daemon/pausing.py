"""Whether this machine lends at the moment: draining, paused for a while or until resumed, over restarts.

It owns the decision and the clock of a pause; what it means for workers and sessions is `lending.py`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import trio

from ..protocol.errors import Code, CorollaError, error
from .lending import Lending
from .store import Store


class Pausing:
    """The pauses of one daemon. unix: the wall clock, in seconds, since a pause outlives processes."""

    def __init__(
        self,
        lending: Lending,
        store: Store,
        nursery: trio.Nursery,
        on_event: Callable[[str, str], None],
        *,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._lending = lending
        self._store = store
        self._nursery = nursery
        self._on_event = on_event
        self._unix = unix
        self._waiting = trio.CancelScope()

    def start(self) -> None:
        """Start lending, or go on pausing as before the restart. Raises as `Lending.start`."""
        state = self._store.state
        left_s = state.paused_until - self._unix() if state.paused_until else math.inf
        if not state.paused or left_s <= 0:
            self._lending.start()
            return
        self._lending.start_paused()
        self._on_event("paused", _describe(left_s))
        self._resume_after(left_s)

    def drain(self) -> None:
        """Take no new sessions and let those that are open move or finish; workers stay loaded."""
        self._lending.drain()
        self._on_event("draining", "no new sessions; `daemonctl resume` takes them again")

    async def pause(self, for_s: float) -> None:
        """Let sessions move, end the workers; returns when their memory is free. for_s: 0 is until `resume`.

        Raises `BAD_REQUEST` for a time that is none, `DISK_FULL` or `UNREADABLE` if it cannot be remembered.
        """
        if not 0 <= for_s < math.inf:
            raise error(Code.BAD_REQUEST, f"a pause of {for_s} s", "give a time such as 2h")
        left_s = for_s or math.inf
        self._waiting.cancel()
        self._store.update(paused=True, paused_until=self._unix() + for_s if for_s else 0.0)
        self._on_event("paused", _describe(left_s))
        await self._lending.pause()
        self._resume_after(left_s)

    def resume(self) -> None:
        """Lend again. Raises as `Lending.start`."""
        self._waiting.cancel()
        if self._store.state.paused:
            self._store.update(paused=False, paused_until=0.0)
        self._lending.resume()
        self._on_event("resumed", "lending again")

    def _resume_after(self, seconds: float) -> None:
        self._waiting = trio.CancelScope()
        if seconds < math.inf:
            self._nursery.start_soon(self._wait, seconds, self._waiting)

    async def _wait(self, seconds: float, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(seconds)
            try:
                self.resume()
            except CorollaError as problem:
                self._on_event("resume_failed", str(problem))


def _describe(left_s: float) -> str:
    if left_s == math.inf:
        return "nothing is lent until `daemonctl resume`"
    return f"nothing is lent for {left_s / 60:.0f} min, or until `daemonctl resume`"
