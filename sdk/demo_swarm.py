"""A private swarm on this machine: real daemons in processes of their own, on loopback, in a temporary folder.

Owns the processes and the folder, and leaves neither behind, however it ends. What is done with the swarm is
`demo`'s story.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ..protocol.errors import Code, CorollaError, error
from ..protocol.places import user_cache_folder
from ..protocol.views import Status
from .client import Daemon, connect

START_WITHIN_S: Final = 240.0  # four workers loading side by side on a small machine
STOP_WITHIN_S: Final = 5.0
# What workers are started with that share a machine's cores: a thread that has nothing to do makes room soon, as
# `_ENVIRONMENT` of `model/__main__.py` says. Four steps of `examples.lora` on two cores, with its start, took 69 s
# so, and 97 s without.
SHARED_CORES: Final = {"GOMP_SPINCOUNT": "3000"}
_POLL_S: Final = 0.1


@dataclass
class Member:
    """One daemon. blocks: None serves nothing."""

    name: str
    blocks: tuple[int, int] | None
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    peer: str = ""
    is_ready: bool = False
    in_use: bool = False
    is_killed: bool = False

    @property
    def socket(self) -> Path:
        """Its control socket."""
        return self.folder / "s"

    def connect(self) -> Daemon:
        """The SDK's view of it."""
        return connect(self.socket)

    def status(self) -> Status | None:
        """Its status; None while it does not answer."""
        try:
            with self.connect() as daemon:
                return daemon.status()
        except CorollaError as problem:
            if problem.code is Code.NO_DAEMON:
                return None
            raise

    def last_words(self) -> str:
        """The end of its log."""
        log = self.folder / "log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-8:])


class DemoSwarm:
    """Use as a context manager: at its end no process and no file is left."""

    def __init__(self, model: str, name: str = "demo") -> None:
        self._model = model
        self._name = name
        self.folder = Path(tempfile.mkdtemp(prefix="corolla-"))
        self.members: list[Member] = []
        self._token = ""

    def start(
        self, spans: list[tuple[str, tuple[int, int] | None]], on_progress: Callable[[], object]
    ) -> None:
        """Start a daemon for each (name, blocks), the first of which founds the swarm; wait for none."""
        for name, blocks in spans:
            member = Member(name, blocks, self.folder / name)
            self.members.append(member)
            self._launch(member)
            if not self._token:
                self.wait(lambda member=member: member.status() is not None, on_progress)  # type: ignore[misc]
                with member.connect() as daemon:
                    self._token = daemon.create_swarm(self._name).token

    def add(self, name: str, blocks: tuple[int, int] | None) -> None:
        """One more daemon. It joins by those that run now: the first may be gone."""
        for status in filter(None, (m.status() for m in self.members if not m.is_killed)):
            if status.join_command is not None:
                self._token = status.join_command.split()[-1]
        self.start([(name, blocks)], _nothing)

    def wait(self, condition: Callable[[], bool], on_progress: Callable[[], object]) -> None:
        """Wait until a condition holds. Raises `NOT_READY` with its log if a daemon ends before, `TIMEOUT`."""
        deadline = time.monotonic() + START_WITHIN_S
        while not condition():
            for member in self.members:
                self._check(member)
            if time.monotonic() > deadline:
                raise error(
                    Code.TIMEOUT,
                    f"the demo's swarm was not ready within {START_WITHIN_S:g} s",
                    "close other programs, or choose a smaller model with --model",
                )
            on_progress()
            time.sleep(_POLL_S)

    def is_serving(self) -> bool:
        """Whether every daemon that lends blocks has a worker online."""
        lenders = [member for member in self.members if member.blocks is not None]
        for member in lenders:
            status = member.status()
            member.peer = status.peer if status is not None else ""
            member.is_ready = status is not None and any(w.state == "online" for w in status.workers)
        return all(member.is_ready for member in lenders)

    def note_use(self) -> None:
        """Ask each daemon whether a session runs on its blocks."""
        for member in self.members:
            if member.blocks is not None and not member.is_killed:
                status = member.status()
                member.in_use = status is not None and any(worker.sessions for worker in status.workers)

    def kill(self, member: Member) -> None:
        """SIGKILL to the daemon; it says goodbye to nobody, and its worker dies with it."""
        if member.process is not None:
            member.process.kill()
            member.process.wait()
        member.is_killed, member.in_use = True, False

    def close(self) -> None:
        """Stop everything and remove the folder. May be called twice; a second Ctrl-C does not cut it short."""
        with _undisturbed():
            self._close()

    def _close(self) -> None:
        running = [m.process for m in self.members if m.process is not None and m.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_WITHIN_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for member in self.members:
            if member.process is not None:
                _end_group(member.process.pid)  # a worker that outlived its daemon, if any did
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _launch(self, member: Member) -> None:
        member.folder.mkdir(parents=True)
        config = member.folder / "config.toml"
        config.touch()  # of its own: the user's is for the user's daemon
        blocks = "none" if member.blocks is None else f"{member.blocks[0]}:{member.blocks[1]}"
        command = [sys.executable, "-m", "corolla.daemon", "--config", str(config)]
        command += ["--state-dir", str(member.folder / "state"), "--socket", str(member.socket)]
        command += ["--listen", "/ip4/127.0.0.1/tcp/0", "--model", self._model, "--blocks", blocks]
        command += ["--device", "cpu", "--dtype", "float32"]
        if self._token:
            command += ["--join", self._token]
        with (member.folder / "log").open("wb") as log:
            member.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, who stop them in order
                env=_environment(),
            )

    def _check(self, member: Member) -> None:
        if member.is_killed or member.process is None or member.process.poll() is None:
            return
        raise error(
            Code.NOT_READY,
            f"the daemon {member.name!r} ended with exit code {member.process.returncode}:\n{member.last_words()}",
            "pip install 'corolla[daemon,worker]' brings what it needs",
        )


def _nothing() -> None:
    return None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without signals that ask us to end: we do, within `STOP_WITHIN_S`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in asked]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _environment() -> dict[str, str]:
    """Ours, without the user's wishes for the user's own daemon; converted models are shared with it.

    A demo is what its user waits for, not what the machine lends: it may have all cores, and in front.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COROLLA_")}
    wishes = {
        "CACHE_DIR": str(user_cache_folder()),
        "LOW_PRIORITY": "false",
        "THREADS": str(os.cpu_count() or 1),
    }
    return SHARED_CORES | kept | {f"COROLLA_{name}": value for name, value in wishes.items()}


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # none is left
