"""Which blocks a new worker serves."""

from __future__ import annotations

import pytest

from corolla.daemon.swarm.placement import block_throughputs, choose_span
from corolla.daemon.swarm.view import Span, SwarmView
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.records import SpanState
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
    assert block_throughputs(view) == (2.0, 5.0, 4.0)


def test_no_room_is_an_error() -> None:
    with pytest.raises(CorollaError) as caught:
        choose_span(SwarmView("f", 30, ()), 0)
    assert caught.value.code is Code.DOES_NOT_FIT
