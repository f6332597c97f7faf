"""The placement policies as the simulator runs them: the daemon's pure functions, and nothing of its own but memory.

All machines of a moment see the same records, so what is computed from these alone is computed once for all.
"""

from __future__ import annotations

import random
import time

from corolla.daemon.swarm.coverage import coverage_of
from corolla.daemon.swarm.moving import CHECK_EVERY_S as LOOK_EVERY_S
from corolla.daemon.swarm.moving import Patience, next_plan, own_part, pays_off
from corolla.daemon.swarm.petals import CHECK_EVERY_S, petals_move, petals_quality, petals_span
from corolla.daemon.swarm.placement import Move, choose_span
from corolla.daemon.swarm.view import SwarmView

from .swarm_world import Machine, World, hop_of


class Published:
    """Petals' rule."""

    graceful = False

    def __init__(self) -> None:
        self._quality: tuple[SwarmView | None, float] = (None, 1.0)
        self._rng = random.Random("published")

    def place(self, world: World, machine: Machine) -> tuple[int, int]:
        return petals_span(coverage_of(_without(world.view(), machine)).supply, machine.num_fitting)

    def look(self, world: World, machine: Machine) -> tuple[int, int] | None:
        view = world.view()
        if self._quality[0] is not view:
            self._quality = (view, petals_quality(view, self._rng))
        return petals_move(view, hop_of(machine), self._quality[1])

    def next_look_s(self, rng: random.Random) -> float:
        return rng.uniform(0, 2 * CHECK_EVERY_S)


class Ours:
    """The plan that all make alike. slowest_s: real seconds of the longest decision."""

    graceful = True

    def __init__(self) -> None:
        self._plan: tuple[SwarmView | None, tuple[Move, ...]] = (None, ())
        self._patience = Patience()
        self.slowest_s = 0.0

    def place(self, world: World, machine: Machine) -> tuple[int, int]:
        began = time.perf_counter()
        view = _without(world.view(), machine)
        place = choose_span(view, machine.num_fitting, machine.tokens_per_s)
        self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
        return place

    def look(self, world: World, machine: Machine) -> tuple[int, int] | None:
        view = world.view()
        if self._plan[0] is not view:
            began = time.perf_counter()
            self._plan = (view, next_plan(view, self._patience, world.now))
            self.slowest_s = max(self.slowest_s, time.perf_counter() - began)
        move = own_part(self._plan[1], hop_of(machine))
        if move is None:
            return None
        load_s = machine.load_s * machine.num_fitting
        num_sessions = len(machine.sessions)
        rested_s = world.now - machine.moved_at
        if not pays_off(move, load_s=load_s, num_sessions=num_sessions, rested_s=rested_s):
            return None
        return move.start, move.end

    def next_look_s(self, rng: random.Random) -> float:
        return rng.uniform(0.5, 1.5) * LOOK_EVERY_S


def _without(view: SwarmView, machine: Machine) -> SwarmView:
    """A machine that comes back does not count its own old record."""
    if all(span.peer != machine.name for span in view.spans):
        return view
    spans = tuple(span for span in view.spans if span.peer != machine.name)
    return SwarmView(view.fingerprint, view.num_blocks, spans)
