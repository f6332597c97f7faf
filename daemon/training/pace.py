"""How long requests of a job take, and so when one is late. Pure, its clock an argument.

Work is counted in tokens times blocks, which is all that differs between requests of one kind. A hop that was late is
remembered for a while, so that it is asked after the others.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Set as AbstractSet
from statistics import median
from typing import Final

from ...protocol.steps import Hop

LATE: Final = 4  # times what is usual: queues and other people's work make twice as much an everyday thing
LEAST_S: Final = 10.0  # nobody is late before; a second request for the same is not worth less
UNKNOWN_S: Final = 60.0  # before any was answered
REMEMBERED_S: Final = 60.0  # a slow hop may have been busy with something that is over
_SAMPLES: Final = 64  # the last ones of each kind


class Pace:
    """Of one model's requests, by kind."""

    def __init__(self) -> None:
        self._rates: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))
        self._late: dict[Hop, float] = {}  # when each was late

    def note(self, kind: str, work: int, took_s: float) -> None:
        """A request was answered."""
        self._rates[kind].append(took_s / work)

    def patience_s(self, kind: str, work: int) -> float:
        """After so long a request is late."""
        rates = self._rates[kind]
        return max(LEAST_S, LATE * median(rates) * work) if rates else UNKNOWN_S

    def note_late(self, hop: Hop, now_s: float) -> None:
        """Somebody else answered before this hop, which had been asked long before."""
        self._late[hop] = now_s

    def late(self, now_s: float) -> AbstractSet[Hop]:
        """Who was late not long ago."""
        self._late = {hop: at for hop, at in self._late.items() if now_s - at < REMEMBERED_S}
        return self._late.keys()
