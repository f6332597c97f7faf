"""Worker processes: started, watched, restarted.

A `Worker` owns one process at a time, the socket to it, and the requests under way on it. When the process
dies, hangs or is told to go, everything under way fails with `WORKER_LOST`, listeners hear of it, and unless
the reason is permanent (no such model, no room) a new process is started, later with each failure in a row.
It computes nothing, and knows sessions only as bytes that pass.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Final

import structlog
import trio

from ...protocol.control import WorkerStatus
from ...protocol.errors import Code, CorollaError, error
from ...protocol.framing import FrameParser
from ...protocol.limits import MAX_LOCAL_HEADER_BYTES, MAX_LOCAL_PAYLOAD_BYTES
from ...protocol.messages import Message, encode
from ...protocol.work import (
    FROM_WORKER,
    Beat,
    Begun,
    Configure,
    Done,
    Failed,
    Loading,
    Ready,
    Restored,
    Sampled,
)
from .port import ANSWERS, Notice, Pending, Request

SILENCE_S: Final = 30.0  # without a beat, or without progress while requests wait; then the process is killed
BACKOFF_S: Final = (0.2, 1.0, 5.0, 15.0, 60.0)  # before each restart in a row
STEADY_S: Final = 120.0  # a process that lived so long starts the row anew
GOODBYE_S: Final = 3.0  # between closing the socket and killing the process
_READ_BYTES: Final = 1 << 18
_MAX_LINE: Final = 2000

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
    return [sys.executable, "-m", "corolla.model", "--fd", str(descriptor)]


class Worker:
    """One supervised worker; see `port.WorkerPort`. `run` is its life.

    model: what people call the model while it is not loaded yet. command: for tests with other programs.
    """

    def __init__(
        self,
        number: int,
        configure: Configure,
        *,
        model: str = "",
        command: Callable[[int], list[str]] = worker_command,
    ) -> None:
        self.number = number
        self.configure = configure
        self.state = WorkerState.LOADING
        self.problem: CorollaError | None = None
        self.restarts = 0
        self._model = model or configure.source.location
        self._command = command
        self._ready: Ready | None = None
        self._loading: Loading | None = None
        self._beat: Beat | None = None
        self._heard_at = 0.0  # the last beat, and the last one that told of progress
        self._progressed_at = 0.0
        self._pending: dict[int, Pending] = {}
        self._next_request = 0
        self._outbox: deque[bytes] = deque()
        self._has_mail = trio.Event()
        self._changed = trio.Event()
        self._lost: list[Callable[[], None]] = []
        self._change: list[Callable[[], None]] = []
        self._scope = trio.CancelScope()

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
        if not self._pending:
            self._progressed_at = trio.current_time()
        self._pending[pending.request] = pending
        self._post(replace(request, request=pending.request))
        return pending

    def abandon(self, pending: Pending) -> None:
        self._pending.pop(pending.request, None)
        pending.fail(error(Code.STALE_EPOCH, "nobody wants this step any more"))

    def tell(self, notice: Notice) -> None:
        if self.state is WorkerState.ONLINE:
            self._post(notice)

    def on_lost(self, listener: Callable[[], None]) -> None:
        self._lost.append(listener)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call back when the state changes."""
        self._change.append(listener)

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
            progress=1.0 if ready is not None else (loading.done_bytes / total if loading and total else 0.0),
            error=self.problem.to_wire() if self.problem is not None else None,
        )

    # its life

    async def run(self) -> None:
        """Keep a process running until `stop` or a permanent failure."""
        failures = 0
        with self._scope:
            while True:
                began = trio.current_time()
                problem = await self._live()
                if problem.code in _PERMANENT:
                    _log.error("worker_failed", worker=self.number, problem=str(problem))
                    self._enter(WorkerState.FAILED, problem)
                    return
                failures = 1 if trio.current_time() - began > STEADY_S else failures + 1
                pause_s = BACKOFF_S[min(failures, len(BACKOFF_S)) - 1]
                _log.warning("worker_lost", worker=self.number, problem=str(problem), restart_in_s=pause_s)
                self._enter(WorkerState.LOADING, problem)
                await trio.sleep(pause_s)
                self.restarts += 1
        self._enter(WorkerState.STOPPED, None)

    def stop(self) -> None:
        """End the process and `run`."""
        self._scope.cancel()

    async def _live(self) -> CorollaError:
        """One process, from its start to its end; gives the reason of the end."""
        ours, theirs = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        with theirs:
            process = await trio.lowlevel.open_process(
                self._command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._outbox.clear()
        self._has_mail = trio.Event()
        self._post(self.configure)
        self._heard_at = self._progressed_at = trio.current_time()
        problem = error(Code.WORKER_LOST, f"worker {self.number} ended")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._log_lines, process)
                nursery.start_soon(self._write, stream)
                nursery.start_soon(self._watch, process)
                problem = await self._read(stream)
                nursery.cancel_scope.cancel()
        finally:
            self._lose(problem)
            with trio.CancelScope(shield=True):
                await stream.aclose()
                await _end(process)
        if problem.code is Code.WORKER_LOST and process.returncode:
            problem = error(Code.WORKER_LOST, f"{problem.message} with {_describe_exit(process.returncode)}")
        return problem

    async def _read(self, stream: trio.SocketStream) -> CorollaError:
        parser = FrameParser(
            max_header_bytes=MAX_LOCAL_HEADER_BYTES, max_payload_bytes=MAX_LOCAL_PAYLOAD_BYTES
        )
        while True:
            try:
                data = await stream.receive_some(_READ_BYTES)
                if not data:
                    return error(Code.WORKER_LOST, f"worker {self.number} ended")
                parser.feed(bytes(data))
                for frame in parser.frames():
                    message = FROM_WORKER.decode(frame)
                    if isinstance(message, Failed) and message.request == 0:
                        return message.problem()
                    self._hear(message)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return error(Code.WORKER_LOST, f"worker {self.number} broke its connection")
            except CorollaError as problem:
                return error(Code.WORKER_LOST, f"worker {self.number} said what we cannot read: {problem}")

    def _hear(self, message: Message) -> None:
        match message:
            case Done() | Restored() | Begun() | Sampled():
                if (pending := self._pending.pop(message.request, None)) is not None:
                    self._progressed_at = trio.current_time()
                    pending.resolve(message)
            case Failed():
                if (pending := self._pending.pop(message.request, None)) is not None:
                    self._progressed_at = trio.current_time()
                    pending.fail(message.problem())
            case Beat():
                self._heard_at = trio.current_time()
                if self._beat is None or message.progress != self._beat.progress:
                    self._progressed_at = self._heard_at
                self._beat = message
            case Loading():
                self._loading = message
                self._heard_at = self._progressed_at = trio.current_time()
            case Ready():
                self._ready = message
                self._heard_at = self._progressed_at = trio.current_time()
                self._enter(WorkerState.ONLINE, None)
                _log.info(
                    "worker_ready",
                    worker=self.number,
                    model=message.facts.name,
                    start=message.start,
                    end=message.end,
                )

    async def _write(self, stream: trio.SocketStream) -> None:
        while True:
            while self._outbox:
                try:
                    await stream.send_all(self._outbox.popleft())
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return  # the reader sees the same end, and says so
            self._has_mail = trio.Event()
            await self._has_mail.wait()

    async def _watch(self, process: trio.Process) -> None:
        """Kill a process that hangs; the reader then sees its end."""
        while True:
            now = trio.current_time()
            heard = self._heard_at
            if self._pending:
                heard = min(heard, self._progressed_at)
            if self.state is WorkerState.ONLINE and now - heard > SILENCE_S:
                _log.error("worker_hangs", worker=self.number, silent_s=round(now - heard))
                process.kill()
                return
            await trio.sleep(1.0)

    async def _log_lines(self, process: trio.Process) -> None:
        stderr = process.stderr
        if stderr is None:
            return
        rest = b""
        async for data in stderr:
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-_MAX_LINE:]
            for line in lines:
                text = line[:_MAX_LINE].decode("utf-8", "replace").rstrip()
                if text:
                    _log.info("worker_says", worker=self.number, line=text)

    # bookkeeping

    def _post(self, message: Message) -> None:
        self._outbox.append(encode(message))
        self._has_mail.set()

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


async def _end(process: trio.Process) -> None:
    """Wait for a process whose socket is closed, and kill it when it stays."""
    with trio.move_on_after(GOODBYE_S):
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


def _describe_exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
