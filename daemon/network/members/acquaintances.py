"""Members that we heard of: where each was last, and when to dial it again. No I/O.

Whoever is heard of is dialled, not believed: only its own greeting makes it a member. Which of them are
connected, the membership knows and says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ....protocol.limits import MAX_ADDRESSES, MAX_ADDRESSES_TOLD
from ....protocol.registry import PeerAddresses

TARGET_MEMBERS: Final = 24  # a full mesh of a small swarm, and enough edges to keep a large one in one piece
MAX_KNOWN: Final = 512  # members heard of, connected or not
MAX_DIALS_AT_ONCE: Final = 4
REDIAL_FIRST_S: Final = 0.5
REDIAL_MAX_S: Final = 60.0
FORGET_AFTER_S: Final = 600.0  # a member that nobody reached for so long is no longer told of


@dataclass(slots=True)
class _Acquaintance:
    """A member heard of: where it is, and when to dial it."""

    addresses: tuple[str, ...]
    seen_at: float
    next_dial_at: float
    backoff_s: float = REDIAL_FIRST_S


class Acquaintances:
    """Of one member. clock: in seconds; rng: spreads dials, so that many do not call one at once."""

    def __init__(self, rng: random.Random, clock: Callable[[], float]) -> None:
        self._rng = rng
        self._clock = clock
        self._known: dict[str, _Acquaintance] = {}

    def peers(self) -> Collection[str]:
        """Everyone heard of."""
        return self._known.keys()

    def told(self) -> tuple[PeerAddresses, ...]:
        """Everyone, with the first of its addresses."""
        return tuple(tell_of(peer, friend.addresses) for peer, friend in self._known.items())

    def unseen_s(self, peer: str) -> float | None:
        """For how long one that is not connected was not; of one only heard of, since then. None if unknown."""
        friend = self._known.get(peer)
        return None if friend is None else self._clock() - friend.seen_at

    def met(self, peer: str, addresses: Sequence[str]) -> None:
        """It introduced itself."""
        now = self._clock()
        self._known[peer] = _Acquaintance(tuple(addresses), seen_at=now, next_dial_at=now)

    def parted(self, peer: str) -> None:
        """The line broke, which is no death: it is looked for at once, then ever more rarely."""
        friend = self._known.get(peer)
        if friend is not None:
            friend.seen_at = self._clock()
            friend.backoff_s = REDIAL_FIRST_S
            friend.next_dial_at = self._clock() + self._rng.uniform(0, REDIAL_FIRST_S)

    def hear_of(self, told: PeerAddresses) -> None:
        """Somebody tells of a member that is not connected."""
        now = self._clock()
        addresses = tuple(of_peer(told.addresses, told.peer))
        friend = self._known.get(told.peer)
        if friend is None and addresses:
            self._known[told.peer] = _Acquaintance(addresses, seen_at=now, next_dial_at=now)
        elif friend is not None and not set(addresses) <= set(friend.addresses):  # it may have moved
            merged = dict.fromkeys((*addresses, *friend.addresses))
            friend.addresses = tuple(merged)[:MAX_ADDRESSES]
            friend.next_dial_at = min(friend.next_dial_at, now + REDIAL_FIRST_S)

    def forget(self, peer: str) -> None:
        """It is not of our swarm."""
        self._known.pop(peer, None)

    def bound(self, connected: Collection[str]) -> None:
        """Forget those heard of first, if there are too many; never one that is connected."""
        spare = [peer for peer in self._known if peer not in connected]
        for peer in spare[: max(0, len(self._known) - MAX_KNOWN)]:
            del self._known[peer]

    def due(self, connected: Collection[str]) -> list[str]:
        """Whom to dial now. Those that nobody reached for long are forgotten."""
        now = self._clock()
        absent = {peer: friend for peer, friend in self._known.items() if peer not in connected}
        for peer, friend in absent.items():
            if now - friend.seen_at > FORGET_AFTER_S:
                del self._known[peer]
        wanted = min(TARGET_MEMBERS - len(connected), MAX_DIALS_AT_ONCE)
        due = sorted(p for p in absent if p in self._known and absent[p].next_dial_at <= now)
        self._rng.shuffle(due)
        return due[: max(0, wanted)]

    def due_at(self, connected: Collection[str]) -> float:
        """When the next of them may be dialled; inf if none may."""
        if len(connected) >= TARGET_MEMBERS:
            return float("inf")
        times = (friend.next_dial_at for peer, friend in self._known.items() if peer not in connected)
        return min(times, default=float("inf"))

    def dial(self, peer: str) -> tuple[str, ...]:
        """It is dialled now, at these addresses; if in vain, again after a while."""
        friend = self._known.get(peer)
        if friend is None:
            return ()
        friend.next_dial_at = self._clock() + friend.backoff_s * self._rng.uniform(0.8, 1.2)
        friend.backoff_s = min(2 * friend.backoff_s, REDIAL_MAX_S)
        return friend.addresses


def of_peer(addresses: Iterable[str], peer: str) -> Iterable[str]:
    """Those multiaddresses that name this peer: no one may send others to a third one's door."""
    return (address for address in addresses if address.rpartition("/p2p/")[2] == peer)


def tell_of(peer: str, addresses: Sequence[str]) -> PeerAddresses:
    """A member as it is told of to others."""
    return PeerAddresses(peer, tuple(addresses[:MAX_ADDRESSES_TOLD]))
