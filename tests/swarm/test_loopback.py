"""Membership, registry and routes over real libp2p on loopback: the same code as in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest
from anyio.abc import TaskGroup, TaskStatus
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.daemon.belonging.routes import Routes
from corolla.daemon.identity import Identity
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.members.greeting import Swarm, discover_swarm, found_swarm
from corolla.daemon.network.members.membership import Membership
from corolla.daemon.network.registry.announcements import Offer
from corolla.daemon.network.registry.registry import Registry
from corolla.daemon.session.wiring import RouteRequest, covers
from corolla.daemon.swarm.blame import Ledger
from corolla.protocol.errors import CorollaError
from corolla.protocol.records import SpanState
from corolla.protocol.tensors import DType, Encoding
from corolla.protocol.work import ModelFacts

pytestmark = pytest.mark.anyio
ROSES = found_swarm("roses", bytes(32), b"1")
TULIPS = found_swarm("tulips", bytes(32), b"1")
FACTS = ModelFacts("m", "f" * 64, "LlamaForCausalLM", 12, 576, 49152, 8192, {})
WHOLE = RouteRequest("f" * 64, 0, 12, Encoding.FLOAT32, max_rows=1, max_tokens=128)


class Node:
    """A daemon without sessions."""

    def __init__(self, network: Libp2pNetwork, key: Ed25519PrivateKey, swarm: Swarm, bootstrap: str) -> None:
        self.network = network
        self.membership = Membership(network, swarm, bootstrap=[bootstrap] if bootstrap else [])
        self.registry = Registry(network, self.membership, key)
        self.routes = Routes(network, self.membership, self.registry, Ledger())


class Swarmlet:
    """Daemons in one process, each with its own socket."""

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._leave: dict[str, anyio.Event] = {}

    async def node(self, bootstrap: str = "", swarm: Swarm = ROSES) -> Node:
        node: Node = await self._tasks.start(self._live, bootstrap, swarm)
        return node

    def kill(self, node: Node) -> None:
        self._leave[node.network.peer].set()

    async def _live(self, bootstrap: str, swarm: Swarm, *, task_status: TaskStatus[Node]) -> None:
        key = Ed25519PrivateKey.generate()
        kad = f"/corolla/kad/{swarm.swarm_id}/1"
        async with (
            open_network(Identity(key), listen=("/ip4/127.0.0.1/tcp/0",), kad_protocol=kad) as network,
            anyio.create_task_group() as tasks,
        ):
            node = Node(network, key, swarm, bootstrap)
            leave = self._leave[network.peer] = anyio.Event()
            await tasks.start(node.membership.run)
            await tasks.start(node.registry.run)
            task_status.started(node)
            await leave.wait()
            tasks.cancel_scope.cancel()


async def within(swarmlet: Callable[[Swarmlet], Awaitable[None]]) -> None:
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(60):
            await swarmlet(Swarmlet(tasks))
        tasks.cancel_scope.cancel()


async def changed(node: Node, condition: Callable[[], bool]) -> None:
    """Wait on the registry's notifications."""
    version = node.registry.version
    while not condition():
        version = await node.registry.wait_changed(version)


async def test_members_meet_announce_route_and_notice_a_death() -> None:
    async def story(s: Swarmlet) -> None:
        client = await s.node()
        door = client.network.addresses()[0]
        ada, bob, cyd = [await s.node(door) for _ in range(3)]
        for node, start, end in ((ada, 0, 6), (bob, 6, 12), (cyd, 4, 12)):
            node.registry.announce_model(FACTS)
            node.registry.announce(Offer(0, "f" * 64, start, end, SpanState.ONLINE, DType.FLOAT32))
        await changed(client, lambda: client.routes.view("f" * 64, 12).replicas()[4:] == (2,) * 8)
        assert (await client.routes.find_model("m")) == FACTS
        assert covers(await client.routes.find_route(WHOLE), 0, 12)
        await changed(bob, lambda: len(bob.registry.spans_now("f" * 64)) == 3)
        s.kill(bob)
        await changed(client, lambda: client.routes.view("f" * 64, 12).replicas()[6:] == (1,) * 6)
        route = await client.routes.find_route(WHOLE)
        assert [hop.hop.peer for hop in route.hops] == [ada.network.peer, cyd.network.peer]

    await within(story)


async def test_a_swarm_is_discovered_and_a_stranger_is_turned_away() -> None:
    async def story(s: Swarmlet) -> None:
        ada = await s.node()
        door = ada.network.addresses()[0]
        async with open_network(
            Identity(Ed25519PrivateKey.generate()), listen=("/ip4/127.0.0.1/tcp/0",)
        ) as network:
            assert await discover_swarm(network, door) == ROSES
        eve = await s.node(door, TULIPS)
        bob = await s.node(door)
        await bob.membership.wait_joined(timeout_s=30)
        assert [member.peer for member in bob.membership.members()] == [ada.network.peer]
        assert eve.membership.members() == ()
        assert await ada.membership.wait_member(bob.network.peer, timeout_s=30)
        assert [member.peer for member in ada.membership.members()] == [bob.network.peer]

    await within(story)


async def test_members_and_no_strangers_enter_the_routing_table() -> None:
    async def story(s: Swarmlet) -> None:
        ada = await s.node()
        door = ada.network.addresses()[0]
        bob = await s.node(door)
        eve = await s.node(door, TULIPS)
        await bob.membership.wait_joined(timeout_s=30)
        await ada.membership.wait_member(bob.network.peer, timeout_s=30)
        with pytest.raises(CorollaError, match="belongs to swarm roses"):
            await eve.membership.wait_joined(timeout_s=0.5)
        assert await ada.network.closest_peers(bytes(32), 8) == (bob.network.peer,)
        assert await bob.network.closest_peers(bytes(32), 8) == (ada.network.peer,)
        assert await eve.network.closest_peers(bytes(32), 8) == ()

    await within(story)
