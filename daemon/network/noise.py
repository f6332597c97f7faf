"""Noise, encrypted as py-libp2p does it, and carried to and from the socket with fewer turns.

The library reads every Noise message with one system call for its two length bytes and one for its body,
each under a lock, and taking a free lock costs a turn of trio's scheduler. A muxer has one reader and one
writer, so no lock is missed; reading in large pieces, and sending what the socket takes at once without
waiting, halves the time of a small message. It also lets us dial an address without knowing who lives
there: the far side still proves its identity, and the caller learns it.
Source: https://noiseprotocol.org, https://github.com/libp2p/specs/tree/master/noise
"""

from __future__ import annotations

import os
import socket
from typing import Final

import trio
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair, PrivateKey, PublicKey
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from libp2p.security.secure_session import SecureSession
from libp2p.security.security_multistream import SecurityMultistream
from multiaddr import Multiaddr
from noise.connection import NoiseConnection

from .multistream import agree, answer

MAX_PLAIN_BYTES: Final = 65_519  # of one message: 65,535 less 16 of authentication
_LENGTH_BYTES: Final = 2
_READ_BYTES: Final = 128 * 1024  # two full Noise messages


class NoiseSession(ISecureConn):
    """A connection whose far side has proved who it is. One task may read and one may write at a time."""

    def __init__(self, session: SecureSession, connection: IRawConnection) -> None:
        self.is_initiator = session.is_initiator
        self._session = session
        self._connection = connection
        self._socket = _socket_of(connection)
        self._noise = _state_of(session)
        self._cipher = b""  # received, from `_at` on not yet decrypted
        self._at = 0
        self._plain = b""  # decrypted, and more than was asked for
        self._unsent = memoryview(b"")  # encrypted, and more than the socket took

    async def read(self, n: int | None = None) -> bytes:
        """What arrives next: at most one message, and at most `n` bytes.

        Raises `ConnectionClosedError` at the end, and what decryption raises for a forged message.
        """
        data = self._plain or await self._read_message()
        if n is None or n >= len(data):
            self._plain = b""
            return data
        self._plain = data[n:]
        return data[:n]

    async def write(self, data: bytes) -> None:
        """Send all of `data`, after what is left over from `write_nowait`. Raises `ConnectionClosedError`."""
        await self.flush()
        await self._send(self._encrypt(data))

    def write_nowait(self, data: bytes) -> bool:
        """Send `data` without waiting. False when a part is left over, which `flush` sends.

        Not before `flush` has sent what an earlier call left over.
        """
        if self._unsent:
            raise BlockingIOError("an earlier message is not sent yet")
        self._unsent = memoryview(self._encrypt(data))
        if self._socket is not None:
            try:
                self._unsent = self._unsent[os.write(self._socket.socket.fileno(), self._unsent) :]
            except OSError:  # full, or broken: then `flush` waits, or says so
                return False
        return not self._unsent

    async def flush(self) -> None:
        """Send what is left over."""
        if self._unsent:
            unsent, self._unsent = self._unsent, memoryview(b"")
            await self._send(bytes(unsent))

    def tcp_info(self) -> bytes:
        """What the kernel tells of the connection (tcp(7)); nothing of a circuit, or of one that is closed."""
        if self._socket is None or not hasattr(socket, "TCP_INFO"):
            return b""
        try:
            return bytes(self._socket.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
        except OSError:
            return b""

    async def close(self) -> None:
        await self._connection.close()

    def get_local_peer(self) -> ID:
        return self._session.get_local_peer()

    def get_local_private_key(self) -> PrivateKey:
        return self._session.get_local_private_key()

    def get_remote_peer(self) -> ID:
        return self._session.get_remote_peer()

    def get_remote_public_key(self) -> PublicKey:
        return self._session.get_remote_public_key()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._connection.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._connection.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._connection.get_connection_type()

    async def _read_message(self) -> bytes:
        plain = b""
        while not plain:  # an empty message says nothing
            await self._fill(_LENGTH_BYTES)
            size = int.from_bytes(self._cipher[self._at : self._at + _LENGTH_BYTES])
            await self._fill(_LENGTH_BYTES + size)
            start = self._at + _LENGTH_BYTES
            self._at = start + size
            plain = bytes(self._noise.decrypt(self._cipher[start : self._at]))
        return plain

    async def _fill(self, size: int) -> None:
        """Have `size` bytes from `_at` on."""
        have = len(self._cipher) - self._at
        if have >= size:
            return
        pieces = [self._cipher[self._at :]]
        while have < size:
            pieces.append(await self._receive())
            have += len(pieces[-1])
        self._cipher, self._at = b"".join(pieces), 0

    def _encrypt(self, data: bytes) -> bytes:
        pieces: list[bytes] = []
        for start in range(0, len(data), MAX_PLAIN_BYTES):
            cipher = self._noise.encrypt(data[start : start + MAX_PLAIN_BYTES])
            pieces += (len(cipher).to_bytes(_LENGTH_BYTES), cipher)
        return b"".join(pieces)

    async def _send(self, data: bytes) -> None:
        if self._socket is None:
            await self._connection.write(data)
            return
        try:
            await self._socket.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as failure:
            raise ConnectionClosedError(_why(failure)) from failure

    async def _receive(self) -> bytes:
        try:
            if self._socket is None:
                data = await self._connection.read(_READ_BYTES)
            else:
                data = bytes(await self._socket.receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as failure:
            raise ConnectionClosedError(_why(failure)) from failure
        if not data:
            raise ConnectionClosedError("the peer closed the connection")
        return data


class FastNoise(Transport):
    """The security transport `/noise`, XX pattern, whose sessions are `NoiseSession`s."""

    def __init__(self, key_pair: KeyPair) -> None:
        super().__init__(key_pair, noise_privkey=create_new_key_pair().private_key)

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return _faster(await super().secure_inbound(conn), conn)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID | None) -> ISecureConn:
        """The secured connection; with a `peer_id` of None, whoever answers is accepted and named by it."""
        return _faster(await self.get_pattern().handshake_outbound(conn, peer_id), conn)


class NoiseOnly(SecurityMultistream):
    """Agrees on `/noise` and nothing else, in one round trip, and listens to no stranger for long."""

    def __init__(self, noise: FastNoise) -> None:
        super().__init__({PROTOCOL_ID: noise})
        self._noise = noise

    async def select_transport_and_protocol(
        self, conn: IRawConnection, is_initiator: bool
    ) -> tuple[TProtocol, ISecureTransport]:
        """Raises as `agree` and `answer`."""
        if is_initiator:
            await agree(conn, "(not known yet)", PROTOCOL_ID)
        else:
            await answer(conn, lambda protocol: protocol == PROTOCOL_ID)
        return PROTOCOL_ID, self._noise


def _faster(session: ISecureConn, connection: IRawConnection) -> ISecureConn:
    if isinstance(session, SecureSession):
        return NoiseSession(session, connection)
    raise TypeError(f"the Noise handshake gave a {type(session).__name__}, expected a SecureSession")


def _state_of(session: SecureSession) -> NoiseConnection:
    if isinstance(session.conn, NoiseTransportReadWriter):
        return session.conn.noise_state
    raise TypeError(f"the Noise session writes to a {type(session.conn).__name__}")


def _socket_of(connection: IRawConnection) -> trio.SocketStream | None:
    """The socket of a TCP connection; None for one through a relay, which is a stream itself."""
    tcp = connection.stream if isinstance(connection, RawConnection) else None
    return tcp.stream if isinstance(tcp, TrioTCPStream) else None


def _why(failure: Exception) -> str:
    return str(failure.__cause__ or failure)
