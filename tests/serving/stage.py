"""A swarm in memory for tests of the serving side: daemons with twins for workers, and clients by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import anyio
import trio
from anyio.abc import TaskGroup

from corolla.daemon.network.conversation import Conversation
from corolla.daemon.network.memory import MemoryHub, memory_hub
from corolla.daemon.network.seam import Network
from corolla.daemon.serving.peers import HopService
from corolla.daemon.serving.twin import HIDDEN_SIZE, WorkerTwin, embedding, twin_facts, whole_row
from corolla.protocol.limits import HISTORY_BYTES
from corolla.protocol.messages import Message
from corolla.protocol.steps import (
    NEW_ROW,
    SESSION,
    SESSION_PROTOCOL,
    Hop,
    Linked,
    LinkHop,
    Opened,
    OpenSession,
    Reply,
    Result,
    Row,
    Step,
)
from corolla.protocol.tensors import Encoding

NUM_BLOCKS = 6
FACTS = twin_facts(num_blocks=NUM_BLOCKS)
TOKEN_BYTES = Encoding.FLOAT32.token_bytes(HIDDEN_SIZE)
SESSION_ID = b"a session's name"
M = TypeVar("M", bound=Message)


def tokens(*values: int) -> list[bytes]:
    """Hidden states before the first block."""
    return [embedding(value, TOKEN_BYTES) for value in values]


def expected(*values: int, start: int = 0, end: int = NUM_BLOCKS) -> list[bytes]:
    """What the blocks make of one row of these tokens."""
    return whole_row(start, end, tokens(*values))


@dataclass
class Daemon:
    """One peer that serves."""

    name: str
    service: HopService
    worker: WorkerTwin
    start: int
    end: int

    @property
    def hop(self) -> Hop:
        return Hop(self.name, self.worker.number)


class Caller:
    """A client's stream to one hop, spoken by hand."""

    def __init__(self, talk: Conversation, daemon: Daemon) -> None:
        self.talk = talk
        self.daemon = daemon

    async def say(self, message: Message) -> None:
        await self.talk.say(message)

    async def hear(self, kind: type[M]) -> M:
        """The next message, which has to be of this kind."""
        with trio.fail_after(100):
            message = await self.talk.hear()
        assert isinstance(message, kind), f"heard {message}, expected {kind.__name__}"
        return message

    async def ended(self) -> None:
        """Wait until the far side has ended the stream."""
        with trio.fail_after(100):
            assert await self.talk.hear() is None

    def leave(self) -> None:
        """Lose the stream."""
        self.talk.stream.reset()


