"""Routes for sessions, over members that announce their spans in memory."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio.abc import TaskGroup
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.daemon.belonging.routes import Routes, no_swarm
from corolla.daemon.network.members.greeting import found_swarm
from corolla.daemon.network.members.membership import Membership
from corolla.daemon.network.memory import MemoryHub, memory_hub
from corolla.daemon.network.registry.announcements import Offer
from corolla.daemon.network.registry.registry import Registry
from corolla.daemon.session.wiring import Precision, Route, RouteRequest, covers
from corolla.daemon.swarm.blame import HEAVY, Ledger
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.records import SpanState, peer_id_of
from corolla.protocol.steps import Hop
from corolla.protocol.tensors import DType, Encoding
from corolla.protocol.work import ModelFacts

pytestmark = pytest.mark.anyio
SWARM = found_swarm("roses", bytes(32), b"1")
FINGERPRINT = "f" * 64
FACTS = ModelFacts("SmolLM2", FINGERPRINT, "LlamaForCausalLM", 12, 576, 49152, 8192, {})
WHOLE = RouteRequest(FINGERPRINT, 0, 12, Encoding.FLOAT32, max_rows=1, max_tokens=128)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


class Node:
    """A daemon without sessions."""

    def __init__(self, hub: MemoryHub, number: int, bootstrap: list[str]) -> None:
        key = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
        self.peer = peer_id_of(key.public_key().public_bytes_raw())
        network = hub.network(self.peer)
        rng = random.Random(number)
        self.ledger = Ledger()
        self.membership = Membership(network, SWARM, bootstrap=bootstrap, rng=rng)
        self.registry = Registry(network, self.membership, key, rng=rng, unix=lambda: 1.8e9)
        self.routes = Routes(network, self.membership, self.registry, self.ledger, rng=rng)

    def serve(self, start: int, end: int, state: SpanState = SpanState.ONLINE, **more: Any) -> None:
        offer = Offer(0, FINGERPRINT, start, end, state, DType.FLOAT32, tokens_per_s=50.0)
        self.registry.announce(dataclasses.replace(offer, **more))
        self.registry.announce_model(FACTS)


class Garden:
    """A client and servers."""

    def __init__(self, hub: MemoryHub, tasks: TaskGroup) -> None:
        self.hub = hub
        self.tasks = tasks
        self.nodes: list[Node] = []

    async def grow(self, count: int) -> list[Node]:
        for _ in range(count):
            first = [f"/memory/{node.peer}/p2p/{node.peer}" for node in self.nodes[:1]]
            node = Node(self.hub, len(self.nodes) + 1, first)
            self.nodes.append(node)
            await self.tasks.start(node.membership.run)
            await self.tasks.start(node.registry.run)
        await until(lambda: all(len(n.membership.members()) == len(self.nodes) - 1 for n in self.nodes))
        return self.nodes[-count:]


@asynccontextmanager
async def garden() -> AsyncIterator[Garden]:
    async with memory_hub() as hub, anyio.create_task_group() as tasks:
        yield Garden(hub, tasks)
        tasks.cancel_scope.cancel()


async def until(condition: Callable[[], bool], *, within_s: float = 30.0) -> None:
    """Wait on the mock clock."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - it takes no time: the clock jumps
            await trio.sleep(0.01)


def peers(route: Route) -> list[str]:
    return [hop.hop.peer for hop in route.hops]


async def refused(client: Node, request: RouteRequest = WHOLE) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        await client.routes.find_route(request)
    return caught.value


async def test_a_session_finds_its_route() -> None:
    async with garden() as g:
        client, ada, bob = await g.grow(3)
        ada.serve(0, 6)
        bob.serve(6, 12)
        await until(lambda: client.routes.view(FINGERPRINT, 12).coverage() == 1)
        route = await client.routes.find_route(WHOLE)
        assert covers(route, 0, 12)
        assert peers(route) == [ada.peer, bob.peer]
        assert route.hops[0].precision == Precision(DType.FLOAT32, None)


async def test_our_own_span_may_be_a_hop_and_we_need_nobody_else() -> None:
    async with garden() as g:
        (client,) = await g.grow(1)
        client.serve(0, 12)
        await trio.sleep(1)
        assert peers(await client.routes.find_route(WHOLE)) == [client.peer]


async def test_a_dead_peer_is_routed_round_at_once() -> None:
    async with garden() as g:
        client, ada, bob = await g.grow(3)
        for node in (ada, bob):
            node.serve(0, 12)
        await until(lambda: client.routes.view(FINGERPRINT, 12).replicas() == (2,) * 12)
        await client.routes.find_route(WHOLE)
        g.hub.kill(ada.peer)
        before = trio.current_time()
        for _ in range(10):
            assert peers(await client.routes.find_route(WHOLE)) == [bob.peer]
        assert trio.current_time() == before


async def test_a_repair_asks_nobody_though_holders_hang() -> None:
    async with garden() as g:
        client, ada, bob, cyd = await g.grow(4)
        ada.serve(0, 6)
        bob.serve(6, 12)
        cyd.serve(4, 12)
        await until(lambda: client.routes.view(FINGERPRINT, 12).coverage() == 1)
        await client.routes.find_route(WHOLE)
        g.hub.hang(bob.peer)
        before = trio.current_time()
        lost = dataclasses.replace(
            WHOLE,
            start=6,
            upstream=Hop(ada.peer, 0),
            avoid=frozenset({Hop(bob.peer, 0)}),
            precision=Precision(DType.FLOAT32, None),
        )
        route = await client.routes.find_route(lost)
        assert peers(route) == [cyd.peer]
        assert covers(route, 6, 12)
        assert trio.current_time() == before


