"""Connections through a relay: what is said to set one up, and the stream as a connection afterwards.

Wire-compatible with libp2p's circuit relay v2. Source: https://github.com/libp2p/specs/tree/master/relay.
A circuit is one stream to the relay, joined there with one from the relay to the far peer; Noise and Yamux run
inside it from end to end, so that the relay sees neither content nor protocols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Status, StopMessage
from multiaddr import Multiaddr

from ....protocol.errors import Code, CorollaError, error
from ..seam import Stream

HOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/hop"  # to a relay: reserve, connect
STOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/stop"  # from a relay: somebody connects to you
CIRCUIT: Final = "/p2p-circuit"
WORN: Final = 0.8  # of a circuit's bytes or time: what is left suffices to make another


@dataclass(frozen=True, slots=True)
class CircuitLimit:
    """When a relay ends a circuit. duration_s; num_bytes: both ways together. 0 is never."""

    duration_s: float = 0.0
    num_bytes: int = 0

    @classmethod
    def said(cls, limit: Limit) -> CircuitLimit:
        """As a relay says it."""
        return cls(float(limit.duration), int(limit.data))


class CircuitConnection(IRawConnection):
    """The stream of a circuit that stands, as the library's connection. address: of the far peer, by the relay."""

    def __init__(
        self,
        stream: Stream,
        rest: bytes,
        address: str,
        *,
        is_initiator: bool,
        limit: CircuitLimit | None = None,
    ) -> None:
        self.is_initiator = is_initiator
        self._stream = stream
        self._rest = rest
        self._address = Multiaddr(address)
        self._limit = limit or CircuitLimit()
        self._num_bytes = 0
        self._since = trio.current_time()
        self._is_worn = trio.Event()

    async def wait_worn(self) -> None:
        """Wait until it should be replaced: most of its bytes or of its time is used, or it has ended."""
        duration_s = self._limit.duration_s
        with trio.move_on_at(self._since + WORN * duration_s if duration_s else float("inf")):
            await self._is_worn.wait()

    def _count(self, size: int) -> None:
        self._num_bytes += size
        if 0 < WORN * self._limit.num_bytes <= self._num_bytes:
            self._is_worn.set()

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes. Raises `ConnectionClosedError`; the end is `b""`."""
        if not self._rest:
            try:
                self._rest = await self._stream.receive()
            except CorollaError as problem:
                raise ConnectionClosedError(problem.message) from problem
            self._count(len(self._rest))
        data, self._rest = (self._rest, b"") if n is None else (self._rest[:n], self._rest[n:])
        return data

    async def write(self, data: bytes) -> None:
        """Send all of it. Raises `ConnectionClosedError`."""
        self._count(len(data))
        try:
            await self._stream.send(data)
        except CorollaError as problem:
            raise ConnectionClosedError(problem.message) from problem

    async def close(self) -> None:
        self._is_worn.set()
        self._stream.reset()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None  # the relay's is not the peer's

    def get_transport_addresses(self) -> list[Multiaddr]:
        return [self._address]

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.RELAYED


def split_circuit(address: str) -> tuple[str, str]:
    """Address and peer id of the relay in `…/p2p/RELAY/p2p-circuit`. Raises `BAD_REQUEST`."""
    head, found, rest = address.partition(CIRCUIT)
    relay_address, named, relay = head.rpartition("/p2p/")
    if not (found and named and relay) or (rest and not rest.startswith("/p2p/")):
        raise error(
            Code.BAD_REQUEST,
            f"{address!r} names no relay",
            "write it like /ip4/192.0.2.7/tcp/4517/p2p/RELAY/p2p-circuit",
        )
    return relay_address, relay


def circuit_address(relay_address: str, relay: str) -> str:
    """Where a peer is reached that holds a reservation at a relay."""
    return f"{relay_address}/p2p/{relay}{CIRCUIT}"


def peer_of(message: PeerId) -> str:
    """The peer id in a message. Raises `PROTOCOL_VIOLATION`."""
    try:
        return str(ID(bytes(message.id)))
    except Exception as problem:  # of base58 and multihash: each says it in its own type
        raise error(Code.PROTOCOL_VIOLATION, "a circuit message with an unreadable peer id") from problem


def hop_status(status: Status.ValueType) -> HopMessage:
    """A relay's short answer."""
    return HopMessage(type=HopMessage.STATUS, status=status)


def stop_status(status: Status.ValueType) -> StopMessage:
    """The answer to a relay's knock."""
    return StopMessage(type=StopMessage.STATUS, status=status)


def check_status(status: Status.ValueType, what: str) -> None:
    """Raise `BUSY` when the relay has no room, `PEER_LOST` when the far peer is not there, `UNSUPPORTED` else."""
    if status == Status.OK:
        return
    name = Status.Name(status) if status in Status.values() else str(status)
    full = (Status.RESERVATION_REFUSED, Status.RESOURCE_LIMIT_EXCEEDED)
    gone = (Status.CONNECTION_FAILED, Status.NO_RESERVATION)
    code = Code.BUSY if status in full else Code.PEER_LOST if status in gone else Code.UNSUPPORTED
    raise error(code, f"{what}: {name.lower()}")
