"""The placement policies as the simulator runs them: the daemon's pure functions, and nothing of its own but memory.

All machines of a moment see the same records, so what is computed from these alone is computed once for all.
"""

from __future__ import annotations

import math
import random

from corolla.daemon.swarm.moving import CHECK_EVERY_S as LOOK_EVERY_S
from corolla.daemon.swarm.moving import Patience, next_plan, own_part, pays_off
from corolla.daemon.swarm.petals import (
    CHECK_EVERY_S,
    QUALITY,
    petals_imagined,
    petals_move,
    petals_quality,
    petals_span,
)
from corolla.daemon.swarm.placement import Move, choose_span

from .swarm_world import FEW, Machine, World, hop_of

IMAGINED_EVERY_S = 60.0


class Published:
    """Petals' rule."""

    graceful = False

    def __init__(self) -> None:
        self._quality = (-1, 1.0)  # of which version of what is seen
        self._imagined = (-math.inf, 0.0)  # when, tokens per second
        self._rng = random.Random("published")

    def place(self, world: World, machine: Machine) -> tuple[int, int]:
        with world.census_without(machine) as census:
            return petals_span(census.coverage().supply, machine.num_fitting)

    def look(self, world: World, machine: Machine) -> tuple[int, int] | None:
        own = world.record(machine)
        if self._quality[0] != world.version:
            supply = world.census().coverage().supply
            self._quality = (world.version, petals_quality(supply, lambda: self._imagine(world)))
        quality = self._quality[1]
        if own is None or quality >= QUALITY:
            return None
        return petals_move(world.census().coverage().supply, own, quality)

    def _imagine(self, world: World) -> float:
        """What all could reach hardly changes from one moment to the next where they are many."""
        at, imagined = self._imagined
        if len(world.machines) <= FEW or world.now - at > IMAGINED_EVERY_S:
            imagined = petals_imagined(world.view(), self._rng)
            self._imagined = world.now, imagined
        return imagined

    def next_look_s(self, rng: random.Random) -> float:
        return rng.uniform(0, 2 * CHECK_EVERY_S)


class Ours:
    """The plan that all make alike."""

    graceful = True

    def __init__(self) -> None:
        self._plan: tuple[int, tuple[Move, ...]] = (-1, ())  # of which version of what is seen
        self._patience = Patience()

    def place(self, world: World, machine: Machine) -> tuple[int, int]:
        with world.census_without(machine) as census:
            return choose_span(census, machine.num_fitting, machine.tokens_per_s)

    def look(self, world: World, machine: Machine) -> tuple[int, int] | None:
        if self._plan[0] != world.version:
            self._plan = (world.version, next_plan(world.census(), self._patience, world.now))
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
