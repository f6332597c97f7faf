"""Members of a swarm in memory: what `belonging` joins together, over the network's twin, with workers of hashes.

Time is a mock clock that jumps. Nothing here decides anything: it is the daemon's own code.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

import anyio
import trio
from anyio.abc import TaskStatus

from corolla.daemon.belonging.belonging import Belonging
from corolla.daemon.belonging.routes import Routes
from corolla.daemon.identity import identity_from_seed
from corolla.daemon.network.members.greeting import found_swarm
from corolla.daemon.network.members.membership import Membership
from corolla.daemon.network.memory import MemoryHub, memory_hub
from corolla.daemon.network.registry.announcements import Offer
from corolla.daemon.network.registry.registry import Registry
from corolla.daemon.serving.peers import HopService
from corolla.daemon.serving.training import TrainingService
from corolla.daemon.serving.twin import HIDDEN_SIZE, WorkerTwin, embedding, twin_facts, whole_row
from corolla.daemon.swarm.blame import Ledger
from corolla.protocol.records import SpanState
from corolla.protocol.tensors import DType, Encoding
from corolla.protocol.work import ModelFacts

NUM_BLOCKS = 4
FACTS = twin_facts(num_blocks=NUM_BLOCKS)
TOKEN_BYTES = Encoding.FLOAT32.token_bytes(HIDDEN_SIZE)
SWARM = found_swarm("meadow", bytes(32), b"1")


@dataclass
class Member:
    """One daemon's place in the swarm. life: cancel it to end the daemon without a word."""

    belonging: Belonging
    life: trio.CancelScope
    worker: WorkerTwin | None = None

    @property
    def peer(self) -> str:
        return self.belonging.network.peer


@dataclass
class Meadow:
    """The swarm, as its tests see it."""

    hub: MemoryHub
    nursery: trio.Nursery
    members: list[Member] = field(default_factory=list)

    async def client(self) -> Member:
        """A daemon that serves nothing."""
        return await self._add(None)

    async def serve(self, start: int, end: int) -> Member:
        """A daemon that serves blocks [start, end), known to all."""
        worker = WorkerTwin(0, FACTS, start, end)
        self.nursery.start_soon(worker.run)
        member = await self._add(worker)
        member.belonging.registry.announce_model(FACTS)
        announce(member)
        others = [other.belonging for other in self.members if other is not member]
        await until(lambda: all(knows(other, member.peer) for other in others))
        return member

    async def _add(self, worker: WorkerTwin | None) -> Member:
        member: Member = await self.nursery.start(self._live, worker)  # type: ignore[arg-type]
        self.members.append(member)
        number = len(self.members) - 1
        await until(lambda: len(member.belonging.membership.members()) >= number)
        return member

    async def _live(
        self,
        worker: WorkerTwin | None,
        *,
        task_status: TaskStatus[Member] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        number = len(self.members) + 1
        identity = identity_from_seed(number.to_bytes(32, "big"))
        network = self.hub.network(identity.peer)
        first = [f"/memory/{member.peer}/p2p/{member.peer}" for member in self.members[:1]]
        rng = random.Random(number)
        membership = Membership(network, SWARM, bootstrap=first, rng=rng)
        registry = Registry(network, membership, identity.private_key, rng=rng, unix=lambda: 1.8e9)
        ledger = Ledger()
        hops = HopService(network)
        routes = Routes(network, membership, registry, ledger, rng=rng)
        over = anyio.Event()
        belonging = Belonging(SWARM, network, membership, registry, routes, ledger, hops, over)
        if worker is not None:
            hops.add_worker(worker)
            TrainingService(network, hops.worker_for)  # the network holds it
        with trio.CancelScope() as life:
            async with anyio.create_task_group() as tasks:
                await tasks.start(membership.run)
                await tasks.start(registry.run)
                await tasks.start(hops.run)
                task_status.started(Member(belonging, life, worker))

    def kill(self, member: Member) -> None:
        """It dies as by SIGKILL."""
        self.hub.kill(member.peer)
        member.life.cancel()


@asynccontextmanager
async def meadow() -> AsyncIterator[Meadow]:
    """An empty swarm."""
    async with memory_hub() as hub, trio.open_nursery() as nursery:
        yield Meadow(hub, nursery)
        nursery.cancel_scope.cancel()


def announce(member: Member, *, queue: int = 0) -> None:
    """Announce the span of a daemon that serves one, anew."""
    ready = member.worker.ready if member.worker is not None else None
    if ready is not None:
        place = (ready.start, ready.end, SpanState.ONLINE, DType.FLOAT32)
        offer = Offer(0, FACTS.fingerprint, *place, tokens_per_s=9.0, queue=queue)
        member.belonging.registry.announce(offer)


def knows(belonging: Belonging, peer: str) -> bool:
    """Whether a daemon knows of a span and a model of this peer."""
    spans = belonging.registry.all_spans_now()
    manifests = belonging.registry.manifests_now()
    return any(seen.record.peer == peer for seen in spans) and any(m.peer == peer for m in manifests)


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait on the mock clock."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - it takes no time: the clock jumps
            await trio.sleep(0.01)


class EndsTwin:
    """Who lends workers of ends: one, in memory. num_asked: how often somebody wanted it."""

    def __init__(self, facts: ModelFacts = FACTS) -> None:
        self.worker = WorkerTwin(200, facts, 0, 0)
        self.num_asked = 0

    async def ends_of(self, facts: ModelFacts) -> WorkerTwin:
        """As `ends.Ends.ends_of`."""
        self.num_asked += 1
        await until(lambda: self.worker.ready is not None)
        return self.worker


def whole_text(prompt: Iterable[int], num_tokens: int) -> tuple[int, ...]:
    """The greedy tokens after a prompt, by the whole model of hashes."""
    inputs = [embedding(token, TOKEN_BYTES) for token in prompt]
    tokens: list[int] = []
    for _ in range(num_tokens):
        hidden = whole_row(0, NUM_BLOCKS, inputs)[-1]
        tokens.append(int.from_bytes(blake2b(hidden, digest_size=8).digest()) % FACTS.vocab_size)
        inputs.append(embedding(tokens[-1], TOKEN_BYTES))
    return tuple(tokens)
