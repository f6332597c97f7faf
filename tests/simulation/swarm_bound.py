"""The most that any placement could give: bounds on a simulated swarm by linear programming.

Every machine holds one span of as many blocks as fit. Two measures (`daemon/swarm/capacity.py`): what a layout carries
if routes share the work out, and its slowest block if all routes take whole spans, which is the published measure.
In the relaxations a machine may hold any shares of blocks: what whole machines reach is at most that, and what is
found for a few of them (`swarm_search.py`) at least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, lil_matrix

Machines = Iterable[tuple[int, float]]  # blocks held, tokens per second through them


def most_carried_by_program(machines: Machines, num_blocks: int) -> float:
    """An upper bound on what any layout carries, by linear programming.

    Variables: the share that machines give to each block, and T. Nobody gives more than its work, nor more than T to
    any of the blocks that it holds. Machines that hold equally many blocks and are equally fast count as one.
    """
    kinds = sorted(Counter(machines).items())
    count = len(kinds)
    held = np.array([length * number for (length, _), number in kinds])
    work = [length * speed * number for (length, speed), number in kinds]
    rows = np.arange(count)
    program = coo_matrix(  # of the work that each kind gives, and in the last column of T
        (
            np.concatenate([np.ones(count), -held, -np.ones(count), [num_blocks]]),
            (
                np.concatenate([rows, rows, np.full(count, count), [count]]),
                np.concatenate([rows, np.full(count, count), rows, [count]]),
            ),
        )
    )
    objective = np.zeros(count + 1)
    objective[-1] = -1.0
    bounds = [*((0.0, most) for most in work), (0.0, None)]
    solved = linprog(objective, A_ub=program.tocsr(), b_ub=np.zeros(count + 1), bounds=bounds, method="highs")
    return -float(solved.fun)


def best_tokens_per_s(machines: Machines, num_blocks: int) -> float:
    """An upper bound on the tokens per second of the slowest block: the published measure.

    Of machines of equal length only the sum of speeds matters: as many variables as there are lengths and positions.
    """
    speeds: Counter[int] = Counter()
    for length, speed in machines:
        speeds[length] += speed  # type: ignore[assignment]
    places = [(length, start) for length in speeds for start in range(num_blocks - length + 1)]
    if not places:
        return 0.0
    lengths = sorted(speeds)
    cover = lil_matrix((num_blocks, len(places) + 1))  # the last variable is the throughput
    spent = lil_matrix((len(lengths), len(places) + 1))
    for column, (length, start) in enumerate(places):
        cover[start : start + length, column] = -1.0
        spent[lengths.index(length), column] = 1.0
    cover[:, len(places)] = 1.0
    objective = np.zeros(len(places) + 1)
    objective[-1] = -1.0
    solved = linprog(
        objective,
        A_ub=cover.tocsr(),
        b_ub=np.zeros(num_blocks),
        A_eq=spent.tocsr(),
        b_eq=[float(speeds[length]) for length in lengths],
        method="highs",
    )
    return -float(solved.fun)
