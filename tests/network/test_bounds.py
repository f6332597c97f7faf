"""Peers that flood, dawdle or say nothing are dropped, and nobody else notices. Real hosts on loopback."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, cast

import pytest
import trio
from libp2p.identity.identify_push.identify_push import ID_PUSH
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from trio.testing import MockClock

from corolla.daemon.identity import Identity, identity_from_seed, new_identity
from corolla.daemon.network.allowance import Allowance, Allowances, Rate, Terms
from corolla.daemon.network.conversation import Conversation
from corolla.daemon.network.libp2p import host as host_module
from corolla.daemon.network.libp2p import network as libp2p_module
from corolla.daemon.network.libp2p.host import key_pair
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.memory import stream_pair
from corolla.daemon.network.seam import Stream
from corolla.daemon.network.wire.multistream import agree
from corolla.daemon.network.wire.noise import FastNoise, NoiseOnly, NoiseSession
from corolla.daemon.network.wire.yamux import PROTOCOL as YAMUX
from corolla.daemon.network.wire.yamux import Yamux
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.framing import encode_frame
from corolla.protocol.limits import (
    FIRST_WORD_BYTES,
    FIRST_WORD_S,
    INITIAL_WINDOW_BYTES,
    MAX_CONNECTIONS_PER_PEER,
    MAX_HANDSHAKES,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    MESSAGE_TIMEOUT_S,
    MIB,
    SESSION_IDLE_S,
    SILENCE_S,
    STREAMS_PER_STRANGER,
    WRITE_STALL_S,
)
from corolla.protocol.messages import encode
from corolla.protocol.registry import KEY_BYTES, REGISTRY, Find

from ..fuzzing.hostile import may_refuse
from .test_yamux import PlainConnection, echo_all, exchange, plain_pair, running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

ECHO = "/test/echo/1"
SINK = "/test/sink/1"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
UPDATE, PING_FRAME, SYN, ACK = 1, 2, 1, 2
FRIEND = identity_from_seed(b"f" * 32)
SHORT = Find((bytes(KEY_BYTES),))
LONG = Find(tuple(bytes([number]) * KEY_BYTES for number in range(100)))


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)
    await stream.close()


async def never_read(stream: Stream) -> None:
    await trio.sleep_forever()


@asynccontextmanager
async def network(identity: Identity | None = None, **options: Any) -> AsyncIterator[Libp2pNetwork]:
    async with open_network(identity or new_identity(), **{"listen": LOOPBACK, **options}) as opened:
        opened.handle(ECHO, echo)
        opened.handle(SINK, never_read)
        yield opened


@asynccontextmanager
async def friends(**options: Any) -> AsyncIterator[tuple[Libp2pNetwork, Callable[[], Any]]]:
    """A daemon, and a friend's running stream to it: `still_there()` shows that it was not harmed."""
    async with network(**options) as daemon, network(FRIEND, listen=()) as friend:
        friend.learn(daemon.peer, daemon.addresses())
        stream = await friend.open(daemon.peer, ECHO, timeout_s=5)

        async def still_there() -> None:
            await stream.send(b"still there?")
            got = b""
            while len(got) < 12:
                piece = await stream.receive()
                assert piece
                got += piece
            assert got == b"still there?"

        await still_there()
        yield daemon, still_there
        await still_there()


def only_friends(peer: str, protocol: str) -> bool:
    return peer == FRIEND.peer


@asynccontextmanager
async def raw(daemon: Libp2pNetwork, identity: Identity | None = None) -> AsyncIterator[NoiseSession]:
    """A secured connection on which we say what we like instead of yamux."""
    parts = daemon.addresses()[0].split("/")
    async with await trio.open_tcp_stream(parts[2], int(parts[4])) as tcp:
        noise = NoiseOnly(FastNoise(key_pair(identity or new_identity())))
        connection = RawConnection(TrioTCPStream(tcp), True)
        secured = await noise.secure_outbound(connection, ID.from_string(daemon.peer))
        await agree(secured, daemon.peer, YAMUX)
        yield cast(NoiseSession, secured)


