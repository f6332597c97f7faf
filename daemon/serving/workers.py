"""Worker processes: started, watched, restarted.

A `Worker` owns one process at a time and the requests under way on it. When the process dies, hangs or is told
to go, everything under way fails with `WORKER_LOST`, listeners hear of it, and unless the reason is permanent
(no such model, no room) a new process is started, later with each failure in a row. It computes nothing, and
knows sessions only as bytes that pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

import structlog
import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.messages import Message
from ...protocol.views import WorkerStatus
from ...protocol.work import (
    Beat,
    Begun,
    Configure,
    Done,
    Failed,
    Gradients,
    Loading,
    Ready,
    Restored,
    Sampled,
)
from .port import ANSWERS, Notice, Pending, Request
from .priority import lower
from .process import WorkerProcess

SILENCE_S: Final = 30.0  # without a beat, or without progress; then the process is killed
LOADING_SILENCE_S: Final = 600.0  # the same while it loads: a hub or a disk may be slow
BACKOFF_S: Final = (0.2, 1.0, 5.0, 15.0, 60.0)  # before each restart in a row
STEADY_S: Final = 120.0  # a process that lived so long starts the row anew

# Not cured by another attempt with the same configuration.
_PERMANENT: Final = frozenset(
    {
        Code.UNKNOWN_MODEL,
        Code.UNSUPPORTED_FAMILY,
        Code.GATED_MODEL,
        Code.BLOCKS_OUT_OF_RANGE,
        Code.DOES_NOT_FIT,
        Code.UNREADABLE,
        Code.DISK_FULL,
        Code.DAMAGED_WEIGHTS,
        Code.BAD_REQUEST,
        Code.BAD_CONFIG,
        Code.BAD_DTYPE,
    }
)

_log = structlog.get_logger("corolla.workers")


class WorkerState(StrEnum):
    """What a worker is doing."""

    LOADING = "loading"
    ONLINE = "online"
    FAILED = "failed"  # for good, until it is configured anew
    STOPPED = "stopped"


def worker_command(descriptor: int) -> list[str]:
    """How the worker program is started on an inherited socket."""
    return [sys.executable, "-P", "-m", "corolla.model", "--fd", str(descriptor)]


class Worker:
    """One supervised worker; see `port.WorkerPort`. `run` is its life.

    model: what people call the model while it is not loaded yet. command: its command line, for the number of
    the socket that it inherits. is_polite: whether it stands behind other programs. silence_s, backoff_s: as the
    constants say.
    """

    def __init__(
        self,
        number: int,
        configure: Configure,
        *,
        model: str = "",
        command: Callable[[int], Sequence[str]] = worker_command,
        is_polite: bool = False,
        silence_s: float = SILENCE_S,
        backoff_s: Sequence[float] = BACKOFF_S,
    ) -> None:
        self.number = number
        self.configure = configure
        self.state = WorkerState.LOADING
        self.problem: CorollaError | None = None
        self.restarts = 0
        self._model = model or configure.source.location
        self._command = command
        self.is_polite: Final = is_polite
        self._silence_s = silence_s
        self._backoff_s = backoff_s
        self._ready: Ready | None = None
        self._device = ""  # on which it served last
        self._loading: Loading | None = None
        self._beat: Beat | None = None
        self._heard_at = 0.0  # the last beat, and the last one that told of progress
        self._progressed_at = 0.0
        self._pending: dict[int, Pending] = {}
        self._next_request = 0
        self._process: WorkerProcess | None = None
        self._stuck: WorkerProcess | None = None  # one that is still there, though killed
        self._failures = 0  # in a row
        self._changed = trio.Event()
        self._lost: list[Callable[[], None]] = []
        self._change: list[Callable[[], None]] = []
        self._scope = trio.CancelScope()
        self._refusal: CorollaError | None = None

    # the port

    @property
    def ready(self) -> Ready | None:
        return self._ready if self.state is WorkerState.ONLINE else None

    @property
    def progress(self) -> int:
        return self._beat.progress if self._beat is not None else 0

    @property
    def queue(self) -> int:
        return len(self._pending)

    def submit(self, request: Request) -> Pending:
        self._next_request += 1
        pending = Pending(self._next_request, ANSWERS[type(request)])
        if self.state is not WorkerState.ONLINE:
            pending.fail(self._not_online())
            return pending
        self._pending[pending.request] = pending
        self._send(replace(request, request=pending.request))
        return pending

    def abandon(self, pending: Pending) -> None:
        self._pending.pop(pending.request, None)
        pending.fail(error(Code.STALE_EPOCH, "nobody wants this step any more"))

    def tell(self, notice: Notice) -> None:
        if self.state is WorkerState.ONLINE:
            self._send(notice)

    def on_lost(self, listener: Callable[[], None]) -> Callable[[], None]:
        self._lost.append(listener)
        return lambda: self._lost.remove(listener)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call back when the state changes."""
        self._change.append(listener)

    @property
    def process(self) -> int | None:
        """The process id, while there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def is_back_soon(self) -> bool:
        """May one count on its serving before long? Not when it fails again and again, or its device is lost."""
        if self.state is WorkerState.LOADING and self.problem is not None:
            return self._failures <= 1 and self.problem.code is not Code.DEVICE_LOST
        return self.state in (WorkerState.LOADING, WorkerState.ONLINE)

    @property
    def loading(self) -> Loading | None:
        """How far it is with loading."""
        return self._loading

    async def wait_ready(self) -> Ready:
        """What it serves, once it does. Raises what keeps it from ever serving."""
        while (ready := self.ready) is None:
            if self.state in (WorkerState.FAILED, WorkerState.STOPPED):
                raise self._not_online()
            await self._changed.wait()
        return ready

    async def wait_stopped(self) -> None:
        """Wait until its process has ended for good, and with it whatever it held."""
        while self.state not in (WorkerState.FAILED, WorkerState.STOPPED):
            await self._changed.wait()

    def status(self) -> WorkerStatus:
        """For people."""
        ready, beat, loading = self._ready, self._beat, self._loading
        total = loading.total_bytes if loading is not None else 0
        return WorkerStatus(
            worker=self.number,
            state=self.state.value,
            model=ready.facts.name if ready is not None else self._model,
            start=ready.start if ready is not None else self.configure.start,
            end=ready.end if ready is not None else max(0, self.configure.end),
            dtype=ready.dtype if ready is not None else self.configure.dtype,
            quantization=ready.quantization if ready is not None else self.configure.quantization,
            device=ready.device if ready is not None else self.configure.device,
            ends=self.configure.ends,
            queue=len(self._pending),
            tokens_per_s=ready.decode_tokens_per_s if ready is not None else 0.0,
            cache_tokens=ready.cache_tokens if ready is not None else 0,
            free_tokens=beat.free_tokens if beat is not None else (ready.cache_tokens if ready else 0),
            weight_bytes=ready.weight_bytes if ready is not None else 0,
            restarts=self.restarts,
            stage=loading.stage if loading is not None and ready is None else "",
            progress=1.0 if ready is not None else (loading.done_bytes / total if loading and total else 0.0),
            error=self.problem.to_wire() if self.problem is not None else None,
            now_tokens_per_s=beat.tokens_per_s if beat is not None else 0.0,
            loaded_tokens_per_s=ready.loaded_tokens_per_s if ready is not None else 0.0,
            prefill_tokens_per_s=ready.prefill_tokens_per_s if ready is not None else 0.0,
            launches_per_s=ready.launches_per_s if ready is not None else 0.0,
        )

    # its life

    async def run(self) -> None:
        """Keep a process running until `stop` or a permanent failure."""
        with self._scope:
            while True:
                began = trio.current_time()
                problem = await self._live()
                if self._is_permanent(problem):
                    _log.error("worker_failed", worker=self.number, problem=str(problem))
                    self._enter(WorkerState.FAILED, problem)
                    return
                self._failures = 1 if trio.current_time() - began > STEADY_S else self._failures + 1
                pause_s = self._backoff_s[min(self._failures, len(self._backoff_s)) - 1]
                _log.warning("worker_lost", worker=self.number, problem=str(problem), restart_in_s=pause_s)
                self._enter(WorkerState.LOADING, problem)
                await trio.sleep(pause_s)
                if self._stuck is not None:  # another one would only hang on the same driver
                    await self._stuck.wait_ended()
                    self._stuck = None
                self.restarts += 1
        self._enter(WorkerState.FAILED if self._refusal else WorkerState.STOPPED, self._refusal)

    def _is_permanent(self, problem: CorollaError) -> bool:
        """Would another attempt be in vain? A device that was there may come back, with another driver say."""
        if problem.code is Code.DEVICE_LOST:
            return not self._device
        return problem.code in _PERMANENT

    def _asked(self) -> Configure:
        """What the process is to be. One that served on a GPU waits for that, rather than to be a slow one."""
        if self.configure.device == "auto" and self._device.startswith("cuda"):
            return replace(self.configure, device=self._device)
        return self.configure

    def stop(self) -> None:
        """End the process and `run`."""
        self._scope.cancel()

    def refuse(self, problem: CorollaError) -> None:
        """End it for good, and say why: its owner does not want what it serves."""
        self._refusal = problem
        self._scope.cancel()

    async def _live(self) -> CorollaError:
        """One process, from its start to its end; gives the reason of the end."""
        problem = error(Code.WORKER_LOST, f"worker {self.number} was stopped")
        self._heard_at = self._progressed_at = trio.current_time()
        try:
            self._process = await WorkerProcess.start(f"worker {self.number}", self._command)
            if self.is_polite:
                lower(self._process.pid)
            self._process.send(self._asked())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, self._process)
                problem = await self._process.run(self._hear)
                nursery.cancel_scope.cancel()
        except CorollaError as reason:
            problem = reason
        finally:
            if self._process is not None and self._process.is_stuck:
                self._stuck = self._process
            self._process = None
            self._lose(problem)
        return problem

    def _hear(self, message: Message) -> CorollaError | None:
        """Take what the process says; gives the reason, if that is its end."""
        now = trio.current_time()
        match message:
            case Done() | Restored() | Begun() | Sampled() | Gradients():
                pending = self._pending.pop(message.request, None)
                if pending is not None and not isinstance(message, pending.expects):
                    pending.fail(error(Code.INTERNAL, f"a worker answered with {message.KIND!r}"))
                elif pending is not None:
                    pending.resolve(message)
            case Failed(request=0):
                return message.problem()
            case Failed():
                if (pending := self._pending.pop(message.request, None)) is not None:
                    pending.fail(message.problem())
            case Beat():
                self._heard_at = now
                if self._beat is None or message.progress != self._beat.progress:
                    self._progressed_at = now
                self._beat = message
            case Loading():
                self._loading = message
                self._heard_at = self._progressed_at = now
            case Ready():
                self._ready = message
                self._device = message.device
                self._heard_at = self._progressed_at = now
                self._enter(WorkerState.ONLINE, None)
                _log.info(
                    "worker_ready",
                    worker=self.number,
                    model=message.facts.name,
                    start=message.start,
                    end=message.end,
                )
        return None

    async def _watch(self, process: WorkerProcess) -> None:
        """Kill a process that hangs.

        An idle worker's progress grows too, so that one that hangs on what nobody waits for any more shows.
        """
        while True:
            silent_s = trio.current_time() - min(self._heard_at, self._progressed_at)
            if silent_s > (self._silence_s if self.state is WorkerState.ONLINE else LOADING_SILENCE_S):
                _log.error("worker_hangs", worker=self.number, silent_s=round(silent_s))
                words = f"worker {self.number} hung for {silent_s:.0f} s and was killed"
                process.kill(error(Code.WORKER_LOST, words))
                return
            await trio.sleep(min(1.0, self._silence_s))

    # bookkeeping

    def _send(self, message: Message) -> None:
        if self._process is not None:
            self._process.send(message)

    def _lose(self, problem: CorollaError) -> None:
        was_online = self._ready is not None
        if self.state is WorkerState.ONLINE:
            self.state = WorkerState.LOADING
        self._ready = self._beat = self._loading = None
        pending, self._pending = self._pending, {}
        for request in pending.values():
            request.fail(error(Code.WORKER_LOST, problem.message))
        if was_online:
            for listener in tuple(self._lost):
                listener()

    def _enter(self, state: WorkerState, problem: CorollaError | None) -> None:
        self.state = state
        self.problem = problem
        self._changed.set()
        self._changed = trio.Event()
        for listener in tuple(self._change):
            listener()

    def _not_online(self) -> CorollaError:
        if self.problem is not None and self.state is WorkerState.FAILED:
            return error(self.problem.code, self.problem.message, self.problem.remedy, **self.problem.details)
        return error(Code.WORKER_LOST, f"worker {self.number} is {self.state.value}")
