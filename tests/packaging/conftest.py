"""What the tests of packages share: the packages of this tree, and the root of a Debian, each made once."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import corolla

from .container import Container, booted, copy_root, make_root

ROOT = Path(corolla.__file__).parent
DIST = "COROLLA_DIST"  # names a folder with packages that were built before
DEBIAN = "COROLLA_DEBIAN"  # and a root that was made before, as `make_root` does


@pytest.fixture(scope="session")
def packages() -> Path:
    """The folder with the .deb and the .rpm; `build/package` holds what they carry."""
    if DIST in os.environ:
        return Path(os.environ[DIST])
    subprocess.run([ROOT / "packaging/package"], check=True, capture_output=True)
    return ROOT / "build/dist"


@pytest.fixture(scope="session")
def deb(packages: Path) -> Path:
    (package,) = packages.glob(f"corolla_{corolla.__version__}_*.deb")
    return package


@pytest.fixture(scope="session")
def rpm(packages: Path) -> Path:
    (package,) = packages.glob(f"corolla-{corolla.__version__}-*.rpm")
    return package


@pytest.fixture(scope="session")
def fresh_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a Debian that nobody has used."""
    if DEBIAN in os.environ:
        yield Path(os.environ[DEBIAN])
        return
    folder = tmp_path_factory.mktemp("debian") / "root"
    make_root(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def debian(tmp_path: Path, fresh_root: Path) -> Iterator[Container]:
    """A Debian that has just booted."""
    folder = tmp_path / "root"
    copy_root(fresh_root, folder)
    with booted(folder) as container:
        yield container
    shutil.rmtree(folder)
