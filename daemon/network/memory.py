"""The network's twin in memory: a hub of peers, with delays, deaths, hangs and cut links on demand.

Everything waits on trio's clock, and nothing is random but by the seed, so that a simulation under a mock
clock and deterministic scheduling repeats itself exactly. It knows nothing of sockets or libp2p; `libp2p.py`
uses its `stream_pair` for streams to ourselves.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from ...protocol.errors import Code, error
from ...protocol.limits import MIB
from ...protocol.views import ReachView
from .handlers import Handlers
from .room import Room
from .seam import Guard, Handler, PeerView

WINDOW_BYTES: Final = 256 * 1024  # on their way in one direction of a stream, as in the muxer
_CHUNK_BYTES: Final = 64 * 1024
_PREFIX: Final = "/memory/"

Delay = Callable[[random.Random, str, str], float]  # (rng, from, to) -> seconds of one way


def no_delay(rng: random.Random, source: str, target: str) -> float:
    """Everything arrives at once."""
    return 0.0


def uniform_delay(low_s: float, high_s: float) -> Delay:
    """Every message takes between `low_s` and `high_s`; within one stream they keep their order."""

    def delay(rng: random.Random, source: str, target: str) -> float:
        return rng.uniform(low_s, high_s)

    return delay


class _End:
    """One side's standing: whether its peer is hung, and who waits for it to go on."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.hung = False
        self.lot = trio.lowlevel.ParkingLot()

    async def go(self) -> None:
        """Wait until this peer runs."""
        while self.hung:
            await self.lot.park()


