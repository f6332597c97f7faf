"""What the owner of this daemon wants: a TOML file, then environment variables, then flags; later ones win.

One frozen value, checked as a whole. It reads files and decides nothing else; keys are those of `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..protocol.errors import Code, error
from ..protocol.limits import REPLACEMENT_WAIT_S, SESSION_GRACE_S
from ..protocol.tensors import DType, Quantization
from .network.dialling import Reachability
from .schedule import Rules, parse_hours

VARIABLE_PREFIX: Final = "COROLLA_"
DEFAULT_LISTEN: Final = ("/ip4/0.0.0.0/tcp/4517", "/ip6/::/tcp/4517")  # where there is no IPv6, the first
DISK_BYTES: Final = 50 * 10**9
_AMOUNTS: Final = (
    "threads", "memory_bytes", "cache_tokens", "replacement_wait_s", "session_grace_s",
    "upload_bytes_per_s", "idle_minutes", "disk_bytes",
)  # fmt: skip
_LISTS: Final = ("listen", "announce", "device", "operators", "models")
_NAMES: Final[dict[type, str]] = {int: "a whole number", float: "a number", bool: "true or false"}
_TRUTHS: Final = {"true": True, "1": True, "false": False, "0": False}
_NOT_KEPT: Final = ("state_dir",)  # `config.set` keeps its values in the state folder itself


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set. Empty strings and zeros mean: as the daemon thinks best.

    model: folder, hub id or GGUF file. blocks: `auto`, `START:END` or `none`. listen, announce: multiaddresses.
    reachability: `auto`, `public`, or `private` behind a NAT or firewall, where others come through relays.
    relay: whether to carry others' connections, within limits, if we are public. mdns: whether to look for
    members in the local network, and be found there. upnp: whether to ask the router to forward a port.
    join: a token or multiaddress, taken up at start. device: one worker each. memory_bytes, cache_tokens,
    threads: of each worker. operators: users who may manage this daemon, besides root and its own.
    state_dir, socket, cache_dir: the user's own places if empty.

    What the owner keeps for himself. upload_bytes_per_s: of all that leaves this machine; 0 is half the measured
    uplink. hours: when to lend, such as `22:00-07:00`, local time; empty is always. idle_minutes: lend only
    when nobody has used this machine for so long; 0 is always. yield_gpu: lend no GPU that another program uses.
    models: names or beginnings of fingerprints that may be lent; empty is any. disk_bytes: for weights in
    cache_dir. low_priority: workers that serve others come after everything else on this machine.
    metrics_port: of this machine alone, for Prometheus; 0 is none (the control socket has them too).
    """

    model: str = ""
    blocks: str = "auto"
    listen: tuple[str, ...] = DEFAULT_LISTEN
    announce: tuple[str, ...] = ()
    reachability: str = Reachability.AUTO
    relay: bool = True
    mdns: bool = True
    upnp: bool = True
    join: str = ""
    device: tuple[str, ...] = ("auto",)
    dtype: str = ""
    quantization: str = ""
    threads: int = 0
    memory_bytes: int = 0
    cache_tokens: int = 0
    state_dir: str = ""
    socket: str = ""
    cache_dir: str = ""
    upload_bytes_per_s: int = 0
    hours: str = ""
    idle_minutes: float = 0.0
    yield_gpu: bool = True
    models: tuple[str, ...] = ()
    disk_bytes: int = DISK_BYTES
    low_priority: bool = True
    metrics_port: int = 0
    operators: tuple[str, ...] = ()
    replacement_wait_s: float = REPLACEMENT_WAIT_S
    session_grace_s: float = SESSION_GRACE_S
    log_level: str = "info"
    log_format: str = "auto"

    def __post_init__(self) -> None:
        self.span()
        if self.dtype and self.dtype not in list(DType):
            raise _bad("dtype", self.dtype, f"one of {', '.join(DType)}")
        if self.reachability not in list(Reachability):
            raise _bad("reachability", self.reachability, f"one of {', '.join(Reachability)}")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise _bad("log_level", self.log_level, "debug, info, warning or error")
        if self.log_format not in ("auto", "text", "json"):
            raise _bad("log_format", self.log_format, "auto, text or json")
        for name in _AMOUNTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise _bad(name, getattr(self, name), "0 or more")
        if not 0 <= self.metrics_port < 1 << 16:
            raise _bad("metrics_port", self.metrics_port, "a port up to 65535, or 0 for none")
        if not self.device:
            raise _bad("device", [], "at least one, such as auto")
        if self.quantization and self.quantization not in list(Quantization):
            raise _bad("quantization", self.quantization, f"one of {', '.join(Quantization)}")
        try:
            parse_hours(self.hours)
        except ValueError as problem:
            wanted = 'times such as 22:00-07:00, several with commas, or "" for always'
            raise _bad("hours", self.hours, wanted) from problem

    def span(self) -> tuple[int, int] | None:
        """The blocks of `START:END`; None for `auto`, and (0, 0) for `none`."""
        if self.blocks == "auto":
            return None
        if self.blocks == "none":
            return (0, 0)
        start, colon, end = self.blocks.partition(":")
        if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
            raise _bad("blocks", self.blocks, "auto, none, or START:END such as 0:15")
        return int(start), int(end)


