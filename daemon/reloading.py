"""Other settings for a daemon that runs: read again, checked as a whole, and put in force as far as can be.

It owns which keys take effect when. What each means is for its owner: workers for `lending.py`, the clock of hours
for `pausing.py`. Settings that are wrong change nothing: the old ones stay in force, and the status says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ..protocol.errors import CorollaError
from ..protocol.settings import Applied
from .config import KEYS, Config, check_setting
from .control import uids_of
from .lending.sources import source_of
from .store import Store

WORKER_KEYS: Final = frozenset(
    {
        "model",
        "blocks",
        "device",
        "dtype",
        "quantization",
        "threads",
        "memory_bytes",
        "cache_tokens",
        "low_priority",
    }
)
NOW_KEYS: Final = frozenset(
    {
        "upload_bytes_per_s", "hours", "idle_minutes", "yield_gpu", "models", "disk_bytes", "metrics_port",
        "relay", "join", "operators", "replacement_wait_s", "session_grace_s",
    }
)  # fmt: skip
DAEMON_KEYS: Final = frozenset(
    {
        "listen",
        "announce",
        "reachability",
        "mdns",
        "upnp",
        "state_dir",
        "socket",
        "cache_dir",
        "log_level",
        "log_format",
    }
)  # sockets, folders and logs are opened once

Sources = Callable[[Mapping[str, Any]], Config]


def differences(old: Config, new: Config) -> Applied:
    """Which settings differ, by when they take effect."""
    changed = [key for key in KEYS if getattr(old, key) != getattr(new, key)]
    return Applied(
        now=tuple(key for key in changed if key in NOW_KEYS),
        workers=tuple(key for key in changed if key in WORKER_KEYS),
        daemon=tuple(key for key in changed if key in DAEMON_KEYS),
    )


class Reloading:
    """Of one daemon. sources: the whole configuration anew, given what `config.set` kept. config: the one in force.

    put_in_force: does it, and raises if it cannot be; then nothing has changed.
    """

    def __init__(
        self,
        store: Store,
        sources: Sources,
        config: Config,
        put_in_force: Callable[[Config, Applied], None],
        emit: Callable[[str, str], None],
    ) -> None:
        self._store = store
        self._sources = sources
        self._config = config
        self._put_in_force = put_in_force
        self._emit = emit
        self._started_with = config  # what the parts were made with that are made once
        self.problem: CorollaError | None = None  # of the last reload

    def explain(self) -> str | None:
        """What its owner should know of the settings; None if all are in force."""
        if self.problem is not None:
            return f"the configuration was not reloaded, the old one is in force: {self.problem}"
        waiting = differences(self._started_with, self._config).daemon
        if waiting:
            return f"{', '.join(waiting)} will count when the daemon is started again: daemonctl stop, then corollad"
        return None

    def reload(self) -> None:
        """Read the files again: SIGHUP. Raises nothing: a daemon that runs is not ended by a file."""
        try:
            config = self._sources(self._store.state.settings)
            applied = self._apply(config)
        except CorollaError as problem:
            self.problem = problem
            self._emit("reload_failed", f"the old configuration stays in force: {problem}")
            return
        self.problem = None
        self._emit("reloaded", describe(applied))

    def set(self, key: str, value: Any) -> Applied:
        """Keep one setting and put it in force. Raises `BAD_CONFIG`, `UNKNOWN_MODEL`, `DISK_FULL`, `UNREADABLE`."""
        checked = check_setting(key, value)
        settings = {**self._store.state.settings, key: checked}
        config = self._sources(settings)
        _check(config)
        self._store.update(settings=settings)
        applied = self._apply(config)
        if getattr(config, key) != checked:
            applied = Applied(applied.now, applied.workers, applied.daemon, overridden=True)
        self._emit("config", f"{key} is {checked!r}: {describe(applied)}")
        return applied

    def _apply(self, config: Config) -> Applied:
        _check(config)
        applied = differences(self._config, config)
        self._put_in_force(config, applied)
        self._config = config
        return applied


def _check(config: Config) -> None:
    """Raise what could not be put in force."""
    if config.model:
        source_of(config.model)
    uids_of(config.operators)


def describe(applied: Applied) -> str:
    """In one line, for people."""
    parts = []
    if applied.now:
        parts.append(f"{', '.join(applied.now)} in force")
    if applied.workers:
        parts.append(f"{', '.join(applied.workers)} when workers have moved their sessions and started again")
    if applied.daemon:
        parts.append(f"{', '.join(applied.daemon)} when the daemon is started again")
    if applied.overridden:
        parts.append("a flag or an environment variable says otherwise, and wins")
    return "; ".join(parts) or "nothing changed"
