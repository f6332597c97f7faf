"""What changes under running daemons: weights on their disk, a second daemon of the same identity."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..model.tiny import save_tiny
from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until

pytestmark = pytest.mark.timeout(600)
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
PROMPT = [5, 17, 40, 8, 23]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    save_tiny(folder, "llama", seed=4, eos_token_id=None)
    return folder


@pytest.fixture
def swarm(model: Path, tmp_path: Path) -> Iterator[LocalSwarm]:
    with local_swarm(model, *OPTIONS, "--cache-dir", str(tmp_path / "cache")) as swarm:
        yield swarm


def kinds(daemon: DaemonProcess) -> list[str]:
    with daemon.connect() as program:
        return [event.kind for event in program.events()]


def generated(daemon: DaemonProcess) -> list[int]:
    with daemon.connect() as program:
        pieces = program.model("tiny").generate(tokens=[PROMPT], max_new_tokens=8, stream=True)
        return [piece.token for piece in pieces]


def test_weights_that_change_are_not_mixed_and_the_change_is_told(
    swarm: LocalSwarm, model: Path, tmp_path: Path
) -> None:
    client = swarm.found()
    server = swarm.serve("server", 0, 4)
    server.wait_online()
    swarm.wait_covered(client, [1] * 4)
    before = generated(client)

    save_tiny(tmp_path / "other", "llama", seed=5, eos_token_id=None)
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    with (model / "model.safetensors").open("r+b") as file:  # into the very file that was loaded
        file.write(weights)
    assert generated(client) == before  # what runs is what was loaded

    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: "weights_changed" in kinds(server), "the change is told")
    server.wait_online()
    assert server.status().workers[0].error is None
    wait_until(lambda: serves_only_new(client), "the swarm knows the new weights alone")
    for daemon in (client, server):
        assert "Traceback" not in daemon.log(), daemon.log()


def serves_only_new(client: DaemonProcess) -> bool:
    with client.connect() as program:
        return [list(view.replicas) for view in program.swarm().models if any(view.replicas)] == [[1] * 4]


def test_weights_that_are_cut_short_fail_the_worker_once_and_a_reload_tries_again(
    swarm: LocalSwarm, model: Path, tmp_path: Path
) -> None:
    swarm.found()
    server = swarm.serve("server", 0, 4)
    server.wait_online()
    whole = (model / "model.safetensors").read_bytes()
    os.truncate(model / "model.safetensors", len(whole) // 2)
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGKILL)
    server.wait_for(lambda status: status.workers[0].state == "failed", "gives its worker up")
    error = server.status().workers[0].error
    assert isinstance(error, dict)
    assert error["code"] == "damaged_weights"
    (model / "model.safetensors").write_bytes(whole)
    server.signal(signal.SIGHUP)
    server.wait_online()


@pytest.mark.long  # members greet each other anew every half a minute
def test_two_daemons_of_one_identity_that_serve_nothing_are_told(swarm: LocalSwarm) -> None:
    swarm.found()
    first = swarm.add("first", "--blocks", "none", "--join", swarm.token)
    first.wait_for(lambda status: status.state == "online", "has joined")
    twin = swarm.folder / "twin" / "state"
    twin.mkdir(parents=True)
    shutil.copy(first.folder / "state" / "identity.pem", twin)
    second = swarm.add("twin", "--blocks", "none", "--join", swarm.token)
    second.wait_for(lambda status: status.state == "online", "has joined")
    assert first.status().peer == second.status().peer
    wait_until(
        lambda: any("identity.pem" in (daemon.status().hint or "") for daemon in (first, second)),
        "one of them knows",
        deadline_s=400,
    )
    for daemon in (first, second):
        assert "Traceback" not in daemon.log(), daemon.log()


@pytest.mark.long  # a daemon looks once a minute what is held in its name
def test_two_daemons_of_one_identity_are_told_and_neither_falls(swarm: LocalSwarm) -> None:
    client = swarm.found()
    first = swarm.serve("first", 0, 4)
    first.wait_online()
    twin = swarm.folder / "twin" / "state"
    twin.mkdir(parents=True)
    shutil.copy(first.folder / "state" / "identity.pem", twin)
    second = swarm.serve("twin", 0, 4)
    second.wait_online()
    assert first.status().peer == second.status().peer
    wait_until(
        lambda: any("identity.pem" in (daemon.status().hint or "") for daemon in (first, second)),
        "one of them knows",
        deadline_s=400,
    )
    assert generated(client)
    for daemon in (client, first, second):
        assert daemon.status().state == "online"
        assert "Traceback" not in daemon.log(), daemon.log()


JUMPS = (
    "import os, sys, time; now = time.time;"
    " time.time = lambda: now() + 3600 * os.path.exists(sys.argv[1]);"
    " from corolla.daemon.__main__ import main; main(sys.argv[2:])"
)


class Jumping(DaemonProcess):
    """A daemon whose clock is an hour ahead for as long as `folder/ahead` exists."""

    @property
    def ahead(self) -> Path:
        return self.folder / "ahead"

    def command(self) -> list[str]:
        return [sys.executable, "-c", JUMPS, str(self.ahead), *super().command()[3:]]


@pytest.mark.long  # what is known of a member is forgotten after a minute or two
def test_a_clock_that_jumps_by_an_hour_is_told_and_costs_no_text(swarm: LocalSwarm) -> None:
    client = swarm.found()
    steady = swarm.serve("steady", 0, 4)
    swarm.kind = Jumping
    jumping = swarm.serve("jumping", 0, 4)
    assert isinstance(jumping, Jumping)
    for daemon in (steady, jumping):
        daemon.wait_online()
    swarm.wait_covered(client, [2] * 4)
    before = generated(client)

    jumping.ahead.touch()
    wait_until(
        lambda: any("ahead of those of other members" in words for words in jumping.status().health),
        "it is told that its clock is wrong",
        deadline_s=400,
    )
    swarm.wait_covered(client, [1] * 4)  # nobody believes what it announces
    assert generated(client) == before
    assert jumping.status().state == "online"
    assert client.status().health == ()  # it knows two clocks that agree, its own and the steady one

    jumping.ahead.unlink()
    wait_until(lambda: not jumping.status().health, "it is well again", deadline_s=400)
    swarm.wait_covered(client, [2] * 4)
    assert generated(client) == before
    for daemon in (client, steady, jumping):
        assert "Traceback" not in daemon.log(), daemon.log()