async def test_the_charged_are_avoided_until_they_are_the_only_ones() -> None:
    async with garden() as g:
        client, ada, bob = await g.grow(3)
        for node in (ada, bob):
            node.serve(0, 12)
        await until(lambda: client.routes.view(FINGERPRINT, 12).replicas() == (2,) * 12)
        client.ledger.charge(ada.peer, HEAVY, "wrong values", trio.current_time())
        assert {peers(await client.routes.find_route(WHOLE))[0] for _ in range(10)} == {bob.peer}
        g.hub.kill(bob.peer)
        assert peers(await client.routes.find_route(WHOLE)) == [ada.peer]


async def test_sessions_spread_over_equal_replicas() -> None:
    async with garden() as g:
        client, ada, bob = await g.grow(3)
        for node in (ada, bob):
            node.serve(0, 12)
        await until(lambda: client.routes.view(FINGERPRINT, 12).replicas() == (2,) * 12)
        chosen = {peers(await client.routes.find_route(WHOLE))[0] for _ in range(30)}
        assert chosen == {ada.peer, bob.peer}


async def test_every_hop_of_a_route_has_a_standby_and_a_queue_that_its_record_tells_makes_it_worth_leaving() -> (
    None
):
    async with garden() as g:
        client, ada, bob, eve = await g.grow(4)
        ada.serve(0, 6)
        bob.serve(6, 12)
        await until(lambda: client.routes.view(FINGERPRINT, 12).replicas() == (1,) * 12)
        route = await client.routes.find_route(WHOLE)
        alone = await client.routes.stand(WHOLE, route.hops)
        assert [(one.leg.span.peer, one.standby) for one in alone] == [(ada.peer, None), (bob.peer, None)]

        eve.serve(0, 12)
        ada.serve(0, 6, queue=30)
        await until(lambda: sorted(s.queue for s in client.routes.view(FINGERPRINT, 12).spans) == [0, 0, 30])
        busy, other = await client.routes.stand(WHOLE, route.hops)
        for one in (busy, other):
            assert one.standby is not None
            assert [leg.span.peer for leg in one.standby.legs] == [eve.peer]
        assert busy.is_worth_leaving
        assert not other.is_worth_leaving


async def test_unserved_blocks_are_named_with_who_is_loading_them() -> None:
    async with garden() as g:
        client, ada, bob = await g.grow(3)
        ada.serve(0, 6)
        bob.serve(6, 12, SpanState.LOADING)
        await until(lambda: len(client.registry.spans_now(FINGERPRINT)) == 2)
        problem = await refused(client)
        assert problem.code is Code.BLOCKS_UNSERVED
        assert problem.message == f"blocks 6:12 are served by nobody; peer {bob.peer} is loading them"
        bob.serve(6, 12)
        version = client.registry.version
        await client.registry.wait_changed(version)
        assert covers(await client.routes.find_route(WHOLE), 0, 12)


async def test_a_lack_of_room_for_the_session_is_said() -> None:
    async with garden() as g:
        client, ada = await g.grow(2)
        ada.serve(0, 12, cache_tokens=127)
        await until(lambda: client.routes.view(FINGERPRINT, 12).coverage() == 1)
        assert "short of room for 128 tokens" in (await refused(client)).message


async def test_alone_in_the_swarm_is_said_so() -> None:
    async with garden() as g:
        (client,) = await g.grow(1)
        problem = await refused(client)
        assert problem.code is Code.NO_PEERS
        assert "roses" in problem.message


async def test_blocks_beyond_the_model_are_out_of_range() -> None:
    async with garden() as g:
        client, ada = await g.grow(2)
        ada.serve(0, 12)
        await until(lambda: bool(client.registry.manifests_now()))
        assert (await refused(client, dataclasses.replace(WHOLE, end=13))).code is Code.BLOCKS_OUT_OF_RANGE


async def test_models_are_found_by_name_as_soon_as_somebody_announces_them() -> None:
    async with garden() as g:
        client, ada = await g.grow(2)
        with pytest.raises(CorollaError) as caught:
            await client.routes.find_model("smollm2")
        assert caught.value.code is Code.UNKNOWN_MODEL
        ada.serve(0, 12)
        await until(lambda: bool(client.registry.manifests_now()))
        assert await client.routes.find_model("smollm2") == FACTS


async def test_the_swarm_is_described_for_people() -> None:
    async with garden() as g:
        client, ada = await g.grow(2)
        ada.serve(0, 8)
        await until(lambda: bool(client.registry.manifests_now()))
        told = client.routes.describe()
        assert (told.name, told.swarm_id) == (SWARM.name, SWARM.swarm_id)
        assert told.models[0].replicas == (1,) * 8 + (0,) * 4
        (span,) = told.spans
        assert (span.model, span.start, span.end, span.state, span.mine) == ("SmolLM2", 0, 8, "online", False)
        g.hub.kill(ada.peer)
        assert client.routes.describe().spans[0].state == "lost"


def test_without_a_swarm_the_remedy_is_said() -> None:
    problem = no_swarm()
    assert problem.code is Code.NO_SWARM
    assert "daemonctl join" in problem.remedy


async def test_one_put_out_is_told_so_where_nobody_else_is_there() -> None:
    async with garden() as g:
        client, ada = await g.grow(2)
        ada.serve(0, 12)
        await client.routes.find_route(WHOLE)
        ada.membership.roll.ban(client.peer)
        ada.membership.review()
        await until(lambda: client.membership.refusal is not None)
        problem = await refused(client)
        assert problem.code is Code.NOT_INVITED
        assert "is banned here" in problem.message
