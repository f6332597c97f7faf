"""A session through hops over libp2p on loopback: the client's code and the hops' code as they ship."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest
import trio

from corolla.daemon.identity import identity_from_seed
from corolla.daemon.network.libp2p import open_network
from corolla.daemon.network.seam import Network
from corolla.daemon.serving.peers import HopService
from corolla.daemon.serving.twin import WorkerTwin
from corolla.daemon.session.client import open_session
from corolla.daemon.session.roster import Terms
from corolla.daemon.session.wiring import Route, RouteHop, RouteRequest
from corolla.protocol.steps import NEW_ROW, Hop, Reply, Row
from corolla.protocol.tensors import DType, Encoding

from .stage import FACTS, NUM_BLOCKS, SESSION_ID, TOKEN_BYTES, expected, tokens

pytestmark = pytest.mark.anyio

SPANS = ((0, 2), (2, 3), (3, NUM_BLOCKS))
TERMS = Terms(SESSION_ID, FACTS.fingerprint, 0, NUM_BLOCKS, Encoding.FLOAT32, TOKEN_BYTES, 2, 1024)


class OneRoute:
    """A router that knows one way."""

    def __init__(self, *hops: RouteHop) -> None:
        self._hops = hops

    async def find_route(self, request: RouteRequest) -> Route:
        return Route(self._hops)


@asynccontextmanager
async def daemons() -> AsyncIterator[tuple[list[Network], list[HopService], list[WorkerTwin]]]:
    """A daemon for each span; the first one is the client's too."""
    async with AsyncExitStack() as stack:
        networks: list[Network] = []
        for number in range(len(SPANS)):
            identity = identity_from_seed(bytes([number + 40]) * 32)
            network = open_network(
                identity, listen=("/ip4/127.0.0.1/tcp/0",), kad_protocol="/corolla/kad/hops/1"
            )
            networks.append(await stack.enter_async_context(network))
        for one in networks:
            for other in networks:
                one.learn(other.peer, other.addresses())
        async with anyio.create_task_group() as tasks:
            services = [HopService(network) for network in networks]
            workers = [WorkerTwin(0, FACTS, start, end) for start, end in SPANS]
            for service, worker in zip(services, workers, strict=True):
                service.add_worker(worker)
                tasks.start_soon(worker.run)
                await tasks.start(service.run)
            yield networks, services, workers
            tasks.cancel_scope.cancel()


async def test_a_session_computes_and_leaves_nothing_behind() -> None:
    async with daemons() as (networks, services, workers):
        hops = [
            RouteHop(Hop(network.peer, 0), start, end, DType.FLOAT32)
            for network, (start, end) in zip(networks, SPANS, strict=True)
        ]
        with trio.fail_after(60):
            async with open_session(networks[0], OneRoute(*hops), TERMS) as session:
                prompt = [number % 251 for number in range(600)]  # longer than one message may be
                whole = expected(*prompt, 1, 2, 3)
                rows = (Row(NEW_ROW, 0, len(prompt)),)
                answer = await session.step(rows, b"".join(tokens(*prompt)), Reply.LAST)
                assert answer == whole[len(prompt) - 1]
                for index, token in enumerate((1, 2, 3)):
                    position = len(prompt) + index
                    answer = await session.step((Row(0, position, 1),), tokens(token)[0], Reply.LAST)
                    assert answer == whole[position]
            while any(service.statistics().num_sessions for service in services):  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert [worker.statistics().num_caches for worker in workers] == [0, 0, 0]
