"""The session's state machine under random schedules of everything that can go wrong.

2,000 schedules run by default. By hand: `python -m pytest tests/simulation -k schedules --seeds 100000`, and one
seed exactly, told in full: `python -m tests.simulation.test_sessions SEED`.
"""

from __future__ import annotations

import sys

import pytest

from .schedules import build

NUM_SCHEDULES = 2000
PER_TEST = 100


def play(seed: int, *, verbose: bool = False) -> None:
    """Run one schedule and check what must hold. Raises AssertionError naming the seed."""
    world = build(seed, verbose=verbose)
    try:
        world.run()
        world.check()
        if world.outcome.failed is not None:
            raise AssertionError(f"the session failed: {world.outcome.failed}")
    except AssertionError as problem:
        raise AssertionError(f"seed {seed}: {problem}") from problem


@pytest.mark.parametrize("first", range(0, NUM_SCHEDULES, PER_TEST))
def test_schedules_change_no_answer_and_charge_nobody_innocent(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        play(seed)


if __name__ == "__main__":
    play(int(sys.argv[1]), verbose=True)
    print("holds")
