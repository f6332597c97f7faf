"""How fast this machine was found to be: kept on disk by device, model, precision and version.

The worker measures itself on its real blocks at each start, and again when what it computes has become faster or
slower by much; we take the time that loading takes. This remembers both per block, so that a span that is only
planned has a speed and a price already, and how fast the machine's line is. A measurement that differs much from
what was remembered is told and replaces it. It measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Final

from ...protocol.errors import CorollaError
from ...protocol.work import Ready
from ..network.line import Line
from ..store import Store

LINE: Final = "line"  # no device is called so
MAX_PROFILES: Final = 64  # the oldest are forgotten
DRIFT: Final = 1.3  # times faster or slower than remembered: worth telling
DEFAULT_LOAD_S: Final = 2.0  # of a block nobody here has loaded yet


@dataclass(frozen=True, slots=True)
class Profile:
    """Per block: tokens/s of decoding one row, of prefill, and of decoding several rows (loaded), through a single
    block; seconds to load. launches_per_s: of the whole machine; see `Ready`. 0: unknown."""

    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    load_s: float = 0.0
    loaded_tokens_per_s: float = 0.0
    launches_per_s: float = 0.0

    def speed_of(self, num_blocks: int) -> float:
        """Tokens per second of decoding through so many blocks."""
        return self.decode_tokens_per_s / num_blocks

    def load_time_s(self, num_blocks: int) -> float:
        """Seconds until so many blocks would be served."""
        return (self.load_s or DEFAULT_LOAD_S) * num_blocks


class Profiles:
    """What is remembered. version: of Corolla; another one may compute at another speed."""

    def __init__(self, store: Store, version: str, on_event: Callable[[str, str], None]) -> None:
        self._store = store
        self._version = version
        self._on_event = on_event
        content = store.load_profiles()
        self.line = _line(content.pop(LINE, None))
        self._profiles = {key: _profile(value) for key, value in content.items()}

    def of(self, ready: Ready) -> Profile:
        """What is known of a worker that serves, or of one like it."""
        return self._profiles.get(self._key(ready), Profile())

    def note(self, ready: Ready, load_s: float) -> Profile:
        """A worker has measured itself. load_s: of its whole span; 0 if it was not loaded just now."""
        num_blocks = ready.end - ready.start
        key, before = self._key(ready), self.of(ready)
        now = Profile(
            ready.decode_tokens_per_s * num_blocks or before.decode_tokens_per_s,
            ready.prefill_tokens_per_s * num_blocks or before.prefill_tokens_per_s,
            load_s / num_blocks or before.load_s,
            ready.loaded_tokens_per_s * num_blocks or before.loaded_tokens_per_s,
            ready.launches_per_s or before.launches_per_s,
        )
        old, new = before.decode_tokens_per_s, now.decode_tokens_per_s
        if old and new and not 1 / DRIFT <= new / old <= DRIFT:
            told = f"{ready.device or 'the device'} decodes {new:.0f} tokens/s a block now, {old:.0f} before"
            self._on_event("profile_drifted", told)
        self._profiles.pop(key, None)
        self._profiles[key] = now
        for oldest in list(self._profiles)[:-MAX_PROFILES]:
            del self._profiles[oldest]
        self._save()
        return now

    def note_line(self, line: Line) -> None:
        """The line has been measured."""
        self.line = line
        self._save()

    def _key(self, ready: Ready) -> str:
        parts = (ready.device, ready.facts.fingerprint, ready.dtype, ready.quantization or "", self._version)
        return "/".join(map(str, parts))

    def _save(self) -> None:
        content: dict[str, list[float]] = {
            key: list(astuple(profile)) for key, profile in self._profiles.items()
        }
        content[LINE] = [self.line.up_bytes_per_s, self.line.down_bytes_per_s]
        try:
            self._store.save_profiles(content)
        except CorollaError as problem:  # it is measured again at the next start
            self._on_event("store_failed", str(problem))


def _profile(value: Any) -> Profile:
    """What a file says, if it makes sense."""
    try:
        return Profile(*(max(0.0, float(number)) for number in value))  # earlier versions wrote fewer
    except (TypeError, ValueError):
        return Profile()


def _line(value: Any) -> Line:
    try:
        up, down = (max(0.0, float(number)) for number in value)
        return Line(up, down)
    except (TypeError, ValueError):
        return Line()
