"""Answers peers: sessions of clients on our workers, and the push streams of the hops before them.

It owns who has which session, and what each client may hold; what happens in a session is `served.Served`. A
session outlives its client's stream by `SESSION_GRACE_S`; then everything of it is freed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog
import trio
from anyio.abc import TaskStatus

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import (
    HISTORY_BYTES,
    MAX_SESSIONS,
    MAX_SESSIONS_PER_CLIENT,
    MIN_HISTORY_BYTES,
    OPEN_TIMEOUT_S,
    SESSION_GRACE_S,
)
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
    OpenSession,
    Step,
)
from ...protocol.training import PutPart
from ...protocol.work import Ready
from ..network.conversation import Conversation
from ..network.seam import Network, Stream
from ..tally import Tally
from .hop import HopSession
from .port import WorkerPort
from .prefixes import SentPrefixes, SessionPrefix
from .served import Served
from .training import Asked

FIRST_WORD_TIMEOUT_S: Final = OPEN_TIMEOUT_S  # of a stream that was opened to us
# For our own link of the epoch, which the client sends as it sends the other's; the other gives up soon after.
ATTACH_WAIT_S: Final = 0.6 * OPEN_TIMEOUT_S
TICK_S: Final = 0.1  # how exactly receipts keep their times

_log = structlog.get_logger("corolla.peers")

_Key = tuple[str, bytes, int]  # client, session, worker


@dataclass(frozen=True, slots=True)
class Statistics:
    """What is held for others now. history_promised_bytes: the sum of the sessions' budgets."""

    num_sessions: int
    num_push_streams: int
    num_steps: int
    history_bytes: int
    history_promised_bytes: int
    block_tokens: int = 0  # computed for others so far: tokens times blocks


@dataclass(slots=True)
class _Place:
    """A session in the table. history_bytes: what it was promised."""

    served: Served
    history_bytes: int


