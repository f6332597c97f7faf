"""With libp2p as others wrote it, both ways: dial, identify, ping, echo over our muxer, Kademlia's find-peer."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from corolla.daemon.identity import new_identity
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.reach import autonat, dcutr
from corolla.daemon.network.reach.autonat import DIAL_REQUEST_PROTOCOL
from corolla.daemon.network.reach.dcutr import DCUTR_PROTOCOL
from corolla.daemon.network.reach.preamble import Preamble
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import CorollaError

from .peers import DEADLINE_S, ECHO, IDENTIFY, PING, ForeignPeer, JsPeer, install_go, install_js, running

pytestmark = [pytest.mark.anyio, pytest.mark.long, pytest.mark.timeout(600)]

KAD = "/ipfs/kad/1.0.0"
SIZES = (1, 14_000, 65_536, 1_000_000)


@pytest.fixture(scope="module", params=["js", "go"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The kind of peer and what runs it, installed once."""
    kind: str = request.param
    folder = tmp_path_factory.mktemp(kind)
    return kind, install_js(folder) if kind == "js" else install_go(folder)


@pytest.fixture
def folder() -> Iterator[Path]:
    """For sockets, whose paths have to be short."""
    with tempfile.TemporaryDirectory(prefix="cor-") as path:
        yield Path(path)


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)
    await stream.close()


@asynccontextmanager
async def ours() -> AsyncIterator[Libp2pNetwork]:
    async with open_network(new_identity(), listen=("/ip4/127.0.0.1/tcp/0",), kad_protocol=KAD) as network:
        network.handle(ECHO, echo)
        yield network


async def read(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive()
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return data


async def identified(network: Libp2pNetwork, peer: ForeignPeer) -> bytes:
    """What a peer says of itself. js-libp2p answers one such question at a time, and our host asks too."""
    with trio.fail_after(DEADLINE_S):
        while True:
            try:
                stream = await network.open(peer.peer, IDENTIFY, timeout_s=10)
                data = b""
                while piece := await stream.receive():
                    data += piece
                await stream.close()
                return data
            except CorollaError:
                await trio.sleep(0.1)


async def check_ours_to_theirs(network: Libp2pNetwork, peer: ForeignPeer) -> None:
    """Identify, ping and echo, asked by us."""
    told = parse_identify_response(await identified(network, peer))
    assert {ECHO, PING, KAD} <= set(told.protocols)
    assert ID.from_string(peer.peer).to_bytes()[-32:] in told.public_key
    stream = await network.open(peer.peer, PING, timeout_s=10)
    await stream.send(bytes(range(32)))
    assert await read(stream, 32) == bytes(range(32))
    stream.reset()
    for size in SIZES:
        stream = await network.open(peer.peer, ECHO, timeout_s=10)
        data = bytes(index % 251 for index in range(size))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, data)
            assert await read(stream, size) == data
        await stream.close()


async def check_theirs_to_ours(network: Libp2pNetwork, peer: ForeignPeer) -> None:
    """The same, asked by them."""
    assert {ECHO, PING, KAD} <= set(await peer.identify(network.peer))
    await peer.ping(network.peer)
    for size in SIZES:
        assert await peer.echo(network.peer, size), f"{size} bytes came back otherwise"


@pytest.mark.parametrize("we_dial", [True, False])
async def test_whoever_dials_both_talk(program: tuple[str, Path], folder: Path, we_dial: bool) -> None:
    async with running(*program, folder) as peer, ours() as network:
        if we_dial:
            assert await network.connect(peer.address, timeout_s=10) == peer.peer
        else:
            await peer.dial(network.addresses()[0])
        await check_ours_to_theirs(network, peer)
        await check_theirs_to_ours(network, peer)
        assert [view.peer for view in network.peers()] == [peer.peer]
        assert all(view.inbound is not we_dial for view in network.peers())


async def test_they_find_a_peer_through_us(program: tuple[str, Path], folder: Path) -> None:
    async with running(*program, folder) as peer, ours() as network, ours() as third:
        await third.connect(network.addresses()[0], timeout_s=10)
        network.learn(third.peer, third.addresses())
        await peer.dial(network.addresses()[0])
        found: list[str] = []
        with trio.fail_after(DEADLINE_S):
            while not found:
                try:
                    found = await peer.find(third.peer)
                except AssertionError:  # it has not taken us into its table yet
                    await trio.sleep(0.2)
        port = third.addresses()[0].split("/tcp/")[1].split("/")[0]
        assert any(f"/127.0.0.1/tcp/{port}" in address for address in found)


async def test_we_find_a_peer_through_them(program: tuple[str, Path], folder: Path) -> None:
    async with running(*program, folder) as peer, ours() as network, ours() as third:
        await peer.dial(third.addresses()[0])
        await network.connect(peer.address, timeout_s=10)
        key = ID.from_string(third.peer).to_bytes()
        with trio.fail_after(DEADLINE_S):
            while third.peer not in await network.closest_peers(key, 4):  # noqa: ASYNC110 - the peer's own time
                await trio.sleep(0.2)
        stream = await network.open(third.peer, ECHO, timeout_s=10)
        await stream.send(b"found")
        assert await read(stream, 5) == b"found"


@pytest.mark.parametrize("program", ["js"], indirect=True)
async def test_dialling_back_and_punching_are_asked_and_answered_alike(
    program: tuple[str, Path], folder: Path
) -> None:
    """What is said alone: on loopback nobody dials anybody, since it is no address of the world."""
    elsewhere = ("/ip4/11.0.0.9/tcp/4517",)
    async with running(*program, folder) as peer, ours() as network:
        assert isinstance(peer, JsPeer)
        await network.connect(peer.address, timeout_s=10)
        assert await peer.ask_to_dial(network.peer, network.addresses()[0]) == "E_DIAL_REFUSED"

        stream = await network.open(peer.peer, DIAL_REQUEST_PROTOCOL, timeout_s=10)
        talk = Preamble(stream)
        await talk.say(autonat.request(elsewhere, autonat.new_nonce()))
        told = await talk.hear(autonat.ENVELOPE)
        assert told.WhichOneof("msg") == "dialDataRequest"  # as the specification wants it for another IP
        stream.reset()

        stream = await network.open(peer.peer, DCUTR_PROTOCOL, timeout_s=10)
        talk = Preamble(stream)
        await talk.say(dcutr.connect(elsewhere))
        assert dcutr.doors_of(await talk.hear(HolePunch)) == ()
        stream.reset()
