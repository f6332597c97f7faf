"""What only the real network does: ports, strangers, other libraries' hosts, processes that die or stop."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_pair
from libp2p.host.ping import PingService
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as StockNoise
from multiaddr import Multiaddr
from trio.testing import wait_all_tasks_blocked

from corolla.daemon.identity import Identity, identity_from_seed, new_identity
from corolla.daemon.network.dialling import split_peer
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import MAX_KAD_QUESTIONS

pytestmark = pytest.mark.anyio

ECHO = "/test/echo/1"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
KAD = "/corolla/kad/test/1"


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)
    await stream.close()


async def read_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive()
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return data


async def assert_echoes(network: Libp2pNetwork, peer: str) -> None:
    stream = await network.open(peer, ECHO, timeout_s=5)
    await stream.send(b"are you there?")
    assert await read_exactly(stream, 14) == b"are you there?"
    await stream.close()


@asynccontextmanager
async def network(identity: Identity | None = None, **options: Any) -> AsyncIterator[Libp2pNetwork]:
    async with open_network(identity or new_identity(), **{"listen": LOOPBACK, **options}) as opened:
        opened.handle(ECHO, echo)
        yield opened


def endpoint(of: Libp2pNetwork) -> tuple[str, int]:
    parts = of.addresses()[0].split("/")
    return parts[2], int(parts[4])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ports


async def test_a_taken_port_is_named() -> None:
    async with network() as one:
        listen = split_peer(one.addresses()[0])[0]
        with pytest.raises(CorollaError, match=str(endpoint(one)[1])) as caught:
            async with network(listen=(listen,)):
                pytest.fail("two networks share a port")
        assert caught.value.code is Code.PORT_TAKEN
        assert "--listen" in caught.value.remedy


async def test_a_port_that_was_tried_is_free_though_a_child_has_inherited_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inherited: list[int] = []
    listen = socket.socket.listen

    def listen_and_fork(tried: socket.socket, *backlog: int) -> None:
        listen(tried, *backlog)
        if not inherited:  # the trial is the first; a child holds it until its own program runs
            inherited.append(os.dup(tried.fileno()))

    monkeypatch.setattr(socket.socket, "listen", listen_and_fork)
    try:
        async with network(listen=(f"/ip4/127.0.0.1/tcp/{free_port()}",)) as one:
            assert one.addresses()
    finally:
        for number in inherited:
            os.close(number)
    assert inherited


async def test_a_port_can_be_opened_again_and_again_by_the_same_identity() -> None:
    identity = new_identity()
    listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
    async with network() as other:
        for _ in range(3):
            async with network(identity, listen=(listen,)) as one:
                other.learn(one.peer, one.addresses())
                await assert_echoes(other, one.peer)
                await assert_echoes(one, one.peer)


@pytest.mark.timeout(60)
async def test_a_network_cancelled_while_it_opens_ends_whenever_that_is() -> None:
    async def open_it() -> None:
        async with network(kad_protocol=KAD):
            await trio.sleep_forever()

    for num_turns in range(0, 60, 3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_it)
            for _ in range(num_turns):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:4001", "/ip4/127.0.0.1/udp/4001/quic-v1", "/ip4/127.0.0.1/tcp/99999"]
)
async def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(CorollaError) as caught:
        async with network(listen=(address,)):
            pytest.fail("it listens")
    assert caught.value.code is Code.BAD_CONFIG


async def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(CorollaError, match=r"203\.0\.113\.1") as caught:
        async with network(listen=("/ip4/203.0.113.1/tcp/0",)):
            pytest.fail("it listens")
    assert caught.value.code is Code.BAD_CONFIG


async def test_wildcards_are_told_as_real_addresses_and_announced_ones_first() -> None:
    async with network(listen=("/ip4/0.0.0.0/tcp/0",), announce=("/ip4/8.8.8.8/tcp/4001",)) as one:
        told = one.addresses()
        assert told[0] == f"/ip4/8.8.8.8/tcp/4001/p2p/{one.peer}"
        assert not [address for address in told if "0.0.0.0" in address]
        assert len(told) > 1
        assert all(address.endswith(f"/p2p/{one.peer}") for address in told)


# dialling


async def test_an_address_without_peer_id_tells_who_lives_there() -> None:
    async with network() as one, network() as other:
        assert await one.connect(split_peer(other.addresses()[0])[0], timeout_s=5) == other.peer
        await assert_echoes(one, other.peer)


async def test_a_wrong_peer_id_is_refused() -> None:
    stranger = identity_from_seed(b"s" * 32).peer
    async with network() as one, network() as other:
        bare = split_peer(other.addresses()[0])[0]
        with pytest.raises(CorollaError, match="peer") as caught:
            await one.connect(f"{bare}/p2p/{stranger}", timeout_s=5)
        assert caught.value.code is Code.PEER_LOST
        assert one.peers() == ()


async def test_our_own_address_is_refused() -> None:
    async with network() as one:
        for address in (one.addresses()[0], split_peer(one.addresses()[0])[0]):
            with pytest.raises(CorollaError, match="own address"):
                await one.connect(address, timeout_s=5)


async def test_dead_addresses_before_the_good_one_do_no_harm() -> None:
    async with network() as one, network() as other:
        one.learn(
            other.peer, [f"/ip4/127.0.0.1/tcp/{free_port()}", "/ip4/127.0.0.1/tcp/1", *other.addresses()]
        )
        await assert_echoes(one, other.peer)


async def test_a_peer_that_was_not_there_is_reached_as_soon_as_it_is() -> None:
    identity = new_identity()
    async with network() as one:
        async with network(identity) as other:
            addresses = other.addresses()
        one.learn(identity.peer, addresses)
        for _ in range(2):
            with pytest.raises(CorollaError):
                await one.open(identity.peer, ECHO, timeout_s=5)
        async with network(identity, listen=(split_peer(addresses[0])[0],)):
            await assert_echoes(one, identity.peer)


async def test_the_error_tells_what_was_tried() -> None:
    stranger = identity_from_seed(b"s" * 32).peer
    async with network() as one:
        one.learn(stranger, ["/ip4/127.0.0.1/tcp/1"])
        with pytest.raises(CorollaError, match="refused") as caught:
            await one.open(stranger, ECHO, timeout_s=5)
        assert caught.value.code is Code.PEER_LOST
        assert caught.value.details["tried"] == ["/ip4/127.0.0.1/tcp/1"]


async def test_many_who_want_one_peer_share_one_dial() -> None:
    async with network() as one, network() as other:
        one.learn(other.peer, other.addresses())
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(assert_echoes, one, other.peer)
        assert len(other.peers()[0].addresses) == 1


async def test_two_that_dial_each_other_at_once_both_get_through() -> None:
    async with network() as one, network() as other:
        one.learn(other.peer, other.addresses())
        other.learn(one.peer, one.addresses())
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(assert_echoes, one, other.peer)
                nursery.start_soon(assert_echoes, other, one.peer)
            await one.disconnect(other.peer)


# finding peers


async def test_kademlia_finds_a_peer_that_only_a_third_one_knows() -> None:
    async with (
        network(kad_protocol=KAD) as one,
        network(kad_protocol=KAD) as middle,
        network(kad_protocol=KAD) as other,
    ):
        await other.connect(middle.addresses()[0], timeout_s=5)
        await one.connect(middle.addresses()[0], timeout_s=5)
        found: tuple[str, ...] = ()
        while other.peer not in found:
            found = await one.closest_peers(b"k" * 32, 5)
        assert one.peer not in found
        await assert_echoes(one, other.peer)


async def test_swarms_do_not_mix() -> None:
    async with network(kad_protocol=KAD) as one, network(kad_protocol="/corolla/kad/other/1") as other:
        await one.connect(other.addresses()[0], timeout_s=5)
        with pytest.raises(CorollaError) as caught:
            await one.open(other.peer, KAD, timeout_s=5)
        assert caught.value.code is Code.UNSUPPORTED


async def test_the_guard_keeps_strangers_out_of_kademlia() -> None:
    def nobody(peer: str, protocol: str) -> bool:
        return False

    async with network(kad_protocol=KAD) as one, network(kad_protocol=KAD, guard=nobody) as other:
        await one.connect(other.addresses()[0], timeout_s=5)
        for protocol in (KAD, ECHO):
            with pytest.raises(CorollaError) as caught:
                await one.open(other.peer, protocol, timeout_s=5)
            assert caught.value.code is Code.UNSUPPORTED
        assert await other.closest_peers(b"k" * 32, 5) in ((), (one.peer,))


@pytest.mark.parametrize("question", [b"", b"\x00", b"\xff" * 10, b"\x02\x08\x00", b"\xff\xff\xff\x7f"])
async def test_bad_kademlia_questions_are_not_answered(question: bytes) -> None:
    async with network() as one, network(kad_protocol=KAD) as other:
        await one.connect(other.addresses()[0], timeout_s=5)
        stream = await one.open(other.peer, KAD, timeout_s=5)
        await stream.send(question)
        await stream.close()
        try:
            assert await stream.receive() == b""
        except CorollaError as failure:
            assert failure.code is Code.PEER_LOST  # noqa: PT017 - both answers are good
        await assert_echoes(one, other.peer)


async def test_so_many_kademlia_questions_are_answered_on_one_stream() -> None:
    question = Message(type=Message.MessageType.FIND_NODE, key=b"k" * 32).SerializeToString()
    async with network() as one, network(kad_protocol=KAD) as other:
        await one.connect(other.addresses()[0], timeout_s=5)
        stream = await one.open(other.peer, KAD, timeout_s=5)
        await stream.send((MAX_KAD_QUESTIONS + 1) * (bytes([len(question)]) + question))
        answers = b""
        while data := await stream.receive():
            answers += data
        sizes = []
        while answers:
            sizes.append(answers[0])  # nobody else is known: an answer is short
            answers = answers[1 + sizes[-1] :]
        assert len(sizes) == MAX_KAD_QUESTIONS


# strangers


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 1000, b"\xff" * 100_000])
async def test_garbage_on_the_port_does_no_harm(garbage: bytes) -> None:
    async with network() as one, network() as other:
        for _ in range(5):
            stream = await trio.open_tcp_stream(*endpoint(other))
            async with stream:
                try:
                    await stream.send_all(garbage)
                except trio.BrokenResourceError:
                    continue
        one.learn(other.peer, other.addresses())
        await assert_echoes(one, other.peer)


@pytest.mark.parametrize(
    "garbage", [b"\x00", b"\x05nope\n", b"\xff\xff\xff\xff", b"\x13/multistream/1.0.0\n"]
)
async def test_garbage_instead_of_a_proposal_costs_one_stream(garbage: bytes) -> None:
    async with network() as one, network() as other:
        await one.connect(other.addresses()[0], timeout_s=5)
        connection = one._connections.live(other.peer)
        assert connection is not None
        muxed = await connection.muxed_conn.open_stream()
        await muxed.write(garbage)
        await muxed.close()
        await assert_echoes(one, other.peer)
        assert [view.peer for view in one.peers()] == [other.peer]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_peer_that_speaks_in_the_clear_is_refused() -> None:
    keys = create_new_key_pair()
    plain = new_host(key_pair=keys, sec_opt={PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)})
    async with network() as other, plain.run([]):
        with pytest.raises(Exception, match="unable to connect"):
            await plain.connect(info_from_p2p_addr(Multiaddr(other.addresses()[0])))
        assert other.peers() == ()
    gc.collect()  # the library leaves its socket to the collector, which complains: here, and in no other test


async def test_the_stock_host_is_understood() -> None:
    """Dial, identify, ping and echo by py-libp2p as it comes, with its own muxer."""
    keys = create_new_key_pair()
    noise = StockNoise(keys, noise_privkey=create_noise_pair().private_key)
    stock = new_host(key_pair=keys, sec_opt={NOISE: noise})
    async with network() as ours, stock.run([Multiaddr(LOOPBACK[0])]):
        info = info_from_p2p_addr(Multiaddr(ours.addresses()[0]))
        await stock.connect(info)
        assert len(await PingService(stock).ping(info.peer_id, 2)) == 2
        stream: Any = await stock.new_stream(info.peer_id, [ECHO])  # type: ignore[list-item]
        await stream.write(b"hello")
        assert await stream.read(5) == b"hello"
        assert [view.peer for view in ours.peers()] == [str(stock.get_id())]

        async def shout(muxed: Any) -> None:
            await muxed.write((await muxed.read(5)).upper())
            await muxed.close()

        stock.set_stream_handler("/test/shout/1", shout)  # type: ignore[arg-type]
        back = await ours.open(str(stock.get_id()), "/test/shout/1", timeout_s=5)
        await back.send(b"quiet")
        assert await read_exactly(back, 5) == b"QUIET"
        await stock.close()  # its `run` alone would leave the socket open


# what is left behind


async def test_connections_that_come_and_go_leave_nothing_behind() -> None:
    async with network() as other:

        async def visit() -> None:
            async with network(listen=()) as one:
                one.learn(other.peer, other.addresses())
                await assert_echoes(one, other.peer)

        async def settled() -> int:
            await wait_all_tasks_blocked(0.3)  # the library pauses 0.1 s after each connection
            return trio.lowlevel.current_statistics().tasks_living

        await visit()
        before = await settled()
        for _ in range(20):
            await visit()
        assert await settled() <= before


async def test_closing_ends_handlers_and_tells_the_other_side() -> None:
    ended = trio.Event()
    left = trio.Event()

    async def patient(stream: Stream) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with network() as one:
        one.on_peer(lambda peer, connected: None if connected else left.set())
        async with network() as other:
            other.handle("/test/patient/1", patient)
            one.learn(other.peer, other.addresses())
            stream = await one.open(other.peer, "/test/patient/1", timeout_s=5)
            await stream.send(b"x")
        assert ended.is_set()
        await left.wait()
        with pytest.raises(CorollaError) as caught:
            await stream.receive()
        assert caught.value.code is Code.PEER_LOST


async def test_a_cancelled_block_closes_too() -> None:
    with trio.CancelScope() as scope:
        async with network() as one:
            address = endpoint(one)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream(*address)


# other processes

_PROGRAM = """
import sys, anyio
from corolla.daemon.identity import new_identity
from corolla.daemon.network.libp2p.network import open_network