class HopService:
    """Serves `SESSION_PROTOCOL` and `PUSH_PROTOCOL` on a network, with this daemon's workers.

    history_bytes: for the histories of all sessions. admits: asked with the client's peer id before a
    session is opened; it raises what the client is to be told (draining, paused). tally: counts what is done. `run`
    has to run while the service is used.
    """

    def __init__(
        self,
        network: Network,
        *,
        grace_s: float = SESSION_GRACE_S,
        history_bytes: int = HISTORY_BYTES,
        admits: Callable[[str], None] | None = None,
        tally: Tally | None = None,
    ) -> None:
        self._network = network
        self._workers: dict[int, WorkerPort] = {}
        self._forget: dict[int, Callable[[], None]] = {}  # how each worker's listener is taken back
        self._draining: set[int] = set()  # workers that take no new sessions
        self._grace_s = grace_s
        self._history_bytes = history_bytes
        self._admits = admits
        self._places: dict[_Key, _Place] = {}
        self._prefixes = SentPrefixes()
        self._num_caches = 0  # so far: their names
        self._num_refused: Counter[int] = Counter()  # sessions, by worker, so far
        self.tally: Final = tally or Tally()
        self._busy: dict[Served, None] = {}  # with steps under way, in the order in which they came
        self._changed = trio.lowlevel.ParkingLot()  # sessions came or went
        self._is_busy = trio.lowlevel.ParkingLot()
        self._nursery: trio.Nursery | None = None
        network.handle(SESSION_PROTOCOL, self._serve_client)
        network.handle(PUSH_PROTOCOL, self._serve_push)

    def add_worker(self, worker: WorkerPort) -> None:
        """Offer a worker's span to clients."""
        known = self._workers.get(worker.number)
        if known is not None:
            self.remove_worker(known)
        self._workers[worker.number] = worker
        self._forget[worker.number] = worker.on_lost(lambda: self._worker_lost(worker))

    def remove_worker(self, worker: WorkerPort) -> None:
        """Offer it no more; its sessions end."""
        if self._workers.get(worker.number) is worker:
            del self._workers[worker.number]
            self._forget.pop(worker.number)()
            self._draining.discard(worker.number)
        for key, place in tuple(self._places.items()):
            if place.served.worker is worker:
                self._free(key, place.served)

    def worker_for(self, client: str, asked: Asked) -> WorkerPort:
        """The worker for a training request. Raises as sessions are refused: `BUSY`, `DRAINING`, …."""
        start, end = (
            (asked.block, asked.block + 1) if isinstance(asked, PutPart) else (asked.start, asked.end)
        )
        self._ready(asked.worker, asked.fingerprint, start, end)
        if asked.worker in self._draining:
            raise error(Code.DRAINING, f"worker {asked.worker} takes no new requests", "use another peer")
        if self._admits is not None:
            self._admits(client)
        return self._workers[asked.worker]

    def keep_for(self, grace_s: float) -> None:
        """How long sessions opened from now on outlive their client's stream."""
        self._grace_s = grace_s

    def drain(self, worker: int) -> None:
        """Take no new sessions on a worker; those that are open go on."""
        self._draining.add(worker)

    def undrain(self, worker: int) -> None:
        """Take new sessions on it again."""
        self._draining.discard(worker)

    def part_with(self, barred: Callable[[str], bool]) -> None:
        """End the sessions of barred clients: no time of grace for those who may not come back."""
        for key, place in tuple(self._places.items()):
            if barred(key[0]):
                self._free(key, place.served)

    def ask_to_leave(self, worker: int, *, amid_steps: bool) -> None:
        """Tell the sessions of a worker to go elsewhere now: `DRAINING`, which charges nobody.

        Those with a step under way only if `amid_steps`: they would have to compute it again.
        """
        for key, place in tuple(self._places.items()):
            if key[2] == worker and (amid_steps or not place.served.num_under_way):
                place.served.ask_to_leave()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the sessions' tasks until cancelled; then every session is freed."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await self._tick()
            finally:
                self._nursery = None
                for worker in tuple(self._workers.values()):
                    self.remove_worker(worker)

    def statistics(self) -> Statistics:
        """For status, and for tests that nothing is left."""
        places = self._places.values()
        return Statistics(
            num_sessions=len(places),
            num_push_streams=sum(place.served.has_push for place in places),
            num_steps=sum(place.served.num_under_way for place in places),
            history_bytes=sum(place.served.hop.history.size_bytes for place in places),
            history_promised_bytes=sum(place.history_bytes for place in places),
            block_tokens=self.tally.block_tokens,
        )

    def num_sessions(self, worker: int) -> int:
        """Sessions open on one worker."""
        return sum(key[2] == worker for key in self._places)

    @property
    def num_clients(self) -> int:
        """Members who have a session here."""
        return len({key[0] for key in self._places})

    def num_refused(self, worker: int) -> int:
        """Sessions that one worker had no room for, so far."""
        return self._num_refused[worker]

    async def wait_idle(self, worker: int | None = None) -> None:
        """Wait until nobody has a session here, or none on one worker."""
        while self._places if worker is None else self.num_sessions(worker):
            await self._changed.park()

    # the client's stream

    async def _serve_client(self, stream: Stream) -> None:
        talk = Conversation.begun_by(stream, SESSION)
        first = await _first_word(talk)
        if not isinstance(first, OpenSession):
            raise error(Code.PROTOCOL_VIOLATION, f"{stream.peer} did not begin a session stream with `open`")
        key = (stream.peer, first.session, first.worker)
        try:
            served = await self._open(key, first)
        except CorollaError as problem:
            await stream.send(encode(Failure.of(first.session, 0, problem)))
            await stream.close()
            return
        talk.trust()
        line = served.enter(stream)
        try:
            while served.is_on(line) and (message := await _next(talk)) is not None:
                if isinstance(message, CloseSession):
                    self._free(key, served)
                elif served.is_on(line):
                    await served.hear(message)
        finally:
            served.leave(line)

    async def _open(self, key: _Key, message: OpenSession) -> Served:
        """The session, as new or resumed. Raises why the client cannot have it."""
        ready, nursery = self._ready(message.worker, message.fingerprint, message.start, message.end)
        if key not in self._places and message.worker in self._draining:
            raise error(Code.DRAINING, f"worker {message.worker} takes no new sessions", "use another peer")
        if self._admits is not None and key not in self._places:
            self._admits(key[0])
        place = self._places.get(key)
        if place is not None and place.served.hop.opened != message:
            self._free(key, place.served)
            place = None
        if place is not None:
            await place.served.wait_open()
            return place.served
        token_bytes = message.encoding.token_bytes(ready.facts.hidden_size)
        is_last = message.end == ready.facts.num_blocks  # nothing is sent on, and so nothing kept
        wanted = 0 if is_last else message.max_rows * message.max_tokens * token_bytes * 5 // 4  # and forks
        budget = self._admit(key[0], wanted)
        self._num_caches += 1
        served = Served(
            self._network,
            self._workers[message.worker],
            HopSession(key[0], message, token_bytes, budget),
            self._num_caches.to_bytes(len(message.session)),
            SessionPrefix(self._prefixes, key[0], message, keeps=not is_last),
            grace_s=self._grace_s,
            on_busy=self._add_busy,
            on_work=partial(self._note_work, key[0]),
        )
        self._places[key] = _Place(served, budget)
        nursery.start_soon(self._own, key, served)
        self._changed.unpark_all()
        try:
            await served.wait_open()
        except CorollaError as problem:
            self._num_refused[message.worker] += problem.code is Code.BUSY
            raise
        return served

    def _ready(self, number: int, fingerprint: str, start: int, end: int) -> tuple[Ready, trio.Nursery]:
        """What the worker serves, if that is what is asked for, and where its session can live."""
        worker = self._workers.get(number)
        ready = worker.ready if worker is not None else None
        if self._nursery is None or ready is None:
            raise error(Code.BUSY, f"worker {number} does not serve now", "use another peer")
        if fingerprint != ready.facts.fingerprint:
            raise error(
                Code.UNKNOWN_MODEL,
                f"worker {number} serves model {ready.facts.fingerprint[:8]}, not {fingerprint[:8]}",
            )
        if not ready.start <= start < end <= ready.end:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks {start}:{end} asked of worker {number}, which serves {ready.start}:{ready.end}",
            )
        return ready, self._nursery

    def _admit(self, client: str, wanted_bytes: int) -> int:
        """The history budget of a new session. Raises `BUSY` if the client, or all, have too many."""
        mine = [place for key, place in self._places.items() if key[0] == client]
        if len(self._places) >= MAX_SESSIONS or len(mine) >= MAX_SESSIONS_PER_CLIENT:
            said = f"{len(self._places)} sessions are open here, {len(mine)} of them yours"
            raise error(Code.BUSY, said, "use another peer")
        left = self._history_bytes - sum(place.history_bytes for place in self._places.values())
        left_to_client = self._history_bytes // 2 - sum(place.history_bytes for place in mine)
        return min(wanted_bytes, max(MIN_HISTORY_BYTES, min(left, left_to_client)))

    async def _own(self, key: _Key, served: Served) -> None:
        """One session's life. A defect in it ends it alone."""
        try:
            await served.run()
        except Exception:
            _log.exception("session_failed", client=key[0], session=key[1].hex()[:8])
        finally:
            self._free(key, served)

    def _free(self, key: _Key, served: Served) -> None:
        place = self._places.get(key)
        if place is not None and place.served is served:
            del self._places[key]
        self._busy.pop(served, None)
        served.free()
        self._changed.unpark_all()

    def _worker_lost(self, worker: WorkerPort) -> None:
        for place in tuple(self._places.values()):
            if place.served.worker is worker:
                place.served.worker_lost()

    def _note_work(self, client: str, num_tokens: int, num_blocks: int) -> None:
        if client != self._network.peer:
            self.tally.steps += 1
            self.tally.tokens += num_tokens
            self.tally.block_tokens += num_tokens * num_blocks

    def note_training(self, client: str, num_tokens: int) -> None:
        """Tokens of a client went back through our blocks."""
        if client != self._network.peer:
            self.tally.training_tokens += num_tokens

    # receipts

    def _add_busy(self, served: Served) -> None:
        self._busy[served] = None
        self._is_busy.unpark_all()

    async def _tick(self) -> None:
        while True:
            if not self._busy:
                await self._is_busy.park()
            await trio.sleep(TICK_S)
            for served in tuple(self._busy):
                served.tick()
                if not served.num_under_way:
                    self._busy.pop(served, None)

    # the push stream of an upstream hop

    async def _serve_push(self, stream: Stream) -> None:
        talk = Conversation.begun_by(stream, PUSH)
        message: Message | None = await _first_word(talk)
        served: Served | None = None
        sender = Hop(stream.peer, 0)
        try:
            while message is not None:
                answer: Message | None = None
                if isinstance(message, Attach):
                    if served is not None:
                        served.detached(stream)
                    sender = Hop(stream.peer, message.from_worker)
                    served, answer = await self._attach(stream, message, sender)
                    if served is not None:
                        talk.trust()
                elif isinstance(message, Step):
                    if served is None or message.session != served.hop.opened.session:
                        raise error(Code.PROTOCOL_VIOLATION, f"{stream.peer} pushed what it did not attach")
                    answer = await served.take(message, sender)
                if answer is not None:
                    await talk.say(answer)
                    if isinstance(answer, Failure):
                        break
                message = await _next(talk)
        finally:
            if served is not None:
                served.detached(stream)
        await stream.close()

    async def _attach(
        self, stream: Stream, message: Attach, sender: Hop
    ) -> tuple[Served | None, Attached | Failure]:
        """Wait for our own link of the epoch that the upstream hop speaks of; what to answer it."""
        key = (message.client, message.session, message.to_worker)
        problem = error(Code.TIMEOUT, f"no link of epoch {message.epoch} came in {ATTACH_WAIT_S:g} s")
        with trio.move_on_after(ATTACH_WAIT_S):
            while True:
                place = self._places.get(key)
                if place is None:
                    await self._changed.park()  # the client opens all hops before it links any: rare
                    continue
                hop = place.served.hop
                if hop.expects(message.epoch, sender):
                    place.served.attached(stream)
                    return place.served, Attached(message.session, message.epoch)
                if hop.epoch >= message.epoch:
                    problem = error(
                        Code.STALE_EPOCH,
                        f"{sender.peer} attached in epoch {message.epoch}, this hop is at {hop.epoch}"
                        " with another upstream",
                        epoch=hop.epoch,
                    )
                    break
                await place.served.wired.park()
        return None, Failure.of(message.session, message.epoch, problem)


async def _first_word(talk: Conversation) -> Message | None:
    with trio.move_on_after(FIRST_WORD_TIMEOUT_S):
        return await _next(talk)
    raise error(Code.TIMEOUT, f"{talk.stream.peer} said nothing in {FIRST_WORD_TIMEOUT_S:g} s")


async def _next(talk: Conversation) -> Message | None:
    """The next message of a kind that we know: a newer peer may say what we need not understand."""
    while True:
        try:
            return await talk.hear()
        except CorollaError as problem:
            if problem.code is not Code.UNSUPPORTED:
                raise
