"""Random schedules: who serves what, and what befalls whom when. One seed is one schedule, always the same."""

from __future__ import annotations

from .world import World

NUM_BLOCKS = 4


def build(seed: int, *, verbose: bool = False) -> World:
    """A world with random peers and random misfortunes.

    Each block has a rock: a peer to which nothing happens, so that the session must always reach its end.
    """
    world = World(seed, num_blocks=NUM_BLOCKS, verbose=verbose)
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


def _misfortune(world: World) -> None:
    rng = world.rng
    names = [name for name in world.peers if name.startswith("peer")]
    name = rng.choice(names)
    peer = world.peers[name]
    at_s = rng.choice((0.0, rng.uniform(0, 0.5), rng.uniform(0, 3), rng.uniform(0, 20)))

    def later(what: object) -> None:
        world.clock.after(at_s, what)  # type: ignore[arg-type]

    match rng.randrange(12):
        case 0 | 1:
            later(lambda: world.kill(name))
        case 2:
            later(lambda: world.kill(name, back_after_s=rng.uniform(0, 90)))
        case 3:
            later(lambda: world.hang(name, rng.choice((1.0, 15.0, 100.0))))
        case 4:
            world.guilty.add(name)
            later(lambda: setattr(peer.habits, "stuck", True))
        case 5:
            world.guilty.add(name)
            later(peer.crash_worker)
        case 6:
            world.liars.add(name)
            kind = rng.choice(("nan", "shape", "short"))
            later(lambda: setattr(peer.habits, "garbage", kind))
        case 7:
            world.liars.add(name)
            later(lambda: setattr(peer.habits, "slanders", True))
        case 8:
            peer.habits.history_bytes = rng.choice((0, 40, 100))
        case 9:
            later(lambda: setattr(peer.habits, "busy", True))
            peer.habits.repeats = True
        case 10:
            other = rng.choice([other for other in world.peers if other != name])
            silent, for_s = rng.random() < 0.4, rng.choice((1.0, 30.0, 10000.0))
            later(lambda: world.cut(name, other, silent=silent, for_s=for_s))
        case 11:
            world.guilty.add(name)
            later(lambda: [world.break_stream(stream) for stream in world.streams_of(name)])
