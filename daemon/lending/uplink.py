"""The upload limit that an owner who names none gets: half of what the line was measured to carry.

It owns when the line is measured: now and then nothing is held back, until a transfer that had to be sent anyway has
shown the line's speed. Before the first measurement nothing is held back at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import trio

from ...protocol.views import LineView
from ..network.line import Line
from ..network.traffic import Traffic
from .profiles import Profiles

LOOK_EVERY_S: Final = 0.5  # so short are the transfers that show something
SETTLE_S: Final = 30.0  # after the first finding: what comes then may show more
AGAIN_AFTER_S: Final = 24 * 3600.0
SHARE: Final = 0.5


class Uplink:
    """Of one daemon. owners_limit: bytes a second, as it is now; 0 if the owner names none."""

    def __init__(
        self,
        traffic: Traffic,
        profiles: Profiles,
        owners_limit: Callable[[], int],
        on_event: Callable[[str, str], None],
    ) -> None:
        self._traffic = traffic
        self._profiles = profiles
        self._owners_limit = owners_limit
        self._on_event = on_event
        self._best = 0.0  # in this measurement
        self._measured_at = math.inf  # when its first finding came
        self._is_open = not profiles.line.up_bytes_per_s
        self._again_at = -math.inf
        self.apply()

    @property
    def line(self) -> Line:
        """What is known of the line."""
        return self._profiles.line

    def view(self) -> LineView:
        """For people."""
        limit = self._traffic.limit_bytes_per_s
        line, traffic = self.line, self._traffic
        return LineView(
            up_bytes_per_s=line.up_bytes_per_s,
            down_bytes_per_s=line.down_bytes_per_s,
            limit_bytes_per_s=limit if limit < math.inf else 0.0,
            sent_bytes=traffic.sent_bytes,
            received_bytes=traffic.received_bytes,
        )

    def apply(self) -> None:
        """Put the limit in force: the owner's, else half of the line, else none."""
        limit, up = self._owners_limit(), self.line.up_bytes_per_s
        if limit:
            self._traffic.limit(limit)
        elif up and not self._is_open:
            self._traffic.limit(SHARE * up, spares_near=True)
        else:
            self._traffic.limit(math.inf)

    async def run(self) -> None:
        """Measure until cancelled."""
        self._again_at = trio.current_time() + AGAIN_AFTER_S
        self._traffic.meter.read(trio.current_time())
        while True:
            await trio.sleep(LOOK_EVERY_S)
            now = trio.current_time()
            self.note(self._traffic.meter.read(now), now)

    def note(self, found: Line, now_s: float) -> None:
        """Take what one look found into account."""
        known = self.line
        if found.down_bytes_per_s > known.down_bytes_per_s:
            self._profiles.note_line(Line(known.up_bytes_per_s, found.down_bytes_per_s))
        if found.up_bytes_per_s:
            self._best = max(self._best, found.up_bytes_per_s)
            self._measured_at = min(self._measured_at, now_s)
        if self._best and now_s - self._measured_at >= SETTLE_S:
            self._conclude(now_s)
        elif not self._is_open and now_s >= self._again_at:
            self._is_open = True
            self._best, self._measured_at = 0.0, math.inf
            self.apply()

    def _conclude(self, now_s: float) -> None:
        """The best finding is the line's speed; while transfers are held back, only if it is more than was known."""
        best, known = self._best, self.line
        self._best, self._measured_at = 0.0, math.inf
        if self._is_open or best > known.up_bytes_per_s:
            self._profiles.note_line(Line(best, known.down_bytes_per_s))
            self._on_event("uplink_measured", f"the line takes {best / 1e6:.2f} MB/s")
        self._is_open, self._again_at = False, now_s + AGAIN_AFTER_S
        self.apply()
