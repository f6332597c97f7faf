"""A program of this machine that is asked what it knows of it, over and over, such as `nvidia-smi`.

It owns the process while it asks. Where nothing is answered nothing is known: the program may be missing, fail, or
hang. One that hangs in a driver cannot even be killed (proc(5), state D), so nobody waits for its end, and it is not
asked again before that.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

import structlog
import trio

ASK_TIMEOUT_S: Final = 10.0
END_TIMEOUT_S: Final = 1.0  # for a process that was killed; one that needs longer is stuck in a driver
MAX_ANSWER_BYTES: Final = 1 << 20  # thousands of processes on a GPU

_log = structlog.get_logger("corolla.tool")


class Tool:
    """One such program. command: with its arguments."""

    def __init__(self, *command: str, timeout_s: float = ASK_TIMEOUT_S) -> None:
        self._command: Sequence[str] = command
        self.timeout_s = timeout_s
        self._stuck: trio.Process | None = None

    async def ask(self) -> str | None:
        """What it says; None if it is not there, fails, hangs, or still hangs since it was asked before."""
        if self._stuck is not None and self._stuck.poll() is None:
            return None
        self._stuck = None
        if shutil.which(self._command[0]) is None:
            return None
        try:
            process = await trio.lowlevel.open_process(
                list(self._command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as problem:
            _log.debug("tool_failed", command=self._command[0], problem=str(problem))
            return None
        answer = bytearray()
        try:
            with trio.move_on_after(self.timeout_s):
                await self._hear(process, answer)
                await process.wait()
        finally:
            await self._end(process)
        return answer.decode(errors="replace") if process.returncode == 0 else None

    async def _hear(self, process: trio.Process, answer: bytearray) -> None:
        """All it says, which keeps it from waiting for us; what is too much is not kept."""
        if process.stdout is None:
            return
        async for data in process.stdout:
            if len(answer) < MAX_ANSWER_BYTES:
                answer += data

    async def _end(self, process: trio.Process) -> None:
        """Nothing is left of it, unless it is stuck."""
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
                with trio.move_on_after(END_TIMEOUT_S):
                    await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()
        if process.returncode is None:
            self._stuck = process
            _log.warning("tool_hangs", command=self._command[0], process=process.pid)