async def is_dropped(connection: NoiseSession, flood: bytes) -> None:
    """Send it all, hearing the answers; returns once the far side has closed the connection."""

    async def pour() -> None:
        try:
            await connection.write(flood)
        except ConnectionClosedError:
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pour)
        with suppress(ConnectionClosedError):
            while True:
                await connection.read()
        nursery.cancel_scope.cancel()


async def is_turned_away(daemon: Libp2pNetwork, identity: Identity) -> None:
    """Returns once the connection is closed, amid its handshake or after, and not because we say nothing."""
    with suppress(CorollaError), trio.fail_after(SILENCE_S - 1):
        async with raw(daemon, identity) as connection:
            await is_dropped(connection, b"")


async def answers_pings(connection: NoiseSession) -> bool:
    """Whether the far side still listens: it asks for our round trip too, and that may come first."""
    await connection.write(frames(PING_FRAME, 1))
    data = b""
    while struct.pack(">BBH", 0, PING_FRAME, ACK) not in data:
        data += await connection.read()
    return True


def frames(kind: int, count: int) -> bytes:
    ids = range(1, 2 * count, 2) if kind == UPDATE else [0] * count
    return b"".join(struct.pack(">BBHII", 0, kind, SYN, number, 0) for number in ids)


# floods


@pytest.mark.parametrize(
    "flood", [frames(PING_FRAME, 12_000), frames(UPDATE, 2000)], ids=["pings", "streams"]
)
async def test_a_stranger_that_floods_is_dropped(flood: bytes) -> None:
    async with friends(guard=only_friends) as (daemon, still_there), raw(daemon) as flooder:
        await is_dropped(flooder, flood)
        await still_there()


async def test_a_member_that_opens_streams_beyond_measure_is_dropped() -> None:
    async with friends() as (daemon, still_there), raw(daemon) as flooder:
        await is_dropped(flooder, frames(UPDATE, 5000))
        await still_there()
        assert [view.peer for view in daemon.peers()] == [FRIEND.peer]


async def test_a_stranger_has_a_few_streams_and_each_that_ends_makes_room() -> None:
    async with friends(guard=only_friends) as (daemon, _), network(listen=()) as stranger:
        stranger.learn(daemon.peer, daemon.addresses())
        streams = [
            await stranger.open(daemon.peer, str(ID_PUSH), timeout_s=5) for _ in range(STREAMS_PER_STRANGER)
        ]
        with pytest.raises(CorollaError):
            await stranger.open(daemon.peer, str(ID_PUSH), timeout_s=5)
        await streams[0].close()
        assert await streams[0].receive() == b""
        await stranger.open(daemon.peer, str(ID_PUSH), timeout_s=5)


async def test_who_fills_our_memory_is_dropped_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libp2p_module, "MAX_UNREAD_OF_ALL_BYTES", 8 * MIB)
    lost = trio.Event()
    async with friends() as (daemon, still_there), network(listen=()) as filler:
        filler.learn(daemon.peer, daemon.addresses())
        daemon.on_peer(lambda peer, connected: lost.set() if peer == filler.peer and not connected else None)

        async def fill() -> None:
            stream = await filler.open(daemon.peer, SINK, timeout_s=10)
            with pytest.raises(CorollaError):
                await stream.send(bytes(4 * MIB))

        async with trio.open_nursery() as nursery:
            for _ in range(48):
                nursery.start_soon(fill)
            await lost.wait()
        await still_there()


