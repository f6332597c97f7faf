"""One session that this daemon serves: its streams, its steps under way, and the tasks that wait for them.

Steps are handed to the worker as they come, so that several are under way; one task, `_pass_on`, sends their
outputs on in order. A link is a task too: it owns the push stream to the next hop. What counts and what becomes
of an output, `hop.HopSession` decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, cast

import structlog
import trio

from ...protocol.errors import Code, CorollaError, error, error_from_wire
from ...protocol.limits import MAX_STEPS_IN_FLIGHT, MIB, OPEN_TIMEOUT_S
from ...protocol.messages import Message
from ...protocol.steps import Attach, Chain, Failure, Hop, KeepPages, LinkHop, Opened, Replay, Step, Where
from ...protocol.work import CloseCache, Compute, Done, NamePages, OpenCache, Restore, Restored
from ..network.seam import Network, Stream
from .hop import HopSession, Verdict
from .line import Line
from .port import Pending, WorkerPort
from .prefixes import SessionPrefix
from .push import Push

# More steps wait in their stream, and then nothing else on it is heard: so a replay on the client's stream, on
# which `Where` comes too, may be read far ahead of the worker.
MAX_UNDER_WAY: Final = 2 * MAX_STEPS_IN_FLIGHT
MAX_AHEAD: Final = 256
MAX_AHEAD_BYTES: Final = 256 * MIB  # and never more than the session was promised room for
CACHE_TIMEOUT_S: Final = 0.8 * OPEN_TIMEOUT_S  # the worker's part of opening or linking

_log = structlog.get_logger("corolla.peers")


@dataclass(frozen=True, slots=True)
class _Job:
    """A step that the worker has."""

    step: Step
    pending: Pending


@dataclass(frozen=True, slots=True)
class _Sending:
    """What goes out without the worker: a replay from our history, or an answer again."""

    messages: Iterator[Message]


class Served:
    """One session on one worker. `run` is its life, `free` its end.

    cache_id: names it to the worker; ids that clients choose could meet there.
    on_busy: told when there are steps under way, so that `tick` is called until there are none.
    on_work: told of each step that was computed: its new tokens, the session's blocks.
    """

    def __init__(
        self,
        network: Network,
        worker: WorkerPort,
        hop: HopSession,
        cache_id: bytes,
        prefix: SessionPrefix,
        *,
        grace_s: float,
        on_busy: Callable[[Served], None],
        on_work: Callable[[int, int], None] = lambda num_tokens, num_blocks: None,
    ) -> None:
        self.worker: Final = worker
        self.hop: Final = hop
        self.is_freed = False
        self.wired = trio.lowlevel.ParkingLot()  # who waits for a new link
        self._network = network
        self._cache_id = cache_id
        self._prefix = prefix
        self._begins: tuple[int, ...] = ()  # tokens that each row may begin with
        self._grace_s = grace_s
        self._on_busy = on_busy
        self._on_work = on_work
        self._line: Line | None = None  # to the client, while it is there
        self._upstream: Stream | None = None  # on which the hop before us pushes
        self._push: Push | None = None
        self._relays_to = False  # steps go downstream through the client
        self._has_cache = False
        self._jobs: deque[_Job | _Sending] = deque()
        self._num_bytes = 0  # of the steps among them
        self._stirred = trio.lowlevel.ParkingLot()  # `_pass_on`: the oldest step may be done
        self._room = trio.lowlevel.ParkingLot()  # readers with a step too many
        self._linking = trio.CancelScope()
        self._grace = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._is_open = trio.Event()
        self._problem: CorollaError | None = None

    # its life

    async def run(self) -> None:
        """Reserve rows and tokens in the worker, then serve until freed."""
        async with trio.open_nursery() as nursery:
            if self.is_freed:
                return
            self._nursery = nursery
            try:
                opened = cast(Done, await self._cache_answer(self._open_cache()))
                self._begins, sent = self._prefix.beginning(opened.rows)
                self.hop.adopt(self._begins, sent)
            except CorollaError as problem:
                self._problem = problem
                return
            finally:
                self._is_open.set()
            nursery.start_soon(self._pass_on)

    async def wait_open(self) -> None:
        """Wait until rows and tokens are reserved. Raises `BUSY`, `TOO_LONG`, `WORKER_LOST`, `TIMEOUT`."""
        await self._is_open.wait()
        if self._problem is not None:
            raise error_from_wire(self._problem.to_wire())  # a new one for each who waits

    def free(self) -> None:
        """Give everything back: the worker's cache, the history, the streams, the tasks."""
        if self.is_freed:
            return
        self.is_freed = True
        self._problem = self._problem or error(Code.BUSY, "the session was closed", "open it again")
        self._is_open.set()
        self._forget_jobs()
        self.worker.tell(CloseCache(self._cache_id))
        self.hop.break_link()
        self.hop.history.clear()
        if self._line is not None:
            self._line.drop()
        if self._push is not None:
            self._push.reset()
        if self._upstream is not None:
            self._upstream.reset()
        self._line = self._push = self._upstream = None
        self.wired.unpark_all()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def worker_lost(self) -> None:
        """The caches are gone; the client will link anew, or go elsewhere."""
        self._has_cache = False
        self._fail(error(Code.WORKER_LOST, "the worker ended"))

    def ask_to_leave(self) -> None:
        """Tell the client to go on elsewhere; until it does, it is served as before."""
        problem = error(Code.DRAINING, "the worker is given up here", "use another peer")
        self.say(Failure.of(self.hop.opened.session, self.hop.epoch, problem))

    @property
    def has_push(self) -> bool:
        """Whether a push stream to the next hop stands."""
        return self._push is not None

    @property
    def num_under_way(self) -> int:
        """Steps that the worker has, or that wait to be sent on."""
        return len(self._jobs)

    # the streams

    def enter(self, stream: Stream) -> Line:
        """The client is there, for the first time or again. The line's `run` is the caller's to start."""
        if self._line is not None:
            self._line.drop()
        self._grace.cancel()
        self._line = Line(stream)
        self._start(self._line.run)
        session, queue = self.hop.opened.session, self.worker.queue
        first = self._begins[0] if len(self._begins) == 1 else 0
        rows = self._begins if len(self._begins) > 1 else ()
        self.say(Opened(session, self.hop.epoch, queue, first, rows))
        return self._line

    def is_on(self, line: Line) -> bool:
        """Whether this is still the client's stream."""
        return self._line is line

    def leave(self, line: Line) -> None:
        """The client's stream is over; it may come back on another within the grace."""
        if self._line is line:
            line.drop()
            self._line = None
            self._grace = trio.CancelScope()
            self._start(self._expire, self._grace)

    def say(self, message: Message) -> None:
        """Tell the client, if it is there; what it misses it asks again, or links anew."""
        if self._line is not None:
            self._line.say(message)

    def attached(self, stream: Stream) -> None:
        """The hop before us pushes on this stream from now on."""
        if self._upstream is not None and self._upstream is not stream:
            self._upstream.reset()
        self._upstream = stream

    def detached(self, stream: Stream) -> None:
        """It does so no more."""
        if self._upstream is stream:
            self._upstream = None

    async def _expire(self, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(self._grace_s)
            self.free()

    # what comes

    async def hear(self, message: Message) -> None:
        """A message of the client. Raises `PROTOCOL_VIOLATION`."""
        if getattr(message, "session", None) != self.hop.opened.session:
            raise error(Code.PROTOCOL_VIOLATION, f"{message.KIND} of another session on this stream")
        match message:
            case Step():
                problem = await self.take(message, None)
                if problem is not None:
                    self.say(problem)
            case LinkHop():
                self._link(message)
            case Where():
                self.say(self.hop.where(message))
            case Replay():
                self._replay(message)
            case KeepPages():
                self._keep_pages(message)

    def _keep_pages(self, message: KeepPages) -> None:
        """Late, or early, it is let be: row numbers would mean other rows."""
        if self._jobs or not self._has_cache or not self.hop.stands_after(message.epoch, message.step_id):
            return
        rows = tuple(self._prefix.own(row.names) for row in message.rows)
        self._prefix.keep(self.hop.history, rows)
        named = tuple(Chain(names) for names in rows)
        self.worker.tell(NamePages(self._cache_id, message.step_id, named))

    async def take(self, step: Step, sender: Hop | None) -> Failure | None:
        """A step came, from the client (sender None) or from another hop; gives the answer to a stale one."""
        while self._is_full(may_read_ahead=sender is None) and not self.is_freed:
            await self._room.park()
        try:
            verdict = self.hop.judge(step, sender, trio.current_time())
        except CorollaError as problem:
            self._fail(problem, step)
            return None
        if verdict is Verdict.TAKE:
            self._submit(step)
        elif verdict is Verdict.REPEAT and self.hop.last_sent is not None:
            if not self._jobs:  # else it is on its way
                self._jobs.append(_Sending(iter((self.hop.last_sent,))))
                self._stir()
        elif verdict is Verdict.STALE:
            epoch = self.hop.epoch
            said = f"step {step.step_id} of epoch {step.epoch}, this hop is at {epoch}"
            return Failure.of(
                step.session, step.epoch, error(Code.STALE_EPOCH, said, epoch=epoch), step.step_id
            )
        return None

    def _is_full(self, *, may_read_ahead: bool) -> bool:
        count = len(self._jobs)
        if may_read_ahead and self._num_bytes < min(MAX_AHEAD_BYTES, self.hop.promised_bytes):
            return count >= MAX_AHEAD
        return count >= MAX_UNDER_WAY

    def _submit(self, step: Step) -> None:
        pending = self.worker.submit(
            Compute(
                0,
                self._cache_id,
                step.step_id,
                step.committed,
                step.rows,
                self.hop.wanted(step),
                step.payload,
            )
        )
        self._jobs.append(_Job(step, pending))
        self._num_bytes += len(step.payload)
        pending.when_done(self._stir)
        self._on_busy(self)

    def _stir(self) -> None:
        self._stirred.unpark_all()

    def tick(self) -> None:
        """Tell the client of steps that take long."""
        for receipt in self.hop.receipts(trio.current_time(), self.worker.progress):
            self.say(receipt)

    # what goes

    async def _pass_on(self) -> None:
        """Send on what the worker gives, in order."""
        while True:
            match self._jobs[0] if self._jobs else None:
                case _Job() as job if job.pending.is_done:
                    await self._finish(job)
                case _Sending() as sending:
                    for message in sending.messages:
                        if not self._is_next(sending) or not await self._send(message):
                            break
                    self._done_with(sending)
                case _:
                    await self._stirred.park()

    async def _finish(self, job: _Job) -> None:
        step = job.step
        try:
            message = self.hop.computed(step, cast(Done, job.pending.result()).payload)
        except CorollaError as problem:
            self._fail(problem, step)
            return
        self._prefix.note(self.hop.history, step.rows)
        opened = self.hop.opened
        self._on_work(sum(row.n for row in step.rows), opened.end - opened.start)
        self.hop.sending(step)
        if message is None or await self._send(message):
            receipt = self.hop.sent(step)
            if receipt is not None:
                self.say(receipt)
        self._done_with(job)

    def _is_next(self, job: _Job | _Sending) -> bool:
        """Whether no new link has come over it."""
        return bool(self._jobs) and self._jobs[0] is job

    def _done_with(self, job: _Job | _Sending) -> None:
        if self._is_next(job):
            self._jobs.popleft()
            if isinstance(job, _Job):
                self._num_bytes -= len(job.step.payload)
            self._room.unpark_all()

    async def _send(self, message: Message) -> bool:
        """A step goes downstream, anything else to the client. False if the link has failed."""
        if isinstance(message, Step) and not self._relays_to:
            if self._push is None:
                return False
            try:
                await self._push.say(message)
            except CorollaError as problem:
                _log.debug("push_failed", reason=problem.message)  # the link's task hears it too, and tells
                return False
        else:
            self.say(message)
            if self._line is not None:
                await self._line.wait_room()
        return True

    def _replay(self, message: Replay) -> None:
        if any(isinstance(job, _Sending) for job in self._jobs):
            raise error(Code.PROTOCOL_VIOLATION, f"{self.hop.client} asked for two replays in one wiring")
        try:
            self._jobs.append(_Sending(self.hop.replayed(message)))
        except CorollaError as problem:
            self.say(Failure.of(message.session, message.epoch, problem))
        self._stir()

    def _fail(self, problem: CorollaError, step: Step | None = None, about: Hop | None = None) -> None:
        """Tell the client, once a link; nothing counts any more until it links anew."""
        if self.hop.is_broken:
            return
        if problem.code is Code.UNKNOWN_SESSION:
            self._has_cache = False
        if problem.details.get("not_finite") == "output":
            problem = error(Code.BAD_ANSWER, problem.message)  # our own values, and nobody else's fault
        about = about or self.hop.accused(problem)
        self._forget_jobs()
        self.hop.break_link()
        step_id = step.step_id if step is not None else 0
        self.say(Failure.of(self.hop.opened.session, self.hop.epoch, problem, step_id, about))

    def _forget_jobs(self) -> None:
        """The worker may still answer some of them, to nobody."""
        jobs, self._jobs, self._num_bytes = self._jobs, deque(), 0
        for job in jobs:
            if isinstance(job, _Job):
                self.worker.abandon(job.pending)
        self._room.unpark_all()

    # the wiring

    def _link(self, message: LinkHop) -> None:
        try:
            base_step = self.hop.link(message)
        except CorollaError as problem:
            self.say(Failure.of(message.session, message.epoch, problem))
            return
        self._linking.cancel()
        self._forget_jobs()
        self._relays_to = message.relays_to
        if self._push is not None:
            self._push.reset()  # also lets go whoever sends on it
            self._push = None
        # The worker is asked now, so that no step of the new wiring can come before this.
        asked = (
            self.worker.submit(Restore(0, self._cache_id, base_step, message.lengths))
            if self._has_cache
            else self._open_cache()
        )
        self.wired.unpark_all()
        self._linking = trio.CancelScope()
        self._start(self._keep_link, message, asked, self._linking)

    async def _keep_link(self, message: LinkHop, asked: Pending, scope: trio.CancelScope) -> None:
        """Make the link, say so, and watch it until it fails or another takes its place."""
        push: Push | None = None
        with scope:
            try:
                if message.downstream is not None and not message.relays_to:
                    push = await self._attach(message, message.downstream)
                held = await self._held(message, asked)
                if not self.hop.is_broken and not scope.cancel_called:
                    self._push = push
                    self.say(self.hop.linked(held))
                    if push is not None:
                        raise await push.wait_end()
            except CorollaError as problem:
                about = message.downstream if problem.code is Code.LINK_FAILED else None
                self._fail(problem, about=about)
            finally:
                if push is not None:
                    push.reset()
                    self._push = None if self._push is push else self._push

    async def _attach(self, message: LinkHop, target: Hop) -> Push:
        opened = self.hop.opened
        attach = Attach(message.session, self.hop.client, message.epoch, opened.worker, target.worker)
        return await Push.attach(self._network, target, attach)

    async def _held(self, message: LinkHop, asked: Pending) -> tuple[int, ...]:
        answer = await self._cache_answer(asked)
        held = answer.held if isinstance(answer, Restored) else (0,) * len(message.lengths)
        if len(held) != len(message.lengths):
            raise error(Code.INTERNAL, f"the worker holds {len(held)} rows, expected {len(message.lengths)}")
        return held

    def _open_cache(self) -> Pending:
        o = self.hop.opened
        return self.worker.submit(
            OpenCache(
                0,
                self._cache_id,
                o.start,
                o.end,
                o.encoding,
                o.max_rows,
                o.max_tokens,
                o.parts,
                tuple(name for names in self._prefix.rows for name in names),
                tuple(map(len, self._prefix.rows)),
            )
        )

    async def _cache_answer(self, asked: Pending) -> Done | Restored:
        """The worker's word on our cache, which exists from then on. Raises what it refuses with, `TIMEOUT`."""
        with trio.move_on_after(CACHE_TIMEOUT_S):
            answer = cast(Done | Restored, await asked.answer())
            self._has_cache = True
            return answer
        raise error(Code.TIMEOUT, f"the worker did not answer in {CACHE_TIMEOUT_S:g} s", "use another peer")

    def _start(self, task: Callable[..., object], *arguments: object) -> None:
        nursery = self._nursery
        # A nursery that was cancelled, as all are when the daemon stops, may be closed to newcomers already.
        if nursery is not None and not self.is_freed and not nursery.cancel_scope.cancel_called:
            nursery.start_soon(task, *arguments)  # type: ignore[arg-type]
