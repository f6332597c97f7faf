"""py-libp2p's host: TCP, Noise and our Yamux only, with what 0.8.1 does badly replaced.

The library's swarm waits 250 ms before it dials, and remembers failures for a minute; it dials peers of its
own accord; it keeps a slot and a task for every connection that ever came in; and an error that escapes a
stream's handler ends all of it. These are overridden here, in subclasses; nothing of the library is patched
for the whole process.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Final, TypeAlias

import structlog
import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream, INetwork, INotifee, IRawConnection
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import ID as PING
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify_push.identify_push import ID_PUSH as IDENTIFY_PUSH
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from ....protocol.errors import Code, CorollaError, error
from ....protocol.limits import CONNECT_TIMEOUT_S, HANDSHAKE_TIMEOUT_S
from ...identity import Identity
from ..allowance import Allowances
from ..dialling import Reach, reach_of
from ..seam import Guard
from ..wire.multistream import answer
from ..wire.noise import FastNoise, NoiseOnly
from ..wire.yamux import Yamux, YamuxOnly, YamuxStream
from .lobby import Guest, Lobby, origin_of_socket
from .tcp import TcpConnection, local_port, with_ends

_PORT_IN_USE: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)  # by an earlier connection to the same address
_WILDCARDS: Final = {"ip4": "0.0.0.0", "ip6": "::"}  # noqa: S104 - where dials come from, as we listen
_EVERYBODYS: Final = (str(IDENTIFY), str(IDENTIFY_PUSH), str(PING))

Connected: TypeAlias = Callable[[SwarmConn], Awaitable[None]]

_log = structlog.get_logger("corolla.host")


def make_host(
    identity: Identity,
    *,
    reach: Callable[[str], Awaitable[SwarmConn]],
    connected: Connected,
    advertised: Callable[[], Sequence[str]],
    admits: Guard,
    allowances: Allowances,
    max_connections: int,
) -> tuple[OurSwarm, BasicHost]:
    """A swarm that is not running yet, and the host upon it.

    reach: dials a peer for the library's own services. connected: called for each new connection.
    advertised: the addresses to tell others. admits: whether a peer may use a protocol; identify and ping
    are everybody's. allowances: what each peer may ask of us.
    """
    swarm = OurSwarm(key_pair(identity), reach, allowances, max_connections=max_connections)
    host = OurHost(swarm, advertised)
    swarm.set_stream_handler(partial(_serve_stream, host, admits))
    swarm.register_notifee(_Notifee(connected))
    return swarm, host


def key_pair(identity: Identity) -> KeyPair:
    """The identity as libp2p's own type."""
    private = Ed25519PrivateKey.from_bytes(identity.seed)
    return KeyPair(private, private.get_public_key())


def check_port(address: str) -> None:
    """Raise `PORT_TAKEN` when somebody listens where `address` would, `BAD_CONFIG` if nobody could.

    The library's listeners share ports (SO_REUSEPORT), so that a second daemon would silently take half of
    the first one's connections; a plain bind beforehand notices.
    """
    kind, _, rest = address.removeprefix("/").partition("/")
    host, _, rest = rest.partition("/")
    transport, _, port = rest.partition("/")
    if kind not in ("ip4", "ip6") or transport != "tcp" or not port.isdecimal() or int(port) > 65535:
        raise error(
            Code.BAD_CONFIG,
            f"cannot listen on {address!r}",
            "write it like /ip4/0.0.0.0/tcp/4001, with port 0 for any free one",
        )
    with socket.socket(socket.AF_INET if kind == "ip4" else socket.AF_INET6, socket.SOCK_STREAM) as probe:
        # Past connections in TIME_WAIT are no bar, somebody who listens is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if kind == "ip6":
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, int(port)))
            probe.listen(1)
            # A worker that is started in this moment inherits the socket until its program runs: closing it would
            # leave it listening there.
            probe.shutdown(socket.SHUT_RDWR)
        except OSError as problem:
            if problem.errno == errno.EADDRINUSE:
                raise error(
                    Code.PORT_TAKEN,
                    f"port {port} on {host} is taken",
                    "another daemon may be running (daemonctl status); or choose another with --listen",
                ) from problem
            raise error(
                Code.BAD_CONFIG,
                f"cannot listen on {address}: {problem.strerror or problem}",
                "choose an address of this machine and a port from 1024 on with --listen",
            ) from problem


class OurHost(BasicHost):
    """The library's host, which tells our circuits whole.

    Its own cuts them off before the relay's peer id, and so says that we listen where our relay does.
    """

    def __init__(self, swarm: OurSwarm, advertised: Callable[[], Sequence[str]]) -> None:
        self._advertised = advertised  # the library asks for addresses while it is made
        super().__init__(swarm, addrs_factory=lambda _: [Multiaddr(address) for address in advertised()])

    def get_addrs(self) -> list[Multiaddr]:
        return [Multiaddr(f"{address}/p2p/{self.get_id()}") for address in self._advertised()]


