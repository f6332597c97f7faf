"""What passes between this machine and others, and how fast it may leave: one owner for all streams of a daemon.

It owns the counts and the token bucket of the owner's upload limit. It delays and never drops; sessions, training
and relaying share it in the order in which they ask. What stays on this machine neither counts nor waits.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable
from enum import Enum
from typing import Final

import trio

from ...protocol.limits import KIB, MIB
from .line import Meter, Watched

BURST_BYTES: Final = MIB  # may leave at once after a pause: a decode step does not wait
PIECE_BYTES: Final = (
    64 * KIB
)  # what leaves at a time under a limit, so that a long message lets short ones between
MAX_YIELD_S: Final = 0.1  # that one waits for others' bytes: who yields does not starve

Remote = tuple[str, int] | None


class Pace:
    """A token bucket: so many bytes a second, in order of asking. bytes_per_s: inf is no limit."""

    def __init__(self, bytes_per_s: float, burst_bytes: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._free_at = -math.inf  # when everything asked for so far would have passed at the steady pace

    @property
    def bytes_per_s(self) -> float:
        """The steady pace."""
        return self._bytes_per_s

    def set(self, bytes_per_s: float) -> None:
        """Another pace, for what is asked from now on; what waits already keeps its time."""
        self._bytes_per_s = bytes_per_s

    def give_way(self, size_bytes: int) -> None:
        """Others took so many bytes of the same line: who asks next waits for that too, for a moment at most."""
        now = trio.current_time()
        free_at = max(self._free_at, now - self._burst_bytes / self._bytes_per_s)
        self._free_at = max(free_at, min(free_at + size_bytes / self._bytes_per_s, now + MAX_YIELD_S))

    async def wait(self, size_bytes: int) -> None:
        """Wait until so many bytes may pass."""
        now = trio.current_time()
        burst_s = self._burst_bytes / self._bytes_per_s
        self._free_at = max(self._free_at, now - burst_s) + size_bytes / self._bytes_per_s
        if self._free_at > now:
            await trio.sleep(self._free_at - now)


class Nearness(Enum):
    """Where the far end of a connection is."""

    HERE = "on this machine"
    NEAR = "in its network at home"
    WORLD = "beyond the line"


def nearness_of(remote: Remote) -> Nearness:
    """Of a socket's far end. None is a circuit: the connection with the relay counts its bytes."""
    if remote is None:
        return Nearness.HERE
    try:
        address = ipaddress.ip_address(remote[0].split("%")[0])
    except ValueError:
        return Nearness.WORLD
    if address.is_loopback:
        return Nearness.HERE
    return Nearness.WORLD if address.is_global else Nearness.NEAR


class Traffic:
    """Of all streams of one daemon. nearness: where a connection's far end is."""

    def __init__(self, nearness: Callable[[Remote], Nearness] = nearness_of) -> None:
        self._nearness = nearness
        self._spares_near = False
        self.meter: Final = Meter()
        self.sent_bytes = 0
        self.received_bytes = 0
        self.relayed_bytes = 0  # for others, of those sent
        self._pace = Pace(math.inf, BURST_BYTES)

    @property
    def own_bytes(self) -> int:
        """What left of our own, without what was carried for others."""
        return self.sent_bytes - self.relayed_bytes

    @property
    def limit_bytes_per_s(self) -> float:
        """What may leave each second; inf is no limit."""
        return self._pace.bytes_per_s

    def lane(self, remote: Remote) -> Lane | None:
        """For a stream to this far end; None if it stays on this machine, where nothing counts or waits."""
        nearness = self._nearness(remote)
        return Lane(self, nearness) if nearness is not Nearness.HERE else None

    def watch(self, connection: Watched) -> None:
        """Let the meter read a new connection, if it leads over the line."""
        if self._nearness(connection.get_remote_address()) is Nearness.WORLD:
            self.meter.watch(connection)

    def limit(self, bytes_per_s: float, *, spares_near: bool = False) -> None:
        """Let so much leave from now on. bytes_per_s: above 0; inf is no limit.

        spares_near: whether it is the line that is to be spared, so that what stays at home does not wait.
        """
        self._pace.set(bytes_per_s)
        self._spares_near = spares_near

    def holds(self, nearness: Nearness) -> bool:
        """Whether what goes there may have to wait."""
        return self._pace.bytes_per_s < math.inf and not (self._spares_near and nearness is Nearness.NEAR)

    async def leave(self, size_bytes: int, nearness: Nearness = Nearness.WORLD) -> None:
        """Wait until so many bytes may leave, and count them."""
        if self.holds(nearness):
            await self._pace.wait(size_bytes)
        self.sent_bytes += size_bytes

    def arrived(self, size_bytes: int) -> None:
        """Count what came."""
        self.received_bytes += size_bytes

    def relayed(self, size_bytes: int) -> None:
        """Count what was carried for others, which `leave` has counted as sent already."""
        self.relayed_bytes += size_bytes


class Lane:
    """The way of one stream through the traffic."""

    __slots__ = ("_nearness", "_traffic")

    def __init__(self, traffic: Traffic, nearness: Nearness) -> None:
        self._traffic = traffic
        self._nearness = nearness

    @property
    def is_held(self) -> bool:
        """Whether what leaves may have to wait."""
        return self._traffic.holds(self._nearness)

    async def leave(self, size_bytes: int) -> None:
        """Wait until so many bytes may leave, and count them."""
        await self._traffic.leave(size_bytes, self._nearness)

    def arrived(self, size_bytes: int) -> None:
        """Count what came."""
        self._traffic.arrived(size_bytes)
