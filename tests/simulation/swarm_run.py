"""One simulated swarm from start to end, under one policy, with its load and its bound."""

from __future__ import annotations

from dataclasses import dataclass

from .swarm_bound import best_tokens_per_s, most_carried_by_program
from .swarm_load import Load, Outcome
from .swarm_policies import Ours, Published
from .swarm_search import FEW, most_found
from .swarm_world import Figures, Settings, World

BOUND_EVERY_S = 60.0
REACH_EVERY_S = 900.0  # a search takes half a second


@dataclass(frozen=True)
class Run:
    """What came out. speeds: time and tokens per second carried, whenever they change.

    reachable: what the best layout found for the machines of a moment carries, as a share of the bound.
    """

    settings: Settings
    figures: Figures
    outcome: Outcome
    speeds: list[tuple[float, float]]
    reachable: list[float]


def simulate(settings: Settings, policy: str, *, asks_reachable: bool = False) -> Run:
    """Run a swarm under `published` or `ours`. The same settings give the same story.

    asks_reachable: also what the best placement would be now and then, of up to `FEW` machines.
    """
    decides: Published | Ours = Ours() if policy == "ours" else Published()
    world = World(settings, decides)
    load = Load(world, 20 if settings.num_machines <= 1000 else 8)

    reachable: list[float] = []

    def present() -> list[tuple[int, float]]:
        here = (machine for machine in world.machines.values() if machine.span is not None)
        return [(machine.num_fitting, machine.tokens_per_s) for machine in here]

    def note_bound() -> None:
        machines, num_blocks = present(), settings.num_blocks
        world.figures.bound_tokens_per_s.append(most_carried_by_program(machines, num_blocks))
        world.figures.whole_bound_tokens_per_s.append(best_tokens_per_s(machines, num_blocks))
        world.after(BOUND_EVERY_S, note_bound)

    def note_reachable() -> None:
        machines, num_blocks = present(), settings.num_blocks
        if len(machines) <= FEW:
            found = most_found(machines, num_blocks, num_replicas=2)
            reachable.append(found / most_carried_by_program(machines, num_blocks))
        world.after(REACH_EVERY_S, note_reachable)

    world.after(settings.warm_up_s, note_bound)
    if asks_reachable:
        world.after(settings.warm_up_s, note_reachable)
    figures = world.run()
    return Run(settings, figures, load.outcome, world.speeds, reachable)
