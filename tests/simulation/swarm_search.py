"""The best placement of whole machines that a search finds: what a small swarm could reach, and not only its bound.

From several beginnings each machine in turn goes where the layout carries most, until none gains (coordinate ascent
with restarts). The result is a layout, so no bound: the true optimum lies between it and the linear program's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from corolla.daemon.swarm.capacity import Place, carried, units

FEW = 12  # machines for which it is worth its time
RESTARTS = 8
MAX_SWEEPS = 8  # over all machines


def most_found(
    machines: Sequence[tuple[int, float]], num_blocks: int, *, num_replicas: int = 1, seed: int = 0
) -> float:
    """Tokens per second of the best layout found that serves each block so often, as far as that is possible.

    machines: blocks held, tokens per second through them.
    """
    rng = random.Random(seed)
    return max(_ascend(machines, num_blocks, num_replicas, rng)[1] for _ in range(RESTARTS))


def _ascend(
    machines: Sequence[tuple[int, float]], num_blocks: int, num_replicas: int, rng: random.Random
) -> tuple[int, float]:
    starts = [rng.randint(0, num_blocks - length) for length, _ in machines]
    best = _rank(machines, starts, num_blocks, num_replicas)
    for _ in range(MAX_SWEEPS):
        before = best
        for index in rng.sample(range(len(machines)), len(machines)):
            for start in range(num_blocks - machines[index][0] + 1):
                tried = [*starts[:index], start, *starts[index + 1 :]]
                rank = _rank(machines, tried, num_blocks, num_replicas)
                if rank > best:
                    best, starts = rank, tried
        if best == before:
            break
    return best


def _rank(
    machines: Sequence[tuple[int, float]], starts: Sequence[int], num_blocks: int, num_replicas: int
) -> tuple[int, float]:
    """Replicas that are missing, less than zero, and the tokens per second carried."""
    work: Counter[Place] = Counter()
    replicas = [0] * num_blocks
    for (length, speed), start in zip(machines, starts, strict=True):
        work[start, start + length] += units(length * speed)
        for block in range(start, start + length):
            replicas[block] += 1
    missing = sum(max(0, num_replicas - count) for count in replicas)
    return -missing, carried(work, num_blocks).tokens_per_s
