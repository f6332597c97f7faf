"""What `daemonctl doctor` says of facts: each situation, its state and its remedy."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corolla.protocol.bounds import BOUNDS
from corolla.protocol.errors import Exit
from corolla.protocol.netcheck import Finding, Netcheck
from corolla.protocol.views import Status, WorkerStatus
from corolla.sdk.cli import main
from corolla.sdk.doctor import NOTE, OK, PROBLEM, Check, Facts, Folder, Unit, diagnose
from corolla.sdk.machine import look, read_settings, run, taken_ports, tcp_port

STATUS = Status(
    version="1", state="online", peer="12D3KooWme", socket="/s", state_folder="/state", uptime_s=1.0, swarm="roses",
    swarm_id="ab", join_command=None, num_peers=1, addresses=(), workers=(), num_sessions=0, resident_bytes=1, pid=7,
)  # fmt: skip
WORKER = WorkerStatus(0, "online", "tiny", 0, 2, device="cpu")
OFFLINE: dict[str, Any] = {
    "file": "/c.toml",
    "config": {"listen": ["/ip4/0.0.0.0/tcp/4517"], "device": ["auto"]},
}
WELL = Facts(
    version="1", uid=1000, unix_s=1.8e9, status=STATUS, config=OFFLINE["config"], netcheck=Netcheck("me", "roses"),
    socket="/s", socket_uid=1000, offline=OFFLINE,
    state=Folder("/state", True, 1000, 0o700, True, 10**12), key=Folder("/state/identity.pem", True, 1000, 0o600),
    cache=Folder("/cache", True, 1000, 0o700, True, 10**12), has_torch=True, memory_bytes=16 * 10**9,
    free_memory_bytes=8 * 10**9, clock_synced=True,
)  # fmt: skip
ALONE = replace(
    WELL,
    status=None,
    config=None,
    netcheck=None,
    socket="",
    trouble=(("no_daemon", "no daemon found", "start one"),),
)


def with_workers(*workers: WorkerStatus) -> Facts:
    return replace(WELL, status=replace(STATUS, workers=workers))


def of(facts: Facts, name: str) -> Check:
    """The only check of this name."""
    (found,) = [check for check in diagnose(facts) if check.name == name]
    return found


def test_a_machine_that_is_well_has_only_good_checks() -> None:
    assert {check.state for check in diagnose(WELL)} == {OK}
    assert all(check.remedy for check in diagnose(ALONE) if check.state != OK)


def test_without_a_daemon_everything_else_is_checked() -> None:
    checks = {check.name: check.state for check in diagnose(ALONE)}
    assert checks["daemon"] == PROBLEM
    assert {
        "configuration",
        "state folder",
        "key",
        "port",
        "clock",
        "worker environment",
        "device",
        "memory",
    } < set(checks)
    assert [name for name, state in checks.items() if state != OK] == ["daemon"]


@pytest.mark.parametrize(
    ("facts", "name", "state", "words"),
    [
        (replace(WELL, version="2"), "version", PROBLEM, "start the daemon again"),
        (replace(WELL, socket_uid=5), "rights", NOTE, "usermod -aG corolla"),
        (replace(WELL, socket_uid=5, is_member=True), "rights", OK, ""),
        (replace(WELL, state=Folder("/state")), "state folder", NOTE, "root"),
        (
            replace(WELL, state=replace(WELL.state, free_bytes=10**6)),
            "state folder",
            PROBLEM,
            "free at least",
        ),
        (
            replace(WELL, state=replace(WELL.state, writable=False)),
            "state folder",
            PROBLEM,
            "chmod u+rwx /state",
        ),
        (replace(WELL, key=replace(WELL.key, mode=0o644)), "key", PROBLEM, "chmod 600 /state/identity.pem"),
        (replace(WELL, key=replace(WELL.key, uid=0)), "key", PROBLEM, "chown 1000"),
        (
            replace(WELL, offline=None, offline_problem="bad blocks"),
            "configuration",
            PROBLEM,
            "--check-config",
        ),
        (replace(ALONE, taken_ports=(4517,)), "port", PROBLEM, "ss -ltnp"),
        (replace(WELL, unix_s=0.0), "clock", PROBLEM, "set-ntp"),
        (replace(ALONE, clock_synced=False), "clock", NOTE, "set-ntp"),
        (with_workers(replace(WORKER, state="failed")), "worker 0", PROBLEM, "daemonctl events"),
        (
            with_workers(
                replace(WORKER, state="failed", error={"message": "no room", "remedy": "fewer blocks"})
            ),
            "worker 0",
            PROBLEM,
            "fewer blocks",
        ),
        (with_workers(replace(WORKER, restarts=2)), "worker 0", NOTE, "daemonctl events"),
        (with_workers(WORKER), "worker 0", OK, ""),
        (replace(WELL, has_torch=False), "worker environment", NOTE, "worker install"),
        (replace(WELL, has_torch=False, environment=True), "worker environment", OK, ""),
        (
            replace(WELL, has_torch=False, other_environments=("0",)),
            "worker environment",
            PROBLEM,
            "worker install",
        ),
        (replace(WELL, devices=("/dev/nvidia0",)), "device", OK, ""),
        (replace(WELL, devices=("/dev/kfd",), closed_devices=("/dev/kfd",)), "device", NOTE, "render"),
        (replace(WELL, config={"device": ["cuda:0"]}), "device", PROBLEM, "driver"),
        (replace(WELL, config={"memory_bytes": 10**12}), "memory", PROBLEM, "memory_bytes 0"),
        (replace(ALONE, free_memory_bytes=10**6), "memory", PROBLEM, "fewer blocks"),
        (replace(with_workers(WORKER), free_memory_bytes=10**6), "memory", NOTE, "fewer blocks"),
        (
            replace(WELL, cache=replace(WELL.cache, free_bytes=10**9)),
            "disk for weights",
            PROBLEM,
            "--cache-dir",
        ),
        (replace(WELL, config={"disk_bytes": 10**13}), "disk for weights", NOTE, "disk_bytes"),
        (
            replace(WELL, units=(Unit("c.service", "system", "failed", "exit-code"),)),
            "service",
            PROBLEM,
            "journalctl",
        ),
        (
            replace(WELL, units=(Unit("c.service", "user", "active", "success"),)),
            "service",
            OK,
            "journalctl --user",
        ),
        (replace(ALONE, units=(Unit("c.service", "system", "inactive"),)), "service", NOTE, "enable --now"),
    ],
)
def test_each_situation_has_its_state_and_its_remedy(facts: Facts, name: str, state: str, words: str) -> None:
    check = of(facts, name)
    assert (check.state, words in check.remedy + check.text) == (state, True)


def test_settings_of_the_running_daemon_that_its_file_does_not_hold_are_named() -> None:
    assert of(WELL, "configuration").text == "/c.toml"
    other = replace(WELL, config={**OFFLINE["config"], "device": ["cpu"]})
    assert of(other, "configuration").text == "/c.toml, and as it was started or set later: device"


def test_findings_of_the_network_are_among_the_checks() -> None:
    found = (
        Finding("clock", "90 s ahead", "set it"),
        Finding("no_ipv6", "no IPv6", "nothing", is_problem=False),
    )
    checks = diagnose(
        replace(WELL, netcheck=Netcheck("me", "roses", clock_ahead_s=90.0, num_clocks=2, findings=found))
    )
    told = {check.name: check.state for check in checks if check.state != OK}
    assert told == {"network: clock": PROBLEM, "network: no_ipv6": NOTE}
    assert "clock" not in [check.name for check in checks]


# what this machine says


def test_a_taken_port_is_noticed_and_a_free_one_is_not() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        port = holder.getsockname()[1]
        holder.listen()
        settings = {"config": {"listen": [f"/ip4/0.0.0.0/tcp/{port}", "/ip4/0.0.0.0/tcp/0"]}}
        assert list(taken_ports(settings)) == [port]
    assert list(taken_ports(settings)) == []
    assert list(taken_ports(None)) == []


@pytest.mark.parametrize(
    ("address", "port"), [("/ip6/::/tcp/12", 12), ("/ip4/1.2.3.4", 0), ("/ip4/1.2.3.4/tcp", 0)]
)
def test_the_port_of_an_address(address: str, port: int) -> None:
    assert tcp_port(address) == port


def test_files_are_looked_at_as_far_as_they_can_be(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    assert (look(key).exists, look(key).mode) == (True, 0o600)
    assert look(tmp_path / "missing").exists is False
    assert look(tmp_path / "missing").free_bytes > 0


def test_a_program_that_is_missing_is_no_crash() -> None:
    assert run(["/no/such/program"]).returncode == 127
    assert run([sys.executable, "-c", "print(5)"]).stdout == "5\n"


def test_corollad_says_what_it_would_do_or_why_it_would_not(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('blocks = "none"\nstate_dir = "/somewhere"\n')
    told, problem = read_settings(file)
    assert told is not None
    assert (told["config"]["blocks"], told["state_folder"], told["file"], problem) == (
        "none",
        "/somewhere",
        str(file),
        "",
    )
    file.write_text('blocks = "7"\n')
    assert read_settings(file)[0] is None
    assert "blocks is '7'" in read_settings(file)[1]


def test_doctor_works_without_a_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COROLLA_STATE_DIR", str(tmp_path / "state"))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--socket", str(tmp_path / "nobody"), "--json"])
    assert ended.value.code == Exit.DEGRADED
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert (checks["daemon"]["state"], "corollad" in checks["daemon"]["remedy"]) == (PROBLEM, True)
    assert checks["configuration"]["state"] == OK
    assert str(tmp_path / "state") in checks["state folder"]["text"]


def test_the_limits_are_shown_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["config", "--limits"], ["config", "--limits", "--json"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == Exit.OK
    table, envelope = capsys.readouterr().out.rsplit("\n", 2)[:2]
    rows = table.splitlines()
    assert rows[0].split() == ["WHAT", "AT", "MOST", "OF", "WHY"]
    assert len(rows) == len(BOUNDS) + 1
    limits = json.loads(envelope)["limits"]
    assert [limit["value"] for limit in limits] == [bound.value for bound in BOUNDS]
    assert all(limit["reason"] for limit in limits)
