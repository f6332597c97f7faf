"""Noise over a connection that is read in large pieces.

py-libp2p reads every Noise message with one system call for its two length bytes and one for its body; a
buffer underneath halves the wake-ups. It also lets us dial an address without knowing who lives there: the
far side still proves its identity, and the caller learns it.
"""

from __future__ import annotations

from typing import Final

from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport
from multiaddr import Multiaddr  # type: ignore[import-untyped]

_READ_BYTES: Final = 128 * 1024  # two full Noise messages


class BufferedConnection(IRawConnection):
    """A raw connection whose `read` takes what has arrived from a buffer, and asks the system rarely."""

    def __init__(self, connection: IRawConnection) -> None:
        self.is_initiator = connection.is_initiator
        self._connection = connection
        self._buffer = b""
        self._at = 0

    async def read(self, n: int | None = None) -> bytes:
        """Between one and `n` bytes. Raises `ConnectionClosedError` at the end."""
        if self._at == len(self._buffer):
            self._buffer, self._at = await self._connection.read(_READ_BYTES), 0
            if not self._buffer:
                raise ConnectionClosedError("the peer closed the connection")
        end = len(self._buffer) if n is None else min(self._at + n, len(self._buffer))
        data = self._buffer[self._at : end]
        self._at = end
        return data

    async def write(self, data: bytes) -> None:
        await self._connection.write(data)

    async def close(self) -> None:
        await self._connection.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._connection.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._connection.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._connection.get_connection_type()


class BufferedNoise(Transport):
    """The security transport `/noise`, XX pattern, with a buffered connection underneath."""

    def __init__(self, key_pair: KeyPair) -> None:
        super().__init__(key_pair, noise_privkey=create_new_key_pair().private_key)

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return await super().secure_inbound(BufferedConnection(conn))

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID | None) -> ISecureConn:
        """The secured connection; with a `peer_id` of None, whoever answers is accepted and named by it."""
        return await self.get_pattern().handshake_outbound(BufferedConnection(conn), peer_id)
