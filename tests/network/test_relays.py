"""Circuits through a relay, over real libp2p: reached, bounded, renewed, replaced, left for a direct connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage

from corolla.daemon.identity import identity_from_seed, new_identity
from corolla.daemon.network.dialling import Reach, Reachability
from corolla.daemon.network.libp2p import host as host_module
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.memory import memory_hub
from corolla.daemon.network.reach import relays as relays_module
from corolla.daemon.network.reach.circuits import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    check_status,
    circuit_address,
    split_circuit,
)
from corolla.daemon.network.reach.identifying import identify
from corolla.daemon.network.reach.observations import endpoint_of
from corolla.daemon.network.reach.preamble import Preamble
from corolla.daemon.network.reach.relaying import BURST_BYTES, RelayLimits, RelayService
from corolla.daemon.network.reach.relays import Refusal, candidates
from corolla.daemon.network.seam import Network, PeerView, Stream
from corolla.daemon.network.traffic import MAX_YIELD_S, Pace
from corolla.protocol.errors import Code, CorollaError

pytestmark = pytest.mark.anyio

ECHO = "/test/echo/1"
PEERS = tuple(identity_from_seed(letter * 32).peer for letter in (b"m", b"s", b"c"))
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)
    await stream.close()


async def echoed(stream: Stream, data: bytes) -> bytes:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send, data)
        back = b""
        while len(back) < len(data):
            piece = await stream.receive()
            assert piece
            back += piece
    return back


async def echo_for_ever(stream: Stream) -> None:
    while True:
        await stream.send(bytes(20_000))
        await stream.receive()


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[Libp2pNetwork]:
    async with open_network(new_identity(), **options) as network:
        network.handle(ECHO, echo)
        yield network


def relay(**limits: Any) -> Any:
    return opened(listen=LOOPBACK, relay=RelayLimits(**limits), reachability=Reachability.PUBLIC)


def hidden() -> Any:
    """A peer that nobody can dial: it does not listen."""
    return opened(listen=(), reachability=Reachability.PRIVATE)


async def until(condition: Any) -> None:
    """Wait for what another task of this loop brings about."""
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - the network tells nobody of this
            await trio.sleep(0.01)


async def enter(network: Libp2pNetwork, by: Libp2pNetwork) -> None:
    """Connect to a relay, and hold a reservation there."""
    await network.connect(by.addresses()[0], timeout_s=5)
    await until(lambda: by.peer in network.relays.held)


async def test_a_peer_that_nobody_can_dial_is_reached_through_a_relay() -> None:
    async with relay() as middle, hidden() as server, opened(listen=LOOPBACK) as client:
        await enter(server, middle)
        client.learn(server.peer, server.addresses())

        stream = await client.open(server.peer, ECHO, timeout_s=10)
        assert stream.peer == server.peer
        data = bytes(range(256)) * 4096  # 1 MiB
        assert await echoed(stream, data) == data
        (view,) = [view for view in client.peers() if view.peer == server.peer]
        assert view.relayed
        (back,) = [view for view in server.peers() if view.peer == client.peer]
        assert back.relayed
        assert back.inbound
        assert middle.relaying is not None
        assert middle.relaying.num_circuits == 1
        await stream.close()


async def test_two_hidden_peers_talk_both_ways() -> None:
    async with relay() as middle, hidden() as one, hidden() as two:
        await enter(one, middle)
        await enter(two, middle)
        one.learn(two.peer, two.addresses())
        assert await echoed(await one.open(two.peer, ECHO, timeout_s=10), b"hello") == b"hello"
        assert await echoed(await two.open(one.peer, ECHO, timeout_s=10), b"there") == b"there"


async def test_the_relay_cannot_pretend_to_be_the_peer() -> None:
    async with relay() as middle, hidden() as server, hidden() as other, opened(listen=LOOPBACK) as client:
        await enter(server, middle)
        await enter(other, middle)
        # The circuit leads to `server`; whoever expects `other` there must not be satisfied.
        circuit = await client.relays.dial(server.relays.addresses()[0], server.peer)
        with pytest.raises(Exception, match=r"(?i)peer"):
            await client._swarm.upgrade_outbound(circuit, ID.from_string(other.peer))


async def test_without_a_reservation_nobody_is_called() -> None:
    async with relay() as middle, opened(listen=()) as server, opened(listen=LOOPBACK) as client:
        await server.connect(middle.addresses()[0], timeout_s=5)
        address = circuit_address(*split_circuit(f"{middle.addresses()[0]}/p2p-circuit"))
        client.learn(server.peer, (address,))
        with pytest.raises(CorollaError, match="no_reservation") as caught:
            await client.open(server.peer, ECHO, timeout_s=10)
        assert caught.value.code is Code.PEER_LOST


async def test_a_relay_takes_no_more_reservations_and_circuits_than_its_limits() -> None:
    limits = relay(reservations=1, circuits_per_peer=1)
    async with limits as middle, hidden() as one, hidden() as two, opened(listen=LOOPBACK) as client:
        await enter(one, middle)
        await two.connect(middle.addresses()[0], timeout_s=5)
        with pytest.raises(CorollaError, match=r"resource|refused"):
            await _ask_reservation(two, middle)
        client.learn(one.peer, one.addresses())
        await client.open(one.peer, ECHO, timeout_s=10)
        with pytest.raises(CorollaError, match="resource_limit") as caught:
            await client.relays.dial(one.relays.addresses()[0], one.peer)
        assert caught.value.code is Code.BUSY


async def test_all_peers_together_have_so_many_circuits() -> None:
    async with (
        relay(circuits=1) as middle,
        hidden() as one,
        hidden() as two,
        opened(listen=LOOPBACK) as client,
    ):
        for server in (one, two):
            await enter(server, middle)
            client.learn(server.peer, server.addresses())
        await client.open(one.peer, ECHO, timeout_s=10)
        with pytest.raises(CorollaError, match="resource_limit"):
            await client.open(two.peer, ECHO, timeout_s=10)


async def test_one_switch_ends_what_is_carried_and_offers_no_more() -> None:
    is_wanted = True
    async with relay(is_wanted=lambda: is_wanted) as middle, hidden() as server:
        await enter(server, middle)
        async with opened(listen=LOOPBACK) as client:
            client.learn(server.peer, server.addresses())
            stream = await client.open(server.peer, ECHO, timeout_s=10)
            assert middle.reach().offers_relay
            is_wanted = False
            with pytest.raises(CorollaError):
                await echo_for_ever(stream)
            assert not middle.reach().offers_relay
            with pytest.raises(CorollaError, match="no_reservation"):
                await client.open(server.peer, ECHO, timeout_s=10)
            with pytest.raises(CorollaError, match="refused"):
                await _ask_reservation(server, middle)


def test_all_circuits_keep_to_one_pace() -> None:
    """Over the twin, on a clock that jumps: beyond the burst, each second's bytes take a second."""

    async def main() -> None:
        async with memory_hub() as hub:
            middle, server, client = (hub.network(name) for name in PEERS)
            RelayService(middle, RelayLimits(bytes_per_s=1000.0)).serve()
            server.handle(STOP_PROTOCOL, take_circuit)
            await _ask_reservation(server, middle)
            stream = await client.open(middle.peer, HOP_PROTOCOL, timeout_s=5)
            talk = Preamble(stream)
            target = PeerId(id=ID.from_string(server.peer).to_bytes())
            await talk.say(HopMessage(type=HopMessage.CONNECT, peer=target))
            check_status((await talk.hear(HopMessage)).status, "the circuit")
            began = trio.current_time()
            assert await echoed(stream, bytes(BURST_BYTES // 2 + 5000)) == bytes(BURST_BYTES // 2 + 5000)
            assert trio.current_time() - began == pytest.approx(10.0, abs=1.0)  # there and back

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def take_circuit(stream: Stream) -> None:
    talk = Preamble(stream)
    await talk.hear(StopMessage)
    await talk.say(StopMessage(type=StopMessage.STATUS, status=Status.OK))
    await echo(stream)


async def _ask_reservation(network: Network, by: Network) -> None:
    stream = await network.open(by.peer, HOP_PROTOCOL, timeout_s=5)
    talk = Preamble(stream)
    await talk.say(HopMessage(type=HopMessage.RESERVE))
    answer = await talk.hear(HopMessage)
    stream.reset()
    check_status(answer.status, "the reservation")


@pytest.mark.parametrize("limits", [{"circuit_bytes": 300_000}, {"circuit_s": 0.5}])
async def test_a_circuit_ends_with_its_limits_and_a_new_one_is_made(limits: dict[str, Any]) -> None:
    async with relay(**limits) as middle, hidden() as server, opened(listen=LOOPBACK) as client:
        await enter(server, middle)
        client.learn(server.peer, server.addresses())
        stream = await client.open(server.peer, ECHO, timeout_s=10)
        with pytest.raises(CorollaError) as caught:
            await echo_for_ever(stream)
        assert caught.value.code is Code.PEER_LOST
        await until(lambda: not any(view.peer == server.peer for view in client.peers()))
        again = await client.open(server.peer, ECHO, timeout_s=10)
        assert await echoed(again, b"again") == b"again"


@pytest.mark.parametrize(
    ("limits", "times"), [({"circuit_bytes": 1_000_000}, 3), ({"circuit_s": 5.0}, 1)], ids=["bytes", "time"]
)
async def test_a_circuit_is_replaced_before_its_limits_and_the_peer_never_missed(
    limits: dict[str, Any], times: int
) -> None:
    """A fifth of its time is a second here, in which a busy machine makes another one."""
    async with relay(**limits) as middle, hidden() as server, opened(listen=LOOPBACK) as client:
        await enter(server, middle)
        client.learn(server.peer, server.addresses())
        told: list[bool] = []
        server.on_peer(lambda peer, connected: told.append(connected) if peer == client.peer else None)
        client.on_peer(lambda peer, connected: told.append(connected) if peer == server.peer else None)
        dialled: list[str] = []
        dial = client.relays.dial

        async def counted(address: str, peer: str) -> Any:
            dialled.append(address)
            return await dial(address, peer)

        client.relays.dial = counted  # type: ignore[method-assign]
        for number in range(1, 1 + times):
            stream = await client.open(server.peer, ECHO, timeout_s=10)
            assert await echoed(stream, bytes(380_000)) == bytes(380_000)  # 0.76 of the bytes, both ways
            assert len(dialled) == number or "circuit_s" in limits
            with pytest.raises(CorollaError):  # what remains of it serves until another stands, and no longer
                await echo_for_ever(stream)
            await until(lambda number=number: len(dialled) > number)
        assert told == [True, True]
        assert await echoed(await client.open(server.peer, ECHO, timeout_s=10), b"there") == b"there"


async def test_a_circuit_that_cannot_be_replaced_goes_on_to_its_end() -> None:
    async with relay(circuit_bytes=300_000, circuits_per_peer=1) as middle, hidden() as server:
        await enter(server, middle)
        async with opened(listen=LOOPBACK) as client:
            client.learn(server.peer, server.addresses())
            stream = await client.open(server.peer, ECHO, timeout_s=10)
            assert await echoed(stream, bytes(130_000)) == bytes(130_000)  # 0.87 of it, both ways
            assert await echoed(stream, b"still there") == b"still there"


def test_what_is_relayed_waits_for_what_is_the_owner_s_own_but_not_long() -> None:
    async def waits() -> list[float]:
        pace = Pace(1000.0, 1000.0)
        await pace.wait(1000)  # the burst
        times = [trio.current_time()]
        for own in (0, 50, 1_000_000):
            pace.give_way(own)
            await pace.wait(100)
            times.append(trio.current_time())
        return [after - before for before, after in pairwise(times)]

    found = trio.run(waits, clock=trio.testing.MockClock(autojump_threshold=0))
    assert found == pytest.approx([0.1, 0.15, 0.1 + MAX_YIELD_S])


async def test_when_a_relay_dies_another_takes_over() -> None:
    async with relay() as second, hidden() as server, opened(listen=LOOPBACK) as client:
        async with relay() as first:
            await enter(server, first)
            await enter(server, second)
            assert len(server.relays.held) == 2
            client.learn(server.peer, server.addresses())
            await client.open(server.peer, ECHO, timeout_s=10)
        await until(lambda: server.relays.held == (second.peer,))
        assert await echoed(await client.open(server.peer, ECHO, timeout_s=10), b"still") == b"still"


async def test_a_direct_connection_comes_first() -> None:
    async with relay() as middle, opened(listen=LOOPBACK, reachability=Reachability.PRIVATE) as server:
        await enter(server, middle)
        async with opened(listen=LOOPBACK) as client:
            client.learn(server.peer, server.relays.addresses())
            await client.open(server.peer, ECHO, timeout_s=10)
            direct = next(a for a in server.addresses() if "p2p-circuit" not in a)
            found = await client.connect(split(direct), timeout_s=5)
            assert found == server.peer
            stream = await client.open(server.peer, ECHO, timeout_s=5)
            assert await echoed(stream, b"direct") == b"direct"
            (view,) = [view for view in client.peers() if view.peer == server.peer]
            assert not view.relayed


async def test_who_gives_up_its_dial_when_a_connection_stands_keeps_that_connection() -> None:
    """It may be the one that came of this very dial, and still be told of."""
    kad = {"listen": LOOPBACK, "kad_protocol": "/test/kad/1"}
    async with opened(**kad) as one, opened(**kad) as two:
        seen: list[bool] = []
        with trio.CancelScope() as dial:
            one.on_peer(lambda peer, connected: seen.append(connected))
            one.on_peer(lambda peer, connected: dial.cancel())
            await one.connect(two.addresses()[0], timeout_s=5)
        assert dial.cancel_called
        assert await echoed(await one.open(two.peer, ECHO, timeout_s=5), b"on") == b"on"
        assert seen == [True]  # it was not lost and made again


async def test_who_should_dial_is_the_client_though_the_other_came_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        host_module, "reach_of", lambda address: Reach.PUBLIC
    )  # so dials leave by the open port
    async with opened(listen=LOOPBACK) as ada, opened(listen=LOOPBACK) as bob:
        endpoint = endpoint_of(split(bob.addresses()[0]))
        assert endpoint is not None
        with ada._swarm.expecting(bob.peer, [endpoint]):
            await bob._meet(split(ada.addresses()[0]), ada.peer)
        await until(lambda: ada.peers() and bob.peers())
        assert [view.inbound for view in ada.peers()] == [False]
        assert [view.inbound for view in bob.peers()] == [True]
        assert await echoed(await ada.open(bob.peer, ECHO, timeout_s=5), b"on") == b"on"


def split(address: str) -> str:
    return address.rpartition("/p2p/")[0]


async def test_reservations_are_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays_module, "RENEW_AFTER_S", 0.0)
    async with relay(reservation_s=30) as middle, hidden() as server:
        await enter(server, middle)
        assert middle.relaying is not None
        since = server.relays._held[middle.peer][1]
        server.relays.stir()
        await until(lambda: server.relays._held.get(middle.peer, ("", 0.0))[1] > since)


