"""Real daemons on loopback: separate processes, real libp2p, real workers, real kills.

A `LocalSwarm` starts `corollad` processes with state folders of their own and waits for what they report
through their control sockets, never for time to pass.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import corolla
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.views import Status
from corolla.sdk.demo_swarm import SHARED_CORES

START_DEADLINE_S = 300.0  # only a daemon that hangs needs so long, also on a busy machine
_POLL_S = 0.02
# Tests share their machine with others: a worker that stood behind all of them might never end, and a session
# that waited for its replacement as shortly as a user would like might not see it.
_PATIENT = {"COROLLA_LOW_PRIORITY": "false", "COROLLA_REPLACEMENT_WAIT_S": f"{START_DEADLINE_S:g}"}


class DaemonFailedError(Exception):
    """A daemon ended, or did not reach the state that a test needs; the text holds its log."""


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = START_DEADLINE_S) -> None:
    """Poll a condition of another process, which has no event to wait on. Raises TimeoutError."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}")
        time.sleep(_POLL_S)


@dataclass
class DaemonProcess:
    """One `corollad`. `folder` holds its state, its socket and its log."""

    name: str
    folder: Path
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Its control socket."""
        return self.folder / "s"

    def command(self) -> list[str]:
        """How it is started."""
        command = [sys.executable, "-m", "corolla.daemon", "--state-dir", str(self.folder / "state")]
        return [*command, "--socket", str(self.socket), "--listen", "/ip4/127.0.0.1/tcp/0", *self.arguments]

    def start(self) -> None:
        """Start the process; `wait_ready` waits until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**SHARED_CORES, **os.environ, **_PATIENT, **self.environment},
                start_new_session=True,
            )

    def connect(self) -> Any:
        """The SDK's view of this daemon."""
        return corolla.connect(self.socket)

    def status(self) -> Status:
        """Its status. Raises `NO_DAEMON` while it starts."""
        with self.connect() as daemon:
            status: Status = daemon.status()
            return status

    def wait_ready(self) -> None:
        """Wait until its control socket answers."""
        self.wait_for(lambda status: True, "answers")

    def wait_online(self) -> None:
        """Wait until it is in the swarm and all its workers serve."""
        self.wait_for(
            lambda status: (
                status.state == "online"
                and bool(status.workers)
                and all(worker.state == "online" for worker in status.workers)
            ),
            "serves its span",
        )

    def wait_for(self, condition: Callable[[Status], bool], what: str) -> None:
        """Wait until its status is so. Raises DaemonFailedError with the log if it ends before."""

        def reached() -> bool:
            if self.process is None or self.process.poll() is not None:
                raise DaemonFailedError(f"{self.name} ended before it {what}\n{self.log()}")
            try:
                return condition(self.status())
            except CorollaError as problem:
                if problem.code is not Code.NO_DAEMON:
                    raise
                return False

        try:
            wait_until(reached, f"{self.name} {what}")
        except TimeoutError as problem:
            raise DaemonFailedError(f"{problem}\n{self.log()}") from problem

    def worker_pids(self) -> list[int]:
        """The processes that this daemon started."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")  # any of its threads may have forked
        return [int(child) for task in tasks for child in task.read_text().split()]

    @property
    def pid(self) -> int:
        """Of the daemon itself."""
        if self.process is None:
            raise DaemonFailedError(f"{self.name} was not started")
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL, which lets it say goodbye to nobody."""
        self.signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: int) -> None:
        """Send any signal to the daemon itself."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code."""
        if self.process is None:
            raise DaemonFailedError(f"{self.name} was not started")
        return self.process.wait(START_DEADLINE_S)

    def log(self) -> str:
        """The end of what it logged."""
        path = self.folder / "log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def end(self) -> None:
        """Make sure that neither it nor a worker of it is left."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGCONT)
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self.process.wait()


class LocalSwarm:
    """Daemons that joined one swarm. The first one founds it and serves nothing: users' programs ask it."""

    def __init__(self, folder: Path, model: Path | str | None, options: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.model = model
        self.options = options
        self.kind = DaemonProcess  # of the daemons that serve
        self.daemons: dict[str, DaemonProcess] = {}
        self.token = ""

    def found(self, *arguments: str) -> DaemonProcess:
        """Start the client's daemon and create the swarm."""
        model = ("--model", str(self.model)) if self.model is not None else ()
        client = self.add("client", "--blocks", "none", *model, *arguments)
        client.wait_ready()
        with client.connect() as daemon:
            daemon.create_swarm("test")
            command = daemon.status().join_command
        self.token = command.split()[-1]
        return client

    def serve(self, name: str, start: int, end: int, *arguments: str) -> DaemonProcess:
        """Start a daemon that serves blocks [start, end); `wait_online` waits for it."""
        span = ("--model", str(self.model), "--blocks", f"{start}:{end}", "--join", self.token)
        return self._start(self.kind(name, self.folder / name, (*span, *arguments, *self.options)))

    def add(self, name: str, *arguments: str) -> DaemonProcess:
        """Start any other daemon."""
        return self._start(DaemonProcess(name, self.folder / name, (*arguments, *self.options)))

    def _start(self, daemon: DaemonProcess) -> DaemonProcess:
        self.daemons[daemon.name] = daemon
        daemon.start()
        return daemon

    def wait_covered(self, client: DaemonProcess, replicas: list[int]) -> None:
        """Wait until the client's daemon sees just so many replicas of each block."""

        def covered() -> bool:
            with client.connect() as daemon:
                models = daemon.swarm().models
            return bool(models) and list(models[0].replicas) == replicas

        wait_until(covered, f"replicas {replicas}")

    def end(self) -> None:
        """Kill whatever is left."""
        for daemon in self.daemons.values():
            daemon.end()


@contextmanager
def local_swarm(model: Path | str | None, *options: str) -> Iterator[LocalSwarm]:
    """A swarm in a short-named temporary folder (socket paths are short), gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="cor-") as folder:
        swarm = LocalSwarm(Path(folder), model, options)
        try:
            yield swarm
        finally:
            swarm.end()
