"""Answers peers: sessions of clients on our workers, and the push streams of the hops before them.

It owns who has which session; what happens in one is `served.Served`. A session outlives its client's stream by
`SESSION_GRACE_S`; then everything of it is freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
import trio
from anyio.abc import TaskStatus

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import MIB, OPEN_TIMEOUT_S, SESSION_GRACE_S
from ...protocol.messages import Message, encode
from ...protocol.steps import (
    PUSH,
    PUSH_PROTOCOL,
    SESSION,
    SESSION_PROTOCOL,
    Attach,
    Attached,
    CloseSession,
    Failure,
    Hop,
    Opened,
    OpenSession,
    Step,
)
from ..network.conversation import Conversation
from ..network.seam import Network, Stream
from .hop import HopSession
from .port import WorkerPort
from .served import Served

MAX_SESSIONS: Final = 256  # of all clients, on all workers of this daemon
MAX_SESSIONS_PER_CLIENT: Final = 64
HISTORY_BYTES: Final = 512 * MIB  # of one session; the oldest positions go first
FIRST_WORD_TIMEOUT_S: Final = 10.0  # of a stream that was opened to us

_log = structlog.get_logger("corolla.peers")

_Key = tuple[str, bytes, int]  # client, session, worker


@dataclass(frozen=True, slots=True)
class Statistics:
    """What is held for others now."""

    num_sessions: int
    num_push_streams: int
    history_bytes: int


class HopService:
    """Serves `SESSION_PROTOCOL` and `PUSH_PROTOCOL` on a network, with this daemon's workers.

    admits: asked with the client's peer id before a session is opened; it raises what the client is to be
    told (draining, paused). `run` has to run while the service is used.
    """

    def __init__(
        self,
        network: Network,
        *,
        grace_s: float = SESSION_GRACE_S,
        history_bytes: int = HISTORY_BYTES,
        admits: Callable[[str], None] | None = None,
    ) -> None:
        self._network = network
        self._workers: dict[int, WorkerPort] = {}
        self._grace_s = grace_s
        self._history_bytes = history_bytes
        self._admits = admits
        self._sessions: dict[_Key, Served] = {}
        self._opened = trio.Event()
        self._nursery: trio.Nursery | None = None
        network.handle(SESSION_PROTOCOL, self._serve_client)
        network.handle(PUSH_PROTOCOL, self._serve_push)

    def add_worker(self, worker: WorkerPort) -> None:
        """Offer a worker's span to clients."""
        self._workers[worker.number] = worker
        worker.on_lost(lambda: self._worker_lost(worker))

    def remove_worker(self, worker: WorkerPort) -> None:
        """Offer it no more; its sessions end."""
        if self._workers.get(worker.number) is worker:
            del self._workers[worker.number]
        for served in tuple(self._sessions.values()):
            if served.worker is worker:
                self._free(served)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the sessions' tasks until cancelled; then every session is freed."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for served in tuple(self._sessions.values()):
                self._free(served)

    def statistics(self) -> Statistics:
        """For status, and for tests that nothing is left."""
        sessions = self._sessions.values()
        return Statistics(
            num_sessions=len(sessions),
            num_push_streams=sum(served.has_push for served in sessions),
            history_bytes=sum(served.hop.history.size_bytes for served in sessions),
        )

    def num_sessions(self, worker: int) -> int:
        """Sessions open on one worker."""
        return sum(key[2] == worker for key in self._sessions)

    # the client's stream

    async def _serve_client(self, stream: Stream) -> None:
        talk = Conversation(stream, SESSION)
        first = await _first_word(talk)
        if not isinstance(first, OpenSession):
            raise error(Code.PROTOCOL_VIOLATION, f"{stream.peer} did not begin a session stream with `open`")
        served = await self._open(stream, first)
        if served is None:
            await stream.close()
            return
        try:
            while served.stream is stream and (message := await talk.hear()) is not None:
                if isinstance(message, CloseSession):
                    self._free(served)
                    await stream.close()
                    return
                await served.hear(message)
        finally:
            if served.stream is stream:
                served.stream = None
                self._keep_for_grace(served)

    async def _open(self, stream: Stream, message: OpenSession) -> Served | None:
        """The session, as new or resumed; None after the client was told why not."""
        key = (stream.peer, message.session, message.worker)
        served = self._sessions.get(key)
        if served is not None and served.hop.opened != message:
            self._free(served)
            served = None
        if served is None:
            try:
                served = await self._admit(key, message)
            except CorollaError as problem:
                await stream.send(encode(Failure.of(message.session, 0, problem)))
                return None
        if served.stream is not None:
            served.stream.reset()
        served.stream = stream
        served.expires_at = math.inf
        await served.say(Opened(message.session, served.hop.epoch, served.worker.queue))
        return served

    async def _admit(self, key: _Key, message: OpenSession) -> Served:
        client, _, number = key
        if self._admits is not None:
            self._admits(client)
        worker = self._workers.get(number)
        ready = worker.ready if worker is not None else None
        if self._nursery is None or worker is None or ready is None:
            raise error(Code.BUSY, f"worker {number} does not serve now", "use another peer")
        served_model = message.fingerprint == ready.facts.fingerprint
        if not served_model or not ready.start <= message.start < message.end <= ready.end:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks {message.start}:{message.end} of model {message.fingerprint[:8]};"
                f" served are {ready.start}:{ready.end} of {ready.facts.fingerprint[:8]}",
            )
        num_mine = sum(other[0] == client for other in self._sessions)
        if len(self._sessions) >= MAX_SESSIONS or num_mine >= MAX_SESSIONS_PER_CLIENT:
            said = f"{len(self._sessions)} sessions are open here, {num_mine} of them yours"
            raise error(Code.BUSY, said, "use another peer")
        token_bytes = message.encoding.token_bytes(ready.facts.hidden_size)
        served = Served(self._network, worker, HopSession(client, message, token_bytes, self._history_bytes))
        self._sessions[key] = served
        try:
            await served.open_cache()
            await self._nursery.start(served.run)
        except BaseException:
            self._free(served)
            raise
        self._opened.set()
        self._opened = trio.Event()
        return served

    def _keep_for_grace(self, served: Served) -> None:
        if self._nursery is not None and not served.is_freed:
            served.expires_at = trio.current_time() + self._grace_s
            self._nursery.start_soon(self._expire, served, served.expires_at)

    async def _expire(self, served: Served, at: float) -> None:
        await trio.sleep_until(at)
        if served.expires_at <= at:
            self._free(served)

    def _free(self, served: Served) -> None:
        opened = served.hop.opened
        key = (served.hop.client, opened.session, opened.worker)
        if self._sessions.get(key) is served:
            del self._sessions[key]
        served.free()

    def _worker_lost(self, worker: WorkerPort) -> None:
        for served in tuple(self._sessions.values()):
            if served.worker is worker:
                served.worker_lost()

    # the push stream of an upstream hop

    async def _serve_push(self, stream: Stream) -> None:
        talk = Conversation(stream, PUSH)
        message: Message | None = await _first_word(talk)
        served: Served | None = None
        sender = Hop(stream.peer, 0)
        while message is not None:
            if isinstance(message, Attach):
                sender = Hop(stream.peer, message.from_worker)
                served = await self._attach(talk, message, sender)
            elif isinstance(message, Step) and served is not None and not served.is_freed:
                await served.take(message, sender, talk)
            message = await talk.hear()
        await stream.close()

    async def _attach(self, talk: Conversation, message: Attach, sender: Hop) -> Served | None:
        """Wait for our own link of the epoch that the upstream hop speaks of, and answer it."""
        key = (message.client, message.session, message.to_worker)
        epoch = 0
        with trio.move_on_after(OPEN_TIMEOUT_S):
            while True:
                served = self._sessions.get(key)
                if served is None:
                    await (
                        self._opened.wait()
                    )  # the client opens all hops before it links any, so this is rare
                    continue
                epoch = served.hop.epoch
                if served.hop.expects(message.epoch, sender):
                    await talk.say(Attached(message.session, message.epoch))
                    return served
                if epoch >= message.epoch:
                    break
                await served.wired.wait()
        problem = error(
            Code.STALE_EPOCH,
            f"{sender.peer} attached in epoch {message.epoch}, this hop is at {epoch}",
            epoch=epoch,
        )
        await talk.say(Failure.of(message.session, message.epoch, problem))
        return None


async def _first_word(talk: Conversation) -> Message | None:
    with trio.move_on_after(FIRST_WORD_TIMEOUT_S):
        return await talk.hear()
    raise error(Code.TIMEOUT, f"{talk.stream.peer} said nothing in {FIRST_WORD_TIMEOUT_S:g} s")
