"""One session that this daemon serves: its streams, its steps under way, and the tasks that wait for them.

Steps are handed to the worker as they come, so that several are under way; one task waits for them in order.
What counts and what becomes of an output, `hop.HopSession` decides.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, cast

import structlog
import trio
from anyio.abc import TaskStatus

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import MAX_STEPS_IN_FLIGHT, WORKING_EVERY_S
from ...protocol.messages import Message, encode
from ...protocol.steps import (
    Attach,
    Failure,
    Hop,
    LinkHop,
    Receipt,
    Replay,
    Stage,
    Step,
    Where,
)
from ...protocol.work import CloseCache, Compute, Done, OpenCache, Restore, Restored
from ..network.conversation import Conversation
from ..network.seam import Network, Stream
from .hop import HopSession, Verdict
from .port import Answer, Pending, WorkerPort
from .push import Push

MAX_UNDER_WAY: Final = 2 * MAX_STEPS_IN_FLIGHT  # of one session, replays too; more wait in the stream
RECEIPT_AFTER_S: Final = 0.1  # a step that is done sooner needs no receipt

_log = structlog.get_logger("corolla.peers")


class Served:
    """One session on one worker. `run` is its life, `free` its end."""

    def __init__(self, network: Network, worker: WorkerPort, hop: HopSession) -> None:
        self.worker: Final = worker
        self.hop: Final = hop
        self.stream: Stream | None = None  # of the client, while it is there
        self.wired = trio.Event()  # a new link came; replaced with each
        self.expires_at = math.inf
        self.is_freed = False
        self._network = network
        self._push: Push | None = None
        self._has_cache = False
        self._under_way: deque[tuple[Step, Pending]] = deque()
        self._has_work = trio.Event()
        self._has_room = trio.Event()
        self._saying = trio.Lock()
        self._linking = trio.CancelScope()
        self._nursery: trio.Nursery | None = None

    @property
    def has_push(self) -> bool:
        """Whether a push stream to the next hop is open."""
        return self._push is not None

    # its life

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wait for the steps under way, in order, and send on what they give."""
        async with trio.open_nursery() as self._nursery:
            if self.is_freed:
                return
            task_status.started()
            while True:
                while self._under_way:
                    step, pending = self._under_way[0]
                    await self._finish(step, pending)
                    if self._under_way and self._under_way[0][1] is pending:
                        self._under_way.popleft()
                    self._has_room.set()
                self._has_work = trio.Event()
                await self._has_work.wait()

    def free(self) -> None:
        """Give everything back: the worker's cache, the history, the streams, the tasks."""
        if self.is_freed:
            return
        self.is_freed = True
        self._abandon()
        self.worker.tell(CloseCache(self.hop.opened.session))
        self.hop.history.clear()
        self._wake_attachers()
        if self._push is not None:
            self._push.reset()
            self._push = None
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def open_cache(self) -> None:
        """Reserve rows and tokens in the worker. Raises `BUSY`, `TOO_LONG`, `WORKER_LOST`."""
        o = self.hop.opened
        request = OpenCache(0, o.session, o.start, o.end, o.encoding, o.max_rows, o.max_tokens)
        await self.worker.submit(request).answer()
        self._has_cache = True

    def worker_lost(self) -> None:
        """The caches are gone; the client will link anew, or go elsewhere."""
        self._has_cache = False
        self._abandon()
        problem = error(Code.WORKER_LOST, "the worker ended")
        self._start(self.say, Failure.of(self.hop.opened.session, self.hop.epoch, problem))

    # what comes

    async def hear(self, message: Message) -> None:
        """A message of the client."""
        if getattr(message, "session", None) != self.hop.opened.session:
            raise error(Code.PROTOCOL_VIOLATION, f"{message.KIND} of another session on this stream")
        match message:
            case Step():
                await self.take(message, None, None)
            case LinkHop():
                await self._link(message)
            case Where():
                await self.say(self.hop.where(message))
            case Replay():
                self._start(self._replay, message)

    async def take(self, step: Step, sender: Hop | None, talk: Conversation | None) -> None:
        """A step came, from the client (sender None) or on a push stream (`talk`)."""
        while len(self._under_way) >= MAX_UNDER_WAY:
            self._has_room = trio.Event()
            await self._has_room.wait()
        verdict = self.hop.judge(step, sender)
        if verdict is Verdict.TAKE:
            request = Compute(
                0, step.session, step.step_id, step.committed, step.rows, self.hop.wanted(step), step.payload
            )
            self._under_way.append((step, self.worker.submit(request)))
            self._has_work.set()
        elif verdict is Verdict.REPEAT and self.hop.last_sent is not None:
            await self._send(self.hop.last_sent)
        elif verdict is Verdict.STALE:
            epoch = self.hop.epoch
            said = f"step {step.step_id} of epoch {step.epoch}, this hop is at {epoch}"
            problem = error(Code.STALE_EPOCH, said, epoch=epoch)
            failure = Failure.of(step.session, step.epoch, problem, step.step_id)
            await (self.say(failure) if talk is None else talk.say(failure))

    # steps under way

    async def _finish(self, step: Step, pending: Pending) -> None:
        try:
            answer = await self._answer(step, pending)
        except CorollaError as problem:
            if step.epoch == self.hop.epoch and problem.code not in (Code.STALE_EPOCH, Code.WORKER_LOST):
                await self._report(problem, step)
            return
        if step.epoch != self.hop.epoch:
            return
        message = self.hop.computed(step, cast(Done, answer).payload)
        if message is not None:
            await self._send(message)
        self.hop.sent(step)

    async def _answer(self, step: Step, pending: Pending) -> Answer:
        """The worker's answer, with receipts for the client while it takes long."""
        with trio.move_on_after(RECEIPT_AFTER_S):
            return await pending.answer()
        await self.say(Receipt(step.session, step.epoch, step.step_id, Stage.RECEIVED))
        progress = self.worker.progress
        while True:
            with trio.move_on_after(WORKING_EVERY_S):
                return await pending.answer()
            if self.worker.progress != progress:
                progress = self.worker.progress
                self.hop.working(step)
                await self.say(Receipt(step.session, step.epoch, step.step_id, Stage.WORKING))

    async def _report(self, problem: CorollaError, step: Step) -> None:
        if problem.details.get("not_finite") == "output":
            problem = error(Code.BAD_ANSWER, problem.message)  # our own values, and nobody else's fault
        about = self.hop.accused(problem)
        await self.say(Failure.of(step.session, step.epoch, problem, step.step_id, about))

    def _abandon(self) -> None:
        """Forget the steps under way; the worker may still answer some of them, to nobody."""
        under_way, self._under_way = self._under_way, deque()
        for _, pending in under_way:
            self.worker.abandon(pending)
        self._has_room.set()

    # the wiring

    async def _link(self, message: LinkHop) -> None:
        try:
            self.hop.link(message)
        except CorollaError as problem:
            await self.say(Failure.of(message.session, message.epoch, problem))
            return
        self._linking.cancel()
        self._abandon()
        restore = None
        if self._has_cache:  # handed over now, so that no step of the new wiring can come before it
            restore = self.worker.submit(Restore(0, message.session, message.base_step, message.lengths))
        self._wake_attachers()
        self._linking = trio.CancelScope()
        self._start(self._finish_link, message, restore, self._linking)

    async def _finish_link(self, message: LinkHop, restore: Pending | None, scope: trio.CancelScope) -> None:
        with scope:
            try:
                held = (0,) * len(message.lengths)
                if restore is None:
                    await self.open_cache()
                else:
                    held = cast(Restored, await restore.answer()).held
                await self._attach(message)
                await self.say(self.hop.linked(held))
            except CorollaError as problem:
                about = message.downstream if problem.code is Code.LINK_FAILED else None
                await self.say(Failure.of(message.session, message.epoch, problem, about=about))

    async def _attach(self, message: LinkHop) -> None:
        """Make a push stream to the downstream hop carry this epoch. Raises `LINK_FAILED`."""
        old, target = self._push, message.downstream
        if old is not None and old.target != target:
            self._push = None
            old.reset()
        if target is None:
            return
        attach = Attach(
            message.session, self.hop.client, message.epoch, self.hop.opened.worker, target.worker
        )
        try:
            if self._push is not None:
                try:
                    await self._push.attach(attach)
                    return
                except CorollaError:
                    self._push = None  # it may have broken with the last wiring; a new one may do
            push = await Push.open(self._network, target, self._push_ended)
            self._push = push
            self._start(push.hear)
            await push.attach(attach)
        except CorollaError as problem:
            raise error(Code.LINK_FAILED, f"no link to {target.peer}: {problem.message}") from problem

    def _push_ended(self, push: Push, reason: str) -> None:
        """The downstream hop is gone, noticed also while nothing is being sent."""
        if self._push is not push:
            return
        self._push = None
        problem = error(Code.LINK_FAILED, f"no link to {push.target.peer}: {reason}")
        failure = Failure.of(self.hop.opened.session, self.hop.epoch, problem, about=push.target)
        self._start(self.say, failure)

    def _wake_attachers(self) -> None:
        self.wired.set()
        self.wired = trio.Event()

    # what goes

    async def _replay(self, message: Replay) -> None:
        try:
            for step in self.hop.replayed(message):
                if message.epoch != self.hop.epoch:
                    return
                await self._send(step)
        except CorollaError as problem:
            await self.say(Failure.of(message.session, message.epoch, problem))

    async def _send(self, message: Message) -> None:
        """A step goes downstream, anything else to the client."""
        if not isinstance(message, Step):
            await self.say(message)
        elif self._push is not None:
            try:
                await self._push.say(message)
            except CorollaError as problem:
                _log.debug("push_failed", reason=problem.message)  # `_push_ended` has told the client

    async def say(self, message: Message) -> None:
        """Tell the client, if it is there; what it misses it asks again, or links anew."""
        stream = self.stream
        if stream is None:
            return
        try:
            async with self._saying:
                await stream.send(encode(message))
        except CorollaError as problem:
            _log.debug("client_gone", client=self.hop.client, reason=problem.message)
        except trio.Cancelled:
            stream.reset()  # a part of the message may have left
            raise

    def _start(self, task: object, *arguments: object) -> None:
        if self._nursery is not None and not self.is_freed:
            self._nursery.start_soon(task, *arguments)  # type: ignore[arg-type]
