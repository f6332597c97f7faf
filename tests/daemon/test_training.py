"""Which replica a micro-batch is drawn to, and what the daemon keeps of adapters."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from random import Random

import pytest

from corolla.daemon.session.wiring import Precision
from corolla.daemon.swarm.view import Span
from corolla.daemon.training.parts import PartShelf
from corolla.daemon.training.virtual import Virtual
from corolla.daemon.training.wiring import common_precision, next_leg, usable
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.records import SpanState
from corolla.protocol.steps import NEW_ROW, Hop, Reply, Row
from corolla.protocol.tensors import DType

FLOAT32 = Precision(DType.FLOAT32, None)


def span(peer: str, start: int, end: int, speed: float = 10.0, dtype: DType = DType.FLOAT32) -> Span:
    return Span(peer, 0, start, end, SpanState.ONLINE, dtype, tokens_per_s=speed, rtt_s=0.0)


def drawn(spans: list[Span], load: dict[Hop, int]) -> Counter[str]:
    rng = Random(0)
    legs = [next_leg(spans, 0, 4, load, rng) for _ in range(600)]
    return Counter(leg.hop.peer for leg in legs if leg is not None)


def test_faster_replicas_get_more_micro_batches() -> None:
    counts = drawn([span("slow", 0, 4, 10.0), span("fast", 0, 4, 30.0)], {})
    assert counts["fast"] > 9 * counts["slow"] > 0


def test_a_long_queue_sends_micro_batches_elsewhere() -> None:
    counts = drawn([span("busy", 0, 4), span("free", 0, 4)], {Hop("busy", 0): 1})
    assert counts["free"] > 5 * counts["busy"] > 0


def test_micro_batches_in_flight_spread_as_the_speeds_of_replicas_allow() -> None:
    spans = [span("slow", 0, 4, 10.0), span("fast", 0, 4, 30.0)]
    rng, total = Random(0), Counter[str]()
    for _ in range(200):
        load = Counter[Hop]()
        for _ in range(4):
            leg = next_leg(spans, 0, 4, load, rng)
            assert leg is not None
            load[leg.hop] += 1
            total[leg.hop.peer] += 1
    assert 2 * total["slow"] < total["fast"] < 5 * total["slow"]


def test_a_leg_ends_where_its_span_or_the_interval_does() -> None:
    short, long = (
        next_leg([span("a", 0, 3)], 1, 9, {}, Random(0)),
        next_leg([span("a", 0, 9)], 1, 4, {}, Random(0)),
    )
    assert short is not None
    assert (short.start, short.end) == (1, 3)
    assert long is not None
    assert (long.start, long.end) == (1, 4)
    assert next_leg([], 0, 4, {}, Random(0)) is None


def test_hops_that_failed_or_compute_otherwise_are_left_out() -> None:
    spans = [span("a", 0, 4), span("b", 0, 4), span("c", 0, 4, dtype=DType.BFLOAT16), span("d", 2, 4)]
    assert [s.peer for s in usable(spans, 1, {Hop("a", 0)}, FLOAT32)] == ["b"]


def test_a_job_takes_the_precision_that_covers_all_blocks() -> None:
    half = [span("c", 0, 3, dtype=DType.BFLOAT16), span("e", 0, 3, dtype=DType.BFLOAT16)]
    assert common_precision([span("a", 0, 4), *half], 0, 4) == FLOAT32
    assert common_precision(half, 0, 4) is None


def test_parts_make_room_in_the_order_of_their_use() -> None:
    shelf = PartShelf(max_bytes=20)
    names = [sha256(bytes([i]) * 8).digest() for i in range(3)]
    shelf.put(names[0], bytes([0]) * 8, "one")
    shelf.put(names[1], bytes([1]) * 8, "two")
    assert shelf[names[0]] == bytes(8)
    shelf.put(names[2], bytes([2]) * 8, "one")
    assert set(shelf) == {names[0], names[2]}
    assert [view.adapter for view in shelf.views()] == ["one"]
    shelf.remove("one")
    assert not len(shelf)


def test_virtual_tokens_stand_before_each_row_that_begins_and_nobody_hears_of_them() -> None:
    virtual = Virtual(b"VW", 1)
    begun = (Row(NEW_ROW, 0, 3), Row(NEW_ROW, 0, 0), Row(NEW_ROW, 0, 1))
    assert virtual.sent(begun, b"abcd") == (
        (Row(NEW_ROW, 0, 5), Row(NEW_ROW, 0, 0), Row(NEW_ROW, 0, 3)),
        b"VWabcVWd",
    )
    assert virtual.heard(begun, b"..ABC..D", Reply.ALL) == b"ABCD"
    assert virtual.heard(begun, b"CD", Reply.LAST) == b"CD"
    later = (Row(2, 1, 1), Row(0, 0, 2))  # one goes on, one is set back to its beginning
    assert virtual.sent(later, b"efg") == ((Row(2, 3, 1), Row(0, 0, 4)), b"eVWfg")
    assert virtual.heard(later, b"E..FG", Reply.ALL) == b"EFG"


def test_a_part_under_a_wrong_name_is_refused() -> None:
    with pytest.raises(CorollaError) as caught:
        PartShelf().put(bytes(32), b"data", "mine")
    assert caught.value.code is Code.BAD_REQUEST
