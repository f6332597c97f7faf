"""Who makes room when a step finds no page: a decision over a frozen view of the sessions. Pure.

Sessions are promised more pages than there are, since few come to hold all they may. When the pages run out,
the most idle session is parked: its pages move to host memory, and back when its next step comes, so that
nothing of it is computed again. Where host memory is full, or there is none, who was idle the longest is
evicted: it holds nothing any more, and its client sends its hidden states again.

Nobody starves: whoever waits longer than `PATIENCE_S` may take the place of a session at work that has had its
turn, `TURN_S`; and then those who came later wait behind.

Source: Kwon et al. 2023, PagedAttention, section 4.5, swapping and recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

# Between two tokens of a text lie one trip over the route and a sample: who brought nothing for longer is idle.
IDLE_S: Final = 1.0
# Longer than a place is empty by chance, and short beside the silence that a client puts up with.
PATIENCE_S: Final = 1.0
# A session at work that was brought back computes for so long before it may have to leave again: moving a long
# one costs tenths of a second.
TURN_S: Final = 1.0
# To be computed again from the beginning costs much more than to be moved, for everyone on the route.
EVICTION_PATIENCE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Resident:
    """A session with pages on the device. used_at, since: its last step, and when it came there, in seconds.

    has_work: a step of it waits. is_amid: one has begun, so that it cannot leave.
    """

    session: bytes
    num_pages: int
    used_at: float
    since: float
    has_work: bool = False
    is_amid: bool = False


@dataclass(frozen=True, slots=True)
class Parked:
    """A session with pages in host memory."""

    session: bytes
    num_pages: int
    used_at: float
    has_work: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """Who is where now. num_free, num_host_free: pages that nobody holds."""

    now_s: float
    num_free: int
    num_host_free: int
    residents: tuple[Resident, ...] = ()
    parked: tuple[Parked, ...] = ()


class Room(NamedTuple):
    """What makes room. evict: first; these may be residents or parked. park: then, one after the other."""

    evict: tuple[bytes, ...] = ()
    park: tuple[bytes, ...] = ()


def make_room(view: View, asker: bytes, num_wanted: int, waited_s: float) -> Room | None:
    """Who has to go so that `asker` finds `num_wanted` free pages; None if it has to wait.

    waited_s: for how long it has waited already.
    """
    missing = num_wanted - view.num_free
    if missing <= 0:
        return Room()
    others = [r for r in view.residents if r.session != asker and r.num_pages and not r.is_amid]
    willing = [resident for resident in others if _may_leave(view, resident, waited_s)]
    while (leaving := _leaving(willing, missing)) is not None:
        room = _accommodated(view, asker, leaving)
        lost = [r for r in leaving if r.session in room.evict and not _is_idle(view, r)]
        if not lost or waited_s >= EVICTION_PATIENCE_S:
            return room
        willing = [resident for resident in willing if resident not in lost]
    return None


def _may_leave(view: View, resident: Resident, waited_s: float) -> bool:
    if _is_idle(view, resident):
        return True
    return waited_s >= PATIENCE_S and view.now_s - resident.since >= TURN_S


def _is_idle(view: View, resident: Resident) -> bool:
    return not resident.has_work and view.now_s - resident.used_at >= IDLE_S


def _leaving(willing: Iterable[Resident], missing: int) -> tuple[Resident, ...] | None:
    """The most idle of them that have enough pages together, and none in vain; the most idle first."""
    chosen: list[Resident] = []
    num_found = 0
    for resident in sorted(willing, key=_idlest_first):
        if num_found >= missing:
            break
        chosen.append(resident)
        num_found += resident.num_pages
    if num_found < missing:
        return None
    for resident in tuple(reversed(chosen)):  # the busiest stays, if the others do
        if num_found - resident.num_pages >= missing:
            chosen.remove(resident)
            num_found -= resident.num_pages
    return tuple(chosen)


def _idlest_first(session: Resident | Parked) -> tuple[bool, float]:
    return session.has_work, session.used_at


def _accommodated(view: View, asker: bytes, leaving: tuple[Resident, ...]) -> Room:
    """Whom of these host memory takes. The busiest comes first, and whoever was parked before makes room."""
    evicted: list[bytes] = []
    parked: list[bytes] = []
    idlest = sorted(
        (p for p in view.parked if p.session != asker and not p.has_work), key=_idlest_first, reverse=True
    )
    num_free = view.num_host_free
    for resident in sorted(leaving, key=_idlest_first, reverse=True):
        if num_free + sum(other.num_pages for other in idlest) < resident.num_pages:
            evicted.append(resident.session)
            continue
        while num_free < resident.num_pages:
            gone = idlest.pop()
            evicted.append(gone.session)
            num_free += gone.num_pages
        parked.append(resident.session)
        num_free -= resident.num_pages
    return Room(tuple(evicted), tuple(parked))


@dataclass(frozen=True, slots=True)
class Expectation:
    """How much of what they may hold sessions come to hold, and for how long they stay.

    Learned from those that ended; before any did, a session is taken to use a quarter of its length.
    """

    share: float = 0.25
    stay_s: float = 60.0

    def after(self, share: float, stay_s: float) -> Expectation:
        """What is expected after one more session has ended."""
        return Expectation(
            self.share + (share - self.share) * _LEARNING, self.stay_s + (stay_s - self.stay_s) * _LEARNING
        )

    def pages(self, num_most: int, num_held: int = 0) -> int:
        """What a session comes to hold that may hold `num_most` pages, and holds `num_held`."""
        return min(num_most, max(num_held, math.ceil(num_most * max(self.share, _LEAST_SHARE))))

    def wait_s(self, sizes: Collection[int], num_missing: int) -> float:
        """Until sessions that are expected to hold `sizes` have given back so many pages.

        They are taken to have come evenly, so that one of n ends in each nth part of a stay.
        """
        if not sizes:
            return 0.0
        mean = max(1.0, sum(sizes) / len(sizes))
        return min(-(-num_missing // mean), len(sizes)) * self.stay_s / len(sizes)


_LEARNING: Final = 1 / 16  # of what is expected, what the latest session tells
_LEAST_SHARE: Final = 1 / 16  # short sessions may be followed by long ones
