"""The most that any placement could give: the linear-programming bound of a simulated swarm.

Every machine serves one span of as many blocks as fit, and may be spread over positions by any shares: what
whole machines reach is at most this. Of machines of equal length only the sum of speeds matters, so that the
program has as many variables as there are lengths and positions, however many machines there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import lil_matrix


def best_tokens_per_s(machines: Iterable[tuple[int, float]], num_blocks: int) -> float:
    """An upper bound on the tokens per second of the slowest block. machines: blocks held, tokens per second."""
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
