"""The interpreter that workers run in: this one if it has torch, else one of their own.

The package of Corolla carries no torch, since which build fits depends on the machine's device. Where it is
missing, the first worker's process is the installer, which becomes the worker when it is done; so installing
shows as loading does. The environment is locked to this version of Corolla and lies in the state folder.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import trio

from ... import __version__
from ...protocol.errors import Code, error

DONE: Final = "corolla-installed"  # the file that marks a whole environment
MAX_LINE_BYTES: Final = 2000  # of what the installer says
_NEEDED: Final = ("torch", "transformers", "safetensors")


class Environment:
    """Of the workers of one daemon. folder: of all versions' environments."""

    def __init__(self, folder: Path, has_own: Callable[[str], bool] | None = None) -> None:
        """has_own: whether this interpreter has a module; for tests."""
        self.folder: Final = folder / __version__
        self._has = has_own or (lambda name: find_spec(name) is not None)

    @property
    def python(self) -> Path | None:
        """The interpreter with everything that a worker needs; None if it has to be installed first."""
        if (self.folder / DONE).exists():
            return self.folder / "bin" / "python"
        return Path(sys.executable) if all(self._has(name) for name in _NEEDED) else None

    def command(self, descriptor: int) -> list[str]:
        """How a worker is started on an inherited socket."""
        python = self.python
        if python is None:
            return [*self.install_command(), "--fd", str(descriptor)]
        return worker_command(python, descriptor)

    async def install(self, tell: Callable[[str], Awaitable[None]]) -> None:
        """Make the environment anew. tell: hears the installer, line by line. Raises `NOT_READY`."""
        line = ""
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    self.install_command(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
            )
            if process.stdout is not None:
                async for line in _lines(process.stdout):
                    await tell(line)
        if process.returncode:
            raise error(Code.NOT_READY, line.removeprefix("error: "), "then again: daemonctl worker install")

    def install_command(self) -> list[str]:
        """How the environment is made; again, it is made anew."""
        return [sys.executable, "-P", "-m", "corolla.daemon.serving.installer", str(self.folder)]


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[str]:
    rest = b""
    async for data in stream:
        *lines, rest = (rest + data).split(b"\n")
        rest = rest[:MAX_LINE_BYTES]
        for line in lines:
            yield line[:MAX_LINE_BYTES].decode(errors="replace").strip()
    if rest:
        yield rest.decode(errors="replace").strip()


def worker_command(python: Path, descriptor: int) -> list[str]:
    """The worker program in this interpreter."""
    return [str(python), "-P", "-m", "corolla.model", "--fd", str(descriptor)]
