"""The state folder: one owner, whole files, and clear words when the disk refuses."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from corolla.daemon.store import MEMBERSHIP_FILE, SEQ_FILE, STATE_FILE, State, migrated, open_store
from corolla.protocol.errors import Code, CorollaError


def refused(folder: Path) -> CorollaError:
    with pytest.raises(CorollaError) as caught, open_store(folder):
        pass
    return caught.value


def test_what_is_remembered_survives(tmp_path: Path) -> None:
    with open_store(tmp_path / "deep" / "state") as store:
        assert store.state == State()
        store.update(swarm_id="ab", swarm="roses", bootstrap=("/ip4/1.2.3.4/tcp/1",))
        store.update(settings={"threads": 2})
        store.save_seq(7)
    with open_store(tmp_path / "deep" / "state") as store:
        assert store.state == State("ab", "roses", ("/ip4/1.2.3.4/tcp/1",), settings={"threads": 2})
        assert store.load_seq() == 7


def test_the_folder_is_the_owners_alone(tmp_path: Path) -> None:
    with open_store(tmp_path / "state") as store:
        assert store.folder.stat().st_mode & 0o777 == 0o700


def test_a_second_daemon_is_refused_and_the_first_named(tmp_path: Path) -> None:
    with open_store(tmp_path):
        program = f"""
from pathlib import Path
from corolla.daemon.store import open_store
with open_store(Path({str(tmp_path)!r})):
    pass
"""
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"process {os.getpid()}" in second.stderr
    assert "--state-dir" in second.stderr


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    with open_store(tmp_path):
        problem = refused(tmp_path)
        assert problem.code is Code.STATE_IN_USE
    with open_store(tmp_path):
        pass


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_store(tmp_path) as store:
        store.update(swarm="roses")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CorollaError) as caught:
            store.update(swarm="thorns")
        assert caught.value.code is Code.DISK_FULL
        assert STATE_FILE in caught.value.message
        assert store.state.swarm == "roses"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", STATE_FILE]
    monkeypatch.undo()
    with open_store(tmp_path) as store:
        assert store.state.swarm == "roses"


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"version": "1"}', '{"version": 1, "settings": 5}', "[" * 9999]
)
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE_FILE).write_text(content)
    problem = refused(tmp_path)
    assert problem.code is Code.UNREADABLE
    assert str(tmp_path / STATE_FILE) in problem.message
    assert "move it away" in problem.remedy


def test_state_of_a_later_corolla_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(json.dumps({"version": 99, "swarm": "roses"}))
    problem = refused(tmp_path)
    assert "version 99" in problem.message
    assert "update Corolla" in problem.remedy
    assert json.loads((tmp_path / STATE_FILE).read_text())["version"] == 99


def test_older_state_is_migrated_step_by_step() -> None:
    def named(content: dict[str, Any]) -> dict[str, Any]:
        return {"names": [content["name"]]}

    def counted(content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "count": len(content["names"])}

    content = migrated({"version": 1, "name": "a"}, Path("x"), {1: named, 2: counted}, newest=3)
    assert content == {"version": 3, "names": ["a"], "count": 1}
    with pytest.raises(ValueError, match="nobody wrote version 0"):
        migrated({"version": 0}, Path("x"), {1: named, 2: counted}, newest=3)


def test_a_lost_sequence_number_counts_from_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.load_seq() == 0
        (tmp_path / SEQ_FILE).write_text("seven\n")
        assert store.load_seq() == 0


def test_a_standing_is_replaced_whole_and_read_by_its_owner_alone(tmp_path: Path) -> None:
    scratch = tmp_path / f"{MEMBERSHIP_FILE}.new"
    with open_store(tmp_path) as store:
        assert store.load_membership() == b""
        scratch.write_bytes(b"left by a crash")
        scratch.chmod(0o644)
        store.save_membership(b"first")
        store.save_membership(b"\x00second")
    with open_store(tmp_path) as store:
        assert store.load_membership() == b"\x00second"
    assert (tmp_path / MEMBERSHIP_FILE).stat().st_mode & 0o777 == 0o600
    assert not scratch.exists()


def test_a_standing_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / MEMBERSHIP_FILE).mkdir()
    with open_store(tmp_path) as store, pytest.raises(CorollaError) as caught:
        store.load_membership()
    assert caught.value.code is Code.UNREADABLE
    assert str(tmp_path / MEMBERSHIP_FILE) in caught.value.message


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    problem = refused(tmp_path / "state")
    assert problem.code is Code.UNREADABLE
    assert str(tmp_path / "state") in problem.message
    assert "--state-dir" in problem.remedy


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    problem = refused(tmp_path / "state")
    assert problem.code is Code.UNREADABLE
