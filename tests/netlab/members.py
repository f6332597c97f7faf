"""Daemons on the hosts of a laboratory, each serving a part of a real model."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..processes import DaemonProcess, LocalSwarm, wait_until
from .lab import PORT, Host, Lab

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
MAIN = "from corolla.daemon.__main__ import main; main()"


def skewed(ahead_s: float) -> str:
    """A prelude after which it is another time of day: the system's clock is one for all hosts."""
    return f"import time; real = time.time; time.time = lambda: real() + {ahead_s}"


def relaying_for(circuit_s: float) -> str:
    """A prelude after which circuits last so long."""
    return f"from corolla.protocol import limits; limits.RELAY_CIRCUIT_S = {circuit_s}"


@dataclass
class LabDaemon(DaemonProcess):
    """A `corollad` on a host, listening there on `PORT`. prelude: Python that it runs before it starts."""

    host: Host | None = field(default=None)
    prelude: str = ""

    def command(self) -> list[str]:
        program = ("-c", f"{self.prelude}\n{MAIN}") if self.prelude else ("-m", "corolla.daemon")
        command = [sys.executable, *program]
        command += ["--state-dir", str(self.folder / "state")]
        command += ["--socket", str(self.socket), "--listen", f"/ip4/0.0.0.0/tcp/{PORT}", *self.arguments]
        return self.host.command(*command) if self.host is not None else command


class LabSwarm(LocalSwarm):
    """A swarm whose daemons live on hosts of a lab; control sockets are reached from outside."""

    def on(self, host: Host, name: str, *arguments: str, prelude: str = "") -> DaemonProcess:
        """Start a daemon on a host."""
        options = (*arguments, *self.options)
        daemon = LabDaemon(name, self.folder / name, options, host=host, prelude=prelude)
        self.daemons[name] = daemon
        daemon.start()
        return daemon

    def found_on(self, host: Host, name: str, *arguments: str) -> DaemonProcess:
        """Start the first daemon there, and create the swarm."""
        daemon = self.on(host, name, *arguments)
        daemon.wait_ready()
        with daemon.connect() as asked:
            asked.create_swarm("lab")
            self.token = asked.status().join_command.split()[-1]
        return daemon

    def serve_on(self, host: Host, name: str, start: int, end: int, *arguments: str) -> DaemonProcess:
        """Start a daemon that serves blocks [start, end)."""
        span = ("--model", str(self.model), "--blocks", f"{start}:{end}", "--join", self.token)
        return self.on(host, name, *span, *arguments)

    def use_on(self, host: Host, name: str) -> DaemonProcess:
        """Start a user's daemon, which serves nothing."""
        return self.on(host, name, "--model", str(self.model), "--blocks", "none", "--join", self.token)


@contextmanager
def lab_swarm(model: Path | None) -> Iterator[tuple[Lab, LabSwarm]]:
    """A lab and a swarm for it, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="lab-") as folder, Lab() as lab:
        swarm = LabSwarm(Path(folder), model, OPTIONS)
        try:
            yield lab, swarm
        finally:
            swarm.end()


def is_relayed(daemon: DaemonProcess, peer: str) -> bool:
    """Whether a daemon reaches a peer through a relay alone."""
    with daemon.connect() as asked:
        return any(view.relayed for view in asked.peers() if view.peer == peer)


def carrier_of(daemon: DaemonProcess, peer: str) -> str:
    """The relay through which a daemon reaches a peer; "" if it does so directly."""
    with daemon.connect() as asked:
        return next((view.through for view in asked.peers() if view.peer == peer), "")


def wait_relayed_address(daemon: DaemonProcess) -> None:
    """Wait until a private daemon can be called through a relay."""
    wait_until(
        lambda: any("p2p-circuit" in address for address in daemon.status().addresses),
        f"{daemon.name} holds a reservation",
    )


def wait_reachable(daemon: DaemonProcess, host: Host) -> None:
    """Wait until a daemon behind a NAT can be called: through a relay, or at its router's address."""
    wait_until(
        lambda: any(
            "p2p-circuit" in address or host.public_address in address
            for address in daemon.status().addresses
        ),
        f"{daemon.name} can be reached",
    )
