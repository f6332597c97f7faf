"""Our muxer as the library sees it: against itself, against the stock one, and against bad company."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

import pytest
import trio
from libp2p.abc import ISecureConn
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from libp2p.stream_muxer.yamux.yamux import Yamux as StockYamux
from trio.testing import MockClock, memory_stream_pair

from corolla.daemon.identity import identity_from_seed
from corolla.daemon.network.wire.yamux import LINGER_TICKS, TICK_S, Yamux
from corolla.protocol.limits import INITIAL_WINDOW_BYTES

T = TypeVar("T")
PEER = ID.from_string(identity_from_seed(b"yamux" * 6 + b"..").peer)


class PlainConnection:
    """What the muxer needs of a secured connection, in memory and in the clear."""

    def __init__(self, stream: trio.StapledStream, *, is_initiator: bool) -> None:
        self.stream = stream
        self.is_initiator = is_initiator

    async def read(self, n: int | None = None) -> bytes:
        data: bytes = await self.stream.receive_some(n)
        if not data:
            raise ConnectionClosedError("the peer closed the connection")
        return data

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError as failure:
            raise ConnectionClosedError("the peer is gone") from failure

    async def close(self) -> None:
        await self.stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return None


def plain_pair() -> tuple[ISecureConn, ISecureConn]:
    one, two = memory_stream_pair()
    return (
        cast(ISecureConn, PlainConnection(one, is_initiator=True)),
        cast(ISecureConn, PlainConnection(two, is_initiator=False)),
    )


@asynccontextmanager
async def running(*connections: Any) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for connection in connections:
            nursery.start_soon(connection.start)
            await connection.event_started.wait()
        yield
        for connection in connections:
            await connection.close()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def couple() -> AsyncIterator[tuple[Yamux, Yamux]]:
    here, there = plain_pair()
    one, two = Yamux(here, PEER), Yamux(there, PEER)
    async with running(one, two):
        yield one, two


@asynccontextmanager
async def lonely() -> AsyncIterator[tuple[Yamux, trio.StapledStream]]:
    """Our muxer, and the bare far end of its connection."""
    here, there = plain_pair()
    one = Yamux(here, PEER)
    async with running(one):
        yield one, cast(PlainConnection, there).stream


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run under a clock that jumps over every wait."""

    async def call() -> T:
        return await main()

    return trio.run(call, clock=MockClock(autojump_threshold=0))


async def echo_all(connection: Any) -> None:
    async def echo(stream: Any) -> None:
        try:
            while True:
                await stream.write(await stream.read(65536))
        except MuxedStreamEOF:
            await stream.close()

    async with trio.open_nursery() as nursery:
        while True:
            nursery.start_soon(echo, await connection.accept_stream())


async def exchange(stream: Any, data: bytes) -> bytes:
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, data)
        while len(got) < len(data):
            got += await stream.read(65536)
    return bytes(got)


async def frames(stream: trio.StapledStream) -> list[tuple[int, int, int, int]]:
    """All frames (type, flags, stream, length) until the connection ends; none may have a body."""
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return [struct.unpack_from(">xBHII", data, at) for at in range(0, len(data), 12)]


@pytest.mark.anyio
@pytest.mark.parametrize("ours_dials", [True, False])
@pytest.mark.parametrize("ours_opens", [True, False])
async def test_the_stock_muxer_understands_ours(ours_dials: bool, ours_opens: bool) -> None:
    here, there = plain_pair()
    if not ours_dials:
        here, there = there, here
    ours, stock = Yamux(here, PEER), StockYamux(there, PEER)
    opener, acceptor = (ours, stock) if ours_opens else (stock, ours)
    async with running(ours, stock), trio.open_nursery() as nursery:
        nursery.start_soon(echo_all, acceptor)
        stream: Any = await opener.open_stream()
        for size in (1, 14_000, 64 * 1024, 1024 * 1024):
            data = bytes(index * 7 % 251 for index in range(min(size, 1000))) * max(1, size // 1000)
            assert await exchange(stream, data) == data
        await stream.close()
        with pytest.raises(MuxedStreamEOF):
            await stream.read(1)
        nursery.cancel_scope.cancel()


def test_a_silent_peer_is_given_up_within_ten_seconds() -> None:
    async def main() -> None:
        async with lonely() as (one, _):
            broken_at: list[float] = []
            one.on_broken = lambda: broken_at.append(trio.current_time())
            began = trio.current_time()
            stream = await one.open_stream()
            with pytest.raises(MuxedStreamReset, match="silent"):
                await stream.read()
            assert broken_at == [trio.current_time()]
            assert 5.0 < trio.current_time() - began <= 10.0
            assert one.is_closed

    run(main)


def test_a_quiet_peer_that_answers_is_kept() -> None:
    async def main() -> None:
        async with couple() as (one, two):
            await trio.sleep(1000)
            assert not one.is_closed
            assert not two.is_closed

    run(main)


@pytest.mark.anyio
async def test_the_round_trip_is_measured_at_once() -> None:
    async with couple() as (one, _):
        while not one.rtt():
            await trio.testing.wait_all_tasks_blocked()
        assert one.rtt() < 10


def test_a_stall_of_our_own_accuses_nobody() -> None:
    clock = MockClock()

    async def main() -> None:
        async with couple() as (one, two):
            for _ in range(10):
                clock.jump(100.0)  # this process was stopped for so long
                await trio.testing.wait_all_tasks_blocked()
            assert not one.is_closed
            assert not two.is_closed

    trio.run(main, clock=clock)


def test_a_reader_asleep_for_minutes_breaks_nothing() -> None:
    async def main() -> None:
        async with couple() as (one, two):
            stream = await one.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, bytes(2 * INITIAL_WINDOW_BYTES))
                far = await two.accept_stream()
                await trio.sleep(300)
                got = 0
                while got < 2 * INITIAL_WINDOW_BYTES:
                    got += len(await far.read())

    run(main)


