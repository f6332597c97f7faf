"""Whether two daemons take turns in one peer's name: what a member remembers of how others greeted it. No I/O.

Each start of a daemon greets by a number of its own, its run. A daemon that starts anew brings a new run, and the
old one is never heard again; where runs come back after others, two daemons share an identity. Neither of the two
can see that by itself if it announces nothing, so whoever notices tells them.
"""

from __future__ import annotations

from collections import deque
from typing import Final

MEMORY_S: Final = 3600.0  # a member of a large swarm is greeted by the same one only every quarter of an hour
MAX_PEERS: Final = 512  # the latest
MAX_RUNS: Final = 8  # of one peer
RETURNS: Final = 2  # one may be a greeting that was long on its way


class Runs:
    """Of the peers that greeted one member."""

    def __init__(self) -> None:
        self._turns: dict[str, deque[tuple[bytes, float]]] = {}  # a run and when it last greeted, latest last

    def note(self, peer: str, run: bytes, now: float) -> None:
        """A peer greeted. run: b"" of an older program, which says nothing."""
        if not run:
            return
        turns = self._turns.pop(peer, None) or deque(maxlen=MAX_RUNS)
        if turns and turns[-1][0] == run:
            turns.pop()
        turns.append((run, now))
        self._turns[peer] = turns
        while len(self._turns) > MAX_PEERS:
            del self._turns[next(iter(self._turns))]

    def take_turns(self, peer: str, now: float) -> bool:
        """Whether several daemons greet in this peer's name."""
        recent = [run for run, at in self._turns.get(peer, ()) if now - at <= MEMORY_S]
        return len(recent) - len(set(recent)) >= RETURNS
