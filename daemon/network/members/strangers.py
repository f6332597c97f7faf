"""Peers that proved to be none of ours: when, and why. No I/O, no clock of its own.

They are neither dialled nor told of, until so much time has passed that they may have changed their mind.
"""

from __future__ import annotations

from collections.abc import Iterator

from ....protocol.errors import CorollaError
from ....protocol.limits import MAX_PEERS_REMEMBERED
from .acquaintances import FORGET_AFTER_S


class Strangers:
    """Of one member; bounded, the oldest are forgotten. `now` and `since` are on one clock, in seconds."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, CorollaError]] = {}

    def __contains__(self, peer: str) -> bool:
        return peer in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def note(self, peer: str, reason: CorollaError, now: float) -> None:
        """It proved to be none of ours."""
        self._known = {p: s for p, s in self._known.items() if now - s[0] < FORGET_AFTER_S and p != peer}
        self._known[peer] = (now, reason)
        for forgotten in tuple(self._known)[:-MAX_PEERS_REMEMBERED]:
            del self._known[forgotten]

    def forgive(self, peer: str) -> None:
        """It is as if it had never been met."""
        self._known.pop(peer, None)

    def proved(self, peer: str, since: float) -> CorollaError | None:
        """Why it is none of ours, if it has shown that since then."""
        at, reason = self._known.get(peer, (since, None))
        return reason if at >= since else None

    def said(self, peer: str) -> str:
        """Why it is none of ours, in words; "" if it is not known to be."""
        return str(self._known[peer][1]) if peer in self._known else ""