def test_who_sends_faster_than_it_may_is_slowed_and_loses_nothing() -> None:
    rate = Rate(1_000_000.0, 500_000.0)
    terms = Terms(rate, Rate(1e9, 1e9), Rate(1e9, 1e9), 100, 10 * MIB)

    class Piecewise(PlainConnection):
        """It reads as little at once as a socket does."""

        async def read(self, n: int | None = None) -> bytes:
            return await super().read(65_536)

    async def main() -> None:
        here, there = plain_pair()
        piecewise = Piecewise(cast(PlainConnection, here).stream, is_initiator=True)
        ours = Yamux(cast(Any, piecewise), ID.from_string(FRIEND.peer))
        theirs = Yamux(there, ID.from_string(FRIEND.peer))
        ours.allowance = Allowance(lambda: terms)
        async with running(ours, theirs), trio.open_nursery() as nursery:
            nursery.start_soon(echo_all, ours)
            began = trio.current_time()
            assert await exchange(await theirs.open_stream(), bytes(8 * MIB)) == bytes(8 * MIB)
            assert trio.current_time() - began > 6.0  # of the 8 s that so much takes at that pace
            nursery.cancel_scope.cancel()

    on_jumping_clock(main)


# at the door


async def test_no_more_connections_are_held_than_may_be_and_the_first_ones_stay() -> None:
    async with friends(max_connections=2) as (daemon, _), raw(daemon) as second:
        await is_turned_away(daemon, new_identity())
        assert await answers_pings(second)


async def test_a_peer_has_a_few_connections_however_fast_they_come() -> None:
    identity = new_identity()
    async with friends() as (daemon, _), AsyncExitStack() as stack:
        held = [
            await stack.enter_async_context(raw(daemon, identity)) for _ in range(MAX_CONNECTIONS_PER_PEER)
        ]
        assert all([await answers_pings(connection) for connection in held])
        await is_turned_away(daemon, identity)
        assert all([await answers_pings(connection) for connection in held])


async def test_a_handshake_that_does_not_go_on_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "HANDSHAKE_TIMEOUT_S", 0.2)
    async with network() as daemon:
        host, port = daemon.addresses()[0].split("/")[2:5:2]
        async with await trio.open_tcp_stream(host, int(port)) as silent:
            with trio.fail_after(9):
                while await silent.receive_some():
                    pass


async def test_silence_at_the_door_keeps_nobody_out() -> None:
    async with network() as daemon, network(listen=()) as newcomer, AsyncExitStack() as silent:
        host, port = daemon.addresses()[0].split("/")[2:5:2]
        for _ in range(MAX_HANDSHAKES + 20):
            await silent.enter_async_context(await trio.open_tcp_stream(host, int(port)))
        newcomer.learn(daemon.peer, daemon.addresses())
        stream = await newcomer.open(daemon.peer, ECHO, timeout_s=10)
        await stream.send(b"hello")
        assert await stream.receive() == b"hello"


async def test_a_stranger_cannot_make_us_wait_for_a_proposal_of_any_length() -> None:
    async with network() as daemon:
        host, port = daemon.addresses()[0].split("/")[2:5:2]
        async with await trio.open_tcp_stream(host, int(port)) as tcp:
            await tcp.send_all(b"\xff\xff\xff\xff\x07" + bytes(100_000))
            with trio.fail_after(9):  # sooner than its handshake would end
                try:
                    while await tcp.receive_some():
                        pass
                except trio.BrokenResourceError:
                    await trio.lowlevel.checkpoint()


# silence and slowness, on a clock that jumps


