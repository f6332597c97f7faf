"""The .deb as a volunteer meets it: installed, started, stopped, misconfigured, removed, purged."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import corolla

from .container import Container, booted, make_root, why_not

ROOT = Path(corolla.__file__).parent
UNIT = ROOT / "packaging/service/corollad.service"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


@pytest.fixture(scope="module")
def package() -> Path:
    subprocess.run([ROOT / "packaging/package", "deb"], check=True, capture_output=True)
    (package,) = (ROOT / "build/dist").glob(f"corolla_{corolla.__version__}_*.deb")
    return package


@pytest.fixture
def debian(tmp_path: Path, package: Path) -> Iterator[Container]:
    make_root(tmp_path / "root")
    shutil.copy(package, tmp_path / "root/corolla.deb")
    with booted(tmp_path / "root") as container:
        yield container


def status_of(debian: Container) -> dict[str, Any]:
    status = json.loads(debian.run("sh", "-c", "daemonctl status --json 2>/dev/null"))["status"]
    assert isinstance(status, dict)
    return status


def test_the_package_is_installed_started_stopped_and_removed(debian: Container) -> None:
    debian.run("dpkg", "-i", "/corolla.deb")

    assert debian.run("systemctl", "is-active", "corollad").strip() == "active"
    shown = debian.run("systemctl", "show", "corollad", "-p", "StatusText")
    assert "not in a swarm: daemonctl join TOKEN" in shown
    debian.run("daemonctl", "swarm", "create", "bees")
    peer = status_of(debian)["peer"]

    debian.run("systemctl", "restart", "corollad")
    status = status_of(debian)
    assert (status["peer"], status["swarm"]) == (peer, "bees")

    debian.run("systemctl", "stop", "corollad")
    assert "Result=success" in debian.run("systemctl", "show", "corollad", "-p", "Result")
    assert debian.exit_code("daemonctl", "status") == 3

    debian.run("dpkg", "-r", "corolla")
    assert debian.has("/var/lib/corolla")  # the owner's identity and memberships
    assert debian.has("/etc/corolla/config.toml")
    for path in ("/usr/lib/corolla", "/usr/bin/corollad", "/var/cache/corolla", "/run/corolla"):
        assert not debian.has(path), path
    assert debian.exit_code("pgrep", "-u", "corolla") == 1

    debian.run("dpkg", "-P", "corolla")
    assert not debian.has("/var/lib/corolla")
    assert not debian.has("/etc/corolla")


def test_a_wrong_configuration_is_told_once_and_not_tried_over_and_over(debian: Container) -> None:
    debian.run("dpkg", "-i", "/corolla.deb")
    debian.run("systemctl", "stop", "corollad")
    with (debian.folder / "etc/corolla/config.toml").open("a") as file:
        file.write('modell = "x"\n')

    assert debian.exit_code("systemctl", "start", "corollad") != 0

    shown = debian.run("systemctl", "show", "corollad", "-p", "NRestarts", "-p", "ExecMainStatus")
    assert "NRestarts=0" in shown
    assert "ExecMainStatus=2" in shown
    assert "unknown key 'modell'" in debian.run("journalctl", "-u", "corollad", "--no-pager")


def test_an_update_keeps_identity_and_swarm_and_a_changed_configuration(debian: Container) -> None:
    debian.run("dpkg", "-i", "/corolla.deb")
    debian.run("daemonctl", "swarm", "create", "bees")
    peer = status_of(debian)["peer"]
    with (debian.folder / "etc/corolla/config.toml").open("a") as file:
        file.write("threads = 1\n")

    debian.run("dpkg", "-i", "/corolla.deb")

    status = status_of(debian)
    assert (status["peer"], status["swarm"]) == (peer, "bees")
    assert (debian.folder / "etc/corolla/config.toml").read_text().endswith("threads = 1\n")


def test_the_unit_is_in_order_and_closed(debian: Container) -> None:
    debian.run("dpkg", "-i", "/corolla.deb")
    assert debian.run("systemd-analyze", "verify", "/usr/lib/systemd/system/corollad.service").strip() == ""
    report = debian.run("systemd-analyze", "security", "corollad.service")
    exposure = float(report.rsplit("corollad.service:", 1)[1].split()[0])
    assert exposure <= 2.0
