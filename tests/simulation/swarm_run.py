"""One simulated swarm from start to end, under one policy, with its load and its bound."""

from __future__ import annotations

from dataclasses import dataclass

from .swarm_bound import best_tokens_per_s
from .swarm_load import Load, Outcome
from .swarm_policies import Ours, Published
from .swarm_world import Figures, Settings, World

BOUND_EVERY_S = 60.0


@dataclass(frozen=True)
class Run:
    """What came out. speeds: time and tokens per second of the slowest block, whenever they change."""

    settings: Settings
    figures: Figures
    outcome: Outcome
    speeds: list[tuple[float, float]]
    slowest_s: float


def simulate(settings: Settings, policy: str) -> Run:
    """Run a swarm under `published` or `ours`. The same settings give the same story."""
    decides: Published | Ours = Ours() if policy == "ours" else Published()
    world = World(settings, decides)
    load = Load(world, 20 if settings.num_machines <= 1000 else 8)

    def note_bound() -> None:
        machines = [
            (machine.num_fitting, machine.tokens_per_s)
            for machine in world.machines.values()
            if machine.span is not None
        ]
        world.figures.bound_tokens_per_s.append(best_tokens_per_s(machines, settings.num_blocks))
        world.after(BOUND_EVERY_S, note_bound)

    world.after(settings.warm_up_s, note_bound)
    figures = world.run()
    slowest_s = decides.slowest_s if isinstance(decides, Ours) else 0.0
    return Run(settings, figures, load.outcome, world.speeds, slowest_s)
