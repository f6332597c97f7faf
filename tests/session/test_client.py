"""A session of the client over the network in memory, with hops as they ship."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from corolla.daemon.network.memory import MemoryHub, MemoryNetwork, memory_hub
from corolla.daemon.serving.peers import HopService
from corolla.daemon.serving.twin import HIDDEN_SIZE, WorkerTwin, twin_facts, whole_row
from corolla.daemon.session.client import open_session
from corolla.daemon.session.events import Kind
from corolla.daemon.session.roster import Terms
from corolla.daemon.session.wiring import Route, RouteHop, RouteRequest
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.steps import NEW_ROW, Hop, Reply, Row
from corolla.protocol.tensors import DType, Encoding

FACTS = twin_facts(num_blocks=2)
SIZE = Encoding.FLOAT32.token_bytes(HIDDEN_SIZE)
TERMS = Terms(b"0123456789abcdef", FACTS.fingerprint, 0, 2, Encoding.FLOAT32, SIZE, 2, 64)
PROMPT = bytes(range(3 * SIZE))
NEW = (Row(NEW_ROW, 0, 3),)


@dataclass
class Swarm:
    """Peers that each serve both blocks; the router gives the first one that is not to be avoided."""

    hub: MemoryHub
    client: MemoryNetwork
    services: list[HopService]
    names: list[str]

    async def find_route(self, request: RouteRequest) -> Route:
        await trio.lowlevel.checkpoint()
        for name in self.names:
            if name not in request.avoid_peers and Hop(name, 0) not in request.avoid:
                return Route((RouteHop(Hop(name, 0), request.start, request.end, DType.FLOAT32),))
        raise error(Code.BLOCKS_UNSERVED, "blocks 0:2 are served by nobody")


@asynccontextmanager
async def swarm(*names: str) -> AsyncIterator[Swarm]:
    async with memory_hub() as hub, trio.open_nursery() as nursery:
        services = []
        for name in names:
            service = HopService(hub.network(name))
            worker = WorkerTwin(0, FACTS, 0, 2)
            service.add_worker(worker)
            nursery.start_soon(worker.run)
            await nursery.start(service.run)  # type: ignore[arg-type]
            services.append(service)
        yield Swarm(hub, hub.network("client"), services, list(names))
        nursery.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_step_is_answered_and_everything_is_released_at_the_end() -> None:
    async with swarm("one") as peers:
        async with open_session(peers.client, peers, TERMS) as session:
            expected = whole_row(0, 2, [PROMPT[i : i + SIZE] for i in range(0, 3 * SIZE, SIZE)])
            assert await session.step(NEW, PROMPT) == b"".join(expected)
            assert await session.step((Row(0, 2, 1),), PROMPT[2 * SIZE :], Reply.LAST) == expected[-1]
            assert peers.services[0].statistics().num_sessions == 1
        await trio.testing.wait_all_tasks_blocked()
        assert peers.services[0].statistics().num_sessions == 0
        assert peers.hub.num_streams_of("client") == 0


@pytest.mark.anyio
async def test_a_death_is_repaired_told_and_charged() -> None:
    charges = []
    async with swarm("one", "two") as peers:
        told = lambda peer, weight, reason: charges.append(peer)  # noqa: E731
        async with open_session(peers.client, peers, TERMS, charge=told) as session:
            events = session.events()
            answer = await session.step(NEW, PROMPT)
            peers.hub.kill("one")
            again = await session.step((Row(0, 0, 3),), PROMPT)
            assert again == answer
            assert session.statistics().num_repairs == 1
        kinds = [event.kind async for event in events]
    assert kinds[0] is Kind.REPAIRING
    assert kinds[-1] is Kind.REPAIRED
    assert charges == ["one"]


@pytest.mark.anyio
async def test_an_opening_in_vain_raises_the_routers_error() -> None:
    async with swarm() as peers:
        with pytest.raises(CorollaError) as caught:
            async with open_session(peers.client, peers, TERMS):
                pytest.fail("it opened")
        assert caught.value.code is Code.BLOCKS_UNSERVED


@pytest.mark.anyio
async def test_a_wrong_step_is_refused_and_the_session_goes_on() -> None:
    async with swarm("one") as peers, open_session(peers.client, peers, TERMS) as session:
        with pytest.raises(CorollaError) as caught:
            await session.step((Row(0, 0, 1),), PROMPT[:SIZE])
        assert caught.value.code is Code.BAD_REQUEST
        assert len(await session.step(NEW, PROMPT)) == len(PROMPT)


@pytest.mark.anyio
async def test_an_error_of_the_user_comes_out_unwrapped() -> None:
    async with swarm("one") as peers:
        with pytest.raises(KeyError):
            async with open_session(peers.client, peers, TERMS):
                raise KeyError("the user's own")


@pytest.mark.anyio
async def test_a_cancelled_step_leaves_the_session_usable() -> None:
    async with swarm("one") as peers, open_session(peers.client, peers, TERMS) as session:
        peers.hub.hang("one")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.step, NEW, PROMPT)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        peers.hub.wake("one")
        assert len(await session.step((Row(0, 3, 1),), PROMPT[:SIZE])) == SIZE


@pytest.mark.anyio
async def test_after_its_end_a_session_refuses_steps() -> None:
    async with swarm("one") as peers:
        async with open_session(peers.client, peers, TERMS) as session:
            pass
        with pytest.raises(CorollaError) as caught:
            await session.step(NEW, PROMPT)
        assert caught.value.code is Code.CANCELLED


@pytest.mark.anyio
async def test_a_session_leaves_a_hop_that_is_slow_without_charging_anybody() -> None:
    charged: list[str] = []
    async with swarm("slow", "other") as peers:
        async with open_session(
            peers.client, peers, TERMS, charge=lambda peer, *_: charged.append(peer)
        ) as session:
            events = session.events()
            await session.step(NEW, PROMPT)
            session.leave(Hop("slow", 0), "is slow")
            answer = await session.step((Row(0, 3, 1),), PROMPT[:SIZE])
            tokens = [PROMPT[i : i + SIZE] for i in range(0, len(PROMPT), SIZE)]
            assert answer == whole_row(0, 2, [*tokens, PROMPT[:SIZE]])[-1]
            assert [place.hop.peer for place in session.statistics().hops] == ["other"]
            session.leave(Hop("slow", 0), "is not here any more")
            assert session.statistics().num_repairs == 1
        kinds = [event.kind async for event in events]
    assert kinds == [Kind.REPAIRING, Kind.REPAIRED]
    assert charged == []
