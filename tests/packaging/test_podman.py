"""The container file, built on a Debian of our own and run by the very line that it names."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import corolla

from ..processes import local_swarm, wait_until
from .container import why_not

ROOT = Path(corolla.__file__).parent
FILE = ROOT / "packaging/Containerfile"
BASE = "localhost/corolla-test-base"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.skipif(shutil.which("podman") is None, reason="needs podman: apt-get install podman runc"),
]

# For machines on which root may not raise limits, or whose control groups are of both versions.
HUMBLE = (
    '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n[engine]\nruntime = "runc"\n'
)


def the_line(program: str) -> list[str]:
    """The line of the container file's opening that begins so."""
    (line,) = (line for line in FILE.read_text().splitlines() if line.startswith(f"#   {program} "))
    return shlex.split(line.removeprefix("#"))


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A podman whose images and volumes are gone afterwards."""
    settings = tmp_path / "containers.conf"
    settings.write_text(HUMBLE if shutil.which("runc") else "")
    monkeypatch.setenv("CONTAINERS_CONF", str(settings))
    yield
    run("podman", "rm", "--force", "corolla", check=False)
    run("podman", "volume", "rm", "--force", "corolla", "corolla-cache", check=False)
    run("podman", "rmi", "--force", "corolla", BASE, check=False)


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if check and done.returncode:
        raise AssertionError(
            f"{shlex.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def status() -> Any:
    """Of the daemon in the container; None while it does not answer."""
    told = run(*the_line("podman exec"), "--json", check=False)
    return json.loads(told or "{}").get("status")


def test_a_daemon_in_a_container_joins_and_is_the_same_after_it_was_made_anew(
    podman: None, packages: Path, fresh_root: Path
) -> None:
    pack, take = ["tar", "-C", str(fresh_root), "-c", "."], ["podman", "import", "--quiet", "-", BASE]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
        subprocess.run(take, stdin=tar.stdout, check=True, capture_output=True)
    assert tar.returncode == 0
    build = the_line("podman build")
    run(*build[:2], "--network=host", "--build-arg", f"BASE={BASE}", *build[2:])
    line = the_line("podman run")
    assert line[-2:] == ["--model", "MODEL"]
    with local_swarm(None) as swarm:
        founder = swarm.found("--listen", "/ip4/0.0.0.0/tcp/0")
        run(*line[:-2], "--blocks", "none", "--no-mdns", "--no-upnp", "--join", swarm.token)
        wait_until(lambda: (status() or {}).get("swarm") == "test", "the container's daemon has joined")
        wait_until(lambda: founder.status().num_peers == 1, "its peer sees it")
        told = status()
        assert told is not None
        run("podman", "stop", "--time", "45", "corolla")
        assert run("podman", "inspect", "corolla", "--format", "{{.State.ExitCode}}").strip() == "0"
        run("podman", "rm", "corolla")
        run(*line[:-2], "--blocks", "none", "--no-mdns", "--no-upnp")
        wait_until(lambda: (status() or {}).get("swarm") == "test", "it remembers its swarm")
        assert (status() or {})["peer"] == told["peer"]
