"""The most that any placement could give: a bound on a simulated swarm by linear programming.

Every machine serves one span of as many blocks as fit. In the relaxation it may be spread over positions by any
shares: what whole machines reach is at most this. Of machines of equal length only the sum of speeds matters, so
that the program has as many variables as there are lengths and positions, however many machines there are. A few
machines reach far less than that, since they cannot be cut; for up to `FEW` the bound is that of whole ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import lil_matrix

FEW: Final = 12
WHOLE_LIMIT_S: Final = 5.0  # of real time; after that the bound proved so far counts


def best_tokens_per_s(machines: Iterable[tuple[int, float]], num_blocks: int) -> float:
    """An upper bound on the tokens per second of the slowest block. machines: blocks held, tokens per second."""
    listed = list(machines)
    if 0 < len(listed) <= FEW:
        return _best_of_whole(listed, num_blocks)
    speeds: Counter[int] = Counter()
    for length, speed in listed:
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


def _best_of_whole(machines: Sequence[tuple[int, float]], num_blocks: int) -> float:
    """The same for machines that cannot be cut: an integer program, of which the proved bound is given."""
    places = [
        (index, start)
        for index, (length, _) in enumerate(machines)
        for start in range(num_blocks - length + 1)
    ]
    cover = lil_matrix((num_blocks, len(places) + 1))
    chosen = lil_matrix((len(machines), len(places) + 1))
    for column, (index, start) in enumerate(places):
        length, speed = machines[index]
        cover[start : start + length, column] = speed
        chosen[index, column] = 1.0
    cover[:, len(places)] = -1.0
    objective = np.zeros(len(places) + 1)
    objective[-1] = -1.0
    solved = milp(
        objective,
        constraints=[
            LinearConstraint(cover.tocsr(), lb=0.0),
            LinearConstraint(chosen.tocsr(), lb=1.0, ub=1.0),
        ],
        integrality=np.array([1] * len(places) + [0]),
        bounds=Bounds(0.0, np.array([1.0] * len(places) + [np.inf])),
        options={"time_limit": WHOLE_LIMIT_S},
    )
    return -float(solved.mip_dual_bound)
