"""The container file, built on a Debian of our own and run by the very line that it names."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import corolla

from ..model.tiny import NUM_BLOCKS, save_tiny
from ..processes import local_swarm, wait_until
from .container import why_not
from .test_update import PROMPT, chosen, lay_environment

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


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A podman whose images are gone afterwards."""
    settings = tmp_path_factory.mktemp("podman") / "containers.conf"
    settings.write_text(HUMBLE if shutil.which("runc") else "")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CONTAINERS_CONF", str(settings))
        yield
        run("podman", "rmi", "--force", "corolla", BASE, check=False)


def run(*command: str, check: bool = True, both: bool = False) -> str:
    """What a command printed; both: also on stderr."""
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if check and done.returncode:
        raise AssertionError(
            f"{shlex.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout + done.stderr if both else done.stdout


def status() -> Any:
    """Of the daemon in the container; None while it does not answer."""
    told = run(*the_line("podman exec"), "--json", check=False)
    return json.loads(told or "{}").get("status")


def states() -> list[str]:
    """Of the workers in the container."""
    return [worker["state"] for worker in (status() or {}).get("workers", ())]


@pytest.fixture(scope="module")
def built(podman: None, packages: Path, fresh_root: Path) -> None:
    """The image of the container file, on a Debian of our own."""
    pack, take = ["tar", "-C", str(fresh_root), "-c", "."], ["podman", "import", "--quiet", "-", BASE]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
        subprocess.run(take, stdin=tar.stdout, check=True, capture_output=True)
    assert tar.returncode == 0
    build = the_line("podman build")
    run(*build[:2], "--network=host", "--build-arg", f"BASE={BASE}", *build[2:])


@pytest.fixture
def image(built: None) -> Iterator[None]:
    """The image; what was made of it is gone afterwards."""
    yield
    run("podman", "rm", "--force", "corolla", check=False)
    run("podman", "volume", "rm", "--force", "corolla", "corolla-cache", check=False)


def start(*arguments: str, mounts: Mapping[Path, str] | None = None) -> None:
    """The very line that the container file names, with these arguments for the daemon."""
    *line, name, option, model = the_line("podman run")
    assert (name, option, model) == ("corolla", "--model", "MODEL")
    seen = [f"--volume={outside}:{inside}:ro" for outside, inside in (mounts or {}).items()]
    run(*line, *seen, name, *arguments, "--no-mdns", "--no-upnp")


def inspected(template: str) -> str:
    return run("podman", "inspect", "corolla", "--format", template).strip()


def test_a_daemon_in_a_container_serves_and_is_the_same_after_it_was_made_anew(
    image: None, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "tiny", "llama", seed=4, eos_token_id=None)
    lay_environment(tmp_path, Path("state"), "/usr/lib/corolla")
    run("chmod", "-R", "a+rX", str(tmp_path))
    mounts = {
        tmp_path / "tiny": "/srv/tiny",
        tmp_path / "state/worker": "/var/lib/corolla/worker",
        Path(sysconfig.get_path("purelib")): "/srv/torch",
    }
    with local_swarm(tmp_path / "tiny") as swarm:
        client = swarm.found("--listen", "/ip4/0.0.0.0/tcp/0", "--dtype", "float32")
        serve = ("--model", "/srv/tiny", "--blocks", f"0:{NUM_BLOCKS}", "--dtype", "float32")
        start(*serve, "--device", "cpu", "--join", swarm.token, mounts=mounts)
        wait_until(lambda: (status() or {}).get("swarm") == "test", "the container's daemon has joined")
        wait_until(lambda: states() not in ([], ["loading"]), "its worker has loaded")
        assert states() == ["online"], run("podman", "logs", "corolla", both=True)
        swarm.wait_covered(client, [1] * NUM_BLOCKS)
        with client.connect() as daemon:
            answer = daemon.model("tiny").generate(tokens=[PROMPT], max_new_tokens=12, encoding="float32")
        assert list(answer.tokens[0]) == chosen(tmp_path / "tiny", list(answer.tokens[0]))
        told = status()

        run("podman", "stop", "--time", "45", "corolla")
        assert inspected("{{.State.ExitCode}}") == "0"
        wait_until(lambda: client.status().num_peers == 0, "it has said goodbye")
        run("podman", "rm", "corolla")
        start("--blocks", "none")
        wait_until(lambda: (status() or {}).get("swarm") == "test", "it remembers its swarm")
        assert (status() or {})["peer"] == told["peer"]


def test_what_no_other_start_would_cure_is_not_tried_for_ever(image: None) -> None:
    start("--blocks", "5:1")
    wait_until(lambda: inspected("{{.State.Status}} {{.RestartCount}}") == "exited 8", "it was given up")
    assert inspected("{{.State.ExitCode}}") == "2"
    assert "5:1" in run("podman", "logs", "corolla", both=True)