@pytest.mark.anyio
async def test_the_far_sides_end_wakes_everybody() -> None:
    woken: list[str] = []

    async def wait(what: str, call: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises((MuxedStreamReset, MuxedConnUnavailable)):
            await call()
        woken.append(what)

    async with lonely() as (one, far), trio.open_nursery() as nursery:
        stream = await one.open_stream()
        while one.mux.may_open:
            await one.open_stream()
        nursery.start_soon(wait, "reader", stream.read)
        nursery.start_soon(wait, "writer", lambda: stream.write(bytes(10 * INITIAL_WINDOW_BYTES)))
        nursery.start_soon(wait, "opener", one.open_stream)
        nursery.start_soon(wait, "acceptor", one.accept_stream)
        await trio.testing.wait_all_tasks_blocked()
        await far.aclose()
    assert sorted(woken) == ["acceptor", "opener", "reader", "writer"]


@pytest.mark.anyio
async def test_what_arrived_before_the_end_can_be_read() -> None:
    async with couple() as (one, two):
        stream = await one.open_stream()
        await stream.write(b"last words")
        far = await two.accept_stream()
        await trio.testing.wait_all_tasks_blocked()
        await one.close()
        await trio.testing.wait_all_tasks_blocked()
        assert two.is_closed
        assert await far.read() == b"last words"
        with pytest.raises(MuxedStreamReset):
            await far.read()


@pytest.mark.anyio
async def test_closing_sends_what_is_queued_and_says_good_bye() -> None:
    here, there = plain_pair()
    one = Yamux(here, PEER)
    far = cast(PlainConnection, there).stream
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.start)
        await one.event_started.wait()
        (await one.open_stream()).finish()
        await one.close()
        nursery.cancel_scope.cancel()
    assert [(kind, flags) for kind, flags, _, _ in await frames(far) if kind != 2] == [(1, 1), (1, 4), (3, 0)]


@pytest.mark.anyio
async def test_a_violation_is_answered_and_ends_the_connection() -> None:
    async with lonely() as (one, far):
        await far.send_all(struct.pack(">BBHII", 0, 0, 0, 9, 0))
        sent = await frames(far)
        assert sent[-1] == (3, 0, 0, 1)
        with pytest.raises(MuxedConnUnavailable, match="stream 9"):
            await one.open_stream()


@pytest.mark.anyio
async def test_after_close_writing_is_refused_and_reading_goes_on() -> None:
    async with couple() as (one, two):
        stream = await one.open_stream()
        await stream.write(b"question")
        await stream.close()
        with pytest.raises(MuxedStreamClosed):
            await stream.write(b"more")
        far = await two.accept_stream()
        assert await far.read() == b"question"
        await far.write(b"answer")
        assert await stream.read() == b"answer"


def test_a_stream_left_alone_is_reset_after_a_minute() -> None:
    async def main() -> None:
        async with couple() as (one, two):
            stream = await one.open_stream()
            await stream.close()
            stream.linger()
            far = await two.accept_stream()
            await trio.sleep(LINGER_TICKS * TICK_S - 2)
            await far.write(b"still heard")
            assert await stream.read() == b"still heard"
            await trio.sleep(4)
            with pytest.raises(MuxedStreamReset):
                await far.write(b"x")
            assert one.mux.num_streams == two.mux.num_streams == 0

    run(main)


@pytest.mark.anyio
async def test_streams_nobody_accepts_are_refused_in_the_end() -> None:
    async with lonely() as (one, far):
        for number in range(400):
            await far.send_all(struct.pack(">BBHII", 0, 1, 1, 2 * number + 2, 0))
        await trio.testing.wait_all_tasks_blocked()
        assert one.mux.num_streams == 256
        accepted = [await one.accept_stream() for _ in range(256)]
        assert [stream.stream_id for stream in accepted] == list(range(2, 514, 2))


@pytest.mark.anyio
async def test_reads_take_no_more_than_asked() -> None:
    async with couple() as (one, two):
        stream = await one.open_stream()
        await stream.write(b"abcdef")
        far = await two.accept_stream()
        assert [await far.read(1), await far.read(2), await far.read(-1)] == [b"a", b"bc", b"def"]
