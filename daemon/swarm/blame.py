"""What peers did wrong lately, as seconds that routing adds to them. Pure: the clock is an argument.

A charge fades with a fixed half-life, so that a peer that behaves recovers by itself. It does not know how
guilt is found (`session/suspicion.py`) nor what routing makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

LIGHT: Final = 1.0  # a missed deadline, a broken connection: may happen to anyone
SLOW: Final = 0.25  # no guilt: late where another was not, and for a while others are the better choice
HEAVY: Final = 16.0  # wrong values, a broken protocol: half an hour until it weighs like a light one
HALF_LIFE_S: Final = 450.0
PENALTY_S: Final = 0.5  # of one light charge: more than any honest difference between two routes
FORGET_BELOW: Final = 0.01  # of a light charge; below it a peer counts as innocent
MAX_PEERS: Final = 4096  # remembered; beyond it the least guilty are forgotten


@dataclass(frozen=True, slots=True)
class Record:
    """A peer's guilt: its weight at `at_s`, and what it was charged with last."""

    weight: float
    at_s: float
    reason: str

    def weight_at(self, now_s: float) -> float:
        """The weight that is left."""
        return self.weight * math.exp2(-max(0.0, now_s - self.at_s) / HALF_LIFE_S)


class Ledger:
    """Charges by peer. Times are seconds of one monotonic clock.

    on_charge: is told of each charge: peer, weight, reason.
    """

    def __init__(self, on_charge: Callable[[str, float, str], None] | None = None) -> None:
        self._records: dict[str, Record] = {}
        self._on_charge = on_charge

    def charge(self, peer: str, weight: float, reason: str, now_s: float) -> None:
        """Add to a peer's guilt."""
        old = self._records.get(peer)
        left = old.weight_at(now_s) if old is not None else 0.0
        self._records[peer] = Record(left + weight, now_s, reason)
        if len(self._records) > MAX_PEERS:
            self._forget(now_s)
        if self._on_charge is not None:
            self._on_charge(peer, weight, reason)

    def penalty(self, peer: str, now_s: float) -> float:
        """Seconds that routing adds to a hop on this peer; 0 for an innocent one."""
        record = self._records.get(peer)
        weight = record.weight_at(now_s) if record is not None else 0.0
        return weight * PENALTY_S if weight >= FORGET_BELOW else 0.0

    def charged(self, now_s: float) -> dict[str, Record]:
        """Everyone who still carries guilt."""
        return {
            peer: record for peer, record in self._records.items() if record.weight_at(now_s) >= FORGET_BELOW
        }

    def _forget(self, now_s: float) -> None:
        guilty = sorted(self._records, key=lambda peer: self._records[peer].weight_at(now_s), reverse=True)
        kept = guilty[: MAX_PEERS // 2]
        self._records = {
            peer: self._records[peer] for peer in kept if self._records[peer].weight_at(now_s) >= FORGET_BELOW
        }
