"""Who is connected, and by which connections: the live ones of each peer, direct ones before circuits.

It opens and closes none; `libp2p.py` tells it of each that came and went. A peer may have several at once: two
that dial each other at the same moment have two, and a circuit lives on beside the direct one that replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.rcmgr import Direction
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable

from ..dialling import Reach, reach_of
from ..seam import PeerView
from ..wire.yamux import Yamux


class Connections:
    """The connections of one network, by peer."""

    def __init__(self) -> None:
        self._of: dict[str, list[SwarmConn]] = {}
        self._changed = trio.Event()  # set when there is one more

    def add(self, peer: str, connection: SwarmConn) -> bool:
        """Keep one. True if it is the peer's first."""
        connections = self._of.setdefault(peer, [])
        connections.append(connection)
        self._changed.set()
        return len(connections) == 1

    def remove(self, peer: str, connection: SwarmConn) -> bool:
        """Forget one. True if it was the peer's last."""
        connections = self._of.get(peer, [])
        if connection in connections:
            connections.remove(connection)
        return not connections and self._of.pop(peer, None) is not None

    def of(self, peer: str) -> tuple[SwarmConn, ...]:
        """A peer's, oldest first."""
        return tuple(self._of.get(peer, ()))

    def all(self) -> tuple[SwarmConn, ...]:
        """Everybody's."""
        return tuple(connection for connections in self._of.values() for connection in connections)

    def direct(self, peer: str) -> tuple[SwarmConn, ...]:
        """A peer's without circuits: those that it made first, since how it came tells more."""
        direct = [c for c in self.of(peer) if not is_relayed(c)]
        return tuple(sorted(direct, key=lambda c: c.direction is not Direction.INBOUND))

    def live(self, peer: str) -> SwarmConn | None:
        """The one to use for a new stream: a direct one, else the freshest circuit."""
        live = [c for c in self.of(peer) if not c.muxed_conn.is_closed]
        direct = [c for c in live if not is_relayed(c)]
        return direct[0] if direct else live[-1] if live else None

    def is_direct(self, peer: str) -> bool:
        """Whether a new stream would pass no relay."""
        connection = self.live(peer)
        return connection is not None and not is_relayed(connection)

    async def wait_direct(self, peer: str) -> None:
        """Wait until a new stream would pass no relay."""
        while not self.is_direct(peer):
            self._changed = trio.Event() if self._changed.is_set() else self._changed
            await self._changed.wait()

    def has_called(self, peer: str) -> bool:
        """Whether a live circuit to the peer is one that we made."""
        mine = [c for c in self.of(peer) if is_relayed(c) and c.direction is Direction.OUTBOUND]
        return any(not c.muxed_conn.is_closed for c in mine)

    def unread_bytes(self) -> Mapping[str, int]:
        """What each peer has sent that waits for its readers."""
        return {peer: sum(yamux_of(c).mux.unread_bytes for c in of) for peer, of in self._of.items()}

    def views(self) -> tuple[PeerView, ...]:
        """As people see them."""
        return tuple(_view(peer, connections) for peer, connections in self._of.items())


def is_relayed(connection: SwarmConn) -> bool:
    """Whether it is a circuit."""
    return any(reach_of(str(a)) is Reach.RELAYED for a in connection.get_transport_addresses())


def yamux_of(connection: SwarmConn) -> Yamux:
    """Its muxer. Raises `MuxedConnUnavailable` if it is not ours."""
    muxed = connection.muxed_conn
    if not isinstance(muxed, Yamux):
        raise MuxedConnUnavailable(f"the connection speaks {type(muxed).__name__}")
    return muxed


def _view(peer: str, connections: Sequence[SwarmConn]) -> PeerView:
    rtts = [rtt for c in connections if (rtt := yamux_of(c).rtt()) > 0]
    return PeerView(
        peer=peer,
        addresses=tuple(str(address) for c in connections for address in c.get_transport_addresses()),
        relayed=all(is_relayed(c) for c in connections),
        inbound=all(c.direction is Direction.INBOUND for c in connections),
        rtt_s=min(rtts, default=None),
    )
