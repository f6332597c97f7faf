"""What every network does, over memory and over libp2p on loopback alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeAlias

import pytest
import trio

from corolla.daemon.identity import identity_from_seed
from corolla.daemon.network.libp2p.network import open_network
from corolla.daemon.network.memory import memory_hub
from corolla.daemon.network.seam import Network, Stream
from corolla.protocol.errors import Code, CorollaError

pytestmark = pytest.mark.anyio

ECHO = "/test/echo/1"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
Networks: TypeAlias = Callable[[int], AbstractAsyncContextManager[list[Network]]]


@asynccontextmanager
async def _in_memory(count: int) -> AsyncIterator[list[Network]]:
    async with memory_hub() as hub:
        yield [hub.network(f"peer{number}") for number in range(count)]


@asynccontextmanager
async def _on_loopback(count: int) -> AsyncIterator[list[Network]]:
    async with AsyncExitStack() as stack:
        networks: list[Network] = []
        for number in range(count):
            identity = identity_from_seed(bytes([number + 1]) * 32)
            network = open_network(identity, listen=LOOPBACK, kad_protocol="/corolla/kad/test/1")
            networks.append(await stack.enter_async_context(network))
        for one in networks:
            for other in networks:
                one.learn(other.peer, other.addresses())
        yield networks


@pytest.fixture(params=[_in_memory, _on_loopback], ids=["memory", "libp2p"])
def networks(request: pytest.FixtureRequest) -> Networks:
    made: Networks = request.param
    return made


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)
    await stream.close()


async def read_to_end(stream: Stream) -> bytes:
    pieces = []
    while data := await stream.receive():
        pieces.append(data)
    return b"".join(pieces)


async def read_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive()
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return data


async def test_bytes_come_back_in_order(networks: Networks) -> None:
    async with networks(2) as (one, other):
        other.handle(ECHO, echo)
        stream = await one.open(other.peer, ECHO, timeout_s=5)
        assert (stream.peer, stream.protocol) == (other.peer, ECHO)
        for text in (b"one", b"two" * 5000, b"three"):
            await stream.send(text)
            assert await read_exactly(stream, len(text)) == text
        await stream.close()
        assert await read_to_end(stream) == b""


async def test_much_passes_through_small_windows_both_ways_at_once(networks: Networks) -> None:
    async with networks(2) as (one, other):
        other.handle(ECHO, echo)
        stream = await one.open(other.peer, ECHO, timeout_s=5)
        data = bytes(range(256)) * 16_384  # 4 MiB

        async def send() -> None:
            await stream.send(data)
            await stream.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await read_to_end(stream) == data


async def test_an_answer_comes_after_the_question_has_ended(networks: Networks) -> None:
    async def count(stream: Stream) -> None:
        await stream.send(str(len(await read_to_end(stream))).encode())
        await stream.close()

    async with networks(2) as (one, other):
        other.handle("/test/count/1", count)
        stream = await one.open(other.peer, "/test/count/1", timeout_s=5)
        await stream.send(b"12345")
        await stream.close()
        assert await read_to_end(stream) == b"5"


async def test_the_handler_knows_who_asks(networks: Networks) -> None:
    async def who(stream: Stream) -> None:
        await stream.send(stream.peer.encode())
        await stream.close()

    async with networks(2) as (one, other):
        other.handle("/test/who/1", who)
        stream = await one.open(other.peer, "/test/who/1", timeout_s=5)
        assert await read_to_end(stream) == one.peer.encode()


async def test_a_reset_is_a_lost_peer_on_the_other_side(networks: Networks) -> None:
    problems: list[Code] = []
    seen = trio.Event()

    async def handler(stream: Stream) -> None:
        try:
            await stream.send(b"hello")
            await stream.receive()
        except CorollaError as failure:
            problems.append(failure.code)
        seen.set()

    async with networks(2) as (one, other):
        other.handle(ECHO, handler)
        stream = await one.open(other.peer, ECHO, timeout_s=5)
        await read_exactly(stream, 5)
        stream.reset()
        stream.reset()  # and never raises
        await seen.wait()
        assert problems == [Code.PEER_LOST]
        with pytest.raises(CorollaError) as caught:
            await stream.send(b"more")
        assert caught.value.code is Code.PEER_LOST


async def test_an_unknown_protocol_is_unsupported(networks: Networks) -> None:
    async with networks(2) as (one, other):
        with pytest.raises(CorollaError) as caught:
            await one.open(other.peer, "/test/none/1", timeout_s=5)
        assert caught.value.code is Code.UNSUPPORTED
        other.handle(ECHO, echo)
        stream = await one.open(other.peer, ECHO, timeout_s=5)
        await stream.send(b"still here")
        assert await read_exactly(stream, 10) == b"still here"


async def test_an_unknown_peer_is_lost(networks: Networks) -> None:
    async with networks(1) as (one,):
        stranger = identity_from_seed(b"stranger" * 4).peer
        with pytest.raises(CorollaError, match=stranger) as caught:
            await one.open(stranger, ECHO, timeout_s=5)
        assert caught.value.code is Code.PEER_LOST


async def test_streams_to_ourselves_stay_here(networks: Networks) -> None:
    async with networks(1) as (one,):
        with pytest.raises(CorollaError) as caught:
            await one.open(one.peer, ECHO, timeout_s=5)
        assert caught.value.code is Code.UNSUPPORTED
        one.handle(ECHO, echo)
        stream = await one.open(one.peer, ECHO, timeout_s=5)
        await stream.send(b"me")
        assert await read_exactly(stream, 2) == b"me"
        assert one.peers() == ()


async def test_listeners_hear_of_a_peer_once_and_of_its_going_once(networks: Networks) -> None:
    heard: list[tuple[str, bool]] = []
    left = trio.Event()

    def listen(peer: str, connected: bool) -> None:
        heard.append((peer, connected))
        if not connected:
            left.set()

    async with networks(2) as (one, other):
        other.handle(ECHO, echo)
        other.on_peer(listen)
        for _ in range(3):
            stream = await one.open(other.peer, ECHO, timeout_s=5)
            await stream.send(b"x")
            await read_exactly(stream, 1)
        assert [view.peer for view in other.peers()] == [one.peer]
        assert [view.inbound for view in other.peers()] == [True]
        await one.disconnect(other.peer)
        await left.wait()
        assert heard == [(one.peer, True), (one.peer, False)]
        assert one.peers() == ()


async def test_streams_break_when_the_connection_is_closed(networks: Networks) -> None:
    async with networks(2) as (one, other):
        other.handle(ECHO, echo)
        stream = await one.open(other.peer, ECHO, timeout_s=5)
        await stream.send(b"x")
        await read_exactly(stream, 1)
        await other.disconnect(one.peer)
        with pytest.raises(CorollaError) as caught:
            await read_to_end(stream)
        assert caught.value.code is Code.PEER_LOST


async def test_a_closed_connection_is_dialled_anew(networks: Networks) -> None:
    async with networks(2) as (one, other):
        other.handle(ECHO, echo)
        await one.open(other.peer, ECHO, timeout_s=5)
        await one.disconnect(other.peer)
        stream = await one.open(other.peer, ECHO, timeout_s=5)
        await stream.send(b"again")
        assert await read_exactly(stream, 5) == b"again"


async def test_a_handlers_error_ends_its_stream_only(networks: Networks) -> None:
    async def broken(stream: Stream) -> None:
        await stream.receive()
        raise RuntimeError("a defect")

    async with networks(2) as (one, other):
        other.handle(ECHO, echo)
        other.handle("/test/broken/1", broken)
        healthy = await one.open(other.peer, ECHO, timeout_s=5)
        stream = await one.open(other.peer, "/test/broken/1", timeout_s=5)
        await stream.send(b"x")
        with pytest.raises(CorollaError) as caught:
            await stream.receive()
        assert caught.value.code is Code.PEER_LOST
        await healthy.send(b"fine")
        assert await read_exactly(healthy, 4) == b"fine"


async def test_the_guard_decides_by_peer_and_protocol(networks: Networks) -> None:
    async with networks(2) as (one, other):
        asked: list[tuple[str, str]] = []

        def guard(peer: str, protocol: str) -> bool:
            asked.append((peer, protocol))
            return protocol != ECHO

        other.restrict(guard)
        other.handle(ECHO, echo)
        other.handle("/test/open/1", echo)
        with pytest.raises(CorollaError) as caught:
            await one.open(other.peer, ECHO, timeout_s=5)
        assert caught.value.code is Code.UNSUPPORTED
        stream = await one.open(other.peer, "/test/open/1", timeout_s=5)
        await stream.send(b"x")
        assert await read_exactly(stream, 1) == b"x"
        assert (one.peer, ECHO) in asked


async def test_a_sleeping_reader_harms_nobody_else(networks: Networks) -> None:
    async def asleep(stream: Stream) -> None:
        await trio.sleep_forever()

    async with networks(2) as (one, other):
        other.handle("/test/asleep/1", asleep)
        other.handle(ECHO, echo)
        slow = await one.open(other.peer, "/test/asleep/1", timeout_s=5)
        quick = await one.open(other.peer, ECHO, timeout_s=5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow.send, bytes(8 * 1024 * 1024))
            for _ in range(50):
                await quick.send(b"y" * 1000)
                assert await read_exactly(quick, 1000) == b"y" * 1000
            nursery.cancel_scope.cancel()


async def test_cancelled_sends_leave_the_connection_whole(networks: Networks) -> None:
    async def asleep(stream: Stream) -> None:
        await trio.sleep_forever()

    async with networks(2) as (one, other):
        other.handle("/test/asleep/1", asleep)
        other.handle(ECHO, echo)
        for _ in range(100):
            victim = await one.open(other.peer, "/test/asleep/1", timeout_s=5)
            with trio.move_on_after(0.001):
                await victim.send(bytes(1024 * 1024))
            victim.reset()
        stream = await one.open(other.peer, ECHO, timeout_s=5)
        await stream.send(b"whole")
        assert await read_exactly(stream, 5) == b"whole"


async def test_many_streams_live_side_by_side(networks: Networks) -> None:
    async with networks(2) as (one, other):
        other.handle(ECHO, echo)
        streams: list[Stream] = []

        async def talk(number: int) -> None:
            stream = await one.open(other.peer, ECHO, timeout_s=60)
            streams.append(stream)
            text = str(number).encode() * 50
            await stream.send(text)
            assert await read_exactly(stream, len(text)) == text

        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(talk, number)
        assert len(streams) == 1000
        assert len(one.peers()) == 1


async def test_the_closest_peers_are_others_and_no_more_than_asked(networks: Networks) -> None:
    async with networks(4) as (one, *others):
        for other in others:
            await one.connect(other.addresses()[0], timeout_s=5)
        found = await one.closest_peers(b"key of 32 bytes, as sha256 gives", 2)
        assert len(found) == 2
        assert set(found) < {other.peer for other in others}


async def test_connect_gives_the_peer_and_keeps_to_one_connection(networks: Networks) -> None:
    async with networks(2) as (one, other):
        other.handle(ECHO, echo)
        assert await one.connect(other.addresses()[0], timeout_s=5) == other.peer
        assert await one.connect(other.addresses()[0], timeout_s=5) == other.peer
        await one.open(other.peer, ECHO, timeout_s=5)
        assert [view.peer for view in one.peers()] == [other.peer]
        assert len(one.peers()[0].addresses) == 1


async def test_connect_refuses_what_is_no_address(networks: Networks) -> None:
    async with networks(1) as (one,):
        with pytest.raises(CorollaError) as caught:
            await one.connect("nonsense", timeout_s=5)
        assert caught.value.code is Code.BAD_REQUEST


async def test_an_error_in_the_block_comes_out_as_itself(networks: Networks) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with networks(1):
            raise ValueError("mine")
