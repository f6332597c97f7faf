"""What others' records say against this daemon itself: that its clock is wrong, or that another uses its identity.

It remembers what was seen for a while and judges; who is told is others' affair. Pure: the clock is an argument.
"""

from __future__ import annotations

import statistics
from typing import Final

from ....protocol.limits import MAX_CLOCK_SKEW_S, RECORD_LIFETIME_S

MEMORY_S: Final = 2 * RECORD_LIFETIME_S
MAX_PEERS: Final = 256  # whose clocks are remembered; the latest
TWIN_MEMORY_S: Final = 600.0  # a look at what is held in our name comes once a minute
SIGHTINGS: Final = 2  # of records that are ours and not by us: one may be of a run whose state was lost


class Doubts:
    """Of one daemon in one swarm."""

    def __init__(self) -> None:
        self._skews: dict[
            str, tuple[float, float]
        ] = {}  # peer → how far its clock is ahead, when that was seen
        self._strange: dict[int, float] = {}  # seq of a record in our name → when it was seen
        self._told_at: float | None = None  # when a member last told of a twin

    def note_clock(self, peer: str, ahead_s: float, now: float) -> None:
        """A peer signed a record; its clock was so far ahead of ours then, as good as can be told."""
        self._skews.pop(peer, None)
        self._skews[peer] = (ahead_s, now)
        while len(self._skews) > MAX_PEERS:
            del self._skews[next(iter(self._skews))]

    def note_own(self, seq: int, last_seq: int, now: float) -> None:
        """A record signed with our key was found. last_seq: the highest that we have signed."""
        if seq > last_seq:
            self._strange = {old: at for old, at in self._strange.items() if now - at <= TWIN_MEMORY_S}
            self._strange[seq] = now

    def note_twin(self, now: float) -> None:
        """A member says that two daemons greet it in our name. It could lie, so all that follows is a hint."""
        self._told_at = now

    def clock_behind_s(self, now: float) -> float | None:
        """How far our clock is behind, if most members say that it is off by more than records bear; else None."""
        recent = [ahead for ahead, at in self._skews.values() if now - at <= MEMORY_S]
        wrong = [ahead for ahead in recent if abs(ahead) > MAX_CLOCK_SKEW_S]
        return statistics.median(wrong) if 2 * len(wrong) > len(recent) else None

    def has_twin(self, now: float) -> bool:
        """Whether somebody else uses our key."""
        if self._told_at is not None and now - self._told_at <= TWIN_MEMORY_S:
            return True
        return sum(now - at <= TWIN_MEMORY_S for at in self._strange.values()) >= SIGHTINGS

    def words(self, now: float) -> tuple[str, str] | None:
        """The worse of the two doubts: its kind, and what to do; None if there is none."""
        if self.has_twin(now):
            return "identity_twin", (
                "another daemon uses this one's identity, so members confuse the two: stop one of them, and delete"
                " the copied identity.pem in its state folder before it starts again"
            )
        behind_s = self.clock_behind_s(now)
        if behind_s is not None:
            way = "behind" if behind_s > 0 else "ahead of"
            return "clock_differs", (
                f"this machine's clock is {abs(behind_s) / 60:.0f} min {way} those of other members, and none believes"
                " the other: set it (timedatectl)"
            )
        return None
