"""A session as the rest of the daemon uses it: the machine's decisions, carried out over the network.

Everything that is decided is decided in `machine.py`, at once, in whichever task an event arrives. This file
owns what waits: the wires' tasks, the timer, the questions to the router, the users of `step`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import anyio
from anyio.abc import TaskGroup

from ...protocol.errors import Code, CorollaError, error, error_from_wire
from ...protocol.messages import Message
from ...protocol.steps import Chain, Hop, Reply, Row
from ..network.seam import Network
from . import events as ev
from .deadlines import Settings
from .machine import SessionMachine, Statistics
from .roster import Terms
from .wire import FAREWELL_S, Wire
from .wiring import Router

MAX_UNREAD_EVENTS: Final = 256  # of one listener; the oldest go first

ChargePeer = Callable[[str, float, str], None]
BringParts = Callable[[Hop, tuple[tuple[int, bytes], ...]], Awaitable[None]]


@asynccontextmanager
async def open_session(
    network: Network,
    router: Router,
    terms: Terms,
    settings: Settings | None = None,
    *,
    charge: ChargePeer | None = None,
    bring: BringParts | None = None,
) -> AsyncIterator[Session]:
    """A session that is open for as long as the block runs.

    terms: with a session id that nobody else can guess, 16 random bytes.
    charge: is told which peer did wrong: peer, weight (see `swarm/blame.py`), reason.
    bring: puts parts of the terms' adapter on a hop that lacks them: block and name of each. Raises why it cannot.
    Raises what the router raised (`BLOCKS_UNSERVED`, `NO_PEERS`), or `SESSION_LOST`.
    """
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        machine = SessionMachine(terms, settings or Settings())
        session = Session(network, router, machine, tasks, charge, bring)
        try:
            await session.wait_ready()
            yield session
        except Exception as problem:  # raised again outside, so that the task group does not wrap it
            failure = problem
        finally:
            with anyio.CancelScope(shield=True):
                await session.close()
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Waiter:
    """Who waits for one step."""

    __slots__ = ("done", "payload", "problem")

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.payload = b""
        self.problem: CorollaError | None = None

    def finish(self, payload: bytes, problem: CorollaError | None = None) -> None:
        self.payload, self.problem = payload, problem
        self.done.set()

    async def result(self) -> bytes:
        await self.done.wait()
        if self.problem is not None:
            raise error_from_wire(self.problem.to_wire())  # a new one for each who waits
        return self.payload


class Events:
    """What happened to a session since `Session.events` was called. Ends with the session."""

    def __init__(self) -> None:
        self._unread: deque[ev.SessionEvent] = deque(maxlen=MAX_UNREAD_EVENTS)
        self._more = anyio.Event()
        self._is_over = False

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> ev.SessionEvent:
        while not self._unread:
            if self._is_over:
                raise StopAsyncIteration
            self._more = anyio.Event()
            await self._more.wait()
        return self._unread.popleft()

    def add(self, event: ev.SessionEvent) -> None:
        """One more."""
        self._unread.append(event)
        self._more.set()

    def end(self) -> None:
        """No more will come."""
        self._is_over = True
        self._more.set()


class Session:
    """Made by `open_session`."""

    def __init__(
        self,
        network: Network,
        router: Router,
        machine: SessionMachine,
        tasks: TaskGroup,
        charge: ChargePeer | None,
        bring: BringParts | None,
    ) -> None:
        self._network = network
        self._router = router
        self._machine = machine
        self._tasks = tasks
        self._charge = charge
        self._bring = bring
        self._wires: dict[int, Wire] = {}
        self._num_wires = 0  # whose tasks still run
        self._no_wires = anyio.Event()
        self._waiters: dict[int, _Waiter] = {}
        self._num_tickets = 0
        self._ready = _Waiter()
        self._problem: CorollaError | None = None
        self._listeners: list[Events] = []
        self._is_closed = False
        self._armed_for: float | None = None
        self._rearm = anyio.Event()

    # the public face

    async def step(self, rows: tuple[Row, ...], payload: bytes, reply: Reply = Reply.ALL) -> bytes:
        """The answer to one step: hidden states of all new tokens, of each row's last one, or nothing.

        payload: hidden states in the session's encoding, row after row, of any length. Steps may be asked
        for before earlier ones are answered; they run in the order of asking.
        Raises `BAD_REQUEST`, `BAD_SHAPE`, `TOO_LONG` (the caller's fault, and the session goes on), and
        `SESSION_LOST`, `NOT_FINITE` (it has ended). A caller that is cancelled leaves its step to run on.
        """
        return await self._ask(lambda ticket: ev.StepRequested(ticket, rows, payload, reply))

    async def again(self, problem: CorollaError) -> bytes:
        """The last answer anew, computed elsewhere: the caller found it wrong, for example not finite.

        Only before the next step. Raises as `step`; `problem` itself if nothing helps.
        """
        ticket = self._num_tickets
        return await self._wait(ticket, ev.Disputed(ticket, problem))

    def keep(self, rows: tuple[Chain, ...]) -> None:
        """Offer hops these pages of the rows as they stand, for later sessions that begin so. Asks for no answer."""
        if self._problem is None:
            self._feed(ev.KeepRequested(rows))

    def leave(self, hop: Hop, reason: str) -> None:
        """Go on without a hop that is slow beside others; what it computed is replayed elsewhere."""
        if self._problem is None:
            self._feed(ev.LeaveRequested(hop, reason))

    def events(self) -> Events:
        """What happens from now on: repairs, waiting, changes of precision."""
        listener = Events()
        if self._is_closed:
            listener.end()
        else:
            self._listeners.append(listener)
        return listener

    def statistics(self) -> Statistics:
        """How it went so far."""
        return self._machine.statistics()

    # its life

    async def wait_ready(self) -> None:
        """Open it, and wait until it can compute. Raises why it cannot."""
        self._tasks.start_soon(self._keep_time)
        self._feed(ev.OpenRequested())
        await self._ready.result()

    async def close(self) -> None:
        """Say goodbye to every hop, for a short time, and forget everything."""
        if not self._is_closed:
            self._is_closed = True
            self._feed(ev.CloseRequested())
            self._finish_all(error(Code.CANCELLED, "the session was closed"))
        if self._num_wires:
            self._no_wires = anyio.Event()
            with anyio.move_on_after(FAREWELL_S):
                await self._no_wires.wait()
        for wire in tuple(self._wires.values()):
            wire.close(None)

    async def _ask(self, request: Callable[[int], ev.Event]) -> bytes:
        self._num_tickets += 1
        return await self._wait(self._num_tickets, request(self._num_tickets))

    async def _wait(self, ticket: int, event: ev.Event) -> bytes:
        if self._problem is not None:
            raise error_from_wire(self._problem.to_wire())
        waiter = self._waiters[ticket] = _Waiter()
        self._feed(event)
        try:
            return await waiter.result()
        finally:
            self._waiters.pop(ticket, None)

    def _feed(self, event: ev.Event) -> None:
        for action in self._machine.handle(event, anyio.current_time()):
            self._act(action)
        deadline = self._machine.next_deadline
        if deadline is not None and (self._armed_for is None or deadline < self._armed_for):
            self._rearm.set()

    def _act(self, action: ev.Action) -> None:
        match action:
            case ev.Send():
                wire = self._wires.get(action.wire)
                if wire is not None:
                    wire.send(action.messages)
            case ev.Deliver():
                self._finish(action.ticket, action.payload)
            case ev.Refuse():
                self._finish(action.ticket, b"", action.problem)
            case ev.FindRoute():
                self._tasks.start_soon(self._find_route, action)
            case ev.OpenHop():
                wire = self._wires[action.wire] = Wire(self._network, action, self._hear, self._lose)
                self._num_wires += 1
                self._tasks.start_soon(self._run_wire, wire)
            case ev.PutParts():
                self._tasks.start_soon(self._put_parts, action)
            case ev.CloseHop():
                wire = self._wires.pop(action.wire, None)
                if wire is not None:
                    wire.close(action.message)
            case ev.Charge():
                if self._charge is not None:
                    self._charge(action.peer, action.weight, action.reason)
            case ev.Emit():
                for listener in self._listeners:
                    listener.add(action.event)
            case ev.Ready():
                self._ready.finish(b"")
            case ev.Fail():
                self._finish_all(action.problem)

    def _finish(self, ticket: int, payload: bytes, problem: CorollaError | None = None) -> None:
        waiter = self._waiters.get(ticket)
        if waiter is not None:  # else its caller was cancelled
            waiter.finish(payload, problem)

    def _finish_all(self, problem: CorollaError) -> None:
        self._problem = self._problem or problem
        for waiter in (self._ready, *self._waiters.values()):
            if not waiter.done.is_set():
                waiter.finish(b"", problem)
        for listener in self._listeners:
            listener.end()
        self._listeners.clear()

    # what waits

    def _hear(self, wire: int, message: Message) -> None:
        self._feed(ev.HopSaid(wire, message))

    def _lose(self, wire: int, problem: CorollaError) -> None:
        self._wires.pop(wire, None)
        self._feed(ev.HopLost(wire, problem))

    async def _run_wire(self, wire: Wire) -> None:
        try:
            await wire.run()
        finally:
            self._num_wires -= 1
            if not self._num_wires:
                self._no_wires.set()

    async def _find_route(self, action: ev.FindRoute) -> None:
        try:
            route = await self._router.find_route(action.request)
        except CorollaError as problem:
            self._feed(ev.RouteMissing(action.ticket, problem))
        else:
            self._feed(ev.RouteFound(action.ticket, route))

    async def _put_parts(self, action: ev.PutParts) -> None:
        problem: CorollaError | None = None
        try:
            if self._bring is None:
                raise error(Code.INTERNAL, "a session with an adapter, and nobody to bring its parts")
            await self._bring(action.hop, action.parts)
        except CorollaError as reason:
            problem = reason
        self._feed(ev.PartsPut(action.wire, problem))

    async def _keep_time(self) -> None:
        while True:
            self._armed_for = self._machine.next_deadline
            self._rearm = anyio.Event()
            deadline = float("inf") if self._armed_for is None else self._armed_for
            with anyio.CancelScope(deadline=deadline):
                await self._rearm.wait()
            due = self._machine.next_deadline
            if due is not None and anyio.current_time() >= due:
                self._feed(ev.Tick())
