"""The state folder: one daemon's lock, and what it remembers between runs.

Files are replaced whole, so that a crash leaves the old or the new one. The key of the identity is
`identity.py`'s own file in the same folder; weights lie in the cache, not here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ..protocol.errors import Code, CorollaError, error

STATE_FILE: Final = "state.json"
SEQ_FILE: Final = "seq"
CONTRIBUTION_FILE: Final = "contribution.json"
PROFILES_FILE: Final = "profiles.json"
MEMBERSHIP_FILE: Final = "membership"
LOCK_FILE: Final = "lock"
STATE_VERSION: Final = 1
Migration = Callable[[dict[str, Any]], dict[str, Any]]
MIGRATIONS: Final[Mapping[int, Migration]] = {}  # from this version of the file to the next one
_MAX_STATE_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered. swarm_id and swarm are empty outside a swarm; bootstrap: where its members were.

    invited: whether our membership of it has to be proved, by what `load_membership` gives.
    told_swarm: the swarm whose privacy words were said with a text. paused_until: unix seconds; 0 is for good.
    """

    swarm_id: str = ""
    swarm: str = ""
    bootstrap: tuple[str, ...] = ()
    invited: bool = False
    told_swarm: str = ""
    paused: bool = False
    paused_until: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


class Store:
    """A state folder that this process has locked. Made by `open_store`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = self._load()
        self.problem: CorollaError | None = None  # of the last attempt to remember something

    def update(self, **changes: Any) -> None:
        """Change what is remembered, on disk first. Raises `DISK_FULL`, `UNREADABLE`."""
        state = replace(self.state, **changes)
        content = {
            "version": STATE_VERSION,
            "swarm_id": state.swarm_id,
            "swarm": state.swarm,
            "bootstrap": list(state.bootstrap),
            "invited": state.invited,
            "told_swarm": state.told_swarm,
            "paused": state.paused,
            "paused_until": state.paused_until,
            "settings": state.settings,
        }
        self._write(STATE_FILE, json.dumps(content, indent=2) + "\n")
        self.state = state

    def load_seq(self) -> int:
        """The highest sequence number of records that earlier runs used; 0 if that is lost."""
        try:
            return int((self.folder / SEQ_FILE).read_text("ascii"))
        except (OSError, ValueError):
            return 0  # the registry's holders tell the right one: see `Announcements.outbid`

    def save_seq(self, seq: int) -> None:
        """Remember a sequence number before it is used."""
        self._write(SEQ_FILE, f"{seq}\n")

    def load_contribution(self) -> dict[str, float]:
        """What earlier runs did for others; nothing if that is lost, which is no reason not to start."""
        try:
            content = json.loads((self.folder / CONTRIBUTION_FILE).read_text("utf-8"))
            return {str(key): float(value) for key, value in content.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def save_contribution(self, content: Mapping[str, float]) -> None:
        """Remember it. Raises `DISK_FULL`, `UNREADABLE`."""
        self._write(CONTRIBUTION_FILE, json.dumps(dict(content)) + "\n")

    def load_profiles(self) -> dict[str, Any]:
        """What workers measured in earlier runs; nothing if that is lost: they measure again."""
        try:
            content = json.loads((self.folder / PROFILES_FILE).read_text("utf-8"))
            return {str(key): value for key, value in content.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def save_profiles(self, content: Mapping[str, Any]) -> None:
        """Remember it. Raises `DISK_FULL`, `UNREADABLE`."""
        self._write(PROFILES_FILE, json.dumps(dict(content)) + "\n")

    def load_membership(self) -> bytes:
        """The standing in our swarm, as `members/roll.py` encodes it; b"" if there is none. Raises `UNREADABLE`."""
        path = self.folder / MEMBERSHIP_FILE
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as problem:
            raise unusable(path, problem) from problem

    def save_membership(self, standing: bytes) -> None:
        """Remember it, for our user alone to read. Raises `DISK_FULL`, `UNREADABLE`."""
        path = self.folder / MEMBERSHIP_FILE
        scratch = path.with_suffix(".new")
        try:
            scratch.unlink(missing_ok=True)  # one left by a crash may have other rights
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(standing)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as problem:
            scratch.unlink(missing_ok=True)
            raise unusable(path, problem) from problem

    def _load(self) -> State:
        path = self.folder / STATE_FILE
        try:
            with path.open("rb") as file:
                content = migrated(json.loads(file.read(_MAX_STATE_BYTES)), path)
            return State(
                swarm_id=str(content.get("swarm_id", "")),
                swarm=str(content.get("swarm", "")),
                bootstrap=tuple(str(address) for address in content.get("bootstrap", ())),
                invited=bool(content.get("invited", False)),
                told_swarm=str(content.get("told_swarm", "")),
                paused=bool(content.get("paused", False)),
                paused_until=float(content.get("paused_until", 0.0)),
                settings=dict(content.get("settings", {})),
            )
        except FileNotFoundError:
            return State()
        except OSError as problem:
            raise unusable(path, problem) from problem
        except (ValueError, TypeError, RecursionError) as problem:
            raise error(
                Code.UNREADABLE,
                f"{path} is damaged: {problem}",
                "move it away; the daemon then forgets its swarm and settings, and you join again",
            ) from problem

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        scratch = path.with_suffix(".new")
        try:
            with scratch.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as problem:
            scratch.unlink(missing_ok=True)
            self.problem = unusable(path, problem)
            raise self.problem from problem
        self.problem = None


def migrated(
    content: Any,
    path: Path,
    migrations: Mapping[int, Migration] = MIGRATIONS,
    newest: int = STATE_VERSION,
) -> dict[str, Any]:
    """What an older version wrote, in the form of the newest; the file changes with the next update.

    Raises ValueError if it is not of any version's form, and `UNREADABLE` if it is of a later one.
    """
    if not isinstance(content, dict) or not isinstance(version := content.get("version"), int):
        raise ValueError("it does not tell its version")
    if version > newest:
        raise error(
            Code.UNREADABLE,
            f"{path} has version {version}, written by a later Corolla; this one reads up to {newest}",
            "update Corolla, or give this one its own folder with --state-dir",
        )
    for old in range(version, newest):
        if old not in migrations:
            raise ValueError(f"nobody wrote version {old}")
        content = migrations[old](content)
    return {**content, "version": newest}


@contextmanager
def open_store(folder: Path) -> Iterator[Store]:
    """The state folder, made if need be, for this process alone.

    Raises `STATE_IN_USE` naming the process that has it, `UNREADABLE`, `DISK_FULL`.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = path.open("ab+", buffering=0)  # what a full disk refused must not come up again at closing
    except OSError as problem:
        raise unusable(folder, problem) from problem
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            lock.seek(0)
            owner = lock.read(32).decode("ascii", "replace").strip() or "unknown"
            raise error(
                Code.STATE_IN_USE,
                f"another daemon (process {owner}) uses the state folder {folder}",
                "stop it with `daemonctl stop`, or give this one its own with --state-dir",
            ) from problem
        try:
            lock.seek(0)
            lock.truncate()
            lock.write(f"{os.getpid()}\n".encode("ascii"))
        except OSError as problem:
            raise unusable(path, problem) from problem
        yield Store(folder)


def unusable(path: Path, problem: OSError) -> CorollaError:
    """The error for a file of ours that the system refuses."""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return error(Code.DISK_FULL, f"no room on the disk for {path}", "free some space and start again")
    return error(
        Code.UNREADABLE,
        f"cannot use {path}: {problem.strerror or problem}",
        "give the daemon's user this folder, or choose another with --state-dir",
    )