class OurSwarm(Swarm):
    """The library's swarm with our dialling and a bounded inbound path."""

    def __init__(
        self,
        keys: KeyPair,
        reach: Callable[[str], Awaitable[SwarmConn]],
        allowances: Allowances,
        *,
        max_connections: int,
    ) -> None:
        peerstore = PeerStore()
        peer_id = ID.from_pubkey(keys.public_key)
        peerstore.add_key_pair(peer_id, keys)
        self._noise = FastNoise(keys)
        upgrader = TransportUpgrader({NOISE: self._noise}, {})
        upgrader.security_multistream = NoiseOnly(self._noise)
        upgrader.muxer_multistream = YamuxOnly(partial(_bound, allowances))
        self._tcp = TCP()
        super().__init__(
            peer_id,
            peerstore,
            upgrader,
            [self._tcp],
            RetryConfig(max_retries=0),
            ConnectionConfig(
                max_connections=max_connections,
                min_connections=0,
                low_watermark=0,
                high_watermark=max_connections,
                max_connections_per_peer=max_connections,  # it would spare new ones: `network.py` sees to it
                inbound_upgrade_timeout=HANDSHAKE_TIMEOUT_S,
            ),
        )
        self.auto_connector = _NoAutoConnector(self, 0.0)
        self._reach = reach
        self._lobby = Lobby()
        self._scopes: dict[Guest, trio.CancelScope] = {}  # of those whose handshake is under way
        self._from_own_port: weakref.WeakSet[SwarmConn] = weakref.WeakSet()
        self._expected: dict[tuple[str, int], ID] = {}  # who may come from an endpoint, to be called by us

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """For the library's own services, such as Kademlia: the same dialling as ours."""
        try:
            return [await self._reach(str(peer_id))]
        except CorollaError as failure:
            raise SwarmException(str(failure)) from failure

    async def dial_address(
        self, address: Multiaddr, expected: ID | None, *, from_any_port: bool = False
    ) -> SwarmConn:
        """A new connection to `address`; whoever answers is accepted when `expected` is None.

        from_any_port: from a port that its NAT has not seen, instead of the one that ours shall show.
        """
        raw = with_ends(await (self._tcp.dial(address) if from_any_port else self._dial_tcp(address)))
        connection = await self.upgrade_outbound(raw, expected)
        if local_port(raw) in self._listening_ports(_family(address)):
            self._from_own_port.add(connection)
        return connection

    def shows_mapping(self, connection: SwarmConn) -> bool:
        """Whether we dialled from a port on which we listen: the far side sees what a NAT makes of it."""
        return connection in self._from_own_port

    async def meet_address(self, address: Multiaddr) -> None:
        """Dial one who dials us at the same time, and be the server of what comes of it."""
        source = self._source(address)
        if source is None:
            raise error(Code.PEER_LOST, "no port of ours that others could meet")
        raw = with_ends(await self._tcp.dial_with_source(address, source))
        await self.upgrade_inbound_raw_conn(raw, address)

    @contextmanager
    def expecting(self, peer: str, endpoints: Sequence[tuple[str, int]]) -> Iterator[None]:
        """While this holds, be the client of a connection that a peer opens from one of these endpoints.

        For the one who should dial when two dial each other: its own packet may come too late, or be lost.
        """
        expected = ID.from_string(peer)
        ours = {endpoint: expected for endpoint in endpoints if endpoint not in self._expected}
        self._expected.update(ours)
        try:
            yield
        finally:
            for endpoint in ours:
                del self._expected[endpoint]

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        """As the library's, which tears down a connection if it is cancelled while it tells others of it.

        So did those who gave up their dials as soon as they heard of a connection, which came of one of them.
        """
        with trio.fail_after(CONNECT_TIMEOUT_S) as scope:
            scope.shield = True
            return await super().add_conn(muxed_conn, direction)

    async def _dial_tcp(self, address: Multiaddr) -> IRawConnection:
        """A socket to an address; into the world from the port that we listen on.

        So our NAT shows others the mapping of that port, at which they may reach us.
        """
        source = self._source(address)
        if source is not None:
            try:
                return await self._tcp.dial_with_source(address, source)
            except OpenConnectionError as failure:
                if not any(os.strerror(number) in str(failure) for number in _PORT_IN_USE):
                    raise
        return await self._tcp.dial(address)

    def _source(self, address: Multiaddr) -> tuple[str, int] | None:
        if reach_of(str(address)) is not Reach.PUBLIC:
            return None
        family = _family(address)
        ports = self._listening_ports(family)
        return (_WILDCARDS[family], ports[0]) if ports else None  # as the socket listens

    def _listening_ports(self, family: str) -> list[int]:
        bound = [str(own).split("/") for one in self.listeners.values() for own in one.get_addrs()]
        return [int(parts[4]) for parts in bound if parts[1] == family]

    async def upgrade_outbound(self, raw: IRawConnection, expected: ID | None) -> SwarmConn:
        """A connection of ours made of what reaches a peer: a socket, or a circuit through a relay."""
        try:
            security = self.upgrader.security_multistream
            secured = await security.secure_outbound(raw, expected)  # type: ignore[arg-type]
            found = secured.get_remote_peer()
            if found == self.self_id:
                raise error(Code.BAD_REQUEST, "this is the daemon's own address")
            return await self.add_conn(await self.upgrader.upgrade_connection(secured, found), "outbound")
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await raw.close()
            raise

    async def _handle_inbound_connection(self, read_write_closer: ReadWriteCloser, maddr: Multiaddr) -> None:
        """Serve one inbound connection for as long as it lasts; its socket is closed when this returns."""
        raw = TcpConnection(read_write_closer, is_initiator=False)
        address = raw.get_remote_address()
        origin = origin_of_socket(address[0]) if address else ""
        refusal = self._lobby.refusal(origin, trio.current_time())
        if refusal:
            _log.debug("connection_refused", reason=refusal)
            return
        guest, leaves = self._lobby.enter(origin)
        if leaves is not None:
            self._scopes[leaves].cancel()
        expected = self._expected.get(address) if address else None
        try:
            muxed = await self._handshake(guest, raw, maddr, expected)
            if isinstance(muxed, Yamux):
                await muxed.event_closed.wait()
        finally:
            self._lobby.leave(guest)

    async def _handshake(
        self, guest: Guest, raw: TcpConnection, maddr: Multiaddr, expected: ID | None
    ) -> IMuxedConn | None:
        """The connection that came of a handshake; None if none did. expected: as whose client we speak."""
        try:
            with trio.CancelScope() as scope:
                self._scopes[guest] = scope
                if expected is None:
                    muxed = await self.upgrade_inbound_raw_conn(raw, maddr)
                else:
                    muxed = await self._call_back(raw, expected)
                self._lobby.introduce(guest)
                return muxed
            _log.debug("handshake_gave_way", origin=guest.origin)
        except Exception as failure:  # whatever a stranger sends
            _log.debug("handshake_failed", reason=root_cause(failure))
        finally:
            del self._scopes[guest]
        return None

    async def _call_back(self, raw: TcpConnection, expected: ID) -> IMuxedConn:
        raw.is_initiator = True
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            connection = await self.upgrade_outbound(raw, expected)
        self._from_own_port.add(connection)
        return connection.muxed_conn


