"""The most that any placement could give: bounds on a simulated swarm by linear and integer programming.

Every machine holds one span of as many blocks as fit. Two measures (`daemon/swarm/capacity.py`): what a layout carries
if routes share the work out, and its slowest block if all routes take whole spans, which is the published measure.
In the relaxations a machine may hold any shares of blocks: what whole machines reach is at most that. A few machines
reach less, since they cannot be cut; how much less an integer program says, whose best layout is given as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_matrix, lil_matrix

FEW: Final = 12
WHOLE_LIMIT_S: Final = 4.0  # of real time; after that the best layout found so far counts

Machines = Iterable[tuple[int, float]]  # blocks held, tokens per second through them


@dataclass(frozen=True)
class Best:
    """The best layout of whole machines that was found, and the tokens per second that none passes."""

    found: float
    bound: float


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


def best_slowest_block(machines: Sequence[tuple[int, float]], num_blocks: int) -> Best:
    """The best layout of whole machines by the published measure, as an integer program."""
    places = _places(machines, num_blocks)
    width = len(places) + 1
    cover, chosen = lil_matrix((num_blocks, width)), lil_matrix((len(machines), width))
    for column, (index, start) in enumerate(places):
        length, speed = machines[index]
        cover[start : start + length, column] = speed
        chosen[index, column] = 1.0
    cover[:, -1] = -1.0
    rows = [LinearConstraint(cover.tocsr(), lb=0.0), LinearConstraint(chosen.tocsr(), lb=1.0, ub=1.0)]
    return _solve(rows, len(places), width)


def best_carried(machines: Sequence[tuple[int, float]], num_blocks: int) -> Best:
    """The best layout of whole machines by what it carries. After its places come the shares, machine by machine."""
    places = _places(machines, num_blocks)
    first = len(places)
    width = first + len(machines) * num_blocks + 1
    held, chosen = lil_matrix((width - 1 - first, width)), lil_matrix((len(machines), width))
    spent, given = lil_matrix((len(machines), width)), lil_matrix((num_blocks, width))
    work = [length * speed for length, speed in machines]
    for column, (index, start) in enumerate(places):
        chosen[index, column] = 1.0
        for block in range(start, start + machines[index][0]):
            held[index * num_blocks + block, column] = -work[index]
    for share in range(width - 1 - first):
        held[share, first + share] = 1.0
        spent[share // num_blocks, first + share] = 1.0
        given[share % num_blocks, first + share] = 1.0
    given[:, -1] = -1.0
    rows = [
        LinearConstraint(held.tocsr(), ub=0.0),
        LinearConstraint(chosen.tocsr(), lb=1.0, ub=1.0),
        LinearConstraint(spent.tocsr(), ub=np.array(work)),
        LinearConstraint(given.tocsr(), lb=0.0),
    ]
    solved = _solve(rows, first, width)
    return Best(solved.found, min(solved.bound, most_carried_by_program(machines, num_blocks)))


def _places(machines: Sequence[tuple[int, float]], num_blocks: int) -> list[tuple[int, int]]:
    return [(i, start) for i, (length, _) in enumerate(machines) for start in range(num_blocks - length + 1)]


def _solve(rows: list[Any], num_places: int, width: int) -> Best:
    """Maximize the last variable, with whole numbers for the places."""
    objective = np.zeros(width)
    objective[-1] = -1.0
    integrality, upper = np.zeros(width), np.full(width, np.inf)
    integrality[:num_places], upper[:num_places] = 1, 1.0
    solved = milp(
        objective,
        constraints=rows,
        integrality=integrality,
        bounds=Bounds(0.0, upper),
        options={"time_limit": WHOLE_LIMIT_S, "mip_rel_gap": 0.003},
    )
    found = 0.0 if solved.x is None else -float(solved.fun)
    return Best(found, float("inf") if solved.mip_dual_bound is None else -float(solved.mip_dual_bound))
