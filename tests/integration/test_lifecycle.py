"""A daemon's life: it ends in order on SIGTERM and SIGINT whatever it does, and remembers its swarm.

Real processes. Every end has to be exit code 0 in bounded time, without a traceback, and leave no worker.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from ..model.tiny import NUM_BLOCKS, save_tiny  # noqa: E402
from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until  # noqa: E402
from .fleet import Liar  # noqa: E402

pytestmark = pytest.mark.timeout(300)
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
PROMPT = [5, 17, 40, 8, 23]
NUM_TOKENS = 40
SIGNALS = (signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long))  # both end it in one way


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, "llama", seed=4, eos_token_id=None)
    return folder


@pytest.fixture
def swarm(model: Path, tmp_path: Path) -> Iterator[LocalSwarm]:
    with local_swarm(model, *OPTIONS, "--cache-dir", str(tmp_path)) as swarm:
        yield swarm


def check_end(daemon: DaemonProcess, workers: list[int]) -> None:
    """Wait for the end that a signal asked for, and check that it was one in order."""
    assert daemon.wait() == 0, daemon.log()
    assert "Traceback" not in daemon.log(), daemon.log()
    assert '"event": "stopped"' in daemon.log()
    assert not daemon.socket.exists()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "no worker is left")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_an_idle_daemon(swarm: LocalSwarm, number: int) -> None:
    daemon = swarm.add("idle", "--blocks", "none")
    daemon.wait_ready()
    daemon.signal(number)
    check_end(daemon, [])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_daemon_that_only_just_starts(swarm: LocalSwarm, number: int) -> None:
    daemon = swarm.add("starting", "--blocks", "none")
    wait_until((daemon.folder / "state" / "lock").exists, "it takes its state folder")
    daemon.signal(number)  # most likely amid its imports
    assert daemon.wait() == 0, daemon.log()
    assert "Traceback" not in daemon.log(), daemon.log()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_daemon_that_loads(swarm: LocalSwarm, number: int) -> None:
    client = swarm.found()
    server = swarm.serve("server", 0, NUM_BLOCKS)
    server.wait_for(lambda status: bool(status.workers), "starts its worker")
    wait_until(lambda: bool(server.worker_pids()), "the worker's process runs")
    workers = server.worker_pids()
    assert server.status().workers[0].state == "loading"
    server.signal(number)
    check_end(server, workers)
    assert client.status().state == "online"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_text_under_way_is_finished_before_the_users_daemon_ends(swarm: LocalSwarm, number: int) -> None:
    client = swarm.found()
    swarm.kind = Liar
    server = swarm.serve("server", 0, NUM_BLOCKS)
    assert isinstance(server, Liar)
    server.wait_online()
    swarm.wait_covered(client, [1] * NUM_BLOCKS)
    server.hold()  # or the text might have ended before the signal arrives
    with client.connect() as daemon, ThreadPoolExecutor(1) as pool:
        text = pool.submit(daemon.model("tiny").generate, tokens=[PROMPT], max_new_tokens=NUM_TOKENS)
        wait_until(server.holds, "the text to be under way")
        workers = client.worker_pids()
        client.signal(number)
        wait_until(lambda: '"event": "stopping"' in client.log(), "the daemon to be stopping")
        server.release()
        (tokens,) = text.result().tokens
    assert len(tokens) == NUM_TOKENS
    assert workers
    check_end(client, workers)

    held = server.worker_pids()
    server.signal(number)
    check_end(server, held)


def test_a_worker_that_hangs_does_not_hold_up_the_end(swarm: LocalSwarm) -> None:
    swarm.found()
    server = swarm.serve("server", 0, NUM_BLOCKS)
    server.wait_online()
    workers = server.worker_pids()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    server.signal(signal.SIGTERM)
    check_end(server, workers)


def restart(daemon: DaemonProcess) -> None:
    """Stop it in order, and start it anew."""
    daemon.signal(signal.SIGTERM)
    check_end(daemon, [])
    daemon.start()
    daemon.wait_ready()


def test_swarms_founded_joined_and_left_are_remembered_over_restarts(swarm: LocalSwarm) -> None:
    founder, member = swarm.add("founder", "--blocks", "none"), swarm.add("member", "--blocks", "none")
    founder.wait_ready()
    member.wait_ready()
    with founder.connect() as daemon:
        founded = daemon.create_swarm("lasting")
    with member.connect() as daemon:
        daemon.join(founded.token)

    restart(member)
    member.wait_for(
        lambda status: status.state == "online" and status.swarm == "lasting" and status.num_peers == 1,
        "is back in the swarm",
    )
    peer = founder.status().peer
    restart(founder)
    assert founder.status().peer == peer
    founder.wait_for(
        lambda status: status.state == "online" and status.swarm == "lasting" and status.num_peers == 1,
        "is back with its member",
    )

    with member.connect() as daemon:
        daemon.leave()
    restart(member)
    status = member.status()
    assert (status.state, status.swarm) == ("idle", None)
    assert founder.status().state == "online"