def _bound(allowances: Allowances, connection: Yamux) -> None:
    connection.allowance = allowances.of(str(connection.peer_id))


def _family(address: Multiaddr) -> str:
    """`ip4`, `ip6`, or what else stands first."""
    return str(address).split("/")[1]


class _NoAutoConnector(AutoConnector):
    """Dials nobody: whom to know is the daemon's business, and who was disconnected stays so."""

    async def maybe_connect(self) -> None: ...

    async def run_background_task(self, nursery: trio.Nursery) -> None: ...


class _Notifee(INotifee):
    """Passes on new connections; endings are known sooner by the muxer itself."""

    def __init__(self, connected: Connected) -> None:
        self._connected = connected

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        if isinstance(conn, SwarmConn):
            await self._connected(conn)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None: ...
    async def opened_stream(self, network: INetwork, stream: INetStream) -> None: ...
    async def closed_stream(self, network: INetwork, stream: INetStream) -> None: ...
    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None: ...
    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None: ...


async def _serve_stream(host: BasicHost, admits: Guard, stream: INetStream) -> None:
    """Agree on an inbound stream's protocol and serve it; an error that escaped would end the whole host."""
    muxed, peer = getattr(stream, "muxed_stream", None), str(stream.muxed_conn.peer_id)
    handlers = host.multiselect.handlers

    def serves(protocol: str) -> bool:
        return TProtocol(protocol) in handlers and (protocol in _EVERYBODYS or admits(peer, protocol))

    try:
        if not isinstance(muxed, YamuxStream):
            raise MuxedStreamError(f"a stream of type {type(muxed).__name__}")
        allowance = muxed.muxed_conn.allowance
        with allowance.stream() if allowance is not None else nullcontext():
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                protocol = TProtocol(await answer(muxed, serves))
            handler = handlers[protocol]
            if handler is not None:
                stream.set_protocol(protocol)
                await handler(stream)
    except Exception as failure:  # whatever a peer sends
        _log.debug("stream_failed", peer=peer, reason=root_cause(failure))
        await stream.reset()


def root_cause(failure: BaseException) -> str:
    """The text of the first cause, which names what happened; those above it only say that it did."""
    while True:
        if isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
        elif failure.__cause__ is not None:
            failure = failure.__cause__
        else:
            break
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror.lower()
    return str(failure) or type(failure).__name__


def quieten() -> None:
    """The library logs strangers' mistakes as errors, with tracebacks; what matters, we log ourselves."""
    for name in ("libp2p", "multiaddr", "noise"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
