"""Gathers the facts of this machine that `doctor` checks: files, ports, devices, units, and what the daemon says.

It looks and judges nothing. What cannot be looked at is left as unknown; nothing is changed.
"""

from __future__ import annotations

import errno
import glob
import grp
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from .. import __version__
from ..protocol.errors import CorollaError
from ..protocol.places import (
    SERVICE_CONFIG,
    SERVICE_SOCKET,
    SERVICE_STATE,
    user_cache_folder,
    user_state_folder,
)
from .client import Daemon, connect
from .doctor import Facts, Folder, Unit

GROUP: Final = "corolla"
UNIT: Final = "corollad.service"
KEY_FILE: Final = "identity.pem"
SERVICE_CACHE: Final = Path("/var/cache/corolla")
COMMAND_TIMEOUT_S: Final = 20.0  # of systemctl, journalctl, and a corollad that only reads its settings
MAX_LOG_LINES: Final = 500
_NEEDED: Final = ("torch", "transformers", "safetensors")
_DEVICES: Final = ("/dev/nvidia[0-9]*", "/dev/kfd")
_UNIT_FACTS: Final = ("LoadState", "ActiveState", "Result", "NRestarts")


def gather(wanted: str | None = None) -> Facts:
    """The facts. wanted: the daemon's socket; None looks where `connect` does."""
    facts = Facts(__version__, os.getuid(), time.time(), is_member=_is_member())
    facts = ask_daemon(facts, wanted)
    is_root_alone = facts.status is None and facts.uid == 0 and wanted is None
    serves = facts.socket == str(SERVICE_SOCKET) or (is_root_alone and _exists(SERVICE_STATE))
    offline, problem = read_settings(SERVICE_CONFIG if serves and _exists(SERVICE_CONFIG) else None)
    state, cache = _folders(facts, offline, serves)
    environments = _entries(state / "worker")
    total, free = _memory()
    devices = tuple(sorted(path for pattern in _DEVICES for path in glob.glob(pattern)))
    return replace(
        facts,
        offline=offline,
        offline_problem=problem,
        taken_ports=tuple(taken_ports(offline)) if facts.status is None else (),
        state=look(state),
        key=look(state / KEY_FILE),
        cache=look(cache),
        has_torch=all(find_spec(name) is not None for name in _NEEDED),
        environment=_exists(state / "worker" / __version__ / "corolla-installed"),
        other_environments=tuple(name for name in environments if name != __version__),
        devices=devices,
        closed_devices=tuple(path for path in devices if not os.access(path, os.R_OK | os.W_OK)),
        memory_bytes=total,
        free_memory_bytes=free,
        clock_synced=_clock_synced(),
        units=tuple(_units()),
    )


def ask_daemon(facts: Facts, wanted: str | None) -> Facts:
    """The facts with what a daemon says, and with why it does not."""
    try:
        daemon = connect(wanted)
    except CorollaError as problem:
        return replace(facts, trouble=(_words(problem),))
    trouble: list[tuple[str, str, str]] = []
    with daemon:
        path = str(daemon.socket)
        return replace(
            facts,
            socket=path,
            socket_uid=look(Path(path)).uid,
            status=_answer(daemon, Daemon.status, trouble),
            config=_answer(daemon, Daemon.config, trouble),
            netcheck=_answer(daemon, Daemon.netcheck, trouble),
            events=_answer(daemon, lambda one: tuple(one.events()), trouble) or (),
            trouble=tuple(trouble),
        )


def _answer(daemon: Daemon, question: Callable[[Daemon], Any], trouble: list[tuple[str, str, str]]) -> Any:
    try:
        return question(daemon)
    except CorollaError as problem:  # of an older daemon, say; the other answers still tell something
        trouble.append(_words(problem))
        return None


def _words(problem: CorollaError) -> tuple[str, str, str]:
    return problem.code.value, problem.message, problem.remedy


