"""What a network is, to the rest of the daemon: peers, streams, addresses.

`libp2p.py` implements it over py-libp2p, `memory.py` in memory for simulations. All code of the daemon
above this file runs over either, unchanged. Peer ids are their base58 strings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...protocol.limits import MIB
from ...protocol.views import ReachView
from .room import Room


class Stream(Protocol):
    """One bidirectional byte stream with a peer whose id the connection has proved."""

    @property
    def peer(self) -> str:
        """The far end's peer id."""

    @property
    def protocol(self) -> str:
        """The protocol that was agreed on."""

    @property
    def room(self) -> Room:
        """For the long messages that the peer has begun; its other streams share it."""

    async def send(self, data: bytes) -> None:
        """Send all of `data`; waits while the far side's window is closed. Raises `PEER_LOST`.

        Cancelling it harms this stream only: a part may have been sent, so the stream should be reset.
        """

    async def receive(self, limit: int = MIB) -> bytes:
        """Some bytes, at least one; `b""` at the end. Raises `PEER_LOST` when the stream broke.

        limit: of the bytes, at least 64 KiB.
        """

    async def close(self) -> None:
        """Send what is queued, then the end. Never raises.

        What the far side still sends can be received; it should end too, or is reset after a minute.
        """

    def reset(self) -> None:
        """Drop the stream at once, on both sides. Never raises."""


Handler = Callable[[Stream], Awaitable[None]]
Guard = Callable[[str, str], bool]  # whether a peer may use a protocol


@dataclass(frozen=True, slots=True)
class PeerView:
    """One connected peer, as `peers` and `netcheck` show it."""

    peer: str
    addresses: tuple[str, ...]  # of the live connections
    relayed: bool
    inbound: bool
    rtt_s: float | None


class Network(Protocol):
    """A running network. Streams to our own peer id are served in memory."""

    @property
    def peer(self) -> str:
        """Our peer id."""

    def addresses(self) -> tuple[str, ...]:
        """Multiaddresses, ending in `/p2p/<peer id>`, by which others may reach us, best first."""

    def on_addresses(self, listener: Callable[[], None]) -> None:
        """Call `listener()` whenever `addresses` may be others than before."""

    def handle(self, protocol: str, handler: Handler) -> None:
        """Serve a protocol: `handler` runs in its own task and owns the stream. Its errors end there.

        An error resets the stream. After a plain return it stays as the handler left it.
        """

    def restrict(self, guard: Guard | None) -> None:
        """Ask `guard(peer, protocol)` before each inbound stream. None: serve everybody.

        What is refused looks `UNSUPPORTED` to the far side.
        """

    async def open(self, peer: str, protocol: str, *, timeout_s: float) -> Stream:
        """A new stream, over the live connection or a new one to any of the peer's known addresses.

        Raises `PEER_LOST` (unreachable, with the addresses tried) or `UNSUPPORTED` (it does not speak this).
        """

    async def connect(self, address: str, *, timeout_s: float) -> str:
        """Connect to a multiaddress, with or without `/p2p/…`; gives the peer id. Raises `PEER_LOST`."""

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        """Remember where a peer can be reached; bounded, newest first."""

    def peers(self) -> tuple[PeerView, ...]:
        """Who is connected."""

    def observes(self, peer: str) -> str:
        """Where we see a connected peer, as a multiaddress; "" if it comes through others, or is not there."""

    def observed_by(self, peer: str, address: str) -> None:
        """A connected peer says where it sees us. It may lie: what several say decides."""

    def reach(self) -> ReachView:
        """Where others can reach us, and by what evidence."""

    async def disconnect(self, peer: str) -> None:
        """Close every connection with a peer."""

    async def closest_peers(self, key: bytes, count: int) -> tuple[str, ...]:
        """The dialable peers of the swarm nearest to a key, by Kademlia distance, without us."""

    def on_peer(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener(peer, connected)` whenever a peer's first connection opens or its last one closes."""
