"""The program that makes the workers' environment, by pip; with `--fd` it then becomes the worker.

    python -m corolla.daemon.serving.installer FOLDER [--fd N]

It tells its progress as a worker does, on the inherited socket, and to people line by line. Several may be
started at once: one installs, the others wait for its lock.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import shutil
import site
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from ...protocol.errors import Code, CorollaError, Exit, error
from ...protocol.messages import Message, encode
from ...protocol.work import Failed, Loading
from .environment import DONE, worker_command

STAGE: Final = "installing"
CPU_WHEELS: Final = "https://download.pytorch.org/whl/cpu"
ROCM_WHEELS: Final = "https://download.pytorch.org/whl/rocm6.4"
FREE_BYTES: Final = {"cpu": 3 << 30, "rocm": 20 << 30, "cuda": 12 << 30}  # as measured, with room
PROGRESS_EVERY_S: Final = 0.5
_PACKAGE: Final = re.compile(
    r"\s*(?:Collecting|Downloading) (?:\S+/)?([A-Za-z0-9._]+(?:-[A-Za-z][A-Za-z0-9._]*)*)"
)
_PROGRESS: Final = re.compile(r"Progress (\d+) of (\d+)")
_EXTRA: Final = re.compile(r"""\s*;\s*extra\s*==\s*['"]worker['"]\s*$""")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--fd", type=int, help="The daemon's socket: become the worker afterwards.")
def main(folder: Path, fd: int | None) -> None:
    """Install what workers need into FOLDER."""
    channel = socket.socket(fileno=os.dup(fd)) if fd is not None else None

    def say(message: Message) -> None:
        if channel is not None:
            channel.sendall(encode(message))

    stage = STAGE

    def report(line: str) -> None:
        nonlocal stage
        stage = stage_of(line)
        click.echo(line, err=fd is not None)
        say(Loading(stage, 0, 0))

    def progress(done: int, total: int) -> None:
        say(Loading(stage, done, total))

    try:
        with _locked(folder, report):
            # A user who asks for it means anew; a worker that waited for another's lock finds it done.
            if fd is None or not (folder / DONE).exists():
                install(folder, report, progress)
    except CorollaError as problem:
        say(Failed.of(0, problem))
        click.echo(f"error: {problem}", err=True)
        sys.exit(Exit.ERROR)
    if fd is not None:
        command = worker_command(folder / "bin" / "python", fd)
        os.execv(command[0], command)  # noqa: S606 - the worker takes over the process and its socket


def install(
    folder: Path,
    report: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Make the environment in `folder`. progress: hears the bytes of each download.

    Raises `DISK_FULL`, `NOT_READY` with pip's last words.
    """
    device = detect_device()
    report(f"installing what workers need, for {device}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < FREE_BYTES[device]:
        raise error(
            Code.DISK_FULL,
            f"{free >> 20} MiB are free at {folder.parent}, torch for {device} needs {FREE_BYTES[device] >> 20}",
            "make room, then: daemonctl worker install",
        )
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    _borrow_ours(folder)
    run_pip(folder, [*_index(device), *requirements()], report, progress)
    (folder / DONE).touch()
    for other in folder.parent.iterdir():  # of versions before this one
        if other != folder and other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
    report("the workers' environment is ready")


def detect_device() -> str:
    """cuda, rocm or cpu, by what drivers are there."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "cuda"
    return "rocm" if Path("/dev/kfd").exists() else "cpu"


def requirements() -> list[str]:
    """What the extra `worker` of this installation asks for."""
    wanted = importlib.metadata.requires("corolla") or []
    return [_EXTRA.sub("", line) for line in wanted if _EXTRA.search(line)]


def stage_of(line: str) -> str:
    """What the daemon's status says of a line of pip: just which package it is at."""
    found = _PACKAGE.match(line)
    return f"{STAGE} {found.group(1)}" if found is not None else STAGE


def run_pip(
    folder: Path,
    arguments: list[str],
    report: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Install into the environment with our own pip. Raises `NOT_READY`."""
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    command += ["install", "--disable-pip-version-check", "--no-input", "--progress-bar", _progress_bar()]
    command += arguments
    problem, told = "", 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout or ():
            if line.startswith(("Collecting", "Downloading", "Installing", "  Downloading")):
                report(line.strip()[:200])
            elif line.startswith("ERROR"):
                problem = line.strip()[:400]
            elif (found := _PROGRESS.match(line)) and time.monotonic() - told > PROGRESS_EVERY_S:
                told = time.monotonic()
                progress(int(found.group(1)), int(found.group(2)))
    if pip.returncode:
        raise error(
            Code.NOT_READY,
            f"pip could not install what workers need: {problem or f'exit code {pip.returncode}'}",
            "see the daemon's log; then: daemonctl worker install",
        )


def _progress_bar() -> str:
    """How pip tells of a download to a program: since its version 24.1 it can."""
    version = importlib.metadata.version("pip").split(".")
    return "raw" if (int(version[0]), int(version[1])) >= (24, 1) else "off"


def _index(device: str) -> list[str]:
    """Where torch for this device is; on PyPI is the one for CUDA, of several GB, for which a CPU has no use."""
    wheels = {"cpu": CPU_WHEELS, "rocm": ROCM_WHEELS}.get(device)
    return ["--extra-index-url", wheels] if wheels else []


def _borrow_ours(folder: Path) -> None:
    """Let the environment see this interpreter's packages: Corolla itself, of just this version."""
    ours = [path for path in (*site.getsitepackages(), *sys.path) if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(ours)]
    (theirs,) = folder.glob("lib/python*/site-packages")
    (theirs / "corolla-daemon.pth").write_text("\n".join(lines) + "\n")


@contextmanager
def _locked(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of an environment; says so when it has to wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another worker that installs")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
