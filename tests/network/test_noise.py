"""Noise on a socket: messages of any size, what the socket does not take, and forged bytes."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from noise.exceptions import NoiseInvalidMessage
from trio.testing import open_stream_to_socket_listener

from corolla.daemon.identity import identity_from_seed
from corolla.daemon.network.libp2p.host import key_pair
from corolla.daemon.network.wire.noise import FastNoise, NoiseSession
from corolla.daemon.network.wire.sealing import MAX_PLAIN_BYTES, Sealer, Unsealer

pytestmark = pytest.mark.anyio

ONE, TWO = identity_from_seed(b"1" * 32), identity_from_seed(b"2" * 32)


@asynccontextmanager
async def sessions(peer: str | None = TWO.peer) -> AsyncIterator[tuple[NoiseSession, NoiseSession]]:
    """A dialling and an accepting session over a real socket with small buffers."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    here = await open_stream_to_socket_listener(listener)
    there = await listener.accept()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    found: list[NoiseSession] = []

    async def accept() -> None:
        session = await FastNoise(key_pair(TWO)).secure_inbound(RawConnection(TrioTCPStream(there), False))
        assert isinstance(session, NoiseSession)
        found.append(session)

    async with listener, here, there:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            expected = None if peer is None else ID.from_string(peer)
            near = await FastNoise(key_pair(ONE)).secure_outbound(
                RawConnection(TrioTCPStream(here), True), expected
            )
        assert isinstance(near, NoiseSession)
        yield near, found[0]


async def read_exactly(session: NoiseSession, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await session.read(size - len(data))
    return data


async def test_both_sides_learn_whom_they_speak_with() -> None:
    async with sessions() as (one, two):
        assert str(one.get_remote_peer()) == TWO.peer
        assert str(two.get_remote_peer()) == ONE.peer


async def test_whoever_answers_is_accepted_when_nobody_is_expected() -> None:
    async with sessions(None) as (one, _):
        assert str(one.get_remote_peer()) == TWO.peer


@pytest.mark.parametrize("size", [1, 65_518, MAX_PLAIN_BYTES, MAX_PLAIN_BYTES + 1, 300_000])
async def test_messages_of_any_size_arrive(size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    async with sessions() as (one, two), trio.open_nursery() as nursery:
        nursery.start_soon(one.write, data)
        assert await read_exactly(two, size) == data


async def test_a_read_gives_no_more_than_asked_and_keeps_the_rest() -> None:
    async with sessions() as (one, two):
        await one.write(b"abcdef")
        assert [await two.read(2), await two.read(3), await two.read()] == [b"ab", b"cde", b"f"]


async def test_what_the_socket_does_not_take_at_once_is_kept_for_flush() -> None:
    async with sessions() as (one, two):
        sent = b""
        while True:
            message = bytes([len(sent) % 251]) * 10_000
            sent += message
            if not one.send_nowait([message]):
                break
        with pytest.raises(BlockingIOError):
            one.send_nowait([b"too early"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.write, b"the last")
            assert await read_exactly(two, len(sent) + 8) == sent + b"the last"


async def test_the_librarys_own_session_understands_ours() -> None:
    async with sessions() as (one, two):
        stock = two._session  # before any message: both start from the handshake's keys
        data = bytes(index % 251 for index in range(100_000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.write, data)
            got = b""
            while len(got) < len(data):
                got += await stock.read(len(data) - len(got))
        assert got == data
        await stock.write(b"and back")
        assert await read_exactly(one, 8) == b"and back"


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 3000), max_size=8))
def test_sealed_messages_cut_anywhere_come_out_whole(messages: list[bytes], cuts: list[int]) -> None:
    sealer, unsealer = Sealer(bytes(32), 7), Unsealer(bytes(32), 7)
    sealed = b"".join(piece for message in messages for piece in sealer.seal(message))
    at = sorted(min(cut, len(sealed)) for cut in cuts)
    pieces = [sealed[a:b] for a, b in zip([0, *at], [*at, len(sealed)], strict=True)]
    found = [message for piece in pieces for message in unsealer.unseal(piece)]
    assert found == [message for message in messages if message]


async def test_the_end_is_an_error_of_the_connection() -> None:
    async with sessions() as (one, two):
        await one.close()
        with pytest.raises(ConnectionClosedError):
            await two.read()
        with pytest.raises(ConnectionClosedError):
            await one.write(b"x")


async def test_forged_bytes_are_not_taken_for_a_message() -> None:
    async with sessions() as (one, two):
        await one._connection.write(b"\x00\x20" + bytes(32))
        with pytest.raises(NoiseInvalidMessage):
            await two.read()
