"""A fresh Debian with its own systemd: made by debootstrap, booted by systemd-nspawn, entered by nsenter.

It has no network but its own loopback, and is gone with its folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

TIMEOUT_S = 600  # of one command, on a machine that has other things to do
# Tests share their machine with others; a service that stood behind all of them might never come up.
BUSY = "[Service]\nNice=-5\nIOSchedulingClass=best-effort\n"
TOOLS = ("debootstrap", "systemd-nspawn", "nsenter")


def why_not() -> str:
    """What this machine lacks to run one; empty if nothing."""
    if os.getuid() != 0:
        return "a container needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}: apt-get install debootstrap systemd-container" if missing else ""


class Container:
    """One that is booted. folder: its root, seen from outside."""

    def __init__(self, folder: Path, init: int) -> None:
        self.folder = folder
        self._init = init

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside; what it printed."""
        inside = ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-n", "-p", "-r", "-w", *command]
        done = subprocess.run(
            inside,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def exit_code(self, *command: str) -> int:
        """Run a command inside; how it ended."""
        inside = ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-n", "-p", "-r", "-w", *command]
        return subprocess.run(inside, capture_output=True, timeout=TIMEOUT_S, check=False).returncode

    def has(self, path: str) -> bool:
        """Whether a path exists inside."""
        return os.path.lexists(self.folder / path.lstrip("/"))


def make_root(folder: Path) -> None:
    """A minimal Debian 12 with systemd, and with rpm beside dpkg."""
    packages = "systemd,systemd-sysv,dbus,procps,rpm"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(folder)],
        stdout=subprocess.DEVNULL,
        check=True,
    )


def copy_root(fresh: Path, folder: Path) -> None:
    """Another root like it; files are shared where the file system can."""
    subprocess.run(["cp", "--archive", "--reflink=auto", str(fresh), str(folder)], check=True)


@contextmanager
def booted(folder: Path, seen: Mapping[Path, str] | None = None) -> Iterator[Container]:
    """The system in `folder`, running. seen: folders of this machine → where they are to be read inside."""
    beside = folder / "etc/systemd/system/corollad.service.d"
    beside.mkdir(parents=True)
    (beside / "busy.conf").write_text(BUSY)
    command = ["systemd-nspawn", "-q", "-D", str(folder), "--register=no", "--keep-unit"]
    command += [f"--bind-ro={outside}:{inside}" for outside, inside in (seen or {}).items()]
    nspawn = subprocess.Popen(
        [*command, "--private-network", "--pipe", "-b"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        container = Container(folder, _init_of(nspawn))
        container.run("systemctl", "is-system-running", "--wait", check=False)
        yield container
        container.run("systemctl", "poweroff", check=False)
        nspawn.wait(TIMEOUT_S)
    finally:
        nspawn.kill()
        nspawn.wait()


def _init_of(nspawn: subprocess.Popen[bytes]) -> int:
    """The container's first process, once its bus answers."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn ended with {nspawn.returncode}")
        children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()
        for child in children:
            bus = Path(f"/proc/{child}/root/run/dbus/system_bus_socket")
            if bus.exists() and Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return int(child)
        time.sleep(0.2)  # nothing outside the container tells when it has booted
    raise AssertionError("the container did not boot in 300 s")
