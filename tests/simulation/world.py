"""One simulated session: the real state machine, simulated peers, and everything that goes wrong, by one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from corolla.daemon.session import events as ev
from corolla.daemon.session.ascent import Phase
from corolla.daemon.session.deadlines import Settings
from corolla.daemon.session.machine import SessionMachine
from corolla.daemon.session.roster import Terms
from corolla.daemon.swarm.blame import HEAVY, LIGHT
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.messages import Message
from corolla.protocol.steps import Reply, Row
from corolla.protocol.tensors import Encoding

from .blocks import TOKEN_BYTES, Blocks, numbers, payload_of, reply_of
from .clock import Clock
from .hops import Attach, SimPeer
from .paths import Offer, random_route
from .rows import random_rows

MAX_TOKENS = 60
LIMIT_S = 4000.0
SESSION = b"simulated-sess-1"


@dataclass
class Stream:
    """One stream between the client and a peer. Each direction is in order."""

    wire: int
    peer: SimPeer
    life: int
    open: bool = True
    was_reset: bool = False
    due_there: float = 0.0
    due_back: float = 0.0


@dataclass
class UserStep:
    """A step that the user takes, and what the whole model answers."""

    rows: tuple[Row, ...]
    payload: bytes
    reply: Reply
    expected: bytes


@dataclass
class Outcome:
    """What a simulation ended with."""

    delivered: dict[int, bytes] = field(default_factory=dict)
    failed: CorollaError | None = None
    events: list[ev.SessionEvent] = field(default_factory=list)
    charges: list[ev.Charge] = field(default_factory=list)


class World:
    """Everything around one machine. `run` plays the user; `after` and what follows serve the peers."""

    def __init__(self, seed: int, *, num_blocks: int = 4) -> None:
        self.rng = random.Random(f"world {seed}")
        self.clock = Clock()
        self.num_blocks = num_blocks
        self.lines: list[str] = []  # the story, for comparing two runs of one seed and for reading
        self.outcome = Outcome()
        self.guilty: set[str] = set()  # may be charged at all
        self.liars: set[str] = set()  # may be charged heavily
        self.peers: dict[str, SimPeer] = {}
        self.listed: dict[str, bool] = {}  # what the registry still says
        self.cuts: set[tuple[str, str]] = set()
        self.silent_cuts: set[tuple[str, str]] = set()
        self.max_delay_s = self.rng.choice((0.001, 0.05, 0.3))
        self.max_compute_s = self.rng.choice((0.001, 0.1, 3.0))
        self.shortens = self.rng.random() < 0.3
        self._streams: dict[int, Stream] = {}
        self._push_due: dict[tuple[str, str], float] = {}
        self._steps: list[UserStep] = []
        self._asked = 0
        self._tick_at: float | None = None
        self._last_tick = -1.0
        self._num_ticks_now = 0
        settings = Settings(part_tokens=self.rng.choice((2, 5, 512)), open_wait_s=60.0)
        terms = Terms(SESSION, "f", 0, num_blocks, Encoding.FLOAT32, TOKEN_BYTES, 8, MAX_TOKENS)
        self.machine = SessionMachine(terms, settings)

    # what the user does

    def plan_steps(self, count: int) -> None:
        """Random steps: prompts, single tokens, forks, dropped rows, rollbacks."""
        whole = Blocks(0, self.num_blocks)
        for index in range(count):
            rows = random_rows(self.rng, whole.lengths, MAX_TOKENS, first=index == 0)
            values = [self.rng.getrandbits(63) for _ in range(sum(row.n for row in rows))]
            reply = self.rng.choice(tuple(Reply))
            out = whole.compute(rows, values)
            expected = payload_of(reply_of(rows, reply, out))
            self._steps.append(UserStep(rows, payload_of(values), reply, expected))

    def run(self) -> None:
        """Open the session, take all steps, close it, and let what is left of it expire."""
        self.feed(ev.OpenRequested())
        ahead = self.rng.choice((1, 1, 2, 6))
        self._ask(ahead)
        done = self.clock.run(lambda: self.is_over, LIMIT_S)
        if not done:
            raise AssertionError(f"stuck at {self.clock.now:.1f} s in {self.machine.phase}")
        if self.machine.phase is not Phase.ENDED:
            self.feed(ev.CloseRequested())
        self.clock.run(lambda: False, self.clock.now + 200.0)

    @property
    def is_over(self) -> bool:
        """All answers are here, or the session has failed."""
        return self.outcome.failed is not None or len(self.outcome.delivered) == len(self._steps)

    @property
    def steps(self) -> list[UserStep]:
        return self._steps

    def _ask(self, ahead: int) -> None:
        while self._asked < len(self._steps) and self._asked < len(self.outcome.delivered) + ahead:
            step = self._steps[self._asked]
            self._asked += 1
            self.feed(ev.StepRequested(self._asked, step.rows, step.payload, step.reply))
        if not self.is_over:
            pause_s = self.rng.choice((0.01, 0.1, 1.0, 3.0))
            self.clock.after(pause_s, lambda: self._ask(ahead))

    # the client around the machine

    def feed(self, event: ev.Event) -> None:
        """Give the machine an event, and do what it wants."""
        self._tell("<-", event)
        for action in self.machine.handle(event, self.clock.now):
            self._tell("->", action)
            self._act(action)
        self._arm()

    def _tell(self, arrow: str, what: ev.Event | ev.Action) -> None:
        if isinstance(what, ev.Send) and not isinstance(what.messages, tuple | list):
            text = f"Send(wire={what.wire}, a replay)"
        else:
            text = str(what).replace(f"session={SESSION!r}, ", "")
        self.lines.append(f"{self.clock.now:9.4f} {self.machine.phase.name:9} {arrow} {text}")

    def _arm(self) -> None:
        deadline = self.machine.next_deadline
        if deadline is None or (self._tick_at is not None and self._tick_at <= deadline):
            return
        self._tick_at = deadline
        self.clock.at(deadline, lambda: self._tick(deadline))

    def _tick(self, at: float) -> None:
        if self._tick_at != at:
            return
        self._tick_at = None
        self._num_ticks_now = self._num_ticks_now + 1 if self.clock.now == self._last_tick else 0
        self._last_tick = self.clock.now
        if self._num_ticks_now > 100:
            raise AssertionError(f"it asks for a tick at {at} again and again")
        self.feed(ev.Tick())

    def _act(self, action: ev.Action) -> None:
        match action:
            case ev.FindRoute():
                self.clock.after(self.rng.uniform(0, 0.1), lambda: self._find_route(action))
            case ev.OpenHop():
                self._open(action)
            case ev.Send():
                for message in action.messages:
                    self._to_peer(action.wire, message)
            case ev.CloseHop():
                if action.message is not None:
                    self._to_peer(action.wire, action.message)
                self._close(action.wire, was_reset=action.message is None)
            case ev.Deliver():
                if action.ticket in self.outcome.delivered:
                    raise AssertionError(f"step {action.ticket} was delivered twice")
                self.outcome.delivered[action.ticket] = action.payload
            case ev.Charge():
                self.outcome.charges.append(action)
            case ev.Emit():
                self.outcome.events.append(action.event)
            case ev.Fail():
                self.outcome.failed = action.problem
            case ev.Refuse():
                raise AssertionError(f"refused: {action.problem}")

    def _delay(self) -> float:
        return self.rng.uniform(0, self.max_delay_s)

    def _open(self, action: ev.OpenHop) -> None:
        peer = self.peers[action.peer]
        stream = self._streams[action.wire] = Stream(action.wire, peer, peer.life)
        stream.due_there = self.clock.now
        if not peer.alive:
            self.clock.after(self._delay(), lambda: self.break_stream(stream))
        else:
            self._to_peer(action.wire, action.message)

    def _to_peer(self, wire: int, message: Message) -> None:
        stream = self._streams.get(wire)
        if stream is None or not stream.open:
            return
        stream.due_there = max(stream.due_there, self.clock.now + self._delay())
        say = self._sayer(stream)

        def arrive() -> None:
            if stream.life == stream.peer.life and stream.peer.alive:
                stream.peer.later(0.0, hear)

        def hear() -> None:
            if stream.was_reset:
                return
            stream.peer.hear(message, say, stream.wire)
            if not stream.open:  # it comes late to a peer that hung, which now finds the stream ended
                self._start_grace(stream.peer, stream.wire)

        self.clock.after(stream.due_there - self.clock.now, arrive)

    def _sayer(self, stream: Stream) -> Callable[[Message], None]:
        def say(message: Message) -> None:
            if not stream.open or stream.life != stream.peer.life:
                return
            stream.due_back = max(stream.due_back, self.clock.now + self._delay())
            self.clock.after(stream.due_back - self.clock.now, lambda: arrive(message))

        def arrive(message: Message) -> None:
            if stream.open:
                self.feed(ev.HopSaid(stream.wire, message))

        return say

    def break_stream(self, stream: Stream) -> None:
        """The client notices that a stream is gone."""
        if stream.open:
            self._close(stream.wire)
            self.feed(ev.HopLost(stream.wire, error(Code.PEER_LOST, f"{stream.peer.name} is gone")))

    def _close(self, wire: int, *, was_reset: bool = False) -> None:
        stream = self._streams.pop(wire, None)
        if stream is not None:
            stream.open = False
            stream.was_reset = was_reset
            self._start_grace(stream.peer, wire)

    def _start_grace(self, peer: SimPeer, wire: int) -> None:
        def expire() -> None:
            for key, session in list(peer.sessions.items()):
                if session.stream == wire:
                    del peer.sessions[key]

        peer.later(60.0, expire)

    @property
    def num_streams(self) -> int:
        """Streams that are still open."""
        return len(self._streams)

    def streams_of(self, name: str) -> list[Stream]:
        """Open streams to a peer."""
        return [stream for stream in self._streams.values() if stream.peer.name == name]

    # the router

    def _find_route(self, action: ev.FindRoute) -> None:
        offers = [
            Offer(peer.hop, peer.start, peer.end) for peer in self.peers.values() if self.listed[peer.name]
        ]
        route = random_route(self.rng, offers, action.request)
        if route is None:
            self.feed(ev.RouteMissing(action.ticket, error(Code.BLOCKS_UNSERVED, "nobody serves this")))
        else:
            self.feed(ev.RouteFound(action.ticket, route))

    # the peers' surroundings

    def add_peer(self, name: str, start: int, end: int) -> SimPeer:
        peer = self.peers[name] = SimPeer(name, start, end, self)
        self.listed[name] = True
        return peer

    def after(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.clock.after(delay_s, callback)

    def compute_s(self, peer: SimPeer) -> float:
        return self.rng.uniform(0, self.max_compute_s)

    def held_share(self) -> float:
        return self.rng.random() if self.shortens and self.rng.random() < 0.3 else 1.0

    def push(self, source: SimPeer, target: str, message: Message | Attach) -> bool:
        peer = self.peers[target]
        link = (source.name, target)
        if link in self.cuts or not peer.alive:
            return False
        if link in self.silent_cuts:
            return True
        due = max(self._push_due.get(link, 0.0), self.clock.now + self._delay())
        self._push_due[link] = due
        life = peer.life

        def arrive() -> None:
            if peer.alive and peer.life == life and link not in self.cuts:
                peer.later(0.0, lambda: peer.hear_push(message))

        self.clock.after(due - self.clock.now, arrive)
        return True

    # what goes wrong

    def kill(self, name: str, *, back_after_s: float | None = None) -> None:
        """A peer dies; the registry forgets it after a while; perhaps it starts anew."""
        peer = self.peers[name]
        if not peer.alive:
            return
        self.guilty.add(name)
        peer.alive = False
        peer.hung = False
        peer.life += 1
        peer.sessions.clear()
        for stream in self.streams_of(name):
            self.clock.after(self._delay(), lambda stream=stream: self.break_stream(stream))  # type: ignore[misc]
        for other in self.peers.values():
            for session in list(other.sessions.values()):
                if session.downstream == peer.hop and other.alive:
                    other.later(self._delay(), lambda o=other, s=session: self._notice(o, s, name))  # type: ignore[misc]
        self.clock.after(self.rng.uniform(0, 60), lambda: self._unlist(name))
        if back_after_s is not None:
            self.clock.after(back_after_s, lambda: self._revive(name))

    def _notice(self, peer: SimPeer, session: object, lost: str) -> None:
        for current in peer.sessions.values():
            if current is session and current.downstream is not None and current.downstream.peer == lost:
                peer.link_failed(current)

    def _unlist(self, name: str) -> None:
        if not self.peers[name].alive:
            self.listed[name] = False

    def _revive(self, name: str) -> None:
        self.peers[name].alive = True
        self.listed[name] = True

    def hang(self, name: str, for_s: float) -> None:
        """A peer does nothing for a while, then goes on as if nothing had happened."""
        peer = self.peers[name]
        self.guilty.add(name)
        peer.hung = True
        self.clock.after(for_s, lambda: setattr(peer, "hung", False))

    def cut(self, one: str, other: str, *, silent: bool, for_s: float) -> None:
        """Two peers do not reach each other, and are told or not."""
        cuts = self.silent_cuts if silent else self.cuts
        for link in ((one, other), (other, one)):
            cuts.add(link)
            self.clock.after(for_s, lambda link=link: cuts.discard(link))  # type: ignore[misc]
            if not silent:
                for session in self.peers[link[0]].sessions.values():
                    self._notice(self.peers[link[0]], session, link[1])

    def check(self) -> None:
        """Raise AssertionError unless everything that must hold after `run` does."""
        outcome = self.outcome
        for ticket, payload in outcome.delivered.items():
            expected = self._steps[ticket - 1].expected
            if payload != expected:
                raise AssertionError(f"step {ticket}: {numbers(payload)}, expected {numbers(expected)}")
        if list(outcome.delivered) != list(range(1, len(outcome.delivered) + 1)):
            raise AssertionError(f"answers out of order: {list(outcome.delivered)}")
        for charge in outcome.charges:
            allowed = self.liars if charge.weight >= HEAVY else self.guilty | self.liars
            if charge.weight >= LIGHT and charge.peer not in allowed:  # anybody may be slow
                raise AssertionError(f"{charge.peer} is innocent, and charged: {charge.reason}")
        if self.num_streams:
            raise AssertionError(f"{self.num_streams} streams are open")
        if self.machine.next_deadline is not None or self.machine.statistics().history_bytes:
            raise AssertionError("the machine waits, or keeps history, after its end")
        for peer in self.peers.values():
            if peer.alive and not peer.hung and peer.sessions:
                raise AssertionError(f"{peer.name} keeps a session")
