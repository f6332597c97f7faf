"""How fast this machine's line is, as its own transfers show: nothing is sent to find out.

Of each TCP connection into the world, the kernel tells what the far end has acknowledged, for how long there was
something to send, and whether we or the far end, not the line, set the pace. It owns no limit; see `traffic.py`.
Sources: struct tcp_info (linux/tcp.h); Cheng et al., Delivery Rate Estimation (draft-cheng-iccrg-delivery-rate).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from ...protocol.limits import KIB

TCP_INFO_BYTES: Final = 192  # up to the fields that we read; kernels before 4.10 tell less
ENOUGH_BYTES: Final = 128 * KIB  # in one interval, so that its start, and slow start, do not count for much
ENOUGH_S: Final = 0.2  # of sending without a pause
FAR_END: Final = 0.3  # share of that time in which the far end's window was closed: it measures the far end


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes a second, 0 while unknown. up: measured under load. down: the most that was seen; it may be faster."""

    up_bytes_per_s: float = 0.0
    down_bytes_per_s: float = 0.0


class Reading(NamedTuple):
    """What the kernel tells of one connection so far. is_app_limited: we had less to send than the line took."""

    acked_bytes: int
    received_bytes: int
    busy_s: float
    closed_s: float
    is_app_limited: bool


class Watched(Protocol):
    """A connection, as the muxer is one."""

    @property
    def is_closed(self) -> bool: ...
    def tcp_info(self) -> bytes: ...
    def get_remote_address(self) -> tuple[str, int] | None: ...


def parse_tcp_info(data: bytes) -> Reading | None:
    """A reading of the kernel's struct; None where it tells too little, or nothing."""
    if len(data) < TCP_INFO_BYTES:
        return None
    acked, received = struct.unpack_from("=QQ", data, 120)
    busy_us, closed_us = struct.unpack_from("=QQ", data, 168)
    return Reading(acked, received, busy_us / 1e6, closed_us / 1e6, bool(data[7] & 1))


def up_rate(before: Reading, now: Reading) -> float | None:
    """Bytes a second that the line took between two readings; None if something else set the pace."""
    acked, busy_s = now.acked_bytes - before.acked_bytes, now.busy_s - before.busy_s
    if now.is_app_limited or acked < ENOUGH_BYTES or busy_s < ENOUGH_S:
        return None
    return None if now.closed_s - before.closed_s > FAR_END * busy_s else acked / busy_s


class Meter:
    """Reads the connections of one daemon that lead into the world."""

    def __init__(self) -> None:
        self._watched: dict[Watched, Reading | None] = {}
        self._read_at = 0.0

    def watch(self, connection: Watched) -> None:
        """Read this one too, which leads over the line, until it is closed."""
        self._watched[connection] = None

    def read(self, now_s: float) -> Line:
        """What was found since the last time: the best single connection up, all together down; 0 is nothing."""
        readings = {c: parse_tcp_info(c.tcp_info()) for c in self._watched if not c.is_closed}
        pairs = [(before, r) for c, r in readings.items() if (before := self._watched[c]) is not None and r]
        elapsed_s, self._read_at = now_s - self._read_at, now_s
        self._watched = readings
        rates = (up_rate(before, after) for before, after in pairs)
        return Line(
            max((rate for rate in rates if rate is not None), default=0.0),
            _received(pairs) / elapsed_s if elapsed_s > 0 else 0.0,
        )


def _received(pairs: Iterable[tuple[Reading, Reading]]) -> int:
    received = sum(after.received_bytes - before.received_bytes for before, after in pairs)
    return received if received >= ENOUGH_BYTES else 0