KEYS: Final = tuple(field.name for field in dataclasses.fields(Config))


def load_config(
    path: Path | None,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration from all its sources.

    path: of the TOML file; None is none. settings: what `config.set` kept, between the file and the environment.
    flags: given ones only. Raises `BAD_CONFIG` naming key and value, `UNREADABLE` for the file.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values |= _from_file(path)
    kept = "what `daemonctl config` kept"
    values |= {key: check_value(key, value, kept) for key, value in (settings or {}).items()}
    for key in KEYS:
        text = environment.get(VARIABLE_PREFIX + key.upper())
        if text is not None:
            values[key] = _from_text(key, text)
    values |= {key: check_value(key, value) for key, value in flags.items()}
    return Config(**values)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """A configuration with what `config.set` kept on top. Raises `BAD_CONFIG`."""
    return dataclasses.replace(config, **settings)


def check_setting(key: str, value: Any) -> Any:
    """A value that `config.set` may keep. Raises `BAD_CONFIG` as `check_value`, and for where it is kept."""
    if key in _NOT_KEPT:
        raise error(
            Code.BAD_CONFIG,
            f"{key} names the folder in which settings are kept, and cannot be one of them",
            f"give it as --{key.replace('_', '-')}, {VARIABLE_PREFIX}{key.upper()}, or in the configuration file",
        )
    return check_value(key, value)


def check_value(key: str, value: Any, where: object = "the configuration") -> Any:
    """A value of the key's type. Raises `BAD_CONFIG`, with the closest known key for an unknown one."""
    if key not in KEYS:
        close = difflib.get_close_matches(key, KEYS, 1)
        meant = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(KEYS)}"
        raise error(Code.BAD_CONFIG, f"unknown key {key!r} in {where}", meant)
    expected = typing.get_type_hints(Config)[key]
    if key in _LISTS:
        items = list(filter(None, [value])) if isinstance(value, str) else value  # "" is a list of none
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise _bad(key, value, "a list of strings")
        return tuple(items)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise _bad(key, value, _NAMES.get(expected, "a string"))
    return value


def rules_of(config: Config) -> Rules:
    """When this machine may lend."""
    return Rules(parse_hours(config.hours), 60.0 * config.idle_minutes, config.yield_gpu)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError as problem:
        raise error(Code.UNREADABLE, f"no configuration file {path}", "check its name") from problem
    except OSError as problem:
        raise error(
            Code.UNREADABLE, f"cannot read {path}: {problem.strerror}", "let the daemon's user read it"
        ) from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise error(Code.BAD_CONFIG, f"{path}: {problem}", "correct that line") from problem
    return {key: check_value(key, value, path) for key, value in table.items()}


def _from_text(key: str, text: str) -> Any:
    expected = typing.get_type_hints(Config)[key]
    if key in _LISTS:
        return tuple(item for item in text.split(",") if item)
    try:
        return _TRUTHS[text.lower()] if expected is bool else expected(text)
    except (ValueError, KeyError) as problem:
        raise _bad(VARIABLE_PREFIX + key.upper(), text, _NAMES[expected]) from problem


def _bad(key: str, value: Any, expected: str) -> Exception:
    return error(Code.BAD_CONFIG, f"{key} is {value!r}, expected {expected}")