async def echo(stream):
    while data := await stream.receive():
        await stream.send(data)

async def main():
    async with open_network(new_identity(), listen=("/ip4/127.0.0.1/tcp/0",)) as network:
        network.handle("/test/echo/1", echo)
        print(network.addresses()[0], flush=True)
        await anyio.sleep_forever()

anyio.run(main, backend="trio")
"""


@asynccontextmanager
async def other_process() -> AsyncIterator[tuple[trio.Process, str]]:
    child = await trio.lowlevel.open_process([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        address = b""
        while not address.endswith(b"\n"):
            address += await child.stdout.receive_some()
        yield child, address.decode().strip()
    finally:
        child.kill()
        with trio.CancelScope(shield=True):
            await child.wait()


async def _lose(act: signal.Signals, limit_s: float) -> None:
    left = trio.Event()
    async with network() as one, other_process() as (child, address):
        peer = await one.connect(address, timeout_s=5)
        one.on_peer(lambda who, connected: left.set() if (who, connected) == (peer, False) else None)
        stream = await one.open(peer, ECHO, timeout_s=5)
        await stream.send(b"x")
        await read_exactly(stream, 1)
        os.kill(child.pid, act)
        with trio.fail_after(limit_s):
            with pytest.raises(CorollaError) as caught:
                await stream.receive()
            await left.wait()
        assert caught.value.code is Code.PEER_LOST


async def test_a_killed_process_is_noticed_at_once() -> None:
    await _lose(signal.SIGKILL, 2.0)


@pytest.mark.long
async def test_a_stopped_process_is_noticed_within_ten_seconds() -> None:
    await _lose(signal.SIGSTOP, 10.0)


# where others see us


async def test_each_side_is_told_where_the_other_sees_it() -> None:
    async with network() as one, network() as other:
        assert one.observes(other.peer) == ""
        await one.connect(other.addresses()[0], timeout_s=5)
        assert one.observes(other.peer) == split_peer(other.addresses()[0])[0]
        await assert_echoes(other, one.peer)  # it has noticed the connection by now
        seen = other.observes(one.peer)
        assert seen.startswith("/ip4/127.0.0.1/tcp/")
        one.observed_by(
            other.peer, "/ip4/11.0.0.9/tcp/4517"
        )  # by a neighbour: that says nothing of the world
        assert one.reach().observed == ()
