"""Whether this machine lends at the moment: draining, paused, or kept back by its owner's rules, over restarts.

It owns the decision, the clock of a pause, and the looks at the machine that the rules ask for. What it means for
workers and sessions is `lending.py`'s; what the rules say, `schedule.py`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from ...protocol.errors import Code, CorollaError, error
from ..schedule import Lends, Rules, Seen, Verdict, may_lend
from ..store import Store
from .lending import Lending
from .occupancy import Occupancy

LOOK_EVERY_S: Final = 15.0  # so soon a machine whose owner is back, or whose clock jumped, lends no more
HELD_DEADLINE_S: Final = 30.0  # for sessions to move when the hours end
YIELD_DEADLINE_S: Final = 6.0  # and when the owner, or another program, wants the machine

Look = Callable[[Rules, int], Awaitable[Seen]]


class Pausing:
    """The pauses of one daemon. rules: the owner's, as they are now.

    unix: the wall clock, in seconds, since a pause outlives processes. look: what is seen of the machine, asked
    with the rules and the minute of the day.
    """

    def __init__(
        self,
        lending: Lending,
        store: Store,
        nursery: trio.Nursery,
        on_event: Callable[[str, str], None],
        *,
        rules: Callable[[], Rules] = Rules,
        unix: Callable[[], float] = time.time,
        look: Look | None = None,
    ) -> None:
        self._lending = lending
        self._store = store
        self._nursery = nursery
        self._on_event = on_event
        self._rules = rules
        self._unix = unix
        self._look = look or Looking(lending).look
        self._waiting = trio.CancelScope()
        self._verdict = Verdict(Lends.YES)
        self._stirred = trio.Event()

    def start(self) -> None:
        """Start lending, or go on pausing as before the restart. Raises as `Lending.start`."""
        # Until `follow` has looked, somebody may sit here.
        self._verdict = may_lend(self._rules(), Seen(self.minute(), idle_s=0.0))
        state = self._store.state
        left_s = state.paused_until - self._unix() if state.paused_until else math.inf
        if state.paused and left_s > 0:
            self._lending.start_paused(Lends.PAUSED)
            self._on_event("paused", _describe(left_s))
            self._resume_after(left_s)
            return
        if state.paused:
            self._store.update(paused=False, paused_until=0.0)
        if self._verdict.lends is Lends.YES:
            self._lending.start()
        else:
            self._lending.start_paused(self._verdict.lends)
            self._on_event("held", self._verdict.words)

    def explain(self) -> str | None:
        """Why nothing is lent, and what to do; None if it is."""
        if self._store.state.paused or self._lending.lends is Lends.DRAINING:
            return f"{self._lending.lends}: daemonctl resume lends again"
        return self._verdict.words or None

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
        await self._lending.pause(Lends.PAUSED)
        self._resume_after(left_s)

    def resume(self) -> None:
        """Lend again, as far as the rules allow. Raises as `Lending.start`."""
        self._waiting.cancel()
        if self._store.state.paused:
            self._store.update(paused=False, paused_until=0.0)
        if self._verdict.lends is Lends.YES:
            self._lending.resume()
            self._on_event("resumed", "lending again")
        else:
            self._lending.start_paused(self._verdict.lends)
            self._on_event("held", self._verdict.words)

    async def follow(self) -> None:
        """Keep to the rules until cancelled."""
        while True:
            self._stirred = trio.Event()
            rules, minute = self._rules(), self.minute()
            verdict = may_lend(rules, await self._look(rules, minute))
            await self.obey(verdict)
            with trio.move_on_after(max(1.0, min(LOOK_EVERY_S, verdict.until_s))):
                await self._stirred.wait()

    def stir(self) -> None:
        """Look at once: the rules are others."""
        self._stirred.set()

    async def obey(self, verdict: Verdict) -> None:
        """Lend, or let sessions move and lend no more, as the rules say now. Nothing changes in a pause."""
        before, self._verdict = self._verdict, verdict
        if verdict.lends is before.lends or self._store.state.paused:
            return
        if verdict.lends is not Lends.YES:
            self._on_event("held", verdict.words)
            deadline_s = HELD_DEADLINE_S if verdict.lends is Lends.OUTSIDE_HOURS else YIELD_DEADLINE_S
            await self._lending.pause(verdict.lends, deadline_s)
            return
        try:
            self._lending.resume()
            self._on_event("resumed", "lending again")
        except CorollaError as problem:
            self._on_event("resume_failed", str(problem))

    def minute(self) -> int:
        """Of the day, in local time."""
        now = time.localtime(self._unix())
        return now.tm_hour * 60 + now.tm_min

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


class Looking:
    """Looks at this machine as far as the rules need it."""

    def __init__(self, lending: Lending, occupancy: Occupancy | None = None) -> None:
        self._lending = lending
        self._occupancy = occupancy or Occupancy()

    async def look(self, rules: Rules, minute: int) -> Seen:
        """What is seen now."""
        idle_s = gpu_free_s = math.inf
        if rules.idle_s:
            idle_s = await self._occupancy.idle_s()
        if rules.yields_gpu and self._lending.uses_gpu:
            gpu_free_s = await self._occupancy.gpu_free_s(self._lending.processes())
        return Seen(minute, idle_s, gpu_free_s)


def _describe(left_s: float) -> str:
    if left_s == math.inf:
        return "nothing is lent until `daemonctl resume`"
    time = f"{left_s / 60:.0f} min" if left_s >= 120 else f"{left_s:.0f} s"
    return f"nothing is lent for {time}, or until `daemonctl resume`"
