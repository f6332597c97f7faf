"""Whether one worker moves now: its part of the plan, with the patience and the cost that are its own. Pure.

It remembers whom earlier plans named, so that one who does not move is passed over, and when its own worker last
moved. The clock is an argument. Who makes the plan: `placement.py`; who carries it out: `lending/rebalancing.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...protocol.steps import Hop
from .census import Census
from .placement import Move, Purpose, plan_moves
from .view import SwarmView

CHECK_EVERY_S: Final = 15.0  # between two looks at the swarm; a gap waits for no longer than this
PATIENCE_S: Final = 20.0  # with one who is named and does not move: two looks
PASSED_OVER_S: Final = 600.0  # for so long it is not named again
REST_S: Final = (
    300.0  # after a move, before another for speed alone: who is named and rests is missed in the plan
)
REPLAY_S: Final = 5.0  # of others' work that each session costs whose caches are built anew elsewhere
MAX_COST_S: Final = 120.0  # of a move for speed: the least gain, 2 %, repays it in some 100 minutes


class Patience:
    """Whom plans name in vain. One for each model that a daemon watches."""

    def __init__(self) -> None:
        self._named: dict[Hop, float] = {}  # since when
        self._passed_over: dict[Hop, float] = {}  # until when

    def passed_over(self, now_s: float) -> frozenset[Hop]:
        """Who is not to be asked now."""
        self._passed_over = {hop: until for hop, until in self._passed_over.items() if until > now_s}
        return frozenset(self._passed_over)

    def note(self, plan: Iterable[Move], now_s: float) -> None:
        """A plan was made: who is in it should move soon."""
        named = {move.hop: self._named.get(move.hop, now_s) for move in plan}
        for hop, since in tuple(named.items()):
            if now_s - since >= PATIENCE_S:
                self._passed_over[hop] = now_s + PASSED_OVER_S
                del named[hop]
        self._named = named


def next_plan(seen: SwarmView | Census, patience: Patience, now_s: float) -> tuple[Move, ...]:
    """The plan of all who see this, without those who were asked in vain."""
    plan = plan_moves(seen, excluded=patience.passed_over(now_s))
    patience.note(plan, now_s)
    return plan


def own_part(plan: Iterable[Move], hop: Hop) -> Move | None:
    """What a plan asks of one worker."""
    return next((move for move in plan if move.hop == hop), None)


def pays_off(move: Move, *, load_s: float, num_sessions: int, rested_s: float) -> bool:
    """Whether a worker should do as planned, by what it alone knows.

    load_s: until it would serve again. num_sessions: whose caches would be lost. rested_s: since its last move.
    Gaps and second replicas are worth any of it; for speed, moving may cost a small share of the time to come.
    """
    if move.purpose is not Purpose.SPEED:
        return True
    return rested_s >= REST_S and load_s + REPLAY_S * num_sessions <= MAX_COST_S
