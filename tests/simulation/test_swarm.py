"""Small simulated swarms under both placement policies; the large ones are `tests/benchmarks/placement.py`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from corolla.daemon.swarm.capacity import most_carried, units
from corolla.daemon.swarm.moving import PASSED_OVER_S, PATIENCE_S, Patience, own_part, pays_off
from corolla.daemon.swarm.placement import Move, Purpose
from corolla.protocol.steps import Hop

from .swarm_bound import best_tokens_per_s, most_carried_by_program
from .swarm_run import simulate
from .swarm_search import most_found
from .swarm_world import Settings

SMALL = Settings(40, 16, seed=3, warm_up_s=300.0, duration_s=600.0)


@pytest.mark.parametrize("policy", ["published", "ours"])
def test_a_swarm_that_loses_all_replicas_of_a_block_heals(policy: str) -> None:
    run = simulate(SMALL, policy)
    assert run.figures.gaps_s, "the outage took nobody away"
    assert 0 < run.figures.down_s < run.figures.seconds
    assert max(run.figures.gaps_s) < 120.0
    assert run.speeds[-1][1] > 0


def test_the_same_seed_tells_the_same_story() -> None:
    one, other = simulate(SMALL, "ours"), simulate(SMALL, "ours")
    assert (one.figures, one.outcome, one.speeds) == (other.figures, other.outcome, other.speeds)


def test_ours_reaches_more_of_both_bounds_than_the_published_rule_and_nobody_passes_them() -> None:
    published, ours = simulate(SMALL, "published"), simulate(SMALL, "ours")
    assert published.figures.share < ours.figures.share <= 1.0
    assert published.figures.whole_share < ours.figures.whole_share <= 1.0
    assert ours.figures.single_block_s <= published.figures.single_block_s


def test_sessions_leave_a_hop_that_drains_and_survive_churn() -> None:
    outcome = simulate(replace(SMALL, seed=4, outage=False, mean_stay_s=600.0), "ours").outcome
    assert outcome.num_moved > 10
    assert outcome.num_lost == 0
    assert outcome.num_refused == 0


def test_the_bound_is_what_identical_machines_reach_exactly() -> None:
    assert best_tokens_per_s([(4, 10.0)] * 4, 16) == pytest.approx(10.0)
    assert best_tokens_per_s([(8, 10.0), (16, 5.0), (8, 10.0)], 16) == pytest.approx(15.0)
    assert best_tokens_per_s([(4, 10.0)] * 7, 16) == pytest.approx(17.5)  # spread by shares
    assert most_found([(4, 10.0)] * 7, 16) == pytest.approx(17.5)  # of whole ones, if routes share
    assert most_found([(8, 10.0)] * 2, 16, num_replicas=2) == pytest.approx(10.0)  # as far as possible
    assert best_tokens_per_s([], 16) == 0.0


def test_the_bound_is_above_any_whole_layout() -> None:
    rng = random.Random(5)
    for _ in range(20):
        machines = [(rng.randint(1, 6), rng.uniform(1, 20)) for _ in range(14)]
        supply = [0.0] * 12
        for length, speed in machines:
            start = rng.randint(0, 12 - length)
            for block in range(start, start + length):
                supply[block] += speed
        assert min(supply) <= best_tokens_per_s(machines, 12) + 1e-6


def test_the_daemon_knows_the_bound_of_the_linear_program() -> None:
    rng = random.Random(6)
    for _ in range(50):
        machines = [(rng.randint(1, 6), rng.lognormvariate(1, 1)) for _ in range(rng.randint(2, 9))]
        known = most_carried([(length, units(length * speed)) for length, speed in machines], 12)
        assert known == pytest.approx(most_carried_by_program(machines, 12), rel=2e-3)


# patience and cost


def test_who_is_named_in_vain_is_passed_over_for_a_while() -> None:
    patience, move = Patience(), Move(Hop("lazy", 0), 0, 4, Purpose.GAP)
    patience.note((move,), 0.0)
    patience.note((move,), PATIENCE_S - 1)
    assert patience.passed_over(PATIENCE_S - 1) == frozenset()
    patience.note((move,), PATIENCE_S)
    assert patience.passed_over(PATIENCE_S) == {move.hop}
    assert patience.passed_over(PATIENCE_S + PASSED_OVER_S) == frozenset()


def test_who_was_named_and_then_not_starts_anew() -> None:
    patience, move = Patience(), Move(Hop("good", 0), 0, 4, Purpose.GAP)
    patience.note((move,), 0.0)
    patience.note((), 5.0)
    patience.note((move,), PATIENCE_S)
    assert patience.passed_over(PATIENCE_S) == frozenset()


def test_a_move_for_speed_has_to_pay_and_one_that_closes_a_gap_has_not() -> None:
    speed, gap = (Move(Hop("m", 0), 0, 4, purpose) for purpose in (Purpose.SPEED, Purpose.GAP))
    assert pays_off(speed, load_s=20.0, num_sessions=2, rested_s=1e6)
    assert not pays_off(speed, load_s=20.0, num_sessions=2, rested_s=60.0)
    assert not pays_off(speed, load_s=600.0, num_sessions=0, rested_s=1e6)
    assert not pays_off(speed, load_s=20.0, num_sessions=60, rested_s=1e6)
    assert pays_off(gap, load_s=600.0, num_sessions=60, rested_s=0.0)
    assert own_part((gap,), Hop("m", 0)) == gap
    assert own_part((gap,), Hop("other", 0)) is None
