"""The layers hold: who may import whom, what stays light, and what the wheel carries."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import corolla

ROOT = Path(corolla.__file__).parent
FOLDERS = ("protocol", "model", "daemon", "sdk")
HEAVY = ("torch", "transformers", "numpy")


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, anywhere in it, except for type checking only."""
    package = ("corolla", *path.relative_to(ROOT).parts[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_no_other_folder_than_protocol(folder: str) -> None:
    others = tuple(f"corolla.{name}" for name in FOLDERS if name not in (folder, "protocol"))
    for path in modules(folder):
        for name in imported(path):
            assert not name.startswith(others), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("folder", ["protocol", "daemon"])
def test_protocol_and_daemon_never_import_heavy_libraries(folder: str) -> None:
    for path in modules(folder):
        for name in imported(path):
            assert name.split(".")[0] not in HEAVY, f"{path.relative_to(ROOT)} imports {name}"


def test_only_records_and_invitations_import_cryptography_in_protocol() -> None:
    users = {
        path.name
        for path in modules("protocol")
        if any(name.split(".")[0] == "cryptography" for name in imported(path))
    }
    assert users == {"records.py", "invitations.py"}


def test_only_the_network_folder_and_identity_import_libp2p() -> None:
    for path in modules("daemon"):
        if "network" in path.parts or path.name == "identity.py":
            continue
        assert not any(name.split(".")[0] == "libp2p" for name in imported(path)), path


def test_the_sdk_does_not_sign() -> None:
    for path in modules("sdk"):
        signing = ("corolla.protocol.records", "corolla.protocol.invitations")
        assert not any(name.startswith(signing) for name in imported(path)), path


@pytest.mark.parametrize("name", ["corolla", "corolla.daemon", "corolla.daemon.__main__", "corolla.sdk.cli"])
def test_importing_does_not_pull_in_torch(name: str) -> None:
    program = f"import sys, {name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    heavy = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert heavy.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["pickle", "marshal", "shelve", "requests"])
def test_nothing_unpickles(module: str) -> None:
    for folder in FOLDERS:
        for path in modules(folder):
            assert module not in {name.split(".")[0] for name in imported(path)}, path


def test_no_assert_guards_input() -> None:
    for folder in FOLDERS:
        for path in modules(folder):
            found = [
                node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)
            ]
            assert not found, f"{path.relative_to(ROOT)}:{found}"


def test_the_wheel_is_told_of_every_package() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for folder in FOLDERS for path in modules(folder)}
    names = {".".join(("corolla", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(told) == {"corolla", *names}


@pytest.mark.long
def test_the_wheel_holds_every_package(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in FOLDERS:
        for path in modules(folder):
            assert f"corolla/{path.relative_to(ROOT)}" in names
    assert "corolla/py.typed" in names
    assert not any(name.startswith(("corolla/tests", "tests", "packaging")) for name in names)
