"""A live daemon under mutated real traffic: it neither crashes nor grows, and serves afterwards."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from corolla.daemon.network.members.greeting import Swarm

from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until
from .attack import Target, attack, door_of

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a daemon holds when nobody asks anything of it."""

    tasks: Counter[str]
    objects: int
    files: int
    resident_mib: float


class Watched(DaemonProcess):
    """A daemon that tells its vitals."""

    def command(self) -> list[str]:
        program = str(Path(__file__).with_name("watched.py"))
        return [sys.executable, program, *super().command()[3:]]

    def vitals(self) -> Vitals:
        """What it holds now."""
        path = self.folder / "vitals"
        path.unlink(missing_ok=True)
        self.signal(signal.SIGUSR1)
        wait_until(path.exists, f"{self.name} tells its vitals")
        status = Path(f"/proc/{self.pid}/status").read_text()
        resident_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        told = json.loads(path.read_text())
        return Vitals(Counter(told["tasks"]), told["objects"], told["files"], resident_kib / 1024)

    def wait_calm(self, before: Vitals) -> Vitals:
        """Its vitals once it has let go of those who left: no task more than before, by its name; no file."""
        now = before

        def calm() -> bool:
            nonlocal now
            now = self.vitals()
            return now.tasks <= before.tasks and now.files <= before.files

        try:
            wait_until(calm, f"{self.name} is calm again")
        except TimeoutError as problem:
            raise AssertionError(f"{now.tasks - before.tasks} more than {before}: {now}") from problem
        return now


@contextmanager
def watched(*arguments: str) -> Iterator[tuple[LocalSwarm, Watched]]:
    """A daemon that founded a swarm."""
    with local_swarm(None) as swarm:
        folder = swarm.folder / "w"
        daemon = Watched("w", folder, arguments, {"COROLLA_VITALS": str(folder / "vitals")})
        swarm.daemons["w"] = daemon
        daemon.start()
        daemon.wait_ready()
        with daemon.connect() as connection:
            connection.create_swarm("roses")
            swarm.token = connection.status().join_command.split()[-1]
        yield swarm, daemon


def target_of(daemon: DaemonProcess, fingerprint: str = "f" * 64) -> Target:
    """Where to attack."""
    status = daemon.status()
    assert status.swarm is not None
    assert status.swarm_id is not None
    swarm = Swarm(status.swarm_id, status.swarm)
    return Target(door_of(status.addresses, status.peer), daemon.socket, swarm, fingerprint)


def assault(daemon: Watched, target: Target, num_messages: int, seed: int) -> Counter[str]:
    """Send so many messages; the daemon must be there afterwards, with a clean log."""
    sent = trio.run(attack, target, num_messages, seed)
    assert sum(sent.values()) >= num_messages
    assert daemon.process is not None
    assert daemon.process.poll() is None, daemon.log()
    log = (daemon.folder / "log").read_text(errors="replace")
    assert "Traceback" not in log, log[log.index("Traceback") - 2000 :][:6000]
    return sent


def check_joins(swarm: LocalSwarm, daemon: DaemonProcess) -> None:
    """Another daemon joins this one, and both see each other."""
    other = swarm.add("other", "--blocks", "none", "--join", swarm.token)
    other.wait_for(lambda status: status.state == "online" and status.num_peers == 1, "has joined")
    assert daemon.status().num_peers == 1


@pytest.mark.timeout(120)
def test_a_little_mutated_traffic_leaves_a_daemon_as_it_was() -> None:
    with watched("--blocks", "none") as (swarm, daemon):
        target = target_of(daemon)
        before = daemon.vitals()
        assault(daemon, target, 300, seed=1)
        daemon.wait_calm(before)
        check_joins(swarm, daemon)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_messages_leave_a_daemon_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from ..model.tiny import NUM_BLOCKS, save_tiny

    save_tiny(tmp_path / "tiny", "llama", seed=4, eos_token_id=None)
    span = ("--model", str(tmp_path / "tiny"), "--blocks", f"0:{NUM_BLOCKS}")
    with watched(*span, *OPTIONS, "--cache-dir", str(tmp_path / "cache")) as (swarm, daemon):
        daemon.wait_online()
        with daemon.connect() as connection:
            fingerprint = connection.models()[0].fingerprint
        target = target_of(daemon, fingerprint)
        first = daemon.vitals()
        assault(daemon, target, 20_000, seed=1)  # caches fill, memory is fragmented
        before = daemon.wait_calm(first)
        sent = assault(daemon, target, 80_000, seed=2)
        after = daemon.wait_calm(before)
        print(f"\n{dict(sent)}\nat first {first}\nafter 20,000 {before}\nafter 100,000 {after}")
        assert after.objects < before.objects + 20_000  # four messages leave no object
        assert after.resident_mib < before.resident_mib + 32
        check_joins(swarm, daemon)
        model = ("--model", str(tmp_path / "tiny"))
        client = swarm.add("client", "--blocks", "none", *model, "--join", swarm.token, *OPTIONS)
        client.wait_for(lambda status: status.state == "online", "has joined")
        with client.connect() as connection:
            wait_until(lambda: bool(connection.models()), "the client hears of the model")
            text = connection.model("tiny").generate(tokens=[[5, 17, 40]], max_new_tokens=8)
        assert len(text.tokens[0]) == 8
