"""Direct connections in the place of relayed ones, by DCUtR. See `dcutr.py` for what is said.

Of the two ends of a circuit, `A` made it and `B` was called. `B` dials `A` first, if `A` says that it is public.
Otherwise both dial at once: each packet that goes out opens the sender's NAT for the one that comes, and the two
openings meet as one connection (RFC 9293, section 3.5, simultaneous open). `A` is its client and `B` its server,
whosever packet came first. Meanwhile `A` tries whether `B` lives in its own network. Unlike the specification's
three attempts there are six, less and less often. Should each have called the other, the circuit of the smaller
peer id counts.

It owns no connection: it is told how to dial, and waits for a direct connection to stand. Addresses that a peer
sends us are dialled only if they are public, so that nobody makes us knock at doors in our own network.
Source: Ford, Srisuresh and Kegel 2005, Peer-to-peer communication across network address translators;
https://github.com/libp2p/specs/blob/master/relay/DCUtR.md.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

import structlog
import trio
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from ....protocol.errors import Code, CorollaError, error
from ....protocol.limits import MAX_DOORS, MAX_PUNCHES
from ..seam import Network, Stream
from . import dcutr
from .dcutr import DCUTR_PROTOCOL
from .identifying import identify
from .multiaddresses import public_endpoints
from .observations import endpoint_of
from .preamble import Preamble

DIAL_S: Final = 4.0  # for a SYN through two NATs, and two repetitions of it
SETTLE_S: Final = 0.5  # until the far side, too, has seen the direct connection
REDIAL_S: Final = 0.5  # after a dial that a router refused: the other's packet may open its door yet
TALK_S: Final = 10.0  # for what is said in one attempt
AGAIN_S: Final = (1.0, 5.0, 15.0, 30.0, 60.0, 300.0)  # after a circuit was made, and after each failure

Dial: TypeAlias = Callable[[str, str], Awaitable[object]]  # address, peer; raises `PEER_LOST`
Attempt: TypeAlias = Callable[[str], Awaitable[None]]  # with a peer; raises a `CorollaError` with the reason

_log = structlog.get_logger("corolla.punching")


@dataclass(frozen=True, slots=True)
class Ways:
    """What punching needs of a network.

    call: dials as a client. meet: dials as the server of what is made. expecting: while it holds, we are the client
    of what the peer opens from these endpoints too. near: dials a peer at the private addresses that it told, lest
    it is in our own network. doors: where others see us. has_called: whether a circuit to the peer is ours.
    is_direct: whether a direct connection with a peer stands; wait_direct: waits until one does.
    """

    call: Dial
    meet: Dial
    expecting: Callable[[str, Sequence[tuple[str, int]]], AbstractContextManager[None]]
    near: Attempt
    doors: Callable[[], Sequence[str]]
    has_called: Callable[[str], bool]
    is_direct: Callable[[str], bool]
    wait_direct: Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Circuit:
    """A relayed connection that stands. we_called: whether we made it, and so end it when it is replaced."""

    peer: str
    we_called: bool
    wait_ended: Callable[[], Awaitable[None]]
    end: Callable[[], Awaitable[None]]


class Punching:
    """Serves `DCUTR_PROTOCOL` on a network."""

    def __init__(self, network: Network, ways: Ways) -> None:
        self._network = network
        self._ways = ways
        self._under_way: set[str] = set()  # peers, with each of whom there is one attempt at a time

    def serve(self) -> None:
        """Answer those whom we called, from now on."""
        self._network.handle(DCUTR_PROTOCOL, self._answer)

    async def replace(self, circuit: Circuit) -> None:
        """Try now and again to put a direct connection in a circuit's place, until one stands or the circuit ends.

        Streams on the circuit break then; sessions go on over the direct connection.
        """
        peer = circuit.peer
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pursue, circuit, nursery.cancel_scope)
            await circuit.wait_ended()
            nursery.cancel_scope.cancel()
        _log.debug("circuit_ended", peer=peer, we_called=circuit.we_called)

    async def _pursue(self, circuit: Circuit, everything: trio.CancelScope) -> None:
        peer = circuit.peer
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._try_again, peer, self._come_near if circuit.we_called else self._punch)
            await self._ways.wait_direct(peer)
            nursery.cancel_scope.cancel()
        _log.info("direct", peer=peer)
        await trio.sleep(SETTLE_S)
        if circuit.we_called and self._ways.is_direct(peer):
            await circuit.end()
        everything.cancel()

    async def _try_again(self, peer: str, attempt: Attempt) -> None:
        for pause_s in AGAIN_S:
            await trio.sleep(pause_s)
            try:
                await attempt(peer)
            except CorollaError as problem:
                _log.debug("punch_failed", peer=peer, reason=problem.message)
        _log.info("stays_relayed", peer=peer)

    # as B: we were called

    async def _punch(self, peer: str) -> None:
        """One attempt. Raises why it could not be made."""
        if self._ways.has_called(peer) and self._network.peer < peer:
            # Each of us called the other, and would be client and server of one connection. One circuit counts.
            raise error(Code.BUSY, f"{peer} and we called each other; it opens the doors")
        with self._attempt(peer):
            await self._reverse(peer)
            if self._ways.is_direct(peer):
                return
            doors, rtt_s = await self._agree(peer)
            await trio.sleep(rtt_s / 2)
            await self._knock(peer, doors, self._ways.meet)

    async def _reverse(self, peer: str) -> None:
        """Dial a caller that says that it is public."""
        try:
            told = await identify(self._network, peer)
        except CorollaError as problem:
            _log.debug("caller_not_identified", peer=peer, reason=problem.message)
            return
        await self._knock(peer, public_endpoints(told.listens), self._ways.call, again=False)

    async def _agree(self, peer: str) -> tuple[Sequence[str], float]:
        """Where the caller may be met, and the round trip to it. When this returns it has been told to dial."""
        ours = self._ways.doors()
        if not ours:
            raise error(Code.PEER_LOST, "nobody has told yet where it sees us")
        stream = await self._network.open(peer, DCUTR_PROTOCOL, timeout_s=TALK_S)
        try:
            with trio.fail_after(TALK_S):
                talk = Preamble(stream)
                asked_at = trio.current_time()
                await talk.say(dcutr.connect(ours))
                doors = dcutr.doors_of(await talk.hear(HolePunch))
                rtt_s = trio.current_time() - asked_at
                await talk.say(dcutr.sync())
                await stream.close()
        except trio.TooSlowError as problem:
            stream.reset()
            raise error(Code.TIMEOUT, f"{peer} did not answer a punch in {TALK_S:g} s") from problem
        except BaseException:
            stream.reset()
            raise
        _log.debug("punch", peer=peer, doors=doors, rtt_s=round(rtt_s, 4))
        return doors, rtt_s

    # as A: we called

    async def _come_near(self, peer: str) -> None:
        """Dial one who may be in our own network. Raises why it is not reached there."""
        with trio.move_on_after(TALK_S):
            await self._ways.near(peer)

    async def _answer(self, stream: Stream) -> None:
        peer = stream.peer
        if self._is_busy(peer):
            stream.reset()
            return
        with self._attempt(peer):
            doors = await self._agreed(stream)
            _log.debug("punched", peer=peer, doors=doors)
            endpoints = [endpoint for door in doors[:MAX_DOORS] if (endpoint := endpoint_of(door))]
            with self._ways.expecting(peer, endpoints):
                await self._knock(peer, doors, self._ways.call)

    async def _agreed(self, stream: Stream) -> Sequence[str]:
        """Where the called one may be met; returns when it says so. Raises what it did wrong."""
        try:
            with trio.fail_after(TALK_S):
                talk = Preamble(stream)
                doors = dcutr.doors_of(await talk.hear(HolePunch))
                await talk.say(dcutr.connect(self._ways.doors()))
                dcutr.check_sync(await talk.hear(HolePunch))
                await stream.close()
        except trio.TooSlowError as problem:
            raise error(Code.TIMEOUT, f"{stream.peer} did not finish a punch in {TALK_S:g} s") from problem
        return doors

    # both

    def _is_busy(self, peer: str) -> bool:
        """Whether there are attempts enough, or nothing is left to do."""
        is_full = peer in self._under_way or len(self._under_way) >= MAX_PUNCHES
        return is_full or self._ways.is_direct(peer)

    @contextmanager
    def _attempt(self, peer: str) -> Iterator[None]:
        """Hold the right to one. Raises `BUSY`."""
        if self._is_busy(peer):
            raise error(Code.BUSY, f"no punch with {peer} now")
        self._under_way.add(peer)
        try:
            yield
        finally:
            self._under_way.discard(peer)

    async def _knock(self, peer: str, doors: Sequence[str], dial: Dial, *, again: bool = True) -> None:
        """Dial all of these at once until a direct connection stands, whoever makes it, or time is up.

        again: whether a dial that failed is repeated within that time; without, it ends when all have failed.
        """

        async def one(address: str) -> None:
            while True:
                try:
                    await dial(address, peer)
                except CorollaError as problem:
                    _log.debug("door_closed", peer=peer, address=address, reason=problem.message)
                if not again:
                    return
                await trio.sleep(REDIAL_S)

        async def watch() -> None:
            await self._ways.wait_direct(peer)
            everything.cancel()

        with trio.move_on_after(DIAL_S) as everything:
            async with trio.open_nursery() as watching:
                watching.start_soon(watch)
                async with trio.open_nursery() as dials:
                    for address in doors[:MAX_DOORS]:
                        dials.start_soon(one, address)
                if not again:
                    watching.cancel_scope.cancel()
