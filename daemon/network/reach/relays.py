"""Our use of relays: reservations kept where we are private, circuits dialled and taken.

It owns the reservations. A relay is any member that we reach directly and that grants one. Which connection of
several a stream takes, `libp2p.py` decides; a direct one always comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import structlog
import trio
from libp2p.abc import IRawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage

from ....protocol.errors import Code, CorollaError, error
from ....protocol.limits import (
    CIRCUIT_TIMEOUT_S,
    MAX_RELAYS,
    RELAYS_EVERY_S,
    RESERVATION_S,
)
from ....protocol.views import RelayUse
from ..seam import Network, PeerView, Stream
from .circuits import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    CircuitConnection,
    CircuitLimit,
    check_status,
    circuit_address,
    peer_of,
    split_circuit,
    stop_status,
)
from .identifying import identify
from .preamble import Preamble

RENEW_AFTER_S: Final = RESERVATION_S / 3  # so that two renewals may fail
# Before a member that gave no reservation is asked again: soon at first, since it serves nobody whose
# membership it has not seen yet; then less and less often.
FIRST_AGAIN_S: Final = 1.0
LAST_AGAIN_S: Final = 300.0

_log = structlog.get_logger("corolla.relays")


class Refusal(NamedTuple):
    """A member gave no reservation: when to ask it again, and how long that was put off."""

    again_at: float
    after_s: float


class Upgrade(Protocol):
    """Secures and multiplexes a circuit that somebody made to us; it is then one of our connections."""

    async def __call__(self, circuit: IRawConnection, address: str) -> None: ...


class Relays:
    """The circuits of one network, and where we can be called.

    take: makes a connection of an inbound circuit. is_private: whether nobody can dial us directly.
    changed: called when our relayed addresses are others.
    """

    def __init__(
        self,
        network: Network,
        take: Upgrade,
        is_private: Callable[[], bool],
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._network = network
        self._take = take
        self._is_private = is_private
        self._changed = changed
        self._held: dict[str, tuple[str, float]] = {}  # relay → its address, when the reservation was made
        self._refused: dict[str, Refusal] = {}
        self._observed: dict[str, str] = {}  # relay → where it sees us
        self._stirred = trio.Event()

    def serve(self) -> None:
        """Answer relays from now on."""
        self._network.handle(STOP_PROTOCOL, self._answer)
        self._network.on_peer(self._peer_changed)

    @property
    def held(self) -> tuple[str, ...]:
        """Relays where we hold a reservation."""
        return tuple(self._held)

    def addresses(self) -> tuple[str, ...]:
        """Where we are called through relays, without our own `/p2p/…`."""
        return tuple(circuit_address(address, relay) for relay, (address, _) in self._held.items())

    def uses(self) -> tuple[RelayUse, ...]:
        """Our relays, and how far away they are."""
        rtts = {view.peer: view.rtt_s for view in self._network.peers()}
        return tuple(RelayUse(relay, address, rtts.get(relay)) for relay, (address, _) in self._held.items())

    def observed(self) -> tuple[str, ...]:
        """Where our relays see us: what our NAT makes of the port that we listen on."""
        return tuple(
            dict.fromkeys(self._observed[relay] for relay in self._held if self._observed.get(relay))
        )

    def stir(self) -> None:
        """Look at once whether reservations are needed: it became known whether we are private."""
        self._stirred.set()

    async def run(self) -> None:
        """Keep as many reservations as are useful, until cancelled."""
        while True:
            self._stirred = trio.Event()
            looked_at = trio.current_time()
            if self._is_private():
                await self._renew()
                await self._reserve_more()
            elif self._held:
                self._held.clear()
                self._changed()
            asks = (one.again_at for one in self._refused.values() if one.again_at > looked_at)
            soonest = min(asks, default=looked_at + RELAYS_EVERY_S) - trio.current_time()
            with trio.move_on_after(min(RELAYS_EVERY_S, max(FIRST_AGAIN_S, soonest))):
                await self._stirred.wait()

    async def dial(self, address: str, peer: str) -> CircuitConnection:
        """A circuit to `peer` by the relay in the address. Raises `PEER_LOST`, `BUSY`, `UNSUPPORTED`."""
        relay_address, relay = split_circuit(address)
        self._network.learn(relay, (relay_address,))
        stream = await self._network.open(relay, HOP_PROTOCOL, timeout_s=CIRCUIT_TIMEOUT_S)
        try:
            with trio.fail_after(CIRCUIT_TIMEOUT_S):
                talk = Preamble(stream)
                target = PeerId(id=ID.from_string(peer).to_bytes())
                await talk.say(HopMessage(type=HopMessage.CONNECT, peer=target))
                answer = await talk.hear(HopMessage)
            check_status(answer.status, f"relay {relay} does not connect to {peer}")
        except trio.TooSlowError as problem:
            stream.reset()
            raise error(Code.PEER_LOST, f"relay {relay} did not answer") from problem
        except BaseException:
            stream.reset()
            raise
        return CircuitConnection(
            stream,
            talk.rest,
            circuit_address(relay_address, relay),
            is_initiator=True,
            limit=CircuitLimit.said(answer.limit),
        )

    # being called

    async def _answer(self, stream: Stream) -> None:
        """A relay says that somebody calls."""
        talk = Preamble(stream)
        with trio.fail_after(CIRCUIT_TIMEOUT_S):
            message = await talk.hear(StopMessage)
        if message.type != StopMessage.CONNECT:
            await talk.say(stop_status(Status.UNEXPECTED_MESSAGE))
            await stream.close()
            return
        caller = peer_of(message.peer)
        known = self._held.get(stream.peer)
        if known is None:
            await talk.say(stop_status(Status.PERMISSION_DENIED))
            await stream.close()
            return
        await talk.say(stop_status(Status.OK))
        address = circuit_address(known[0], stream.peer)
        _log.debug("called", by=caller, relay=stream.peer)
        await self._take(CircuitConnection(stream, talk.rest, address, is_initiator=False), address)

    # reservations

    async def _renew(self) -> None:
        due = trio.current_time() - RENEW_AFTER_S
        for relay, (address, since) in tuple(self._held.items()):
            if since <= due:
                await self._reserve(relay, address)

    async def _reserve_more(self) -> None:
        for view in candidates(self._network.peers(), self._held, self._refused, trio.current_time()):
            if len(self._held) >= MAX_RELAYS:
                break
            await self._reserve(view.peer, view.addresses[0])

    async def _reserve(self, relay: str, address: str) -> None:
        before = self.addresses()
        try:
            stream = await self._network.open(relay, HOP_PROTOCOL, timeout_s=CIRCUIT_TIMEOUT_S)
            try:
                with trio.fail_after(CIRCUIT_TIMEOUT_S):
                    talk = Preamble(stream)
                    await talk.say(HopMessage(type=HopMessage.RESERVE))
                    answer = await talk.hear(HopMessage)
            finally:
                stream.reset()
            check_status(answer.status, f"{relay} gives no reservation")
        except (CorollaError, trio.TooSlowError) as problem:
            self._held.pop(relay, None)
            last = self._refused.get(relay)
            after_s = min(LAST_AGAIN_S, 2 * last.after_s) if last is not None else FIRST_AGAIN_S
            self._refused[relay] = Refusal(trio.current_time() + after_s, after_s)
            _log.info("no_reservation", relay=relay, reason=str(problem))
        else:
            await self._ask_observed(relay)
            self._held[relay] = (address, trio.current_time())
            self._refused.pop(relay, None)
        if self.addresses() != before:
            self._changed()

    async def _ask_observed(self, relay: str) -> None:
        """Ask a relay where it sees us, by libp2p's identify."""
        try:
            self._observed[relay] = (await identify(self._network, relay)).observed
        except CorollaError as problem:
            _log.debug("not_observed", relay=relay, reason=str(problem))

    def _peer_changed(self, peer: str, connected: bool) -> None:
        if not connected:
            self._refused.pop(peer, None)
            if self._held.pop(peer, None) is not None:
                self._changed()
        self._stirred.set()


def candidates(
    peers: Sequence[PeerView], held: dict[str, tuple[str, float]], refused: dict[str, Refusal], now: float
) -> list[PeerView]:
    """Members that may relay for us: reached directly, by us, and not asked in vain lately; nearest first."""

    def fits(view: PeerView) -> bool:
        lately = view.peer in refused and now < refused[view.peer].again_at
        return bool(view.addresses) and not (view.relayed or view.inbound or lately or view.peer in held)

    return sorted(filter(fits, peers), key=lambda view: (view.rtt_s or float("inf"), view.peer))
