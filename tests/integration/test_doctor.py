"""netcheck, ping and doctor against real daemons on loopback."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corolla.protocol.errors import Exit
from corolla.sdk.cli import main

from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with local_swarm(None, "--no-mdns", "--no-upnp") as daemons:
        client = daemons.found()
        daemons.add("other", "--blocks", "none", "--join", daemons.token)
        client.wait_for(lambda status: status.num_peers == 1, "has met the other")
        yield daemons


def ctl(capsys: pytest.CaptureFixture[str], daemon: DaemonProcess, *words: str) -> tuple[Any, Any]:
    """Its exit code, and what its envelope holds."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--socket", str(daemon.socket), "--json"])
    return ended.value.code, json.loads(capsys.readouterr().out)


def test_a_member_is_seen_and_pinged(swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]) -> None:
    client, other = swarm.daemons["client"], swarm.daemons["other"]
    peer = other.status().peer
    (view,) = ctl(capsys, client, "peers")[1]["peers"]
    assert (view["peer"], view["connected"], view["relayed"]) == (peer, True, False)
    code, answer = ctl(capsys, client, "ping", peer, "-c", "5")
    assert (code, len(answer["ping"]["rtts_s"]), answer["ping"]["relayed"]) == (Exit.OK, 5, False)
    assert 0 < answer["ping"]["min_s"] <= answer["ping"]["median_s"]
    assert ctl(capsys, client, "ping", "nobody")[0] == Exit.USAGE


def test_netcheck_and_doctor_agree_on_the_network(
    swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    client = swarm.daemons["client"]
    _, told = ctl(capsys, client, "netcheck")
    view = told["netcheck"]
    assert (view["swarm"], view["num_clocks"], len(view["peers"])) == ("test", 1, 1)
    names = {finding["name"] for finding in view["findings"]}
    assert "loopback_only" in names
    _, told = ctl(capsys, client, "doctor")
    checks = {check["name"]: check for check in told["checks"]}
    assert {name.removeprefix("network: ") for name in checks if name.startswith("network: ")} == names
    for name in ("daemon", "version", "rights", "key", "swarm", "clock"):
        assert checks[name]["state"] == "ok", checks[name]


def test_a_bundle_of_a_real_daemon_holds_no_secret(
    swarm: LocalSwarm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = swarm.daemons["other"]
    bundle = tmp_path / "bundle.tar.gz"
    ctl(capsys, other, "doctor", "--bundle", str(bundle))
    with tarfile.open(bundle) as archive:
        contents = {one.name.rpartition("/")[2]: archive.extractfile(one) for one in archive}
        texts = {name: file.read().decode() for name, file in contents.items() if file is not None}
    assert {
        "doctor.json",
        "status.json",
        "config.json",
        "netcheck.json",
        "events.json",
        "versions.json",
    } < set(texts)
    key = (other.folder / "state" / "identity.pem").read_text().splitlines()[1]
    for secret in (swarm.token, swarm.token[-40:], key):
        assert not any(secret in text for text in texts.values())
    assert json.loads(texts["status.json"])["swarm"] == "test"


def test_netcheck_names_members_that_are_gone(swarm: LocalSwarm, capsys: pytest.CaptureFixture[str]) -> None:
    client = swarm.daemons["client"]
    swarm.daemons["other"].kill()

    def told() -> bool:
        code, answer = ctl(capsys, client, "netcheck")
        names = [finding["name"] for finding in answer["netcheck"]["findings"]]
        return code == Exit.DEGRADED and "no_peers" in names

    wait_until(told, "netcheck misses the other")
