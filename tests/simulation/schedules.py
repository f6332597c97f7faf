"""Random schedules: who serves what, and what befalls whom when. One seed is one schedule, always the same."""

from __future__ import annotations

import itertools
import random
from functools import partial

from .world import World

NUM_BLOCKS = 4
FOR_EVER_S = 1e9


def play_machine(seed: int, *, links_break: bool = False) -> World:
    """Run one schedule to its end and check what must hold. Raises AssertionError naming the seed.

    links_break: some peers, or all, never reach each other, or from some time on.
    """
    world = build(seed)
    if links_break:
        _break_links(world, seed)
    try:
        world.run()
        world.check()
        if world.outcome.failed is not None:
            raise AssertionError(f"the session failed: {world.outcome.failed}")
    except Exception as problem:
        told = "\n".join(line[:200] for line in world.lines[-30:])
        raise AssertionError(f"machine, seed {seed}: {problem!r}\n{told}") from problem
    return world


def build(seed: int) -> World:
    """A world with random peers and random misfortunes.

    Each block has a rock: a peer to which nothing happens, so that the session must always reach its end.
    """
    world = World(seed, num_blocks=NUM_BLOCKS)
    rng = world.rng
    at = 0
    while at < NUM_BLOCKS:
        end = rng.randint(at + 1, NUM_BLOCKS)
        world.add_peer(f"rock{at}", rng.randint(0, at), end)
        at = end
    for index in range(rng.randint(2, 8)):
        start = rng.randrange(NUM_BLOCKS)
        world.add_peer(f"peer{index}", start, rng.randint(start + 1, NUM_BLOCKS))
    world.plan_steps(rng.randint(3, 20))
    for _ in range(rng.randint(0, 8)):
        _misfortune(world)
    return world


def _break_links(world: World, seed: int) -> None:
    """Cut links between live peers for ever; between the rocks, too, so that there may be no way round."""
    rng = random.Random(f"links {seed}")
    share = rng.choice((0.3, 0.7, 1.0))
    for one, other in itertools.combinations(sorted(world.peers), 2):
        among_rocks = one.startswith("rock") and other.startswith("rock")
        if among_rocks or rng.random() < share:
            at_s = rng.choice((0.0, 0.0, rng.uniform(0, 5)))
            cut = partial(world.cut, one, other, silent=rng.random() < 0.3, for_s=FOR_EVER_S)
            world.clock.after(at_s, cut)


def _misfortune(world: World) -> None:
    """One thing that befalls a peer that is no rock; mostly one that is on the route at that moment."""
    rng = world.rng
    names = [name for name in world.peers if name.startswith("peer")]
    at_s = rng.choice((0.0, rng.uniform(0, 0.5), rng.uniform(0, 3), rng.uniform(0, 20)))
    kind = rng.randrange(12)
    choice, aim = rng.random(), rng.random()

    def strike() -> None:
        used = [place.hop.peer for place in world.machine.statistics().hops]
        targets = [name for name in used if name in names] if aim < 0.7 else []
        targets = targets or names
        _befall(world, targets[int(choice * len(targets))], kind)

    world.clock.after(at_s, strike)


def _befall(world: World, name: str, kind: int) -> None:
    rng = world.rng
    peer = world.peers[name]
    match kind:
        case 0 | 1:
            world.kill(name)
        case 2:
            world.kill(name, back_after_s=rng.uniform(0, 90))
        case 3:
            world.hang(name, rng.choice((1.0, 15.0, 100.0)))
        case 4:
            world.guilty.add(name)
            peer.habits.stuck = True
        case 5:
            world.guilty.add(name)
            peer.crash_worker()
        case 6:
            world.liars.add(name)
            peer.habits.garbage = rng.choice(("nan", "shape", "short"))
        case 7:
            world.liars.add(name)
            peer.habits.slanders = True
        case 8:
            peer.habits.history_bytes = rng.choice((0, 40, 100))
        case 9:
            peer.habits.busy = peer.habits.repeats = True
        case 10:
            other = rng.choice([other for other in world.peers if other != name])
            world.cut(name, other, silent=rng.random() < 0.4, for_s=rng.choice((1.0, 30.0, 10000.0)))
        case 11:
            world.guilty.add(name)
            for stream in world.streams_of(name):
                world.break_stream(stream)
