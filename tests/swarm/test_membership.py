"""Greeting, joining, and parting with strangers, over the network in memory."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio.abc import TaskGroup

from corolla.daemon.network.members import strangers as strangers_module
from corolla.daemon.network.members.acquaintances import FORGET_AFTER_S, MAX_KNOWN
from corolla.daemon.network.members.greeting import Swarm, discover_swarm, found_swarm
from corolla.daemon.network.members.membership import GOSSIP_EVERY_S, Membership
from corolla.daemon.network.memory import MemoryHub, MemoryNetwork, memory_hub, uniform_delay
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.framing import encode_frame
from corolla.protocol.limits import GREETINGS_AT_ONCE, HELLO_TIMEOUT_S, MAX_HELLO_BYTES
from corolla.protocol.messages import encode
from corolla.protocol.registry import HELLO_PROTOCOL, Hello, PeerAddresses

pytestmark = pytest.mark.anyio
ROSES = found_swarm("roses", bytes(32), b"1")
TULIPS = found_swarm("tulips", bytes(32), b"1")


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


def address(peer: str) -> str:
    return f"/memory/{peer}/p2p/{peer}"


class Garden:
    """Members on a hub."""

    def __init__(self, hub: MemoryHub, tasks: TaskGroup) -> None:
        self.hub = hub
        self.tasks = tasks
        self.learned: list[tuple[str, str]] = []

    def network(self, peer: str) -> MemoryNetwork:
        network = self.hub.network(peer)

        def learn(other: str, addresses: Sequence[str]) -> None:
            self.learned.append((peer, other))

        network.learn = learn  # type: ignore[method-assign, assignment]
        return network

    async def join(self, peer: str, *bootstrap: str, swarm: Swarm = ROSES) -> Membership:
        return await self.enter(self.network(peer), *bootstrap, swarm=swarm)

    async def enter(self, network: MemoryNetwork, *bootstrap: str, swarm: Swarm = ROSES) -> Membership:
        membership = Membership(
            network,
            swarm,
            bootstrap=[address(peer) for peer in bootstrap],
            version="1.2.3",
            rng=random.Random(network.peer),
        )
        await self.tasks.start(membership.run)
        return membership


@asynccontextmanager
async def garden(**options: Any) -> AsyncIterator[Garden]:
    async with memory_hub(**options) as hub, anyio.create_task_group() as tasks:
        yield Garden(hub, tasks)
        tasks.cancel_scope.cancel()


def names(membership: Membership) -> set[str]:
    return {member.peer for member in membership.members()}


async def until(condition: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Wait on the mock clock."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - it takes no time: the clock jumps
            await trio.sleep(0.01)


async def test_a_joiner_and_a_member_know_each_other() -> None:
    async with garden() as g:
        ada = await g.join("ada")
        bob = await g.join("bob", "ada")
        await bob.wait_joined(timeout_s=5)
        assert await ada.wait_member("bob", timeout_s=5)
        (member,) = bob.members()
        assert (member.peer, member.version, member.addresses) == ("ada", "1.2.3", (address("ada"),))
        assert set(g.learned) == {("ada", "bob"), ("bob", "ada")}


@pytest.mark.parametrize("options", [{}, {"delay": uniform_delay(0.01, 0.2), "seed": 3}])
async def test_all_members_of_a_small_swarm_find_each_other_through_one(options: dict[str, Any]) -> None:
    async with garden(**options) as g:
        everyone = {f"p{i}" for i in range(8)}
        members = [await g.join("p0")] + [await g.join(f"p{i}", "p0") for i in range(1, 8)]
        await until(lambda: all(len(names(m)) == 7 for m in members), within_s=GOSSIP_EVERY_S)
        assert {peer.peer for peer in members[0].known()} == everyone - {"p0"}


async def test_news_of_members_spreads_along_a_chain() -> None:
    """Nobody but its neighbour ever was told of the last one."""
    async with garden() as g:
        chain = [await g.join("p0")] + [await g.join(f"p{i}", f"p{i - 1}") for i in range(1, 5)]
        await until(lambda: all(len(names(m)) == 4 for m in chain), within_s=20 * GOSSIP_EVERY_S)


async def test_the_listeners_hear_of_each_member_once_and_of_its_loss() -> None:
    async with garden() as g:
        ada = await g.join("ada")
        heard: list[tuple[str, bool]] = []
        ada.on_member(lambda peer, connected: heard.append((peer, connected)))
        await g.join("bob", "ada")
        await until(lambda: heard == [("bob", True)])
        g.hub.kill("bob")
        assert heard == [("bob", True), ("bob", False)]
        assert names(ada) == set()


async def test_strangers_part_and_never_enter_routing_tables() -> None:
    async with garden() as g:
        ada = await g.join("ada")
        eve = await g.join("eve", "ada", swarm=TULIPS)
        with pytest.raises(CorollaError) as caught:
            await eve.wait_joined(timeout_s=5)
        assert caught.value.code is Code.NO_PEERS
        assert "belongs to swarm roses" in caught.value.message
        assert names(ada) == names(eve) == set()
        assert g.learned == []
        await until(lambda: not g.hub.connected_to("ada"))


async def test_a_peer_that_never_greets_is_disconnected_in_time() -> None:
    async with garden() as g:
        await g.join("ada")
        mute = g.network("mute")
        await mute.connect(address("ada"), timeout_s=5)
        assert g.hub.connected_to("ada")
        await until(lambda: not g.hub.connected_to("ada"), within_s=3 * HELLO_TIMEOUT_S)
        assert g.learned == []


async def test_a_peer_that_hangs_in_its_greeting_is_disconnected_in_time() -> None:
    async with garden() as g:
        await g.join("ada")
        slow = g.network("slow")

        async def say_nothing(stream: Stream) -> None:
            await trio.sleep_forever()

        slow.handle(HELLO_PROTOCOL, say_nothing)
        await slow.connect(address("ada"), timeout_s=5)
        await slow.open("ada", HELLO_PROTOCOL, timeout_s=5)
        await until(lambda: not g.hub.connected_to("ada"), within_s=3 * HELLO_TIMEOUT_S)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        encode_frame(b"not cbor"),
        (MAX_HELLO_BYTES + 1).to_bytes(4, "big") + bytes(4),
        encode_frame(b"\xa1\x60\x65hello"),
    ],
)
async def test_nonsense_instead_of_a_greeting_harms_nobody(data: bytes) -> None:
    async with garden() as g:
        ada = await g.join("ada")
        rude = g.network("rude")
        stream = await rude.open("ada", HELLO_PROTOCOL, timeout_s=5)
        await stream.send(data)
        with pytest.raises(CorollaError):
            await stream.receive()
        bob = await g.join("bob", "ada")
        await bob.wait_joined(timeout_s=5)
        assert names(ada) == {"bob"}


async def test_who_greets_without_end_is_no_longer_heard_and_others_are() -> None:
    async with garden() as g:
        ada = await g.join("ada")
        bob = await g.join("bob", "ada")
        await bob.wait_joined(timeout_s=5)
        refused = 0
        for _ in range(GREETINGS_AT_ONCE + 5):
            stream = await g.hub.find("bob").open("ada", HELLO_PROTOCOL, timeout_s=5)  # type: ignore[union-attr]
            try:
                await stream.send(encode(Hello(ROSES.swarm_id, ROSES.name, "1")))
                await stream.receive()
                await stream.close()
            except CorollaError:
                refused += 1
        assert refused >= 4
        cyd = await g.join("cyd", "ada")
        await cyd.wait_joined(timeout_s=5)
        assert names(ada) == {"bob", "cyd"}


async def test_strangers_are_remembered_in_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers_module, "MAX_PEERS_REMEMBERED", 3)
    async with garden() as g:
        ada = await g.join("ada")
        for number in range(6):
            await g.join(f"eve{number}", "ada", swarm=TULIPS)
        await until(lambda: set(ada._strangers) == {"eve3", "eve4", "eve5"})


async def test_before_membership_only_greetings_are_served() -> None:
    async with garden() as g:
        ada = await g.join("ada")
        served: list[str] = []

        async def secret(stream: Stream) -> None:
            served.append(stream.peer)
            await stream.close()

        g.hub.find("ada").handle("/corolla/secret/1", secret)  # type: ignore[union-attr]
        stranger = g.network("stranger")
        with pytest.raises(CorollaError, match="does not speak"):
            await stranger.open("ada", "/corolla/secret/1", timeout_s=5)
        bob = await g.join("bob", "ada")
        await bob.wait_joined(timeout_s=5)
        await ada.wait_member("bob", timeout_s=5)
        stream = await g.hub.find("bob").open("ada", "/corolla/secret/1", timeout_s=5)  # type: ignore[union-attr]
        assert await stream.receive() == b""
        assert served == ["bob"]


async def test_a_listener_may_speak_at_once() -> None:
    """When either side is told of a member, that member already admits it."""
    async with garden(delay=uniform_delay(0.001, 0.3), seed=5) as g:
        answers: list[tuple[str, str]] = []

        def listen(name: str, membership: Membership) -> None:
            network = g.hub.find(name)
            assert network is not None

            async def serve(stream: Stream) -> None:
                await stream.close()

            async def speak(peer: str) -> None:
                stream = await network.open(peer, "/corolla/test/1", timeout_s=5)
                assert await stream.receive() == b""
                answers.append((name, peer))

            network.handle("/corolla/test/1", serve)

            def greet(peer: str, connected: bool) -> None:
                g.tasks.start_soon(speak, peer)

            membership.on_member(greet)

        for name in ("ada", "bob", "cyd", "dan"):
            listen(name, await g.join(name, *(["ada"] if name != "ada" else [])))
        await until(lambda: len(answers) == 12, within_s=GOSSIP_EVERY_S)


async def test_a_swarm_is_discovered_from_an_address_and_then_joined() -> None:
    async with garden() as g:
        ada = await g.join("ada")
        network = g.network("bob")
        swarm = await discover_swarm(network, address("ada"))
        assert swarm == ROSES
        assert names(ada) == set()
        bob = await g.enter(network, "ada", swarm=swarm)
        await bob.wait_joined(timeout_s=5)
        assert await ada.wait_member("bob", timeout_s=5)


async def test_one_who_asked_and_did_not_join_is_parted_with() -> None:
    async with garden() as g:
        await g.join("ada")
        await discover_swarm(g.network("bob"), address("ada"))
        await until(lambda: not g.hub.connected_to("ada"), within_s=3 * HELLO_TIMEOUT_S)
        assert g.learned == []


async def test_nobody_at_the_address_is_said_with_the_address() -> None:
    async with garden() as g:
        bob = await g.join("bob", "ada")
        with pytest.raises(CorollaError) as caught:
            await bob.wait_joined(timeout_s=5)
        assert caught.value.code is Code.NO_PEERS
        assert address("ada") in caught.value.message
        await g.join("ada")
        await bob.wait_joined(timeout_s=120)  # it goes on trying


async def test_a_broken_line_is_mended() -> None:
    async with garden() as g:
        ada, bob = await g.join("ada"), await g.join("bob", "ada")
        await bob.wait_joined(timeout_s=5)
        await ada.wait_member("bob", timeout_s=5)
        g.hub.cut("ada", "bob")
        assert names(ada) == names(bob) == set()
        await trio.sleep(20)
        g.hub.heal("ada", "bob")
        await until(lambda: names(ada) == {"bob"} and names(bob) == {"ada"}, within_s=90)


async def test_the_dead_are_forgotten() -> None:
    async with garden() as g:
        ada, bob, cyd = await g.join("ada"), await g.join("bob", "ada"), await g.join("cyd", "ada")
        await until(lambda: len(names(bob)) == len(names(cyd)) == 2)
        g.hub.kill("cyd")
        assert ada.num_known == 2
        await trio.sleep(FORGET_AFTER_S / 2)
        assert ada.unseen_s("cyd") == pytest.approx(FORGET_AFTER_S / 2, abs=2)
        assert ada.unseen_s("bob") is None
        await trio.sleep(2 * FORGET_AFTER_S)
        assert ada.unseen_s("cyd") is None
        assert ada.num_known == 1
        assert names(ada) == {"bob"}


async def test_addresses_of_third_parties_are_not_believed() -> None:
    """A member's own addresses must name it, so that no one is sent to another's door."""
    async with garden() as g:
        ada = await g.join("ada")
        liar = g.network("liar")
        liar.addresses = lambda: (address("victim"), "/memory/liar/p2p/liar")  # type: ignore[method-assign]
        await (await g.enter(liar, "ada")).wait_joined(timeout_s=5)
        await ada.wait_member("liar", timeout_s=5)
        assert ada.members()[0].addresses == ("/memory/liar/p2p/liar",)


async def test_stopping_ends_in_bounded_time() -> None:
    async with garden() as g:
        ada = Membership(g.network("ada"), ROSES)
        with anyio.move_on_after(5) as scope:
            await ada.run()
        assert scope.cancelled_caught


async def test_a_greeting_says_where_the_other_is_seen() -> None:
    async with garden() as g:
        told: list[tuple[str, str]] = []
        network = g.network("ada")
        network.observes = lambda peer: f"/memory/{peer}"  # type: ignore[method-assign]
        ada = await g.enter(network)
        other = g.network("bob")
        other.observed_by = lambda peer, address: told.append((peer, address))  # type: ignore[method-assign]
        bob = await g.enter(other, "ada")
        await bob.wait_joined(timeout_s=5)
        await ada.wait_member("bob", timeout_s=5)
        assert set(told) == {("ada", "/memory/bob")}


async def test_one_that_is_heard_of_is_dialled_though_the_bootstrap_is_dead() -> None:
    async with garden() as g:
        bob = await g.join("bob")
        ada = await g.join("ada", "nobody", "nowhere")
        await trio.sleep(30)
        assert names(ada) == set()
        ada.hear_of(PeerAddresses("bob", (address("bob"),)))
        await until(lambda: names(ada) == {"bob"} and names(bob) == {"ada"}, within_s=5)


async def test_hearing_of_many_makes_nobody_forget_whom_it_is_connected_to() -> None:
    async with garden() as g:
        ada, bob = await g.join("ada"), await g.join("bob", "ada")
        await until(lambda: names(ada) == {"bob"})
        for number in range(2 * MAX_KNOWN):
            ada.hear_of(PeerAddresses(f"p{number}", (address(f"p{number}"),)))
        assert ada.num_known <= MAX_KNOWN
        assert "bob" in {told.peer for told in ada.known()}
        assert names(bob) == {"ada"}


async def test_members_learn_how_far_each_others_clocks_are_off() -> None:
    async with garden() as g:
        ada = Membership(g.network("ada"), ROSES, unix=lambda: 1_000_000.0)
        bob = Membership(g.network("bob"), ROSES, bootstrap=[address("ada")], unix=lambda: 1_000_075.0)
        for membership in (ada, bob):
            await g.tasks.start(membership.run)
        await bob.wait_joined(timeout_s=5)
        assert await ada.wait_member("bob", timeout_s=5)
        assert [member.clock_ahead_s for member in bob.members()] == [-75.0]
        assert [member.clock_ahead_s for member in ada.members()] == [75.0]


async def test_bootstrap_addresses_that_failed_are_told_with_the_reason() -> None:
    async with garden() as g:
        bob = await g.join("bob", "nobody")
        await until(lambda: bool(bob.unreached()))
        ((tried, reason),) = bob.unreached()
        assert (tried, bool(reason)) == (address("nobody"), True)