def read_settings(file: Path | None) -> tuple[Mapping[str, Any] | None, str]:
    """What a daemon started now would do, as it says itself, or the reason why it would not start."""
    named = ["--config", str(file)] if file is not None else []
    done = run([sys.executable, "-P", "-m", "corolla.daemon", *named, "--check-config"])
    try:
        told = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        told = None
    if isinstance(told, dict):
        return told, ""
    return None, (done.stderr.strip().splitlines() or ["corollad --check-config said nothing"])[-1]


def taken_ports(offline: Mapping[str, Any] | None) -> Iterator[int]:
    """The ports of these settings that another program holds."""
    settings = offline.get("config", {}) if offline is not None else {}
    for port in dict.fromkeys(tcp_port(str(address)) for address in settings.get("listen", ())):
        if not port:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError as problem:
                if problem.errno == errno.EADDRINUSE:
                    yield port


def tcp_port(address: str) -> int:
    """Of a multiaddress; 0 if it has none, or any."""
    parts = address.split("/")
    after = parts[parts.index("tcp") + 1 :] if "tcp" in parts else []
    return int(after[0]) if after and after[0].isdecimal() else 0


def look(path: Path) -> Folder:
    """A folder or file as far as we may see it. Free space is that of the disk where it is or would be."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return Folder(str(path), False, free_bytes=_free_bytes(path.parent))
    except OSError:
        return Folder(str(path))
    writable = os.access(path, os.W_OK)
    return Folder(str(path), True, found.st_uid, found.st_mode & 0o7777, writable, _free_bytes(path))


def log_lines(units: Sequence[Unit]) -> str:
    """The last lines that the service wrote, as far as we may read them."""
    for unit in units:
        scope = ["--user"] if unit.scope == "user" else []
        limit = ["-n", str(MAX_LOG_LINES), "--no-pager", "-o", "short-iso"]
        done = run(["journalctl", *scope, "-u", unit.name, *limit])
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout
    return "no log can be read here; a daemon in the foreground writes it to its terminal\n"


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A program's answer; one that is missing or hangs answers with code 127 or 124."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=COMMAND_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} hangs")
    except OSError as problem:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: {problem.strerror}")


def _folders(facts: Facts, offline: Mapping[str, Any] | None, serves: bool) -> tuple[Path, Path]:
    """The state folder and the cache folder, as the daemon says, or as one would that is started."""
    told = offline or {}
    state = Path(told.get("state_folder") or user_state_folder())
    cache = Path(told.get("cache_folder") or user_cache_folder())
    if serves:
        state, cache = SERVICE_STATE, SERVICE_CACHE
    if facts.status is not None:
        state = Path(facts.status.state_folder)
    if facts.config is not None and facts.config.get("cache_dir"):
        cache = Path(str(facts.config["cache_dir"])).expanduser()
    return state, cache


def _free_bytes(path: Path) -> int:
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return 0


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _entries(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _is_member() -> bool:
    try:
        return grp.getgrnam(GROUP).gr_gid in (os.getgid(), *os.getgroups())
    except KeyError:
        return False


def _memory() -> tuple[int, int]:
    """Bytes in all, and available."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 0, 0
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)


def _clock_synced() -> bool | None:
    done = run(["timedatectl", "show", "-p", "NTPSynchronized", "--value"])
    return {"yes": True, "no": False}.get(done.stdout.strip()) if done.returncode == 0 else None


def _units() -> Iterator[Unit]:
    for scope in ("system", "user"):
        options = ["--user"] if scope == "user" else []
        done = run(["systemctl", *options, "show", UNIT, f"--property={','.join(_UNIT_FACTS)}"])
        if done.returncode:
            continue
        told = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
        if told.get("LoadState") in (None, "", "not-found"):
            continue
        restarts = told.get("NRestarts", "")
        count = int(restarts) if restarts.isdecimal() else 0
        yield Unit(UNIT, scope, told.get("ActiveState", ""), told.get("Result", ""), count)
