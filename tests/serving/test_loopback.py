"""A session through hops over libp2p on loopback: the client's code and the hops' code as they ship."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
import trio

from corolla.daemon.identity import identity_from_seed
from corolla.daemon.network.dialling import Reachability
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.reach.relaying import RelayLimits
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


@asynccontextmanager
async def relayed_daemons(limits: RelayLimits) -> AsyncIterator[tuple[Network, list[RouteHop], list[str]]]:
    """A client, and a hop for each span that nobody can dial. Whom a circuit was made to is noted, in order."""
    dialled: list[str] = []
    loopback = ("/ip4/127.0.0.1/tcp/0",)
    async with AsyncExitStack() as stack:

        async def opened(number: int, listen: tuple[str, ...], **options: Any) -> Libp2pNetwork:
            identity = identity_from_seed(bytes([number + 60]) * 32)
            return await stack.enter_async_context(open_network(identity, listen=listen, **options))

        relay = await opened(0, loopback, relay=limits, reachability=Reachability.PUBLIC)
        client = await opened(1, loopback)
        hidden = [await opened(2 + n, (), reachability=Reachability.PRIVATE) for n in range(len(SPANS))]
        for network in (client, *hidden):
            network.relays.dial = _noting(network.relays.dial, dialled)  # type: ignore[method-assign]
            await network.connect(relay.addresses()[0], timeout_s=5)
        with trio.fail_after(20):
            while not all(network.relays.held for network in hidden):  # noqa: ASYNC110
                await trio.sleep(0.01)
        for one in (client, *hidden):
            for other in hidden:
                one.learn(other.peer, other.addresses())
        async with anyio.create_task_group() as tasks:
            for network, (start, end) in zip(hidden, SPANS, strict=True):
                service, worker = HopService(network), WorkerTwin(0, FACTS, start, end)
                service.add_worker(worker)
                tasks.start_soon(worker.run)
                await tasks.start(service.run)
            hops = [
                RouteHop(Hop(network.peer, 0), start, end, DType.FLOAT32)
                for network, (start, end) in zip(hidden, SPANS, strict=True)
            ]
            yield client, hops, dialled
            tasks.cancel_scope.cancel()


def _noting(dial: Callable[[str, str], Awaitable[Any]], dialled: list[str]) -> Any:
    async def noted(address: str, peer: str) -> Any:
        dialled.append(peer)
        return await dial(address, peer)

    return noted


async def test_a_session_outlives_the_circuits_that_carry_it() -> None:
    """Hops that nobody can dial, and a relay that soon ends each circuit: every step comes, and right."""
    async with relayed_daemons(RelayLimits(circuit_bytes=30_000)) as (client, hops, dialled):
        with trio.fail_after(60):
            async with open_session(client, OneRoute(*hops), TERMS) as session:
                num_first = len(dialled)
                whole = expected(*(number % 251 for number in range(400)))
                for position, right in enumerate(whole):
                    row = Row(0 if position else NEW_ROW, position, 1)
                    assert await session.step((row,), tokens(position % 251)[0], Reply.LAST) == right
    assert len(dialled) >= num_first + 2 * len(SPANS)


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
