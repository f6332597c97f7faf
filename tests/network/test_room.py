"""One peer's half-sent messages share one room: who begins many holds no more, and keeps only itself waiting."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from corolla.daemon.identity import new_identity
from corolla.daemon.network.conversation import Conversation
from corolla.daemon.network.libp2p.network import open_network
from corolla.daemon.network.room import Room
from corolla.daemon.network.seam import Stream
from corolla.protocol.limits import FIRST_WORD_BYTES, KIB, MAX_UNFINISHED_BYTES, MIB
from corolla.protocol.messages import Message, encode
from corolla.protocol.training import TRAINING, Chunk

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

LONG = encode(Chunk(b"l" * 300 * KIB))
SHORT = encode(Chunk(b"s"))
ROOM_BYTES = 2 * len(LONG)


class Fed:
    """A stream whose far side is the test; it may hold any number of bytes, as the muxer may."""

    peer, protocol = "12D3KooWFeeder", "/test/1"

    def __init__(self, room: Room) -> None:
        self.room = room
        self.arrived = bytearray()
        self._news = trio.lowlevel.ParkingLot()

    def feed(self, data: bytes) -> None:
        self.arrived += data
        self._news.unpark_all()

    async def receive(self, limit: int = MIB) -> bytes:
        while not self.arrived:
            await self._news.park()
        data = bytes(self.arrived[:limit])
        del self.arrived[:limit]
        return data

    async def send(self, data: bytes) -> None: ...
    async def close(self) -> None: ...
    def reset(self) -> None: ...


class Listener:
    """A stream, and what was heard on it."""

    def __init__(self, room: Room, nursery: trio.Nursery) -> None:
        self.stream = Fed(room)
        self.heard: list[Message | None] = []
        self.scope = trio.CancelScope()
        nursery.start_soon(self._hear)

    async def _hear(self) -> None:
        talk = Conversation(self.stream, TRAINING)
        with self.scope:
            while True:
                self.heard.append(await talk.hear())


async def test_half_sent_messages_of_a_peer_hold_no_more_than_its_room() -> None:
    room = Room(ROOM_BYTES)
    async with trio.open_nursery() as nursery:
        listeners = [Listener(room, nursery) for _ in range(10)]
        for listener in listeners:
            listener.stream.feed(LONG[:-1])
        await wait_all_tasks_blocked()
        left = sorted(len(listener.stream.arrived) for listener in listeners)
        assert left[:2] == [0, 0]
        assert all(size >= len(LONG) - 1 - FIRST_WORD_BYTES for size in left[2:])
        for listener in listeners:  # those that were begun have room to end, and make room for the next
            listener.stream.feed(LONG[-1:])
        await wait_all_tasks_blocked()
        assert [len(listener.heard) for listener in listeners] == [1] * 10
        assert room.free_bytes == ROOM_BYTES
        nursery.cancel_scope.cancel()


async def test_short_messages_need_no_room() -> None:
    room = Room(ROOM_BYTES)
    async with trio.open_nursery() as nursery:
        stalled = [Listener(room, nursery) for _ in range(3)]
        for listener in stalled:
            listener.stream.feed(LONG[:-1])
        other = Listener(room, nursery)
        other.stream.feed(SHORT)
        await wait_all_tasks_blocked()
        assert other.heard == [Chunk(b"s")]
        nursery.cancel_scope.cancel()


async def test_who_gives_up_a_message_makes_room_for_the_next() -> None:
    room = Room(ROOM_BYTES)
    async with trio.open_nursery() as nursery:
        holds, holds_too, waits, last = (Listener(room, nursery) for _ in range(4))
        for listener in (holds, holds_too, waits, last):
            listener.stream.feed(LONG[:-1])
            await wait_all_tasks_blocked()
        waits.scope.cancel()
        holds.scope.cancel()
        last.stream.feed(LONG[-1:])
        await wait_all_tasks_blocked()
        assert len(last.heard) == 1
        assert room.free_bytes == ROOM_BYTES - len(LONG)
        nursery.cancel_scope.cancel()
    assert room.free_bytes == ROOM_BYTES


async def test_room_that_was_granted_to_one_who_is_cancelled_goes_to_the_next() -> None:
    room = Room(10)
    await room.take(10)
    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()

        async def take_cancelled() -> None:
            with first:
                await room.take(10)

        nursery.start_soon(take_cancelled)
        await wait_all_tasks_blocked()
        nursery.start_soon(room.take, 7)
        await wait_all_tasks_blocked()
        first.cancel()
        room.give_back(10)  # before it has run again
    assert room.free_bytes == 3


async def test_all_streams_of_a_peer_share_one_room_and_no_other_peers() -> None:
    served: list[Stream] = []

    async def take_part(stream: Stream) -> None:
        served.append(stream)
        await stream.send(b"x")

    async with open_network(new_identity(), listen=("/ip4/127.0.0.1/tcp/0",)) as daemon:
        daemon.handle("/test/1", take_part)
        for num_streams in (2, 1):
            async with open_network(new_identity(), listen=()) as peer:
                peer.learn(daemon.peer, daemon.addresses())
                for _ in range(num_streams):
                    await (await peer.open(daemon.peer, "/test/1", timeout_s=10)).receive()
    one, same, other = (stream.room for stream in served)
    assert one is same
    assert one is not other
    assert one.free_bytes == MAX_UNFINISHED_BYTES
