"""DCUtR, in memory: who says what, who dials whom and as what, and what a hostile end gets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from corolla.daemon.network.memory import MemoryHub, memory_hub
from corolla.daemon.network.reach import dcutr
from corolla.daemon.network.reach.dcutr import DCUTR_PROTOCOL
from corolla.daemon.network.reach.multiaddresses import packed
from corolla.daemon.network.reach.punching import AGAIN_S, DIAL_S, TALK_S, Circuit, Punching, Ways
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.limits import MAX_ADDRESSES_OFFERED, MAX_CIRCUIT_MESSAGE_BYTES, MAX_DOORS, MAX_PUNCHES

pytestmark = pytest.mark.anyio

ADA_S = "/ip4/11.0.0.5/tcp/4517"
BOB_S = "/ip4/11.0.0.6/tcp/4517"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@dataclass
class End:
    """One end of a circuit, with its dials written down instead of made. door: where the other is met.

    opens: after how many dials, of both ends together, the doors are open.
    """

    name: str
    other: str
    doors: tuple[str, ...]
    pair: Pair
    dialled: list[tuple[str, str, float]] = field(default_factory=list)  # how, where, when
    expected: list[tuple[str, int]] = field(default_factory=list)
    listens: tuple[str, ...] = ()
    has_called: bool = False

    async def call(self, address: str, peer: str) -> None:
        await self._dial("call", address)

    async def meet(self, address: str, peer: str) -> None:
        await self._dial("meet", address)

    async def _dial(self, how: str, address: str) -> None:
        self.dialled.append((how, address, trio.current_time()))
        self.pair.dials.add((self.name, how, address))
        if self.pair.opened_by <= self.pair.dials:
            self.pair.direct.set()
        raise error(Code.PEER_LOST, "connection refused")

    async def near(self, peer: str) -> None:
        await self._dial("near", "")

    @contextmanager
    def expecting(self, peer: str, endpoints: Sequence[tuple[str, int]]) -> Iterator[None]:
        self.expected.extend(endpoints)
        yield

    def punching(self, hub: MemoryHub) -> Punching:
        async def wait_direct(peer: str) -> None:
            await self.pair.direct.wait()

        network = hub.network(self.name)
        ways = Ways(
            call=self.call,
            meet=self.meet,
            expecting=self.expecting,
            near=self.near,
            doors=lambda: self.doors,
            has_called=lambda peer: self.has_called,
            is_direct=lambda peer: self.pair.direct.is_set(),
            wait_direct=wait_direct,
        )

        async def tell(stream: Stream) -> None:
            said = Identify(public_key=b"k", listen_addrs=packed(self.listens))
            await stream.send(said.SerializeToString())
            await stream.close()

        network.handle(str(IDENTIFY), tell)
        found = Punching(network, ways)
        found.serve()
        return found


@dataclass
class Pair:
    """Ada made the circuit, Bob was called. opened_by: the dials that make a direct connection."""

    hub: MemoryHub
    opened_by: set[tuple[str, str, str]] = field(default_factory=lambda: {("nobody", "", "")})
    direct: trio.Event = field(default_factory=trio.Event)
    dials: set[tuple[str, str, str]] = field(default_factory=set)
    ended: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.ada = End("ada", "bob", (ADA_S,), self)
        self.bob = End("bob", "ada", (BOB_S,), self)

    async def replace(self, within_s: float) -> None:
        """Both ends try."""
        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                for end in (self.ada, self.bob):
                    circuit = Circuit(end.other, end is self.ada, self.ended.wait, self._end)
                    nursery.start_soon(end.punching(self.hub).replace, circuit)

    async def _end(self) -> None:
        self.ended.set()


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    async with memory_hub() as hub:
        yield Pair(hub)


async def test_both_dial_at_once_and_the_caller_is_the_client() -> None:
    async with pair() as two:
        two.opened_by = {("ada", "call", BOB_S), ("bob", "meet", ADA_S)}
        began = trio.current_time()
        await two.replace(60)
        assert [(how, where) for how, where, _ in two.ada.dialled if how != "near"] == [("call", BOB_S)]
        assert [(how, where) for how, where, _ in two.bob.dialled] == [("meet", ADA_S)]
        assert two.ada.expected == [("11.0.0.6", 4517)]
        assert two.bob.expected == []
        assert two.ended.is_set()  # the circuit has served
        assert trio.current_time() - began < AGAIN_S[0] + 1


async def test_a_caller_that_is_public_is_dialled() -> None:
    async with pair() as two:
        two.ada.listens = ("/ip4/192.168.0.7/tcp/4517", ADA_S)
        two.opened_by = {("bob", "call", ADA_S)}
        await two.replace(60)
        assert [(how, where) for how, where, _ in two.bob.dialled] == [("call", ADA_S)]
        assert two.ada.expected == []


async def test_one_who_says_so_and_cannot_be_dialled_is_met() -> None:
    async with pair() as two:
        two.ada.listens = (ADA_S,)
        two.opened_by = {("ada", "call", BOB_S), ("bob", "meet", ADA_S)}
        await two.replace(60)
        assert [how for how, _, _ in two.bob.dialled] == ["call", "meet"]
        assert two.direct.is_set()


async def test_one_in_the_same_house_is_dialled_there() -> None:
    async with pair() as two:
        two.opened_by = {("ada", "near", "")}
        await two.replace(60)
        assert two.direct.is_set()


async def test_it_is_tried_less_and_less_often_and_the_circuit_stays() -> None:
    async with pair() as two:
        await two.replace(2 * sum(AGAIN_S))
        times = [at for how, _, at in two.bob.dialled]
        starts = [at for before, at in zip([-1e9, *times], times, strict=False) if at - before > 1]
        assert len(starts) == len(AGAIN_S)
        gaps = [after - before for before, after in pairwise(starts)]
        assert gaps == pytest.approx([pause_s + DIAL_S for pause_s in AGAIN_S[1:]], abs=1)
        assert not two.ended.is_set()


async def test_when_the_circuit_ends_nothing_more_is_tried() -> None:
    async with pair() as two:
        two.ended.set()
        await two.replace(60)
        assert two.ada.dialled == two.bob.dialled == []


async def test_two_that_called_each_other_punch_once_at_a_time() -> None:
    """Otherwise each would be client and server of one connection."""
    async with pair() as two:
        two.ada.has_called = two.bob.has_called = True
        with trio.move_on_after(20):
            async with trio.open_nursery() as nursery:
                for end in (two.ada, two.bob):
                    called = Circuit(end.other, False, two.ended.wait, two._end)
                    nursery.start_soon(end.punching(two.hub).replace, called)
        assert {how for how, _, _ in two.ada.dialled} == {"call"}  # the smaller peer id is the caller
        assert {how for how, _, _ in two.bob.dialled} == {"meet"}


# what a hostile end gets


async def said(two: Pair, data: bytes) -> bytes:
    """What ada, who called, answers to these bytes."""
    two.ada.punching(two.hub)
    stream = await two.hub.network("eve").open("ada", DCUTR_PROTOCOL, timeout_s=1)
    await stream.send(data)
    with trio.fail_after(2 * TALK_S):
        return await stream.receive()


def framed(message: HolePunch) -> bytes:
    body = message.SerializeToString()
    return len(body).to_bytes(1, "little") + body if len(body) < 128 else long(len(body)) + body


def long(size: int) -> bytes:
    return bytes((size & 0x7F | 0x80, size >> 7))


@pytest.mark.parametrize(
    "data",
    [
        long(MAX_CIRCUIT_MESSAGE_BYTES + 1),
        b"\xff\xff\xff\xff\x7f",
        b"",
        framed(dcutr.sync()),
        framed(dcutr.connect([ADA_S] * (MAX_ADDRESSES_OFFERED + 1))),
        b"\x02\x08\x01",
        b"\x04\x12\x02ab",
        b"\x03\xff\xff\xff",
        framed(dcutr.connect([ADA_S]))[:-3],
    ],
    ids=["too long", "endless", "silent", "sync", "too many", "type unknown", "no type", "junk", "truncated"],
)
async def test_what_is_no_punch_is_reset_within_bounds(data: bytes) -> None:
    async with pair() as two:
        with pytest.raises(CorollaError, match="reset"):
            await said(two, data)
        assert two.ada.dialled == []


async def test_nobody_is_made_to_knock_at_private_doors_nor_at_many() -> None:
    relayed = f"{BOB_S}/p2p/12D3KooWM6kM1cVf8Jsyh54PP6U7zcnbuNa3xi9biQNMVMDom4oL/p2p-circuit"
    private = (
        "/ip4/192.168.1.1/tcp/80",
        "/ip4/127.0.0.1/tcp/80",
        "/ip6/fe80::1/tcp/80",
        "/dns4/a.b/tcp/80",
        relayed,
    )
    public = tuple(f"/ip4/11.0.1.{number}/tcp/80" for number in range(10))
    async with pair() as two:
        two.bob.doors = (*private, *public)
        await two.replace(AGAIN_S[0] + 0.1)
        assert {where for how, where, _ in two.ada.dialled if how == "call"} == set(public[:MAX_DOORS])


async def test_a_called_one_that_is_direct_already_does_not_make_us_dial() -> None:
    async with pair() as two:
        two.direct.set()
        with pytest.raises(CorollaError, match="reset"):
            await said(two, framed(dcutr.connect([ADA_S])) + framed(dcutr.sync()))
        assert two.ada.dialled == []


async def test_so_many_punches_are_under_way_at_once() -> None:
    async with pair() as two:
        two.ada.punching(two.hub)
        asked = framed(dcutr.connect([ADA_S]))
        for number in range(MAX_PUNCHES):
            stream = await two.hub.network(f"eve{number}").open("ada", DCUTR_PROTOCOL, timeout_s=1)
            await stream.send(asked)
            assert await stream.receive() == asked  # it waits for `SYNC`
        stream = await two.hub.network("one more").open("ada", DCUTR_PROTOCOL, timeout_s=1)
        with pytest.raises(CorollaError, match="reset"):
            await stream.receive()
