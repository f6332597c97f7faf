"""The packages as a volunteer meets them: installed, started, stopped, misconfigured, removed, purged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .container import Container, why_not

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

RPM = ("rpm", "--force-debian", "--nodeps")  # its dependencies go by other names here
OURS = ("/usr/lib/corolla", "/usr/bin/corollad", "/usr/bin/daemonctl", "/var/cache/corolla", "/run/corolla")


def status_of(debian: Container) -> dict[str, Any]:
    status = json.loads(debian.run("sh", "-c", "daemonctl status --json 2>/dev/null"))["status"]
    assert isinstance(status, dict)
    return status


def shown(debian: Container, *properties: str) -> list[str]:
    """Properties of the service."""
    lines = debian.run("systemctl", "show", "corollad").splitlines()
    values = dict(line.partition("=")[::2] for line in lines)
    return [values[name] for name in properties]


@pytest.fixture
def install(debian: Container, deb: Path) -> Callable[[], None]:
    """Installs the .deb, or installs it again."""
    shutil.copy(deb, debian.folder / "corolla.deb")

    def install() -> None:
        debian.run("dpkg", "-i", "/corolla.deb")

    return install


def is_running_and_remembers_its_swarm(debian: Container) -> None:
    """Found a swarm, start again, stop."""
    assert shown(debian, "ActiveState") == ["active"]
    assert (
        "not in a swarm: daemonctl join TOKEN" in shown(debian, "StatusText")[0]
    )  # as systemctl status shows it
    debian.run("daemonctl", "swarm", "create", "bees")
    peer = status_of(debian)["peer"]

    debian.run("systemctl", "restart", "corollad")
    status = status_of(debian)
    assert (status["peer"], status["swarm"]) == (peer, "bees")

    debian.run("systemctl", "reload", "corollad")
    assert shown(debian, "ActiveState", "NRestarts") == ["active", "0"]

    debian.run("systemctl", "stop", "corollad")
    assert shown(debian, "Result") == ["success"]
    assert debian.exit_code("daemonctl", "status") == 3


def is_gone_but_for_the_owners_data(debian: Container) -> None:
    assert debian.has("/var/lib/corolla/identity.pem")
    for path in (*OURS, "/etc/systemd/system/multi-user.target.wants/corollad.service"):
        assert not debian.has(path), path
    assert debian.exit_code("pgrep", "-u", "corolla") == 1


def test_the_deb_is_installed_started_stopped_and_removed(
    debian: Container, install: Callable[[], None]
) -> None:
    install()
    is_running_and_remembers_its_swarm(debian)
    debian.run("dpkg", "-r", "corolla")
    is_gone_but_for_the_owners_data(debian)
    assert debian.has("/etc/corolla/config.toml")

    install()  # its owner thinks better of it
    assert status_of(debian)["swarm"] == "bees"

    debian.run("dpkg", "-P", "corolla")
    assert not debian.has("/var/lib/corolla")
    assert not debian.has("/etc/corolla")
    assert debian.exit_code("id", "corolla") == 1


def test_the_rpm_is_installed_started_updated_and_removed(debian: Container, rpm: Path) -> None:
    shutil.copy(rpm, debian.folder / "corolla.rpm")
    needed = debian.run(*RPM[:2], "-qp", "--requires", "/corolla.rpm").split("\n")
    assert [line for line in needed if "glibc >=" in line]
    assert {"systemd", "shadow-utils"} <= set(needed)

    debian.run(*RPM, "-i", "/corolla.rpm")
    assert debian.run("stat", "-c", "%U:%G %a", "/etc/corolla/config.toml").strip() == "root:corolla 640"
    assert debian.run("stat", "-c", "%U:%G %a", "/var/lib/corolla").strip() == "corolla:corolla 700"
    assert debian.run(*RPM[:2], "-qc", "corolla").strip() == "/etc/corolla/config.toml"
    is_running_and_remembers_its_swarm(debian)

    debian.run(*RPM, "-U", "--force", "/corolla.rpm")
    assert shown(debian, "ActiveState", "UnitFileState") == ["inactive", "enabled"]  # as its owner left it
    debian.run("systemctl", "start", "corollad")
    with (debian.folder / "etc/corolla/config.toml").open("a") as file:
        file.write("threads = 1\n")
    debian.run(*RPM, "-U", "--force", "/corolla.rpm")
    assert status_of(debian)["swarm"] == "bees"
    assert (debian.folder / "etc/corolla/config.toml").read_text().endswith("threads = 1\n")

    debian.run(*RPM, "-e", "corolla")
    is_gone_but_for_the_owners_data(debian)
    assert debian.has("/etc/corolla/config.toml.rpmsave")


def test_what_no_other_start_would_cure_is_told_once_and_not_tried_over_and_over(
    debian: Container, install: Callable[[], None]
) -> None:
    install()
    debian.run("systemctl", "stop", "corollad")
    settings = debian.folder / "etc/corolla/config.toml"
    right = settings.read_text()
    settings.write_text(right + 'modell = "x"\n')
    fails_for_good(debian, "2", "unknown key 'modell'")

    settings.write_text(right)
    (debian.folder / "var/lib/corolla/state.json").write_text("{")
    fails_for_good(debian, "4", "state.json is damaged")


def fails_for_good(debian: Container, status: str, reason: str) -> None:
    assert debian.exit_code("systemctl", "start", "corollad") != 0
    assert shown(debian, "ActiveState", "NRestarts", "ExecMainStatus") == ["failed", "0", status]
    assert reason in debian.run("journalctl", "-u", "corollad", "--no-pager")


def test_an_update_leaves_the_service_as_its_owner_had_it(
    debian: Container, install: Callable[[], None]
) -> None:
    install()
    debian.run("daemonctl", "swarm", "create", "bees")
    peer = status_of(debian)["peer"]
    with (debian.folder / "etc/corolla/config.toml").open("a") as file:
        file.write("threads = 1\n")

    install()
    status = status_of(debian)
    assert (status["peer"], status["swarm"]) == (peer, "bees")
    assert (debian.folder / "etc/corolla/config.toml").read_text().endswith("threads = 1\n")

    debian.run("systemctl", "disable", "--now", "corollad")
    install()
    assert shown(debian, "ActiveState", "UnitFileState") == ["inactive", "disabled"]


def test_the_unit_is_in_order_and_closed(debian: Container, install: Callable[[], None]) -> None:
    install()
    assert debian.run("systemd-analyze", "verify", "/usr/lib/systemd/system/corollad.service").strip() == ""
    user_unit = "/usr/lib/systemd/user/corollad.service"
    asked = ("env", "XDG_RUNTIME_DIR=/tmp", "systemd-analyze", "verify", "--user")
    assert debian.run(*asked, user_unit).strip() == ""
    report = debian.run("systemd-analyze", "security", "corollad.service")
    last = report.rsplit("corollad.service:", 1)[1].split()
    print(f"systemd-analyze security: {' '.join(last[:2])}")
    assert float(last[0]) <= 2.0
