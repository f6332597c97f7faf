"""Noise: py-libp2p's handshake, and then our own way to and from the socket, with fewer turns.

The library reads every Noise message with one system call for its two length bytes and one for its body,
each under a lock, and taking a free lock costs a turn of trio's scheduler. A muxer has one reader and one
writer, so no lock is missed: a message costs one wait, one read and one write, with no layer between. What
is sealed how is in `sealing.py`. It also lets us dial an address without knowing who lives
there: the far side still proves its identity, and the caller learns it.
Source: https://noiseprotocol.org, https://github.com/libp2p/specs/tree/master/noise
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
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

from .multistream import agree, answer
from .sealing import MAX_PLAIN_BYTES, Sealer, Unsealer

_READ_BYTES: Final = 256 * 1024  # four full Noise messages


class NoiseSession(ISecureConn):
    """A connection whose far side has proved who it is. One task may read and one may write at a time."""

    def __init__(self, session: SecureSession, connection: IRawConnection) -> None:
        self.is_initiator = session.is_initiator
        self._session = session
        self._connection = connection
        self._socket = _socket_of(connection)
        self._sealer, self._unsealer = _ciphers_of(session)
        self._arrived: deque[bytes] = deque()  # messages that nobody has read
        self._unsent = memoryview(b"")  # sealed, and more than the socket took

    async def read(self, n: int | None = None) -> bytes:
        """What arrives next: at most one message, and at most `n` bytes. Raises as `receive`."""
        if not self._arrived:
            self._arrived += await self.receive()
        data = self._arrived.popleft()
        if n is not None and n < len(data):
            self._arrived.appendleft(data[n:])
        return data[:n]

    async def write(self, data: bytes) -> None:
        """Send all of `data`, after what is left over from `send_nowait`. Raises `ConnectionClosedError`."""
        await self._flush_all()
        self.send_nowait([data[at : at + MAX_PLAIN_BYTES] for at in range(0, len(data), MAX_PLAIN_BYTES)])
        await self._flush_all()

    async def receive(self) -> Sequence[bytes]:
        """The messages that have arrived, at least one.

        Raises `ConnectionClosedError` at the end, and `NoiseInvalidMessage` for a forged message.
        """
        messages: Sequence[bytes] = tuple(self._arrived)
        self._arrived.clear()
        while not messages:
            messages = self._unsealer.unseal(await self._receive())
        return messages

    def send_nowait(self, messages: Sequence[bytes]) -> bool:
        """Send messages, each at most `MAX_PLAIN_BYTES`, without waiting. False when a part is left to `flush`.

        Not before `flush` has sent what an earlier call left over.
        """
        if self._unsent:
            raise BlockingIOError("an earlier message is not sent yet")
        pieces = [piece for message in messages for piece in self._sealer.seal(message)]
        sent = 0
        if self._socket is not None:
            with suppress(OSError):  # full, or broken: then `flush` waits, or says so
                sent = os.writev(self._socket.socket.fileno(), pieces)
        if sent < sum(map(len, pieces)):
            self._unsent = memoryview(b"".join(pieces))[sent:]
        return not self._unsent

    async def flush(self) -> bool:
        """Send some more of what is left over. True when nothing is left. Raises `ConnectionClosedError`."""
        if not self._unsent:
            return True
        if self._socket is None:
            unsent, self._unsent = self._unsent, memoryview(b"")
            await self._connection.write(bytes(unsent))
            return True
        try:
            await trio.lowlevel.wait_writable(_descriptor(self._socket))
            self._unsent = self._unsent[os.write(_descriptor(self._socket), self._unsent) :]
        except BlockingIOError:  # it was writable for less than a moment
            return False
        except (OSError, trio.ClosedResourceError) as failure:
            raise ConnectionClosedError(_why(failure)) from failure
        return not self._unsent

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

    async def _flush_all(self) -> None:
        while not await self.flush():
            pass

    async def _receive(self) -> bytes:
        """Some bytes as they came."""
        try:
            if self._socket is None:
                data = await self._connection.read(_READ_BYTES)
            else:
                data = await _read_from(self._socket)
        except (OSError, trio.ClosedResourceError) as failure:
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


def _ciphers_of(session: SecureSession) -> tuple[Sealer, Unsealer]:
    """Of the handshake that ended; the library's own are of no use from now on."""
    if not isinstance(session.conn, NoiseTransportReadWriter):
        raise TypeError(f"the Noise session writes to a {type(session.conn).__name__}")
    agreed = session.conn.noise_state.noise_protocol
    out, inward = agreed.cipher_state_encrypt, agreed.cipher_state_decrypt
    return Sealer(out.k, out.n), Unsealer(inward.k, inward.n)


def _socket_of(connection: IRawConnection) -> trio.SocketStream | None:
    """The socket of a TCP connection; None for one through a relay, which is a stream itself."""
    tcp = connection.stream if isinstance(connection, RawConnection) else None
    return tcp.stream if isinstance(tcp, TrioTCPStream) else None


def _descriptor(stream: trio.SocketStream) -> int:
    """Of a socket that is open. Raises `ClosedResourceError`."""
    descriptor = stream.socket.fileno()
    if descriptor < 0:
        raise trio.ClosedResourceError("the connection was closed here")
    return descriptor


async def _read_from(stream: trio.SocketStream) -> bytes:
    """Some bytes. Waits before it tries: a muxer's reader has mostly just read what there was."""
    while True:
        await trio.lowlevel.wait_readable(_descriptor(stream))
        try:
            return os.read(_descriptor(stream), _READ_BYTES)
        except BlockingIOError:  # it was readable for less than a moment
            continue


def _why(failure: Exception) -> str:
    return str(failure.__cause__ or failure)
