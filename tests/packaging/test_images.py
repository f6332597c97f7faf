"""The packages put into a system that does not run, as whoever builds images does; then it boots.

The root is a Debian also for the .rpm, since no other is to be had from Debian's archive: what it needs of a Red Hat
system is there under other names, and an empty package says so to dnf. The scripts run without /proc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .container import booted, copy_root, why_not
from .test_service import OURS, is_running_and_remembers_its_swarm

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

needs_dnf = pytest.mark.skipif(
    not (shutil.which("dnf") and shutil.which("rpmbuild")), reason="needs dnf: apt-get install dnf rpm"
)
RED_HAT = """
Name: red-hat-in-name
Version: 1
Release: 1
Summary: What the system has, in the words of another
License: none
BuildArch: noarch
Provides: glibc = 2.36, systemd = 252, shadow-utils = 4.13
%description
Nothing but names.
%files
"""


@pytest.fixture
def root(tmp_path: Path, fresh_root: Path) -> Iterator[Path]:
    folder = tmp_path / "root"
    copy_root(fresh_root, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """The empty package."""
    specification = tmp_path / "names.spec"
    specification.write_text(RED_HAT)
    run("rpmbuild", "--quiet", "--define", f"_topdir {tmp_path}/rpm", "-bb", str(specification))
    (package,) = tmp_path.glob("rpm/RPMS/noarch/*.rpm")
    return package


def run(*command: str) -> str:
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{said}"
    return said


def dnf(root: Path, *words: str) -> str:
    """dnf for a root, without any repository."""
    bare = ("--installroot", str(root), "--setopt=reposdir=/nowhere", "--releasever=1", "--nogpgcheck", "-y")
    return run("dnf", *bare, *words)


def works_once_booted(root: Path) -> None:
    with booted(root) as system:
        of_config = system.run("stat", "-c", "%U:%G %a", "/etc/corolla/config.toml").strip()
        assert of_config == "root:corolla 640"
        assert system.run("find", "/usr/lib/corolla", "-not", "-user", "root") == ""
        system.run("systemctl", "is-active", "--wait", "corollad")
        is_running_and_remembers_its_swarm(system)


def is_gone_but_for_the_owners_data(root: Path) -> None:
    assert (root / "var/lib/corolla/identity.pem").exists()
    for path in (*OURS, "/etc/systemd/system/multi-user.target.wants/corollad.service"):
        assert not os.path.lexists(root / path.lstrip("/")), path


@needs_dnf
def test_dnf_puts_the_rpm_into_an_image_and_takes_it_out_again(root: Path, rpm: Path, names: Path) -> None:
    said = dnf(root, "install", str(names), str(rpm))
    assert "scriptlet failed" not in said, said
    works_once_booted(root)
    said = dnf(root, "reinstall", str(rpm))
    assert "scriptlet failed" not in said, said

    dnf(root, "remove", "corolla")
    is_gone_but_for_the_owners_data(root)
    assert not (root / "etc/corolla").exists()


def test_dpkg_puts_the_deb_into_an_image_and_takes_it_out_again(root: Path, deb: Path) -> None:
    shutil.copy(deb, root / "corolla.deb")
    run("chroot", str(root), "dpkg", "-i", "/corolla.deb")
    works_once_booted(root)
    run("chroot", str(root), "dpkg", "-i", "/corolla.deb")

    run("chroot", str(root), "dpkg", "-r", "corolla")
    is_gone_but_for_the_owners_data(root)
    assert (root / "etc/corolla/config.toml").exists()
