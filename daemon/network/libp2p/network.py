"""The network over py-libp2p: TCP, Noise and our Yamux, and nothing else.

The library's exceptions become ours here. What it does badly is replaced through its own seams, each in a
file that says why: `host.py`, `yamux.py`, `noise.py`, `kademlia.py`, `multistream.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import structlog
import trio
from libp2p.abc import INetStream, IRawConnection
from libp2p.custom_types import TProtocol
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.rcmgr import Direction
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from ....protocol.errors import Code, CorollaError, error
from ....protocol.limits import (
    CONNECT_TIMEOUT_S,
    MAX_ADDRESSES,
    MAX_CONNECTIONS,
    MAX_CONNECTIONS_PER_PEER,
    MAX_UNREAD_OF_ALL_BYTES,
)
from ....protocol.views import ReachView
from ...identity import Identity
from ..allowance import Allowances, heaviest
from ..dialling import AddressBook, Dials, Reach, Reachability, reach_of, split_peer, try_each, unreachable
from ..handlers import Handlers
from ..memory import MemoryStream, stream_pair
from ..reach.autonat import DIAL_BACK_PROTOCOL
from ..reach.circuits import CircuitConnection
from ..reach.observations import Sighting, place_of
from ..reach.presence import Choices, Means, Presence
from ..reach.punching import Circuit, Punching, Ways
from ..reach.reaching import say_nonce
from ..reach.relaying import RelayLimits
from ..seam import Guard, Handler, PeerView, Stream
from ..traffic import Traffic
from ..wire.multistream import agree
from ..wire.yamux import Yamux, YamuxStream
from .connections import Connections, is_relayed, yamux_of
from .host import check_port, make_host, quieten, root_cause
from .kademlia import SwarmRouting
from .streams import Libp2pStream
from .tcp import listenable

DEFAULT_LISTEN: Final = ("/ip4/0.0.0.0/tcp/0",)
RENEW_AGAIN_S: Final = 5.0  # after a circuit could not be replaced; there is time, a fifth of its own
CLOSE_TIMEOUT_S: Final = 3.0  # for farewells when the network closes; then everything is dropped

_log = structlog.get_logger("corolla.libp2p")


@asynccontextmanager
async def open_network(
    identity: Identity,
    *,
    listen: Sequence[str] = DEFAULT_LISTEN,
    announce: Sequence[str] = (),
    kad_protocol: str | None = None,
    guard: Guard | None = None,
    max_connections: int = MAX_CONNECTIONS,
    reachability: Reachability = Reachability.AUTO,
    relay: RelayLimits | None = None,
    traffic: Traffic | None = None,
    upnp: bool = False,
) -> AsyncIterator[Libp2pNetwork]:
    """A running network. Leaving the block closes it in bounded time; the same port can be opened again.

    listen: multiaddresses; none of them makes a network that only dials. announce: addresses to tell others
    first, such as a forwarded port. kad_protocol: the swarm's own Kademlia protocol id; None while in no
    swarm. guard: as `Network.restrict`, and asked for `kad_protocol` too. relay: what we carry for others;
    None is nothing. traffic: counts and paces what streams carry. upnp: whether to ask our router to forward a
    port. Raises `PORT_TAKEN`, or `BAD_CONFIG` for an address that this machine cannot listen on.
    """
    quieten()
    listen = listenable(listen)
    for address in listen:
        check_port(address)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        network = Libp2pNetwork(
            identity,
            nursery,
            Choices(tuple(announce), reachability, relay, upnp),
            max_connections=max_connections,
            traffic=traffic or Traffic(),
        )
        network.restrict(guard)
        is_open = trio.Event()
        nursery.start_soon(_stop_unless, is_open, network)
        try:
            await nursery.start(network.run, tuple(listen), kad_protocol)
            is_open.set()
            try:
                if network.failure is None:
                    yield network
            finally:
                network.stop()
                nursery.cancel_scope.cancel()  # handlers of our own streams; `run` is shielded
        except Exception as problem:  # raised again outside, so that the nursery does not wrap it
            failure = problem
            nursery.cancel_scope.cancel()
    failure = failure or network.failure
    if failure is not None:
        raise failure


async def _stop_unless(is_open: trio.Event, network: Libp2pNetwork) -> None:
    """Stop it when the block is cancelled while it still opens: its own task is shielded from that.

    Afterwards it stays open until the block is left: whoever is cancelled in there may have farewells to say.
    """
    try:
        await is_open.wait()
    finally:
        if not is_open.is_set():
            network.stop()


class Libp2pNetwork:
    """See `seam.Network`. Made by `open_network`."""

    def __init__(
        self,
        identity: Identity,
        nursery: trio.Nursery,
        choices: Choices,
        *,
        max_connections: int,
        traffic: Traffic,
    ) -> None:
        self._peer = identity.peer
        self._traffic = traffic
        self._nursery = nursery
        self._handlers = Handlers()
        self._listeners: list[Callable[[str, bool], None]] = []
        self._book = AddressBook()
        self._connections = Connections()
        self._dials: Dials[SwarmConn] = Dials()
        self._routing: SwarmRouting | None = None
        self._stopping = trio.Event()
        self._scope = trio.CancelScope(shield=True)
        self.failure: CorollaError | None = None  # why it could not start, or broke down
        means = Means(self._take_circuit, self._ring, self._came_in, traffic)
        self._presence = Presence(self, means, choices)
        self._swarm, self._host = make_host(
            identity,
            reach=self._reach,
            connected=self._on_connected,
            advertised=self._presence.addresses,
            admits=self._handlers.admits,
            allowances=Allowances(self._handlers.knows, on_bytes=self._weigh),
            max_connections=max_connections,
        )
        self._presence.serve()
        self.relays: Final = self._presence.relays
        self.relaying: Final = self._presence.relaying
        ways = Ways(
            call=self._dial,
            meet=self._meet,
            expecting=self._swarm.expecting,
            near=self._call_near,
            doors=self._presence.doors,
            has_called=self._connections.has_called,
            is_direct=self._connections.is_direct,
            wait_direct=self._connections.wait_direct,
        )
        self._punching = Punching(self, ways)
        self._punching.serve()

    # the seam

    @property
    def peer(self) -> str:
        return self._peer

    def addresses(self) -> tuple[str, ...]:
        return tuple(f"{address}/p2p/{self._peer}" for address in self._presence.addresses())

    def on_addresses(self, listener: Callable[[], None]) -> None:
        self._presence.on_change(listener)

    def handle(self, protocol: str, handler: Handler) -> None:
        self._handlers.add(protocol, handler)
        self._host.set_stream_handler(TProtocol(protocol), partial(self._serve, protocol))

    def restrict(self, guard: Guard | None) -> None:
        self._handlers.restrict(guard)

    def on_peer(self, listener: Callable[[str, bool], None]) -> None:
        self._listeners.append(listener)

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        if peer == self._peer:
            return
        self._book.learn(peer, addresses)
        if self._routing is not None and self._connections.live(peer) is not None:
            self._nursery.start_soon(self._routing.add, peer, self._known(peer))  # the guard may admit it now

    def peers(self) -> tuple[PeerView, ...]:
        return self._connections.views()

    def observes(self, peer: str) -> str:
        direct = self._connections.direct(peer)
        return next((str(address) for c in direct for address in c.get_transport_addresses()), "")

    def observed_by(self, peer: str, address: str) -> None:
        direct = self._connections.direct(peer)
        places = [place_of(str(a)) for c in direct for a in c.get_transport_addresses()]
        if not places:
            return
        is_mapping = any(self._swarm.shows_mapping(connection) for connection in direct)
        self._presence.seen_by(peer, Sighting(places[0], address, is_mapping))

    def reach(self) -> ReachView:
        return self._presence.view()

    async def open(self, peer: str, protocol: str, *, timeout_s: float) -> Stream:
        if peer == self._peer:
            return await self._open_to_self(protocol)
        with trio.move_on_after(timeout_s):
            connection = self._connections.live(peer)
            if connection is not None:
                try:
                    return await self._agree(connection, peer, protocol)
                except CorollaError as failure:
                    if failure.code is not Code.PEER_LOST or not connection.muxed_conn.is_closed:
                        raise
            return await self._agree(await self._reach(peer), peer, protocol)
        raise error(
            Code.PEER_LOST,
            f"peer {peer} did not open {protocol} in {timeout_s:g} s",
            tried=list(self._known(peer)),
        )

    async def connect(self, address: str, *, timeout_s: float) -> str:
        bare, peer = split_peer(address)
        if peer == self._peer or bare in self._presence.whereabouts.direct():
            raise error(Code.BAD_REQUEST, f"{address} is this daemon's own address", "give another member's")
        if peer is not None and self._connections.live(peer) is not None:
            return peer
        reason = f"no answer in {timeout_s:g} s"
        with trio.move_on_after(timeout_s):
            try:
                connection = await self._dial(bare, peer)
            except CorollaError as failure:
                if failure.code is not Code.PEER_LOST:
                    raise
                reason = failure.message
            else:
                found = str(connection.muxed_conn.peer_id)
                self._book.worked(found, bare)
                return found
        raise unreachable(peer or "(unknown)", {bare: reason})

    async def disconnect(self, peer: str) -> None:
        async with trio.open_nursery() as nursery:
            for connection in self._connections.of(peer):
                nursery.start_soon(connection.close)

    async def closest_peers(self, key: bytes, count: int) -> tuple[str, ...]:
        found = await self._routing.closest(key, count) if self._routing is not None else ()
        return tuple(peer for peer in found if peer != self._peer and self._is_dialable(peer))[:count]

    # its life

    async def run(
        self,
        listen: tuple[str, ...],
        kad_protocol: str | None,
        *,
        task_status: Any = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop`. Shielded: a cancellation outside ends the block, and that calls `stop`."""
        try:
            with self._scope:
                async with background_trio_service(self._swarm):
                    async with trio.open_nursery() as nursery:
                        await self._start(nursery, listen, kad_protocol)
                        task_status.started()
                        if self.failure is None:
                            await self._stopping.wait()
                        nursery.cancel_scope.cancel()
                    await self._farewell()
        except Exception as crash:  # of the library's services: the node has to start anew
            _log.exception("network_failed")
            self.failure = error(Code.INTERNAL, f"the network broke down: {crash!r}", "restart the daemon")
            self._nursery.cancel_scope.cancel()

    async def _start(self, nursery: trio.Nursery, listen: tuple[str, ...], kad_protocol: str | None) -> None:
        if listen and not await self._swarm.listen(*(Multiaddr(address) for address in listen)):
            self.failure = error(
                Code.PORT_TAKEN, f"cannot listen on {', '.join(listen)}", "choose another with --listen"
            )
            return
        listeners = self._swarm.listeners.values()
        self._presence.whereabouts.listens_on([bound for one in listeners for bound in one.get_addrs()])
        if kad_protocol is not None:
            self._routing = SwarmRouting(
                self._host, kad_protocol, lambda peer: self._handlers.admits(peer, kad_protocol)
            )
            nursery.start_soon(self._routing.run)
        self._presence.start(nursery)

    def stop(self) -> None:
        """Begin to close; `run` ends in bounded time."""
        self._stopping.set()
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + CLOSE_TIMEOUT_S)

    async def _farewell(self) -> None:
        with trio.move_on_after(CLOSE_TIMEOUT_S / 2):
            async with trio.open_nursery() as nursery:
                for connection in self._connections.all():
                    nursery.start_soon(connection.muxed_conn.close)
        self._listeners.clear()
        self._presence.close()
        await self._host.close()

    # connections

    async def _reach(self, peer: str) -> SwarmConn:
        """A live connection, an existing one or a new one to any known address. Raises `PEER_LOST`."""
        return await self._dials.share(
            peer,
            lambda: self._connections.live(peer),
            lambda: try_each(peer, self._known(peer), lambda a: self._dial(a, peer), self._book),
        )

    async def _dial(self, address: str, peer: str | None, *, from_any_port: bool = False) -> SwarmConn:
        """A new connection to an address, where `peer` (or, for None, anyone) must answer.

        from_any_port: as `OurSwarm.dial_address`. Raises `PEER_LOST`, its message only the reason.
        """
        try:
            expected = None if peer is None else ID.from_string(peer)
            with trio.fail_after(CONNECT_TIMEOUT_S):
                if reach_of(address) is not Reach.RELAYED:
                    return await self._swarm.dial_address(
                        Multiaddr(address), expected, from_any_port=from_any_port
                    )
                if peer is None or expected is None:
                    raise error(Code.BAD_REQUEST, f"{address} does not say whom the relay shall call")
                circuit = await self.relays.dial(address, peer)
                connection = await self._swarm.upgrade_outbound(circuit, expected)
                self._nursery.start_soon(self._keep_circuit, peer, address, circuit, connection)
                return connection
        except trio.TooSlowError as failure:
            raise error(Code.PEER_LOST, f"no answer in {CONNECT_TIMEOUT_S:g} s") from failure
        except CorollaError:
            raise
        except Exception as failure:  # of sockets, Noise, multistream, multiaddr: each says why in its text
            raise error(Code.PEER_LOST, root_cause(failure)) from failure

    def _known(self, peer: str) -> tuple[str, ...]:
        try:
            heard = [split_peer(str(a))[0] for a in self._host.get_peerstore().addrs(ID.from_string(peer))]
        except (PeerStoreError, ValueError):
            heard = []
        own = self._presence.whereabouts.direct()  # two peers at one relay share their relayed ones
        known = (a for a in (*self._book.known(peer), *heard[:MAX_ADDRESSES]) if a not in own)
        return tuple(dict.fromkeys(known))

    def _is_dialable(self, peer: str) -> bool:
        if self._connections.live(peer) is not None:
            return True
        now = trio.current_time()
        return any(not self._book.looks_dead(address, now) for address in self._known(peer))

    async def _on_connected(self, connection: SwarmConn) -> None:
        muxed = connection.muxed_conn
        if not isinstance(muxed, Yamux) or muxed.is_closed:
            return
        peer = str(muxed.peer_id)
        if len(self._connections.of(peer)) >= MAX_CONNECTIONS_PER_PEER:
            _log.info("connection_refused", peer=peer, limit=MAX_CONNECTIONS_PER_PEER)
            await connection.close()
            return
        is_first = self._connections.add(peer, connection)
        self._traffic.watch(muxed)
        muxed.on_broken = partial(self._on_broken, peer, connection)
        if is_first:
            self._tell(peer, connected=True)
        addresses = [str(address) for address in connection.get_transport_addresses()]
        if connection.direction is Direction.OUTBOUND:
            self._book.learn(peer, addresses)
        if self._routing is not None:
            await self._routing.add(peer, self._known(peer))
        if is_relayed(connection):
            we_called = connection.direction is Direction.OUTBOUND
            circuit = Circuit(peer, we_called, muxed.event_closed.wait, connection.close)
            self._nursery.start_soon(self._punching.replace, circuit)

    async def _keep_circuit(
        self, peer: str, address: str, circuit: CircuitConnection, connection: SwarmConn
    ) -> None:
        """Put a new circuit in the place of one that is worn, by the same relay if it can. Sessions go on over it."""
        await circuit.wait_worn()
        while not connection.muxed_conn.is_closed:
            ways = (address, *(a for a in self._known(peer) if reach_of(a) is Reach.RELAYED))
            try:
                if not self._connections.is_direct(peer):
                    await try_each(peer, ways, lambda way: self._dial(way, peer), self._book)
                await connection.close()
            except CorollaError as problem:
                _log.info("circuit_not_renewed", peer=peer, reason=problem.message)
                await trio.sleep(RENEW_AGAIN_S)

    async def _call_near(self, peer: str) -> None:
        """Dial a peer as one of our own network. Raises `PEER_LOST`."""
        near = [address for address in self._known(peer) if reach_of(address) is Reach.NEAR]
        await try_each(peer, near, lambda address: self._dial(address, peer), self._book)

    async def _meet(self, address: str, peer: str) -> None:
        """Dial one who dials us at the same time, and serve the connection. Raises `PEER_LOST` with the reason."""
        try:
            await self._swarm.meet_address(Multiaddr(address))
        except Exception as failure:  # as in `_dial`; that it is `peer`, its handshake proves
            raise error(Code.PEER_LOST, root_cause(failure)) from failure

    async def _ring(self, address: str, peer: str, nonce: int) -> bool:
        """Dial a peer anew, to show it that this can be done. See `Doorbell`."""
        connection = await self._dial(address, peer, from_any_port=True)
        try:
            return await say_nonce(await self._agree(connection, peer, DIAL_BACK_PROTOCOL), nonce)
        except CorollaError as problem:  # it is there, and does not listen to us
            _log.debug("nonce_not_heard", peer=peer, reason=problem.message)
            return False
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await connection.close()

    def _came_in(self, stream: Stream) -> bool:
        muxed = stream.connection if isinstance(stream, Libp2pStream) else None
        return any(
            c.muxed_conn is muxed and c.direction is Direction.INBOUND and not is_relayed(c)
            for c in self._connections.of(stream.peer)
        )

    def _weigh(self) -> None:
        """Part with the peer that fills most of our memory, if all together fill too much of it."""
        unread = self._connections.unread_bytes()
        peer = heaviest(unread, MAX_UNREAD_OF_ALL_BYTES)
        if peer is not None:
            _log.warning("memory_full", dropped=peer, unread_bytes=unread[peer], of_all=sum(unread.values()))
            self._nursery.start_soon(self.disconnect, peer)

    def _on_broken(self, peer: str, connection: SwarmConn) -> None:
        if self._connections.remove(peer, connection):
            self._presence.whereabouts.lost(peer)
            self._tell(peer, connected=False)

    def _tell(self, peer: str, *, connected: bool) -> None:
        for listener in tuple(self._listeners):
            try:
                listener(peer, connected)
            except Exception:  # a defect of the listener; the others, and the connection, go on
                _log.exception("listener_failed", peer=peer, connected=connected)

    async def _take_circuit(self, circuit: IRawConnection, address: str) -> None:
        """Somebody called us through a relay; its handshake tells who."""
        try:
            await self._swarm.upgrade_inbound_raw_conn(circuit, Multiaddr(address))
        except Exception as failure:  # whatever a stranger sends
            _log.debug("circuit_failed", relay=address, reason=root_cause(failure))
            await circuit.close()

    # streams

    async def _agree(self, connection: SwarmConn, peer: str, protocol: str) -> Stream:
        """A new stream for a protocol, over a connection."""
        muxed: YamuxStream | None = None
        try:
            muxed = await yamux_of(connection).open_stream()
            await agree(muxed, peer, protocol)
        except (MuxedStreamError, MuxedConnUnavailable) as failure:
            if muxed is not None:
                muxed.break_off()
            raise error(Code.PEER_LOST, f"lost peer {peer} while opening {protocol}: {failure}") from failure
        except BaseException:
            if muxed is not None:
                muxed.break_off()
            raise
        return Libp2pStream(muxed, peer, protocol, self._traffic)

    async def _open_to_self(self, protocol: str) -> MemoryStream:
        await trio.lowlevel.checkpoint()
        if not self._handlers.speaks(protocol):
            raise error(Code.UNSUPPORTED, f"this daemon does not speak {protocol}")
        near, far = stream_pair(self._peer, protocol)
        self._nursery.start_soon(self._handlers.serve, far)
        return near

    async def _serve(self, protocol: str, stream: INetStream) -> None:
        muxed = getattr(stream, "muxed_stream", None)
        if not isinstance(muxed, YamuxStream):
            await stream.reset()
            return
        peer = str(muxed.muxed_conn.peer_id)
        await self._handlers.serve(Libp2pStream(muxed, peer, protocol, self._traffic))