async def test_who_is_public_holds_no_reservation() -> None:
    async with relay() as middle, opened(listen=LOOPBACK, reachability=Reachability.PUBLIC) as server:
        await server.connect(middle.addresses()[0], timeout_s=5)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert server.relays.held == ()
        assert not any("p2p-circuit" in address for address in server.addresses())


async def test_a_flood_before_a_message_is_cut_off() -> None:
    async with relay() as middle, opened(listen=LOOPBACK) as client:
        client.learn(middle.peer, middle.addresses())
        stream = await client.open(middle.peer, HOP_PROTOCOL, timeout_s=5)
        await stream.send(b"\xff\xff\xff\x7f" + bytes(1000))
        with pytest.raises(CorollaError):
            await stream.receive()


async def test_nonsense_is_answered_and_harms_nobody() -> None:
    async with relay() as middle, opened(listen=LOOPBACK) as client:
        client.learn(middle.peer, middle.addresses())
        stream = await client.open(middle.peer, HOP_PROTOCOL, timeout_s=5)
        talk = Preamble(stream)
        await talk.say(HopMessage(type=HopMessage.STATUS))
        answer = await talk.hear(HopMessage)
        assert answer.status == Status.UNEXPECTED_MESSAGE


def test_candidates_are_reached_directly_and_by_us_nearest_first() -> None:
    def view(
        peer: str, *, relayed: bool = False, inbound: bool = False, rtt_s: float | None = 0.1
    ) -> PeerView:
        return PeerView(peer, ("/ip4/192.0.2.1/tcp/1",), relayed, inbound, rtt_s)

    peers = [
        view("far", rtt_s=0.5),
        view("near"),
        view("relayed", relayed=True),
        view("caller", inbound=True),
        view("held"),
        view("refused"),
        view("unmeasured", rtt_s=None),
    ]
    found = candidates(peers, {"held": ("", 0.0)}, {"refused": Refusal(101.0, 1.0)}, now=100.0)
    assert [one.peer for one in found] == ["near", "far", "unmeasured"]


@pytest.mark.parametrize(
    "address", ["/ip4/192.0.2.1/tcp/1", "/p2p-circuit", "/ip4/1.2.3.4/tcp/1/p2p-circuit"]
)
def test_an_address_without_a_relay_is_refused(address: str) -> None:
    with pytest.raises(CorollaError, match="names no relay"):
        split_circuit(address)


async def test_who_asks_is_told_the_circuit_not_the_relay() -> None:
    async with relay() as middle, hidden() as server, opened(listen=LOOPBACK) as client:
        await enter(server, middle)
        client.learn(server.peer, server.addresses())
        told = await identify(client, server.peer)
        assert told.listens == tuple(split(address) for address in server.addresses())
        assert told.listens == (circuit_address(split(middle.addresses()[0]), middle.peer),)


async def test_a_network_tells_how_it_is_reached() -> None:
    async with relay() as middle, hidden() as server:
        await enter(server, middle)
        told = server.reach()
        assert told.reachability == "private"
        assert [use.peer for use in told.relays] == [middle.peer]
        assert not told.offers_relay
        assert middle.reach().offers_relay
        assert middle.reach().num_reservations == 1
