"""Which blocks a worker serves, and who moves when that changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from corolla.daemon.swarm.capacity import carried_by
from corolla.daemon.swarm.coverage import coverage_of
from corolla.daemon.swarm.petals import petals_imagined, petals_move, petals_quality, petals_span
from corolla.daemon.swarm.placement import (
    MIN_GAIN,
    Purpose,
    best_for,
    choose_span,
    gain_of,
    plan_moves,
)
from corolla.daemon.swarm.view import Span, SwarmView
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.records import SpanState
from corolla.protocol.steps import Hop
from corolla.protocol.tensors import DType


def span(start: int, end: int, speed: float = 10.0, state: SpanState = SpanState.ONLINE) -> Span:
    return Span(f"p{start}-{end}-{speed}", 0, start, end, state, DType.FLOAT32, tokens_per_s=speed)


def test_the_first_worker_starts_at_the_first_block() -> None:
    assert choose_span(SwarmView("f", 30, ()), 10) == (0, 10)


def test_a_worker_with_room_for_all_serves_all() -> None:
    assert choose_span(SwarmView("f", 30, (span(0, 30),)), 100) == (0, 30)


@pytest.mark.parametrize("num_fitting", [1, 7, 8, 10, 29])
def test_workers_that_join_one_by_one_leave_no_gap_and_need_no_more_workers_than_must_be(
    num_fitting: int,
) -> None:
    spans: list[Span] = []
    for index in range(-(-30 // num_fitting)):
        start, end = choose_span(SwarmView("f", 30, tuple(spans)), num_fitting)
        spans.append(Span(f"p{index}", 0, start, end, SpanState.LOADING, DType.FLOAT32))
    served = {block for one in spans for block in range(one.start, one.end)}
    assert served == set(range(30))


def test_a_gap_comes_before_any_weak_stretch() -> None:
    view = SwarmView("f", 12, (span(0, 4, 0.5), span(4, 8, 100.0)))
    assert choose_span(view, 4) == (8, 12)


def test_with_no_gap_the_weakest_stretch_is_joined() -> None:
    view = SwarmView("f", 12, (span(0, 4, 20.0), span(4, 8, 5.0), span(8, 12, 10.0)))
    assert choose_span(view, 4) == (4, 8)


def test_the_weakest_block_counts_before_the_sum() -> None:
    view = SwarmView("f", 4, (span(0, 1, 1.0), span(1, 2, 90.0), span(2, 4, 5.0)))
    assert choose_span(view, 2) == (0, 2)


def test_throughputs_add_up_and_those_that_leave_do_not_count() -> None:
    view = SwarmView(
        "f",
        3,
        (
            span(0, 2, 2.0),
            span(1, 3, 3.0),
            span(0, 3, 7.0, SpanState.DRAINING),
            span(2, 3, 0.0, SpanState.LOADING),
        ),
    )
    assert coverage_of(view).supply == (2.0, 5.0, 4.0)


def test_no_room_is_an_error() -> None:
    with pytest.raises(CorollaError) as caught:
        choose_span(SwarmView("f", 30, ()), 0)
    assert caught.value.code is Code.DOES_NOT_FIT


def serving(*places: tuple[int, int, float], num_blocks: int = 12) -> SwarmView:
    """A swarm of movable spans: start, end, tokens/s; peers are called p0, p1, …"""
    return SwarmView(
        "f",
        num_blocks,
        tuple(
            Span(f"p{i}", 0, s, e, SpanState.ONLINE, DType.FLOAT32, tokens_per_s=v, movable=True)
            for i, (s, e, v) in enumerate(places)
        ),
    )


def after(view: SwarmView) -> SwarmView:
    """The view when everybody has done as planned, and has loaded."""
    to = {move.hop: move for move in plan_moves(view)}
    spans = (replace(s, start=to[s.hop].start, end=to[s.hop].end) if s.hop in to else s for s in view.spans)
    return replace(view, spans=tuple(spans))


def test_a_gap_is_closed_by_one() -> None:
    view = serving((0, 6, 10.0), (0, 6, 10.0), (0, 6, 1.0), (0, 6, 10.0), (6, 9, 10.0))
    first = plan_moves(view)[0]
    assert (first.start, first.end, first.purpose) == (6, 12, Purpose.GAP)
    assert coverage_of(after(view)).num_gaps == 0
    assert sum(move.purpose is Purpose.GAP for move in plan_moves(view)) == 1


def test_all_who_see_the_same_make_the_same_plan_whatever_the_order_and_their_own_distance() -> None:
    view = serving(*((0, 4, 5.0 + i) for i in range(6)), (4, 8, 3.0), (4, 8, 3.0))
    spans = [replace(span, rtt_s=0.01 * i, mine=i == 3) for i, span in enumerate(view.spans)]
    random.Random(1).shuffle(spans)
    assert plan_moves(replace(view, spans=tuple(spans))) == plan_moves(view) != ()


def test_who_does_not_move_is_passed_over() -> None:
    view = serving((0, 6, 10.0), (0, 6, 10.0), (0, 6, 10.0), num_blocks=12)
    first = plan_moves(view)[0]
    second = plan_moves(view, excluded=frozenset({first.hop}))[0]
    assert first.purpose is second.purpose is Purpose.GAP
    assert first.hop != second.hop


def test_a_span_that_is_loading_closes_the_gap_already() -> None:
    view = serving((0, 6, 10.0), (0, 6, 10.0), (0, 6, 10.0))
    coming = Span("new", 0, 6, 12, SpanState.LOADING, DType.FLOAT32, tokens_per_s=10.0)
    moves = plan_moves(replace(view, spans=(*view.spans, coming)))
    assert all(move.purpose is not Purpose.GAP for move in moves)


def test_fixed_draining_and_lost_spans_are_never_asked() -> None:
    view = serving((0, 6, 10.0), (0, 6, 10.0), (0, 6, 10.0), (0, 6, 10.0))
    fixed = tuple(
        replace(span, movable=movable, state=state, suspect=suspect)
        for span, (movable, state, suspect) in zip(
            view.spans,
            (
                (False, SpanState.ONLINE, False),
                (True, SpanState.DRAINING, False),
                (True, SpanState.ONLINE, True),
                (False, SpanState.ONLINE, False),
            ),
            strict=True,
        )
    )
    assert plan_moves(replace(view, spans=fixed)) == ()


def test_a_second_replica_comes_before_speed() -> None:
    view = serving((0, 6, 10.0), (0, 6, 10.0), (0, 6, 10.0), (6, 12, 500.0))
    assert [move.purpose for move in plan_moves(view)] == [Purpose.SPARE]
    assert coverage_of(after(view)).num_single == 0


def test_who_alone_serves_a_block_stays_while_there_is_no_gap() -> None:
    view = serving((0, 8, 10.0), (4, 12, 1.0), (4, 12, 1.0), (4, 12, 1.0))
    assert all(move.hop.peer != "p0" for move in plan_moves(view))


def test_small_gains_move_nobody() -> None:
    even = serving(*((s, s + 4, 10.0 + 0.01 * i) for i in range(5) for s in (0, 4, 8)))
    assert plan_moves(even) == ()


def test_an_uneven_swarm_gets_even_and_then_rests() -> None:
    view = serving(*((0, 4, 1.0) for _ in range(20)), *((s, s + 4, 1.0) for s in (4, 4, 8, 8)))
    before = coverage_of(view).tokens_per_s
    num_moves = 0
    while moves := plan_moves(view):
        num_moves += len(moves)
        view = after(view)
        assert num_moves < 20
    assert before == 2.0
    assert coverage_of(view).tokens_per_s >= 7.0
    assert num_moves <= 12


def test_a_long_queue_counts_as_less_speed() -> None:
    view = serving(*((s, s + 6, 10.0) for s in (0, 0, 0, 6, 6, 6)))
    assert plan_moves(view) == ()
    busy = tuple(replace(s, queue=40) if s.start == 6 else s for s in view.spans)
    (move, *_) = plan_moves(replace(view, spans=busy))
    assert (move.start, move.end) == (6, 12)


def test_what_moving_would_gain_is_told() -> None:
    view = serving((0, 6, 10.0), (0, 6, 20.0), (6, 12, 10.0))
    gain = gain_of(view, Hop("p1", 0), 6, 12)
    assert (gain.before.tokens_per_s, gain.after.tokens_per_s) == (10.0, 10.0)
    assert gain.after.supply == (10.0,) * 6 + (30.0,) * 6
    assert best_for(view, Hop("p1", 0)) == (3, 9)  # of use to both sides
    assert best_for(view, Hop("nobody", 0)) is None
    with pytest.raises(CorollaError) as caught:
        gain_of(view, Hop("p1", 0), 8, 14)
    assert caught.value.code is Code.BLOCKS_OUT_OF_RANGE


def test_two_move_together_where_one_alone_gains_nothing() -> None:
    places = (
        (0, 4, 40.0),
        (0, 4, 5.0),
        (0, 4, 5.0),
        (4, 8, 5.0),
        (4, 8, 5.0),
        (4, 8, 40.0),
        (8, 12, 5.0),
        (8, 12, 5.0),
    )
    view = serving(*places)
    moves = plan_moves(view)
    assert 1 < len(moves) <= 4
    assert {move.purpose for move in moves} == {Purpose.SPEED}
    assert len({move.hop for move in moves}) == len(moves)
    before, now = carried_by(view), carried_by(after(view))
    assert now >= before * (1 + MIN_GAIN * len(moves))


def test_random_swarms_only_get_better() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        num_blocks = rng.randint(4, 24)
        places = []
        for _ in range(rng.randint(1, 30)):
            length = rng.randint(1, num_blocks)
            start = rng.randint(0, num_blocks - length)
            places.append((start, start + length, rng.lognormvariate(1, 1)))
        view = serving(*places, num_blocks=num_blocks)
        before, now = coverage_of(view), coverage_of(after(view))
        risk = (before.num_gaps, before.num_single)
        assert (now.num_gaps, now.num_single) <= risk, f"seed {seed}"
        if (now.num_gaps, now.num_single) == risk:
            assert carried_by(after(view)) >= carried_by(view) - 1e-9, f"seed {seed}"


# the published rule


def test_the_published_rule_takes_the_weakest_stretch_and_moves_below_its_quality() -> None:
    assert petals_span((5.0, 1.0, 1.0, 5.0), 2) == (1, 3)
    rng = random.Random(1)
    uneven = serving((0, 6, 10.0), (0, 6, 10.0), (0, 6, 10.0), (6, 12, 10.0))
    supply = coverage_of(uneven).supply
    first, *_, last = uneven.spans
    quality = petals_quality(supply, lambda: petals_imagined(uneven, rng))
    assert quality == 0.5
    assert petals_move(supply, first, quality) == (6, 12)
    assert petals_move(supply, last, quality) is None  # the swarm would fall apart
    assert petals_move(supply, first, 0.8) is None
    assert petals_quality((10.0, 9.0), lambda: 100.0) == 1.0