class _Direction:
    """Bytes on their way from one end of a stream to the other."""

    def __init__(self, source: _End, target: _End, delay: Callable[[], float]) -> None:
        self._source = source
        self._target = target
        self._delay = delay
        self._queue: deque[tuple[float, bytes]] = deque()  # (due, bytes); the end is b""
        self._num_bytes = 0
        self._last_due = 0.0
        self._ended = False
        self._broken: str | None = None
        self.lot = trio.lowlevel.ParkingLot()

    @property
    def is_over(self) -> bool:
        return self._ended or self._broken is not None

    async def put(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        view = memoryview(data)
        while view:
            await self._source.go()
            self._check()
            if self._ended:
                raise error(Code.PEER_LOST, f"the stream to {self._target.peer} was closed here")
            room = min(WINDOW_BYTES - self._num_bytes, _CHUNK_BYTES)
            if room <= 0:
                await self.lot.park()
                continue
            self._push(bytes(view[:room]))
            view = view[room:]

    def end(self) -> None:
        if not self._ended and self._broken is None:
            self._ended = True
            self._push(b"")

    async def get(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            await self._target.go()
            now = trio.current_time()
            if self._queue and self._queue[0][0] <= now and (not self._source.hung or self._broken):
                data = self._queue[0][1]
                if data:
                    self._queue.popleft()
                    self._num_bytes -= len(data)
                    self.lot.unpark_all()
                return data
            self._check()
            due = self._queue[0][0] if self._queue and not self._source.hung else float("inf")
            with trio.move_on_at(max(due, now)):
                await self.lot.park()

    def break_off(self, reason: str, *, keep_arrived: bool) -> None:
        if self._broken is not None:
            return
        self._broken = reason
        now = trio.current_time()
        arrived = keep_arrived and not self._source.hung
        self._queue = deque(item for item in self._queue if arrived and item[0] <= now)
        self.lot.unpark_all()

    def _push(self, data: bytes) -> None:
        self._last_due = max(self._last_due, trio.current_time() + self._delay())
        self._queue.append((self._last_due, data))
        self._num_bytes += len(data)
        self.lot.unpark_all()

    def _check(self) -> None:
        if self._broken is not None:
            raise error(Code.PEER_LOST, self._broken)


class MemoryStream:
    """One end of a stream in memory; see `seam.Stream`."""

    def __init__(self, peer: str, protocol: str, outward: _Direction, inward: _Direction) -> None:
        self._peer = peer
        self._protocol = protocol
        self._outward = outward
        self._inward = inward
        self.room: Final = Room()  # its own: in memory a window holds little

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def protocol(self) -> str:
        return self._protocol

    @property
    def is_over(self) -> bool:
        """Whether it broke, or both sides sent their end."""
        return self._outward.is_over and self._inward.is_over

    async def send(self, data: bytes) -> None:
        await self._outward.put(data)

    async def receive(self, limit: int = MIB) -> bytes:
        return await self._inward.get()

    async def close(self) -> None:
        self._outward.end()

    def reset(self) -> None:
        self.break_off(f"the stream {self._protocol} was reset", keep_arrived=False)

    def break_off(self, reason: str, *, keep_arrived: bool) -> None:
        """End both directions with `reason`; bytes that have arrived may stay readable."""
        self._outward.break_off(reason, keep_arrived=keep_arrived)
        self._inward.break_off(reason, keep_arrived=keep_arrived)

    def wake(self) -> None:
        """Let both directions' waiters look again."""
        self._outward.lot.unpark_all()
        self._inward.lot.unpark_all()


def stream_pair(peer: str, protocol: str) -> tuple[MemoryStream, MemoryStream]:
    """Both ends of a stream of a peer to itself, without delay."""
    end = _End(peer)
    there = _Direction(end, end, lambda: 0.0)
    back = _Direction(end, end, lambda: 0.0)
    return MemoryStream(peer, protocol, there, back), MemoryStream(peer, protocol, back, there)


@asynccontextmanager
async def memory_hub(*, seed: int = 0, delay: Delay = no_delay) -> AsyncIterator[MemoryHub]:
    """A hub to make networks on; all of them end with it.

    seed: of the delays. delay: of one message one way, in seconds.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        hub = MemoryHub(nursery, seed=seed, delay=delay)
        try:
            yield hub
        except Exception as problem:  # raised again outside, so that the nursery does not wrap it
            failure = problem
        hub.close()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class MemoryHub:
    """The peers, their connections, and what befalls them. Made by `memory_hub`.

    nursery: runs the handlers, each under its network's cancel scope.
    """

    def __init__(self, nursery: trio.Nursery, *, seed: int, delay: Delay) -> None:
        self.nursery = nursery
        self._seed = seed
        self._delay = delay
        self._networks: dict[str, MemoryNetwork] = {}
        self._ends: dict[str, _End] = {}
        self._connections: dict[tuple[str, str], _Connection] = {}
        self._cuts: dict[tuple[str, str], None] = {}
        self._num_openings: dict[tuple[str, str], int] = {}

    def network(self, peer: str) -> MemoryNetwork:
        """A running network of this peer; after `kill`, a new one under the same name."""
        if peer in self._networks:
            raise error(Code.STATE_IN_USE, f"peer {peer} is on this hub already", "kill it first")
        self._ends[peer] = _End(peer)
        network = self._networks[peer] = MemoryNetwork(self, peer)
        return network

    def peers(self) -> tuple[str, ...]:
        """Who is alive, in the order of their coming."""
        return tuple(self._networks)

    def kill(self, peer: str) -> None:
        """The peer is gone from one moment to the next: its streams break and its handlers are cancelled."""
        network = self._networks.pop(peer, None)
        if network is None:
            return
        network.stop()
        for pair in [pair for pair in self._connections if peer in pair]:
            self._disconnect(pair, f"peer {peer} is gone")
        end = self._ends.pop(peer)
        end.hung = False
        end.lot.unpark_all()

    def hang(self, peer: str) -> None:
        """Nothing moves from or to the peer until `wake`; nobody is told."""
        self._ends[peer].hung = True

    def wake(self, peer: str) -> None:
        """The peer goes on, and everything that was under way arrives late."""
        end = self._ends[peer]
        end.hung = False
        end.lot.unpark_all()
        for pair, connection in self._connections.items():
            if peer in pair:
                for stream in connection.streams():
                    stream.wake()

    def cut(self, one: str, other: str) -> None:
        """Break the link between two peers: what is open ends, and nothing opens until `heal`."""
        pair = _pair(one, other)
        self._cuts[pair] = None
        if pair in self._connections:
            self._disconnect(pair, f"the link between {one} and {other} is cut")

    def heal(self, one: str, other: str) -> None:
        """Undo `cut`."""
        self._cuts.pop(_pair(one, other), None)

    def is_cut(self, one: str, other: str) -> bool:
        """Whether the link between two peers is cut."""
        return _pair(one, other) in self._cuts

    def close(self) -> None:
        """End everything."""
        for peer in tuple(self._networks):
            self.kill(peer)

    # what networks ask for

    def find(self, peer: str) -> MemoryNetwork | None:
        """The network of a live peer."""
        return self._networks.get(peer)

    def is_hung(self, peer: str) -> bool:
        """Whether a live peer hangs."""
        return peer in self._ends and self._ends[peer].hung

    def num_streams_of(self, peer: str) -> int:
        """How many streams a peer has open: for checks that all were released."""
        return sum(len(c.streams()) for pair, c in self._connections.items() if peer in pair)

    async def reach(self, source: str, target: str) -> None:
        """Wait for a round trip between two peers, and connect them. Raises `PEER_LOST`."""
        if source not in self._networks:
            raise error(Code.PEER_LOST, f"peer {source} is gone")
        await self._ends[source].go()
        if source != target:
            rng = self._rng(source, target, "reach")
            await trio.sleep(self._delay(rng, source, target) + self._delay(rng, target, source))
        while target in self._ends and self._ends[target].hung:
            await self._ends[target].lot.park()
        if source not in self._networks or target not in self._networks:
            gone = source if source not in self._networks else target
            raise error(Code.PEER_LOST, f"peer {gone} cannot be reached: it is gone")
        if self.is_cut(source, target):
            raise error(Code.PEER_LOST, f"peer {target} cannot be reached from {source}: the link is cut")
        pair = _pair(source, target)
        if source != target and pair not in self._connections:
            self._connections[pair] = _Connection(source)
            self._networks[source].tell(target, connected=True)
            self._networks[target].tell(source, connected=True)

    def connect_streams(self, source: str, target: str, protocol: str) -> tuple[MemoryStream, MemoryStream]:
        """Both ends of a new stream between connected peers, the opener's first."""
        here, there = self._ends[source], self._ends[target]
        out_rng, in_rng = self._rng(source, target, "out"), self._rng(source, target, "in")
        delay = no_delay if source == target else self._delay
        outward = _Direction(here, there, lambda: delay(out_rng, source, target))
        inward = _Direction(there, here, lambda: delay(in_rng, target, source))
        near = MemoryStream(target, protocol, outward, inward)
        far = MemoryStream(source, protocol, inward, outward)
        self._connections.setdefault(_pair(source, target), _Connection(source)).add(near)
        return near, far

    def connected_to(self, peer: str) -> tuple[tuple[str, bool], ...]:
        """Whom a peer is connected with, and whether they dialled it."""
        return tuple(
            (pair[1] if pair[0] == peer else pair[0], connection.dialler != peer)
            for pair, connection in self._connections.items()
            if peer in pair and pair[0] != pair[1]
        )

    def part(self, one: str, other: str) -> None:
        """Close the connection between two peers."""
        if _pair(one, other) in self._connections:
            self._disconnect(_pair(one, other), f"peer {one} closed the connection")

    def _disconnect(self, pair: tuple[str, str], reason: str) -> None:
        connection = self._connections.pop(pair)
        for stream in connection.streams():
            stream.break_off(reason, keep_arrived=True)
        for peer, other in (pair, pair[::-1]):
            if peer in self._networks and peer != other:
                self._networks[peer].tell(other, connected=False)

    def _rng(self, opener: str, target: str, purpose: str) -> random.Random:
        """Randomness for one purpose of one opening, whatever else happens on the hub meanwhile."""
        number = self._num_openings[opener, target] = self._num_openings.get((opener, target), 0) + 1
        # Seeded by text, not by `hash`, which differs from process to process.
        return random.Random(f"{self._seed} {opener} {target} {purpose} {number}")  # noqa: S311


class _Connection:
    """The streams between two peers; those that have ended are swept out as others come."""

    def __init__(self, dialler: str) -> None:
        self.dialler = dialler
        self._streams: list[MemoryStream] = []

    def add(self, stream: MemoryStream) -> None:
        self._streams = [*self.streams(), stream]

    def streams(self) -> tuple[MemoryStream, ...]:
        return tuple(stream for stream in self._streams if not stream.is_over)


class MemoryNetwork:
    """One peer's network on a hub; see `seam.Network`. Its addresses are `/memory/<peer>/p2p/<peer>`."""

    def __init__(self, hub: MemoryHub, peer: str) -> None:
        self._hub = hub
        self._peer = peer
        self._handlers = Handlers()
        self._listeners: list[Callable[[str, bool], None]] = []
        self._scopes: dict[trio.CancelScope, None] = {}  # of the running handlers, in order

    @property
    def peer(self) -> str:
        return self._peer

    def addresses(self) -> tuple[str, ...]:
        return (f"{_PREFIX}{self._peer}/p2p/{self._peer}",)

    def on_addresses(self, listener: Callable[[], None]) -> None:
        """Addresses in memory never change."""

    def handle(self, protocol: str, handler: Handler) -> None:
        self._handlers.add(protocol, handler)

    def restrict(self, guard: Guard | None) -> None:
        self._handlers.restrict(guard)

    def on_peer(self, listener: Callable[[str, bool], None]) -> None:
        self._listeners.append(listener)

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        """Nothing to remember: on a hub everyone finds everyone by name."""

    def peers(self) -> tuple[PeerView, ...]:
        return tuple(
            PeerView(
                peer=peer,
                addresses=(f"{_PREFIX}{peer}",),
                relayed=False,
                inbound=inbound,
                rtt_s=None,  # drawing a delay here would change what follows
            )
            for peer, inbound in self._hub.connected_to(self._peer)
        )

    def observes(self, peer: str) -> str:
        return ""  # a hub has no addresses to be seen at

    def observed_by(self, peer: str, address: str) -> None:
        """On a hub nobody is seen elsewhere than where it is."""

    def reach(self) -> ReachView:
        return ReachView("public", nat="none")  # on a hub everyone reaches everyone

    async def connect(self, address: str, *, timeout_s: float) -> str:
        peer = address.removeprefix(_PREFIX).partition("/")[0]
        if not address.startswith(_PREFIX) or not peer:
            raise error(
                Code.BAD_REQUEST,
                f"{address!r} is no address on a hub",
                f"expected {_PREFIX}NAME",
            )
        await self._reach(peer, timeout_s)
        return peer

    async def open(self, peer: str, protocol: str, *, timeout_s: float) -> MemoryStream:
        await self._reach(peer, timeout_s)
        there = self._hub.find(peer)
        if there is None or not there.serves(self._peer, protocol):
            raise error(Code.UNSUPPORTED, f"peer {peer} does not speak {protocol}")
        near, far = self._hub.connect_streams(self._peer, peer, protocol)
        there.serve(far)
        return near

    async def disconnect(self, peer: str) -> None:
        self._hub.part(self._peer, peer)
        await trio.lowlevel.checkpoint()

    async def closest_peers(self, key: bytes, count: int) -> tuple[str, ...]:
        await trio.lowlevel.checkpoint()
        others = [
            peer
            for peer in self._hub.peers()
            if peer != self._peer and not self._hub.is_cut(self._peer, peer)
        ]
        target = _position(key)
        return tuple(sorted(others, key=lambda peer: _position(peer.encode()) ^ target)[:count])

    # what the hub does to it

    def serves(self, peer: str, protocol: str) -> bool:
        """Whether a protocol is served here, to this peer."""
        own = peer == self._peer
        return self._handlers.speaks(protocol) and (own or self._handlers.admits(peer, protocol))

    def serve(self, stream: MemoryStream) -> None:
        """Serve an inbound stream, in a task of its own."""
        self._hub.nursery.start_soon(self._serve, stream)

    def tell(self, peer: str, *, connected: bool) -> None:
        """Call the listeners."""
        for listener in tuple(self._listeners):
            listener(peer, connected)

    def stop(self) -> None:
        """The peer is gone: its handlers are cancelled, and its listeners hear nothing more."""
        self._listeners.clear()
        for scope in tuple(self._scopes):
            scope.cancel()

    async def _serve(self, stream: MemoryStream) -> None:
        scope = trio.CancelScope()
        self._scopes[scope] = None
        try:
            with scope:
                await self._handlers.serve(stream)
        finally:
            self._scopes.pop(scope, None)

    async def _reach(self, peer: str, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            await self._hub.reach(self._peer, peer)
            return
        raise error(Code.PEER_LOST, f"peer {peer} cannot be reached: no answer in {timeout_s:g} s")


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one <= other else (other, one)


def _position(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest())