class Stage:
    """Daemons on a hub."""

    def __init__(self, hub: MemoryHub, tasks: TaskGroup) -> None:
        self.hub = hub
        self.client: Network = hub.network("client")
        self._tasks = tasks
        self.daemons: dict[str, Daemon] = {}

    async def daemon(
        self, name: str, start: int, end: int, *, history_bytes: int = HISTORY_BYTES, cache_tokens: int = 4096
    ) -> Daemon:
        """One more peer that serves blocks [start, end)."""
        network = self.client if name == self.client.peer else self.hub.network(name)
        service = HopService(network, history_bytes=history_bytes)
        worker = WorkerTwin(7, FACTS, start, end, cache_tokens=cache_tokens)
        service.add_worker(worker)
        self._tasks.start_soon(worker.run)
        await self._tasks.start(service.run)
        self.daemons[name] = Daemon(name, service, worker, start, end)
        return self.daemons[name]

    async def chain(self, *cuts: int, history_bytes: int = HISTORY_BYTES) -> list[Caller]:
        """Daemons `hop0`, `hop1`, … cut at these blocks, with an open session, linked in epoch 1."""
        edges = [0, *cuts, NUM_BLOCKS]
        callers = []
        for index, (start, end) in enumerate(pairwise(edges)):
            daemon = await self.daemon(f"hop{index}", start, end, history_bytes=history_bytes)
            callers.append(await self.open(daemon))
        await self.link(callers, 1)
        return callers

    async def call(self, daemon: Daemon, *, network: Network | None = None) -> Caller:
        """A stream, with nothing said on it."""
        stream = await (network or self.client).open(daemon.name, SESSION_PROTOCOL, timeout_s=5)
        return Caller(Conversation(stream, SESSION), daemon)

    async def open(
        self, daemon: Daemon, *, network: Network | None = None, max_rows: int = 4, max_tokens: int = 64
    ) -> Caller:
        """A stream with the session opened on it."""
        caller = await self.call(daemon, network=network)
        await caller.say(opening(daemon, max_rows=max_rows, max_tokens=max_tokens))
        await caller.hear(Opened)
        return caller

    async def link(
        self, callers: list[Caller], epoch: int, base_step: int = 0, lengths: tuple[int, ...] = ()
    ) -> list[Linked]:
        """Wire hops one after another; what each holds."""
        for message, caller in zip(links(callers, epoch, base_step, lengths), callers, strict=True):
            await caller.say(message)
        return [await caller.hear(Linked) for caller in callers]

    def is_released(self) -> bool:
        """Whether nobody holds anything for anybody."""
        return all(
            daemon.service.statistics().num_sessions == 0
            and daemon.service.statistics().history_promised_bytes == 0
            and daemon.worker.statistics().num_caches == 0
            and daemon.worker.statistics().num_pending == 0
            and self.hub.num_streams_of(daemon.name) == 0
            for daemon in self.daemons.values()
        )

    async def until_released(self) -> None:
        """Wait for that."""
        with trio.fail_after(100):
            while not self.is_released():  # noqa: ASYNC110 - of mock time, which costs nothing
                await trio.sleep(0.1)


@asynccontextmanager
async def a_stage() -> AsyncIterator[Stage]:
    """A stage, taken down at the end."""
    failure: BaseException | None = None
    async with memory_hub() as hub, anyio.create_task_group() as tasks:
        try:
            yield Stage(hub, tasks)
        except Exception as problem:  # outside of the nursery, so that it is not wrapped
            failure = problem
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


def opening(daemon: Daemon, *, max_rows: int = 4, max_tokens: int = 64) -> OpenSession:
    """The message that opens the session on all of a daemon's blocks."""
    return OpenSession(
        SESSION_ID,
        FACTS.fingerprint,
        daemon.worker.number,
        daemon.start,
        daemon.end,
        Encoding.FLOAT32,
        max_rows,
        max_tokens,
    )


def links(callers: list[Caller], epoch: int, base_step: int, lengths: tuple[int, ...]) -> list[LinkHop]:
    """The messages that wire hops one after another."""
    hops: list[Hop | None] = [None, *(caller.daemon.hop for caller in callers), None]
    return [
        LinkHop(SESSION_ID, epoch, hops[index], hops[index + 2], base_step, lengths)
        for index in range(len(callers))
    ]


def step(
    step_id: int,
    position: int,
    *values: int,
    epoch: int = 1,
    committed: int | None = None,
    reply: Reply = Reply.ALL,
) -> Step:
    """A step of one row, which begins or goes on at a position."""
    row = Row(0 if position else NEW_ROW, position, len(values))
    payload = b"".join(tokens(*values))
    return Step(
        SESSION_ID,
        epoch,
        step_id,
        (row,),
        step_id - 1 if committed is None else committed,
        reply,
        payload=payload,
    )


async def answer(callers: list[Caller], message: Step) -> list[bytes]:
    """The hidden states that come back of a step."""
    await callers[0].say(message)
    result = await callers[-1].hear(Result)
    assert (result.epoch, result.step_id) == (message.epoch, message.step_id)
    size = TOKEN_BYTES
    return [result.payload[place : place + size] for place in range(0, len(result.payload), size)]
