"""What is right and wrong with Corolla on this machine: pure checks of facts that `machine` gathered.

Each check is a function of all facts; it gives any number of results, each with its remedy. It looks at
nothing itself, so it works alike with a daemon and without one.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from ..protocol.netcheck import Netcheck
from ..protocol.views import DaemonEvent, Status

OK, NOTE, PROBLEM = "ok", "note", "problem"
LITTLE_DISK_BYTES: Final = (
    100 * 10**6
)  # a state folder holds a few hundred kilobytes, its workers' environment more
LITTLE_CACHE_BYTES: Final = 2 * 10**9  # a small model's blocks, and their converted copy
LITTLE_MEMORY_BYTES: Final = 500 * 10**6  # a worker's own code takes about so much
EARLIEST_UNIX_S: Final = 1_750_000_000.0  # before this version was written


@dataclass(frozen=True, slots=True)
class Check:
    """One result. state: `ok`, `note` (nothing is broken) or `problem`; remedy: what to do, "" if nothing."""

    name: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder or file. exists: None if we may not look. mode: permission bits. writable: by us."""

    path: str
    exists: bool | None = None
    uid: int = -1
    mode: int = 0
    writable: bool = False
    free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """A systemd unit of Corolla. scope: `system` or `user`."""

    name: str
    scope: str
    active: str = ""
    result: str = ""
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of this machine. Of a daemon: status, config, netcheck, events, as far as it answered.

    trouble: why no daemon answered, or not all of it; as `(code, message, remedy)`. is_member: whether this user
    is in the group corolla; socket_uid: whose the socket is. offline: the settings with which a daemon would
    start; offline_problem: why it would not. taken_ports: of `offline`, those that another program has.
    devices, closed_devices: files of GPUs, and those of them that we may not open. clock_synced: None if unknown.
    has_torch: whether our own interpreter has what workers need; environment: the workers' own, of this version;
    other_environments: of other versions.
    """

    version: str
    uid: int
    unix_s: float
    status: Status | None = None
    config: Mapping[str, Any] | None = None
    netcheck: Netcheck | None = None
    events: tuple[DaemonEvent, ...] = ()
    trouble: tuple[tuple[str, str, str], ...] = ()
    socket: str = ""
    socket_uid: int = -1
    is_member: bool = False
    offline: Mapping[str, Any] | None = None
    offline_problem: str = ""
    taken_ports: tuple[int, ...] = ()
    state: Folder = field(default_factory=lambda: Folder(""))
    key: Folder = field(default_factory=lambda: Folder(""))
    cache: Folder = field(default_factory=lambda: Folder(""))
    has_torch: bool = False
    environment: bool = False
    other_environments: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    closed_devices: tuple[str, ...] = ()
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    clock_synced: bool | None = None
    units: tuple[Unit, ...] = ()


Rule: TypeAlias = Callable[[Facts], Iterator[Check]]


def diagnose(facts: Facts) -> tuple[Check, ...]:
    """All checks, in the order in which a person would make them."""
    return tuple(check for rule in RULES for check in rule(facts))


def _daemon(facts: Facts) -> Iterator[Check]:
    for code, message, remedy in facts.trouble:
        yield Check("daemon", PROBLEM, f"{message} [{code}]", remedy or "start it: corollad")
    if facts.status is None:
        return
    yield Check("daemon", OK, f"answers on {facts.socket}, pid {facts.status.pid}, {facts.status.state}")
    if facts.status.version == facts.version:
        yield Check("version", OK, f"{facts.version}, as this program")
    else:
        yield Check(
            "version",
            PROBLEM,
            f"the daemon is {facts.status.version}, this program {facts.version}",
            "start the daemon again: daemonctl stop, then corollad (a service: systemctl restart corollad)",
        )


def _rights(facts: Facts) -> Iterator[Check]:
    if facts.status is None:
        return
    if facts.uid in (0, facts.socket_uid):
        yield Check("rights", OK, "this user may see, use and manage the daemon")
    elif facts.is_member:
        yield Check("rights", OK, "this user may see and use the daemon (group corolla)")
    else:
        yield Check(
            "rights",
            NOTE,
            "this user may only see what the daemon does",
            "to use it: sudo usermod -aG corolla USER, then log in again",
        )


def _state(facts: Facts) -> Iterator[Check]:
    folder, key = facts.state, facts.key
    if folder.exists is None:
        yield Check("state folder", NOTE, f"{folder.path} is closed to this user", "run as root to check it")
        return
    if not folder.exists:
        yield Check("state folder", NOTE, f"{folder.path} is made when the daemon starts")
        return
    if folder.free_bytes < LITTLE_DISK_BYTES:
        text = f"{folder.path} lies on a disk with {folder.free_bytes // 10**6} MB left"
        yield Check("state folder", PROBLEM, text, "free at least 100 MB there, or move it: --state-dir")
    elif folder.uid == facts.uid and not folder.writable:
        remedy = f"chmod u+rwx {folder.path}, and see that its disk is not read-only"
        yield Check("state folder", PROBLEM, f"{folder.path} cannot be written", remedy)
    else:
        yield Check("state folder", OK, f"{folder.path}, {folder.free_bytes // 10**9} GB free")
    if key.exists and key.mode & 0o077:
        text = f"{key.path} has mode {stat.S_IMODE(key.mode):04o}: others can speak as this daemon"
        yield Check("key", PROBLEM, text, f"chmod 600 {key.path}")
    elif key.exists and key.uid != folder.uid:
        text = f"{key.path} belongs to uid {key.uid}, its folder to {folder.uid}"
        yield Check("key", PROBLEM, text, f"chown {folder.uid} {key.path}")
    elif key.exists:
        yield Check("key", OK, f"{key.path}, for its owner alone")


def _config(facts: Facts) -> Iterator[Check]:
    if facts.offline is None:
        text = facts.offline_problem or "corollad did not say what it would do"
        remedy = "correct it; corollad --check-config tells whether it is right"
        yield Check("configuration", PROBLEM, text, remedy)
    else:
        source = str(facts.offline.get("file") or "no file; the defaults")
        others = _set_otherwise(facts)
        if others:
            source = f"{source}, and as it was started or set later: {', '.join(others)}"
        yield Check("configuration", OK, source)


def _set_otherwise(facts: Facts) -> list[str]:
    """Settings of the running daemon that another start without flags would not have."""
    mine, fresh = facts.config or {}, (facts.offline or {}).get("config") or {}
    return sorted(key for key in mine if key in fresh and mine[key] != fresh[key])


def _port(facts: Facts) -> Iterator[Check]:
    if facts.status is not None:
        return  # netcheck knows better
    if facts.taken_ports:
        yield Check(
            "port",
            PROBLEM,
            f"another program has TCP port {', '.join(map(str, facts.taken_ports))}",
            "end it (ss -ltnp shows it), or choose another with --listen",
        )
    elif facts.offline is not None:
        yield Check("port", OK, "free: " + ", ".join(_settings(facts).get("listen", ())))


def _clock(facts: Facts) -> Iterator[Check]:
    remedy = "timedatectl set-ntp true"
    if facts.unix_s < EARLIEST_UNIX_S:
        yield Check("clock", PROBLEM, "the clock shows a time long past", remedy)
    elif facts.netcheck is not None and facts.netcheck.clock_ahead_s is not None:
        ahead_s, count = facts.netcheck.clock_ahead_s, facts.netcheck.num_clocks
        if not any(finding.name == "clock" for finding in facts.netcheck.findings):
            yield Check("clock", OK, f"{ahead_s:+.0f} s against {count} members")
    elif facts.clock_synced is False:
        yield Check("clock", NOTE, "the clock is not kept right by the network", remedy)
    elif facts.clock_synced:
        yield Check("clock", OK, "kept right by the network")


def _swarm(facts: Facts) -> Iterator[Check]:
    if facts.status is not None and facts.status.swarm is not None:
        yield Check("swarm", OK, f"in {facts.status.swarm}, with {facts.status.num_peers} peers")
    for finding in facts.netcheck.findings if facts.netcheck is not None else ():
        state = PROBLEM if finding.is_problem else NOTE
        yield Check(f"network: {finding.name}", state, finding.text, finding.remedy)


def _workers(facts: Facts) -> Iterator[Check]:
    for worker in facts.status.workers if facts.status is not None else ():
        name = f"worker {worker.worker}"
        what = (
            f"{worker.model} {worker.start}:{worker.end} {worker.state} on {worker.device or 'no device yet'}"
        )
        problem = worker.error if isinstance(worker.error, dict) else {}
        if worker.state == "failed" or problem:
            text = f"{what}: {problem.get('message', 'it says not why')}"
            remedy = str(problem.get("remedy") or "daemonctl events tells what went before")
            yield Check(name, PROBLEM if worker.state in ("failed", "stopped") else NOTE, text, remedy)
        elif worker.restarts:
            yield Check(
                name, NOTE, f"{what}, started {worker.restarts} times anew", "daemonctl events tells why"
            )
        else:
            yield Check(name, OK, what)


def _environment(facts: Facts) -> Iterator[Check]:
    if facts.has_torch or facts.environment:
        where = "in this interpreter" if facts.has_torch else f"installed, locked to {facts.version}"
        yield Check("worker environment", OK, where)
    elif facts.state.exists is None:
        yield Check(
            "worker environment", NOTE, "lies in a folder closed to this user", "run as root to check it"
        )
    elif facts.other_environments:
        yield Check(
            "worker environment",
            PROBLEM,
            f"is of version {', '.join(facts.other_environments)}, and this is {facts.version}",
            "daemonctl worker install",
        )
    else:
        text = "not installed yet; the first worker installs it"
        yield Check("worker environment", NOTE, text, "to have it ready: daemonctl worker install")


def _device(facts: Facts) -> Iterator[Check]:
    wanted = _settings(facts).get("device", ("auto",))
    wants_gpu = any(str(device).startswith(("cuda", "xpu")) for device in wanted)
    if facts.closed_devices and "cpu" not in wanted:
        text = f"this user may not open {', '.join(facts.closed_devices)}"
        remedy = "add the daemon's user to the groups video and render, then start it again"
        yield Check("device", PROBLEM if wants_gpu else NOTE, text, remedy)
    elif wants_gpu and not facts.devices:
        text = f"the configuration wants {', '.join(wanted)}, and no GPU is there"
        yield Check("device", PROBLEM, text, "install its driver, or: daemonctl config set device auto")
    elif facts.devices:
        yield Check("device", OK, ", ".join(facts.devices))
    else:
        yield Check("device", OK, "no GPU; workers compute on the CPU")


def _memory(facts: Facts) -> Iterator[Check]:
    wanted = int(_settings(facts).get("memory_bytes", 0) or 0)
    free = f"{facts.free_memory_bytes / 1e9:.1f} of {facts.memory_bytes / 1e9:.1f} GB of memory free"
    workers = facts.status.workers if facts.status is not None else ()
    on_cpu = not workers or any(worker.device in ("", "cpu") for worker in workers)
    loads = not workers or any(worker.state != "online" for worker in workers)
    if wanted > facts.memory_bytes and on_cpu:
        text = f"memory_bytes is {wanted / 1e9:.1f} GB, and this machine has {facts.memory_bytes / 1e9:.1f}"
        yield Check(
            "memory", PROBLEM, text, "daemonctl config set memory_bytes 0 (as the daemon thinks best)"
        )
    elif facts.free_memory_bytes < LITTLE_MEMORY_BYTES and loads:
        yield Check(
            "memory", PROBLEM, f"{free}: no room for a worker", "end other programs, or serve fewer blocks"
        )
    elif facts.free_memory_bytes < LITTLE_MEMORY_BYTES:
        yield Check("memory", NOTE, free, "serve fewer blocks, or: daemonctl config set memory_bytes N")
    else:
        yield Check("memory", OK, free)


def _disk(facts: Facts) -> Iterator[Check]:
    folder = facts.cache
    if folder.exists is None or not folder.path:
        return
    wanted = int(_settings(facts).get("disk_bytes", 0) or 0)
    text = f"{folder.path}, {folder.free_bytes / 1e9:.1f} GB free"
    if folder.free_bytes < LITTLE_CACHE_BYTES:
        yield Check("disk for weights", PROBLEM, text, "free some, or move them: --cache-dir")
    elif folder.free_bytes < wanted:
        text += f", of {wanted / 1e9:.0f} GB that weights may take"
        yield Check(
            "disk for weights", NOTE, text, "daemonctl config set disk_bytes N, or --cache-dir elsewhere"
        )
    else:
        yield Check("disk for weights", OK, text)


def _service(facts: Facts) -> Iterator[Check]:
    for unit in facts.units:
        user = "--user " if unit.scope == "user" else ""
        logs = f"journalctl {user}-u {unit.name} -n 100"
        if unit.active == "failed" or unit.result not in ("", "success"):
            text = f"{unit.name} ({unit.scope}): {unit.active}, {unit.result}"
            yield Check(
                "service", PROBLEM, text, f"{logs} says why; then systemctl {user}restart {unit.name}"
            )
        elif unit.active != "active" and facts.status is None:
            text = f"{unit.name} ({unit.scope}): {unit.active}"
            yield Check("service", NOTE, text, f"systemctl {user}enable --now {unit.name}")
        else:
            text = f"{unit.name} ({unit.scope}): {unit.active}, started anew {unit.restarts} times"
            yield Check("service", OK, text, f"its log: {logs}")


def _settings(facts: Facts) -> Mapping[str, Any]:
    """Those in force; else those with which a daemon would start."""
    if facts.config is not None:
        return facts.config
    offline = facts.offline.get("config") if facts.offline is not None else None
    return offline if isinstance(offline, Mapping) else {}


RULES: Final[tuple[Rule, ...]] = (
    _daemon, _rights, _service, _config, _state, _port, _clock, _swarm, _workers, _environment, _device, _memory, _disk,
)  # fmt: skip
