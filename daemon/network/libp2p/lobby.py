"""Who waits at the door: inbound connections by where they come from, before and after their handshake. No I/O.

A handshake costs milliseconds and holds a place for seconds, and proves nothing of who asks. So each origin
(a /24, a /48, a private address) has a pace and a share; and when all places are taken, the oldest handshake of
the origin that holds most of them gives way, so that silence at the door keeps nobody else out.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from dataclasses import dataclass

from ....protocol.limits import (
    HANDSHAKES_AT_ONCE,
    HANDSHAKES_PER_S,
    MAX_CONNECTIONS_PER_ORIGIN,
    MAX_HANDSHAKES,
)
from ..allowance import Paces, Rate
from ..dialling import network_of


@dataclass(eq=False, slots=True)
class Guest:
    """One inbound connection. origin: "" for a program on this machine."""

    origin: str
    is_known: bool = False  # its handshake is done


class Lobby:
    """The inbound connections of one network."""

    def __init__(
        self,
        *,
        max_handshakes: int = MAX_HANDSHAKES,
        max_per_origin: int = MAX_CONNECTIONS_PER_ORIGIN,
        pace: Rate = Rate(HANDSHAKES_PER_S, HANDSHAKES_AT_ONCE),  # noqa: B008 - frozen
    ) -> None:
        self._max_handshakes = max_handshakes
        self._max_per_origin = max_per_origin
        self._paces = Paces(pace)
        self._origins: Counter[str] = Counter()  # of all guests
        self._waiting: dict[Guest, None] = {}  # oldest first

    @property
    def num_waiting(self) -> int:
        """Handshakes under way."""
        return len(self._waiting)

    def refusal(self, origin: str, now: float) -> str:
        """Why a connection from there is closed at once; "" if it may come in. This machine always may."""
        if not origin:
            return ""
        if self._origins[origin] >= self._max_per_origin:
            return f"{self._origins[origin]} connections come from {origin}, limit {self._max_per_origin}"
        if self._paces.take(origin, 1, now) > 0:
            return f"connections come too fast from {origin}"
        return ""

    def enter(self, origin: str) -> tuple[Guest, Guest | None]:
        """A newcomer, and who has to leave for it, if anybody has."""
        leaves = self._largest_crowd() if len(self._waiting) >= self._max_handshakes else None
        if leaves is not None:
            self._waiting.pop(leaves)
        guest = Guest(origin)
        self._waiting[guest] = None
        self._origins[origin] += 1
        return guest, leaves

    def introduce(self, guest: Guest) -> None:
        """Its handshake is done."""
        self._waiting.pop(guest, None)

    def leave(self, guest: Guest) -> None:
        """Its connection is over."""
        self._waiting.pop(guest, None)
        self._origins[guest.origin] -= 1
        if not self._origins[guest.origin]:
            del self._origins[guest.origin]

    def _largest_crowd(self) -> Guest:
        crowds = Counter(guest.origin for guest in self._waiting)
        largest = max(crowds.values())
        return next(guest for guest in self._waiting if crowds[guest.origin] == largest)


def origin_of_socket(address: str) -> str:
    """Where a connection from an IP address comes from; "" for this machine."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return ""
    return network_of(ip) or address
