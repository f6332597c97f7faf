"""Our place in a swarm: which one it is, how it is entered and left, and where its members are remembered to be.

It owns the one `Belonging` of this daemon. Entering or leaving ends the old place and begins a new one, and whoever
asks waits until that is done. How a swarm is founded, and what a token says, is `inviting.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from typing import Final

import trio

from ..protocol.errors import Code, CorollaError, error
from ..protocol.invitations import TOKEN_PREFIX, decode_token
from .belonging.belonging import Belonging, Entry, Terms, belong, discover
from .belonging.inviting import Inviting
from .belonging.routes import no_swarm
from .events import EventLog
from .lending.lending import Lending
from .network.members.roll import Standing
from .store import Store

JOIN_TIMEOUT_S: Final = 15.0  # for the first member to answer
JOIN_AGAIN_S: Final = (5.0, 15.0, 30.0, 60.0)  # after each attempt in vain, the last one for ever
REMEMBER_EVERY_S: Final = 1.0  # where members are, if that changed: a killed daemon finds them again
# Members or a network that are down now.
_MAY_PASS: Final = frozenset({Code.NO_PEERS, Code.PEER_LOST, Code.TIMEOUT})
HINT: Final = "not in a swarm: daemonctl join TOKEN, or daemonctl swarm create NAME"


class Place:
    """The place of one daemon. terms: what belonging needs of it, as it is at the moment."""

    def __init__(
        self, terms: Callable[[], Terms], inviting: Inviting, store: Store, events: EventLog
    ) -> None:
        self.belonging: Belonging | None = None
        self._terms = terms
        self._inviting = inviting
        self._store = store
        self._events = events
        self._entry = inviting.remembered()
        self._entry_changed = trio.Event()
        self._changed = trio.Event()
        self._problem: CorollaError | None = None
        self._doubt: tuple[str, str] | None = None  # about ourselves, as other members' records raise it
        self._leaving = trio.CancelScope()
        self._other_wish = trio.Event()  # the swarm of the configuration is wanted no longer
        self._moving = trio.Lock()
        self._is_closed = False

    # what is known of it

    @property
    def is_wanted(self) -> bool:
        """Whether there is a swarm to be in."""
        return self._entry is not None

    @property
    def problem(self) -> CorollaError | None:
        """Why we are not in our swarm, or not welcome there; None if all is well."""
        if self._problem is not None or self.belonging is None:
            return self._problem
        return self.belonging.membership.refusal

    @property
    def doubt(self) -> str | None:
        """What other members' records make us doubt of ourselves, in words."""
        return self._doubt[1] if self._doubt is not None else None

    def the_belonging(self) -> Belonging:
        """Our place in a swarm. Raises `NO_SWARM`."""
        if self.belonging is None:
            raise no_swarm()
        return self.belonging

    # what is asked of it

    async def create(self, name: str, *, invited: bool = False) -> str:
        """Found a swarm and enter it; its token. Raises `BAD_REQUEST` for a bad name or if we are in one."""
        return await self._enter(self._inviting.found(name, invited), wait_for_member=False)

    async def join(self, token: str) -> str:
        """Enter a swarm by a token or a multiaddress; a token of it. Raises `BAD_TOKEN`, `NO_PEERS`, …"""
        text = token.strip()
        if text.startswith(TOKEN_PREFIX):
            entry = self._inviting.by_token(text)
        else:
            entry = self._inviting.by_address(await discover(self._terms(), text), text)
        return await self._enter(entry, wait_for_member=True)

    async def join_configured(self, token: str) -> None:
        """Join, unless we are in its swarm already; events tell of what fails.

        Where nobody answers, a machine may have started before its network or its members: it tries again, until it is
        in a swarm, is told to leave, or is configured anew.
        """
        self._other_wish.set()
        other_wish = self._other_wish = trio.Event()
        for pause_s in chain(JOIN_AGAIN_S, repeat(JOIN_AGAIN_S[-1])):
            try:
                if not self._is_in(token):
                    await self.join(token)
                return
            except CorollaError as problem:
                if problem.code not in _MAY_PASS or self._is_closed:
                    self._events.emit("join_failed", str(problem))
                    return
                self._events.emit("join_failed", f"{problem}; trying again in {pause_s:g} s")
            with trio.move_on_after(pause_s):
                await other_wish.wait()
                return

    def _is_in(self, token: str) -> bool:
        """Whether a token is of the swarm that we are in. Raises `BAD_TOKEN`."""
        if self._entry is None or not token.startswith(TOKEN_PREFIX):
            return False
        return decode_token(token).swarm_id == self._entry.swarm.swarm_id

    async def leave(self) -> None:
        """Leave the swarm; leaving none is no error."""
        self._other_wish.set()
        async with self._moving:
            await self._change(None)
            self._store.update(swarm_id="", swarm="", bootstrap=(), invited=False)
            self._inviting.forget()
        self._events.emit("left", HINT)

    def close(self) -> None:
        """No swarm is entered any more; the one we are in is left by `end`."""
        self._is_closed = True

    async def end(self) -> None:
        """Be in no swarm until the daemon starts again, which enters the same one."""
        await self._change(None)

    # its life

    async def keep(self, lending: Lending) -> None:
        """Belong to the swarm that is wanted, whichever that is at the time, and lend there."""
        while True:
            self._entry_changed = trio.Event()
            entry = self._entry
            if entry is None or self._is_closed:
                self._tell(None)
                await self._entry_changed.wait()
                continue
            with trio.CancelScope() as self._leaving:
                try:
                    await self._belong(entry, lending)
                except CorollaError as problem:
                    self._events.emit("swarm_failed", str(problem))
                    self._entry = None
                    self._tell(problem)
                    await self._entry_changed.wait()

    async def _belong(self, entry: Entry, lending: Lending) -> None:
        async with belong(self._terms(), entry) as belonging:
            try:
                self.belonging = belonging
                lending.enter(belonging)
                self._events.emit("joined", f"in swarm {entry.swarm.name}", swarm_id=entry.swarm.swarm_id)
                self._tell(None)
                while True:
                    await trio.sleep(REMEMBER_EVERY_S)
                    self._remember(belonging)
                    self._tell_doubts(belonging)
            finally:
                self._remember(belonging)
                self._doubt = None
                lending.leave()
                self.belonging = None

    async def _enter(self, entry: Entry, *, wait_for_member: bool) -> str:
        async with self._moving:
            old = self._entry
            if old is not None and old.swarm.swarm_id != entry.swarm.swarm_id:
                raise error(
                    Code.BAD_REQUEST,
                    f"this daemon is in swarm {old.swarm.name} already",
                    "leave it first: daemonctl leave",
                )
            kept = self._inviting.standing
            try:
                if self.belonging is None or entry.bootstrap:
                    await self._move(entry, entry.standing)
                belonging = self.the_belonging()
                if wait_for_member:
                    await belonging.membership.wait_joined(timeout_s=JOIN_TIMEOUT_S)
            except CorollaError:
                await self._move(old, kept)
                raise
            self._store.update(
                swarm_id=entry.swarm.swarm_id,
                swarm=entry.swarm.name,
                bootstrap=tuple(dict.fromkeys((*entry.bootstrap, *belonging.known_addresses()))),
                invited=self._inviting.standing.charter is not None,
            )
            return belonging.token()

    async def _move(self, entry: Entry | None, standing: Standing | None) -> None:
        """Change our place and our standing together: whoever left the old place changes neither again."""
        if standing is not None and standing != self._inviting.standing:
            await self._change(None)
            self._inviting.keep(standing)
        await self._change(entry)

    async def _change(self, entry: Entry | None) -> None:
        """Leave where we are, enter what is given, and wait until that is done. Raises why it is not."""
        self._entry = entry
        changed = self._changed
        self._entry_changed.set()
        self._leaving.cancel()
        await changed.wait()
        if self._problem is not None:
            raise self._problem

    def _tell(self, problem: CorollaError | None) -> None:
        self._problem = problem
        self._changed.set()
        self._changed = trio.Event()

    def _tell_doubts(self, belonging: Belonging) -> None:
        doubt = belonging.registry.doubts.words(trio.current_time())
        if doubt is not None and (self._doubt is None or doubt[0] != self._doubt[0]):
            self._events.emit(*doubt)
        self._doubt = doubt

    def _remember(self, belonging: Belonging) -> None:
        known = belonging.known_addresses()
        if not known or set(known) == set(self._store.state.bootstrap):
            return
        if self._store.state.swarm_id == belonging.swarm.swarm_id:
            try:
                self._store.update(bootstrap=known)
            except CorollaError as problem:
                self._events.emit("store_failed", str(problem))
