"""What a layout of spans carries, held against a linear program that shares the work out explicitly."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from scipy.optimize import linprog

from corolla.daemon.swarm.capacity import UNITS, Place, carried, most_carried, units


def shared_out(spans: list[tuple[int, int, int]], num_blocks: int) -> float:
    """The same by linear programming: what each span gives to each of its blocks, and T."""
    shares = [(index, block) for index, (start, end, _) in enumerate(spans) for block in range(start, end)]
    program = np.zeros((num_blocks + len(spans), len(shares) + 1))
    limits = np.zeros(len(program))
    for column, (index, block) in enumerate(shares):
        program[block, column] = -1.0
        program[num_blocks + index, column] = 1.0
    program[:num_blocks, -1] = 1.0
    limits[num_blocks:] = [work / UNITS for _, _, work in spans]
    objective = np.zeros(len(shares) + 1)
    objective[-1] = -1.0
    return -float(linprog(objective, A_ub=program, b_ub=limits, method="highs").fun)


def test_a_span_gives_its_work_to_those_of_its_blocks_that_are_short_of_it() -> None:
    work = {(0, 3): units(30.0), (1, 4): units(30.0)}
    assert carried(work, 4).tokens_per_s == pytest.approx(15.0)  # though whole spans leave 10 to the ends
    work = {(0, 2): units(10.0), (0, 4): units(10.0), (2, 4): units(100.0)}
    assert carried(work, 4).tokens_per_s == pytest.approx(10.0)
    assert carried(work, 4).short == ((0, 2),)


def test_a_block_that_nobody_holds_carries_nothing() -> None:
    found = carried({(0, 2): units(10.0), (3, 4): units(10.0)}, 4)
    assert (found.tokens_per_s, found.short) == (0.0, ((2, 3),))
    assert carried({}, 4).tokens_per_s == 0.0


def test_random_layouts_carry_what_the_linear_program_says_and_the_short_blocks_prove_it() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        num_blocks = rng.randint(2, 10)
        spans = []
        for _ in range(rng.randint(1, 8)):
            length = rng.randint(1, num_blocks)
            start = rng.randint(0, num_blocks - length)
            spans.append((start, start + length, units(rng.lognormvariate(2, 1))))
        work: Counter[Place] = Counter()
        for start, end, amount in spans:
            work[start, end] += amount
        found = carried(work, num_blocks)
        assert found.tokens_per_s == pytest.approx(shared_out(spans, num_blocks), abs=1e-6), f"seed {seed}"
        short = {block for start, end in found.short for block in range(start, end)}
        reach = sum(amount for start, end, amount in spans if short & set(range(start, end)))
        assert found.tokens_per_s == pytest.approx(reach / len(short) / UNITS), f"seed {seed}"
        most = most_carried([(end - start, amount) for start, end, amount in spans], num_blocks)
        assert found.tokens_per_s <= most + 1e-9, f"seed {seed}"


def test_a_fast_worker_that_holds_little_cannot_give_all_its_work() -> None:
    assert most_carried([(1, units(100.0)), (4, units(6.0))], 4) == pytest.approx(2.0)
    assert most_carried([(2, units(10.0)), (2, units(10.0))], 4) == pytest.approx(5.0)
