"""Finding peers near a key: py-libp2p's Kademlia routing, under a protocol id of the swarm's own.

Only peer routing is used; values and providers are neither kept nor served (LIBP2P: as a store it is
unfit). The library fixes the protocol id `/ipfs/kad/1.0.0` in a constant; instead of replacing that for the
whole process, its routing is given a host that translates the id, so that every network has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import structlog
import trio
import varint
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.kad_dht.common import BUCKET_SIZE, PROTOCOL_ID
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.kad_dht.peer_routing import PeerRouting
from libp2p.kad_dht.routing_table import RoutingTable
from libp2p.kad_dht.utils import maybe_consume_signed_record
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.utils.varint import read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from ....protocol.limits import KAD_TIMEOUT_S, MAX_KAD_BYTES, MAX_KAD_QUESTIONS

REFRESH_EVERY_S: Final = 600.0
SETTLE_S: Final = 0.5  # connections come in bunches; one look round serves all of them
LOOKUP_TIMEOUT_S: Final = 10.0
MAX_KEY_BYTES: Final = 64
MAX_ADDRESSES_TOLD: Final = 8

_log = structlog.get_logger("corolla.kademlia")


class SwarmRouting:
    """The routing table of one swarm. `run()` keeps it fresh and serves it.

    protocol: such as `/corolla/kad/<swarm>/1`.
    may_enter: whether a peer may ask us and stand in our table: members only.
    """

    def __init__(self, host: IHost, protocol: str, may_enter: Callable[[str], bool]) -> None:
        self.protocol = protocol
        self._host = host
        self._may_enter = may_enter
        translated = cast(IHost, _TranslatingHost(host, protocol, may_enter))
        self._table = RoutingTable(host.get_id(), translated)
        self._routing = PeerRouting(translated, self._table)
        self._news = trio.Event()  # somebody new is connected, who may know others
        host.set_stream_handler(TProtocol(protocol), self._serve)

    async def run(self) -> None:
        """Look for peers near us, when peers connect and every ten minutes; ends by cancellation."""
        async with trio.open_nursery() as nursery:
            self._table.start_periodic_refresh(nursery)
            while True:
                with trio.move_on_after(REFRESH_EVERY_S):
                    await self._news.wait()
                await trio.sleep(SETTLE_S)
                self._news = trio.Event()
                try:
                    await self._routing.refresh_routing_table()
                except Exception as failure:  # of a foreign library, about other machines
                    _log.warning("refresh_failed", reason=repr(failure))

    async def add(self, peer: str, addresses: Sequence[str]) -> None:
        """Consider a connected peer for the table. Addresses that nobody can read leave it out."""
        if not self._may_enter(peer) or not addresses:
            return
        try:
            info = PeerInfo(ID.from_string(peer), [Multiaddr(address) for address in addresses])
            await self._table.add_peer(info, skip_server_mode_check=True)
            self._news.set()
        except Exception as failure:  # of foreign libraries, about what another machine says of itself
            _log.info("not_entered", peer=peer, reason=repr(failure))

    def remove(self, peer: str) -> None:
        """A peer is gone."""
        self._table.remove_peer(ID.from_string(peer))

    async def closest(self, key: bytes, count: int) -> tuple[str, ...]:
        """The peers nearest to `key` that the swarm tells of in bounded time, nearest first."""
        found: list[ID] = []
        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            found = await self._routing.find_closest_peers_network(key, max(count, BUCKET_SIZE))
        if not found:
            found = self._table.find_local_closest_peers(key, max(count, BUCKET_SIZE))
        return tuple(str(peer) for peer in found)

    async def _serve(self, stream: INetStream) -> None:
        peer = stream.muxed_conn.peer_id
        if not self._may_enter(str(peer)):
            await stream.reset()
            return
        for _ in range(MAX_KAD_QUESTIONS):
            try:
                with trio.fail_after(KAD_TIMEOUT_S):
                    request = Message()
                    request.ParseFromString(await read_varint_prefixed_bytes_limited(stream, MAX_KAD_BYTES))
                    if request.type != Message.MessageType.FIND_NODE or not request.key[:MAX_KEY_BYTES]:
                        break
                    if maybe_consume_signed_record(request, self._host, peer):
                        await self._table.add_peer(peer, skip_server_mode_check=True)
                    answer = self._answer(bytes(request.key[:MAX_KEY_BYTES]), asker=peer).SerializeToString()
                    await stream.write(varint.encode(len(answer)) + answer)
            except (IOException, trio.TooSlowError):
                break
        await stream.close()

    def _answer(self, key: bytes, *, asker: ID) -> Message:
        answer = Message()
        answer.type = Message.MessageType.FIND_NODE
        connected = set(self._host.get_connected_peers())
        kind = Message.ConnectionType
        for peer in self._table.find_local_closest_peers(key, BUCKET_SIZE):
            info = self._table.get_peer_info(peer)
            if peer == asker or info is None:
                continue
            entry = answer.closerPeers.add()
            entry.id = peer.to_bytes()
            entry.connection = kind.CONNECTED if peer in connected else kind.CAN_CONNECT
            entry.addrs.extend(address.to_bytes() for address in info.addrs[:MAX_ADDRESSES_TOLD])
        return answer


class _TranslatingHost:
    """A host towards the library's routing, for which the swarm's protocol id is the standard one.

    While its table is nearly empty the library starts from whoever is connected, or ever was heard of, and
    enters them: here these are members only, and nobody.
    """

    def __init__(self, host: IHost, protocol: str, may_enter: Callable[[str], bool]) -> None:
        self._host = host
        self._protocol = TProtocol(protocol)
        self._may_enter = may_enter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    async def new_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> INetStream:
        ours = [self._protocol if protocol == PROTOCOL_ID else protocol for protocol in protocol_ids]
        return await self._host.new_stream(peer_id, ours)

    def get_connected_peers(self) -> list[ID]:
        return [peer for peer in self._host.get_connected_peers() if self._may_enter(str(peer))]

    def get_peerstore(self) -> Any:
        return _TranslatingPeerstore(self._host.get_peerstore(), str(self._protocol))


class _TranslatingPeerstore:
    def __init__(self, store: Any, protocol: str) -> None:
        self._store = store
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def peer_ids(self) -> list[ID]:
        return []

    def get_protocols(self, peer_id: ID) -> list[str]:
        ours = self._store.get_protocols(peer_id)
        return [str(PROTOCOL_ID) if protocol == self._protocol else protocol for protocol in ours]
