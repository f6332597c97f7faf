"""One worker process: started on a socket pair, spoken with, heard, ended.

It owns the process and the socket. It knows the form of messages, not what they are about. Small messages go
out in the task that says them, since every task in between costs a decode step time; what the socket does not
take at once is written by a task.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.framing import FrameParser
from ...protocol.limits import MAX_LOCAL_HEADER_BYTES, MAX_LOCAL_PAYLOAD_BYTES
from ...protocol.messages import Message, encode
from ...protocol.work import FROM_WORKER

GOODBYE_S: Final = 3.0  # between closing the socket and killing the process
KILLED_S: Final = 5.0  # between killing it and its end; what a driver holds (proc(5), state D) may never end
_READ_BYTES: Final = 1 << 18
_SOCKET_BYTES: Final = 1 << 20  # asked of the kernel, which may give less: a step of many tokens in one go
_MAX_LINE: Final = 2000
_MAX_LINES_PER_S: Final = 100  # a worker that floods its log must not flood ours

_log = structlog.get_logger("corolla.workers")


class WorkerProcess:
    """Made by `start`; `run` hears it to its end, and leaves nothing of it behind."""

    def __init__(self, name: str, process: trio.Process, ours: socket.socket) -> None:
        self.last_words = ""  # on stderr, for the reason of its end
        self._name = name
        self._process = process
        self._socket = ours
        self._outbox: deque[memoryview] = deque()
        self._has_mail = trio.lowlevel.ParkingLot()
        self._is_broken = False
        self._why_killed: CorollaError | None = None
        self._killed = trio.CancelScope()

    @classmethod
    async def start(cls, name: str, command: Callable[[int], Sequence[str]]) -> WorkerProcess:
        """A running process. command: its command line for the number of the socket that it inherits.

        Raises `WORKER_LOST` if it cannot be started.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                for end in (ours, theirs):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
                ours.setblocking(False)
                process = await trio.lowlevel.open_process(
                    command(theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # Ctrl-C is the daemon's affair
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
        except OSError as problem:
            ours.close()
            raise error(Code.WORKER_LOST, f"{name} cannot be started: {problem}") from problem
        except BaseException:
            ours.close()
            raise
        return cls(name, process, ours)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, message: Message) -> None:
        """Say something, after all that was said before. A process that is gone does not hear it."""
        rest = memoryview(encode(message))
        if not self._outbox and not self._is_broken:
            rest = rest[self._write_some(rest) :]
        if rest and not self._is_broken:
            self._outbox.append(rest)
            self._has_mail.unpark_all()

    @property
    def is_stuck(self) -> bool:
        """After `run`: has it not ended, though it was killed?"""
        return self._process.returncode is None

    async def wait_ended(self) -> None:
        """Wait for the end of one that is stuck."""
        await self._process.wait()

    def kill(self, why: CorollaError) -> None:
        """End it now; `run` then gives this reason."""
        self._why_killed = why
        self._process.kill()
        self._killed.cancel()

    async def run(self, hear: Callable[[Message], CorollaError | None]) -> CorollaError:
        """Hear it until it ends, or until `hear` gives a reason to end it; gives the reason."""
        problem = error(Code.WORKER_LOST, f"{self._name} was stopped")
        try:
            with self._killed:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._log_lines)
                    nursery.start_soon(self._write)
                    problem = await self._read(hear)
                    nursery.cancel_scope.cancel()
        finally:
            self._is_broken = True
            self._outbox.clear()
            with trio.CancelScope(shield=True):
                trio.lowlevel.notify_closing(self._socket.fileno())
                self._socket.close()
                await self._end()
        if self.is_stuck:
            return error(
                Code.DEVICE_LOST,
                f"process {self.pid} of {self._name} does not end, though it was killed: its device's driver hangs",
                "see what the driver says (dmesg); this machine may have to be started again",
            )
        if self._why_killed is not None:
            return self._why_killed
        if problem.code is Code.WORKER_LOST and self._process.returncode:
            return self._explained(problem)
        return problem

    # in and out

    async def _read(self, hear: Callable[[Message], CorollaError | None]) -> CorollaError:
        parser = FrameParser(
            max_header_bytes=MAX_LOCAL_HEADER_BYTES, max_payload_bytes=MAX_LOCAL_PAYLOAD_BYTES
        )
        while True:
            await trio.lowlevel.wait_readable(self._socket.fileno())
            try:
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    return error(Code.WORKER_LOST, f"{self._name} ended")
                parser.feed(data)
                for frame in parser.frames():
                    problem = hear(FROM_WORKER.decode(frame))
                    if problem is not None:
                        return problem
            except BlockingIOError:
                continue
            except OSError:  # it died with words of ours unread
                return error(Code.WORKER_LOST, f"{self._name} ended")
            except CorollaError as problem:
                return error(Code.WORKER_LOST, f"{self._name} said what we cannot read: {problem}")

    async def _write(self) -> None:
        while not self._is_broken:
            if not self._outbox:
                await self._has_mail.park()
                continue
            await trio.lowlevel.wait_writable(self._socket.fileno())
            sent = self._write_some(self._outbox[0])
            if sent == len(self._outbox[0]):
                self._outbox.popleft()
            else:
                self._outbox[0] = self._outbox[0][sent:]

    def _write_some(self, data: memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # the reader sees the same end, and says so
            self._is_broken = True
            return 0

    async def _log_lines(self) -> None:
        stderr = self._process.stderr
        if stderr is None:
            return
        rest = b""
        window, num_lines = trio.current_time(), 0
        async for data in stderr:
            *lines, rest = (rest + bytes(data)).split(b"\n")
            rest = rest[-_MAX_LINE:]
            now = trio.current_time()
            if now - window >= 1.0:
                window, num_lines = now, 0
            for line in lines:
                text = line[:_MAX_LINE].decode("utf-8", "replace").rstrip()
                if text:
                    self.last_words = text
                    num_lines += 1
                    if num_lines <= _MAX_LINES_PER_S:
                        _log.info("worker_says", worker=self._name, line=text)

    # its end

    async def _end(self) -> None:
        """Wait for the process, whose socket is closed, and kill it when it stays; not longer than makes sense."""
        with trio.move_on_after(GOODBYE_S):
            await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            with trio.move_on_after(KILLED_S):
                await self._process.wait()
        if self._process.stderr is not None:
            await self._process.stderr.aclose()

    def _explained(self, problem: CorollaError) -> CorollaError:
        code = self._process.returncode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = f": {self.last_words}" if self.last_words and code > 0 else ""
        return error(Code.WORKER_LOST, f"{problem.message} with {how}{last}"[:_MAX_LINE])