def on_jumping_clock(main: Callable[[], Any]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_peer_that_takes_nothing_we_send_is_given_up() -> None:
    class Stuffed(PlainConnection):
        """It answers every ping, and its socket takes nothing."""

        async def write(self, data: bytes) -> None:
            await trio.sleep_forever()

        async def read(self, n: int | None = None) -> bytes:
            await trio.sleep(1)
            return struct.pack(">BBHII", 0, PING_FRAME, SYN, 0, 7)

    async def main() -> None:
        here, _ = plain_pair()
        stream = cast(PlainConnection, here).stream
        ours = Yamux(cast(Any, Stuffed(stream, is_initiator=True)), ID.from_string(FRIEND.peer))
        async with running(ours):
            began = trio.current_time()
            writer = await ours.open_stream()
            with pytest.raises(Exception, match="took nothing"):
                await writer.read()
            assert WRITE_STALL_S <= trio.current_time() - began < WRITE_STALL_S + 5

    on_jumping_clock(main)


class Talk:
    """A conversation, the far side of which says what it likes."""

    def __init__(self, *, begun_by_peer: bool = False) -> None:
        near, self.far = stream_pair(FRIEND.peer, "/test/1")
        self.talk = Conversation.begun_by(near, REGISTRY) if begun_by_peer else Conversation(near, REGISTRY)


async def refusal_of(talk: Conversation) -> tuple[Code, float]:
    """Why nothing was heard, and after how long."""
    began = trio.current_time()
    with pytest.raises(CorollaError) as caught:
        await talk.hear()
    return caught.value.code, trio.current_time() - began


def test_a_message_begun_must_end_however_slowly_it_trickles() -> None:
    async def main() -> None:
        one = Talk()
        whole = encode_frame(b"h" * 1000)

        async def trickle() -> None:
            for at in range(len(whole) - 1):
                await one.far.send(whole[at : at + 1])
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            code, after_s = await refusal_of(one.talk)
            assert code is Code.TIMEOUT
            assert after_s == pytest.approx(MESSAGE_TIMEOUT_S, abs=2)
            nursery.cancel_scope.cancel()

    on_jumping_clock(main)


def test_a_stream_opened_for_nothing_is_given_up_at_once_and_a_session_after_hours() -> None:
    async def main() -> None:
        one = Talk(begun_by_peer=True)
        code, after_s = await refusal_of(one.talk)
        assert (code, round(after_s)) == (Code.TIMEOUT, FIRST_WORD_S)
        two = Talk(begun_by_peer=True)
        await two.far.send(encode(SHORT))
        assert await two.talk.hear() == SHORT
        two.talk.trust()
        code, after_s = await refusal_of(two.talk)
        assert (code, round(after_s)) == (Code.TIMEOUT, SESSION_IDLE_S)

    on_jumping_clock(main)


async def test_nothing_large_is_heard_before_a_request_is_admitted() -> None:
    one = Talk(begun_by_peer=True)
    await one.far.send((FIRST_WORD_BYTES + 1).to_bytes(4, "big") + bytes(4))
    assert (await refusal_of(one.talk))[0] is Code.LIMIT_EXCEEDED
    two = Talk(begun_by_peer=True)
    await two.far.send(bytes(4) + (1).to_bytes(4, "big"))
    assert (await refusal_of(two.talk))[0] is Code.LIMIT_EXCEEDED
    three = Talk(begun_by_peer=True)
    three.talk.trust()
    await three.far.send(encode(LONG))
    assert await three.talk.hear() == LONG


@pytest.mark.parametrize("lengths", [(MAX_HEADER_BYTES + 1, 0), (8, MAX_PAYLOAD_BYTES + 1)])
async def test_no_message_is_longer_than_the_longest(lengths: tuple[int, int]) -> None:
    one = Talk()
    await one.far.send(struct.pack(">II", *lengths))
    assert (await refusal_of(one.talk))[0] is Code.LIMIT_EXCEEDED


def test_an_answer_that_nobody_takes_is_given_up() -> None:
    async def main() -> None:
        one = Talk()
        with trio.fail_after(MESSAGE_TIMEOUT_S + 1), may_refuse(Code.TIMEOUT):
            while True:
                await one.talk.say(LONG)
        assert trio.current_time() == pytest.approx(MESSAGE_TIMEOUT_S, abs=1)

    on_jumping_clock(main)


def test_a_strangers_connection_keeps_little_unread() -> None:
    allowances = Allowances(lambda peer: False)

    async def main() -> None:
        here, there = plain_pair()
        ours, theirs = Yamux(here, ID.from_string(FRIEND.peer)), Yamux(there, ID.from_string(FRIEND.peer))
        ours.allowance = allowances.of("stranger")
        async with running(ours, theirs):
            for _ in range(8):
                stream = await theirs.open_stream()
                with trio.move_on_after(100):
                    await stream.write(bytes(INITIAL_WINDOW_BYTES))
                assert ours.mux.unread_bytes <= allowances.of("stranger").unread_bytes

    on_jumping_clock(main)
