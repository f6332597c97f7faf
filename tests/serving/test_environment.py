"""Workers run where torch is; where it is nowhere, the worker's process installs it first."""

from __future__ import annotations

import fcntl
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import trio

from corolla import __version__
from corolla.daemon.serving import installer
from corolla.daemon.serving.environment import DONE, Environment
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.framing import FrameParser
from corolla.protocol.work import FROM_WORKER, Loading


def test_an_interpreter_with_torch_is_used_as_it_is(tmp_path: Path) -> None:
    environment = Environment(tmp_path, lambda _: True)
    assert environment.python == Path(sys.executable)
    assert environment.command(7)[1:] == ["-P", "-m", "corolla.model", "--fd", "7"]


def test_without_torch_the_worker_begins_as_the_installer(tmp_path: Path) -> None:
    environment = Environment(tmp_path, lambda name: name != "torch")
    assert environment.python is None
    assert environment.command(7)[-2:] == ["--fd", "7"]
    assert str(tmp_path / __version__) in environment.command(7)


def test_an_installed_environment_comes_first_and_a_half_one_does_not_count(tmp_path: Path) -> None:
    environment = Environment(tmp_path, lambda _: True)
    environment.folder.mkdir()
    assert environment.python == Path(sys.executable)
    (environment.folder / DONE).touch()
    assert environment.python == environment.folder / "bin" / "python"


def test_requirements_are_those_of_the_worker_extra() -> None:
    names = [line.split(">")[0].split("<")[0] for line in installer.requirements()]
    assert {"torch", "transformers", "safetensors"} <= set(names)
    assert "trio" not in names
    assert not any("extra" in line for line in installer.requirements())


def test_it_installs_and_the_environment_sees_this_very_corolla(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(installer, "run_pip", lambda folder, arguments, *_: asked.append(arguments))
    lines: list[str] = []
    (tmp_path / "old").mkdir()

    installer.install(tmp_path / "new", lines.append)

    assert (tmp_path / "new" / DONE).exists()
    assert not (tmp_path / "old").exists()
    assert any(line.startswith("torch") for line in asked[0])
    program = "import corolla, cbor2; print(corolla.__version__)"
    python = tmp_path / "new" / "bin" / "python"
    shown = subprocess.run([python, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == __version__


def test_what_pip_says_is_told(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    with pytest.raises(CorollaError, match="no-such-package-of-anybody") as caught:
        installer.run_pip(
            tmp_path / "venv", ["--no-index", "--isolated", "no-such-package-of-anybody"], lambda _: None
        )
    assert caught.value.code is Code.NOT_READY


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "FREE_BYTES", dict.fromkeys(("cpu", "rocm", "cuda"), 1 << 60))
    with pytest.raises(CorollaError, match="are free") as caught:
        installer.install(tmp_path / "new", lambda _: None)
    assert caught.value.code is Code.DISK_FULL


def test_a_second_installer_waits_and_becomes_the_worker_when_the_first_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "corolla.daemon.serving.installer", str(folder)]
    with ours, theirs, (tmp_path / "env.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [*command, "--fd", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert "waiting for another worker" in second.stderr.readline()
        (folder / "bin" / "python").write_text("#!/bin/sh\necho became the worker >&2\n")
        (folder / "bin" / "python").chmod(0o755)
        (folder / DONE).touch()
        fcntl.flock(lock, fcntl.LOCK_UN)
        with second.stderr as words:
            assert "became the worker" in words.read()
        assert second.wait(30) == 0
        parser = FrameParser()
        parser.feed(ours.recv(1 << 16))
        told = [FROM_WORKER.decode(frame) for frame in parser.frames()]
    assert told == [Loading(installer.STAGE, 0, 0)]


class Pretended(Environment):
    """One whose installer is a line of shell."""

    script = ""

    def install_command(self) -> list[str]:
        return ["sh", "-c", self.script]


@pytest.mark.anyio
async def test_the_installer_is_heard_line_by_line(tmp_path: Path) -> None:
    environment, lines = Pretended(tmp_path), list[str]()
    environment.script = "echo one; echo two >&2; printf three"

    async def tell(line: str) -> None:
        lines.append(line)

    await environment.install(tell)
    assert lines == ["one", "two", "three"]


@pytest.mark.anyio
async def test_an_installer_that_fails_says_why(tmp_path: Path) -> None:
    environment = Pretended(tmp_path)
    environment.script = "echo collecting; echo 'error: no way to the registry'; exit 1"

    async def tell(line: str) -> None:
        await trio.lowlevel.checkpoint()

    with pytest.raises(CorollaError, match=r"^no way to the registry") as caught:
        await environment.install(tell)
    assert caught.value.code is Code.NOT_READY
    assert "daemonctl worker install" in caught.value.remedy


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("Collecting torch>=2.13", "installing torch"),
        ("  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (190.4 MB)", "installing torch"),
        ("Collecting huggingface-hub<2.0", "installing huggingface-hub"),
        ("Downloading https://example.org/whl/nvidia_cublas-13.0-py3.whl", "installing nvidia_cublas"),
        ("Installing collected packages: torch, transformers", "installing"),
        ("waiting for another worker that installs", "installing"),
    ],
)
def test_status_names_the_package_that_is_being_installed(line: str, stage: str) -> None:
    assert installer.stage_of(line) == stage


def test_bytes_of_a_download_are_told_where_pip_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "_progress_bar", lambda: "off")
    fake = tmp_path / "pip"
    fake.write_text("#!/bin/sh\necho Downloading torch-2.whl\necho Progress 5 of 20\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    heard: list[tuple[int, int]] = []
    installer.run_pip(tmp_path, [], lambda _: None, lambda done, total: heard.append((done, total)))
    assert heard == [(5, 20)]
