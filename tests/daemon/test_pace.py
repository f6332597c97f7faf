"""When a request is late, and for how long that is held against a hop."""

from __future__ import annotations

from corolla.daemon.training.pace import LATE, LEAST_S, REMEMBERED_S, UNKNOWN_S, Pace
from corolla.protocol.steps import Hop


def test_a_request_is_late_beyond_some_times_what_is_usual_for_its_kind_and_size() -> None:
    pace = Pace()
    for took_s in (8.0, 10.0, 100.0):
        pace.note("forward", 10, took_s)
    assert pace.patience_s("forward", 10) == LATE * 10.0
    assert pace.patience_s("forward", 30) == LATE * 30.0
    assert pace.patience_s("forward", 1) == LEAST_S
    assert pace.patience_s("backward", 10) == UNKNOWN_S


def test_what_was_usual_long_ago_counts_no_more() -> None:
    pace = Pace()
    for took_s in (100.0, 7.0):
        for _ in range(100):
            pace.note("forward", 1, took_s)
    assert pace.patience_s("forward", 1) == LATE * 7.0


def test_a_hop_that_was_late_is_forgiven() -> None:
    pace, hop = Pace(), Hop("peer", 0)
    pace.note_late(hop, 5.0)
    assert set(pace.late(6.0)) == {hop}
    assert not pace.late(5.0 + REMEMBERED_S)
