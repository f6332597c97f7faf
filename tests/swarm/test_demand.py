"""What a worker announces as its queue, and that help comes to where it is long."""

from __future__ import annotations

from dataclasses import replace

from corolla.daemon.swarm.demand import HALF_LIFE_S, MAX_QUEUE, REFUSED_HALF_LIFE_S, Demand
from corolla.daemon.swarm.moving import CHECK_EVERY_S
from corolla.daemon.swarm.placement import plan_moves
from corolla.daemon.swarm.view import Span, SwarmView
from corolla.protocol.records import SpanState
from corolla.protocol.tensors import DType


def test_a_queue_is_an_average_over_the_last_while() -> None:
    demand = Demand()
    demand.note(0, 0, 0.0)
    demand.note(10, 0, HALF_LIFE_S)
    assert demand.queue == 5
    demand.note(10, 0, 20 * HALF_LIFE_S)
    assert demand.queue == 10
    demand.note(0, 0, 40 * HALF_LIFE_S)
    assert demand.queue == 0


def test_a_refused_session_counts_as_one_that_waits_and_is_forgotten() -> None:
    demand = Demand()
    demand.note(0, 7, 0.0)
    assert demand.queue == 0  # those before we began to look
    demand.note(0, 15, 1.0)
    assert demand.queue == 8
    demand.note(0, 15, 1.0 + REFUSED_HALF_LIFE_S)
    assert demand.queue == 4
    demand.note(0, 10**6, 2.0 + REFUSED_HALF_LIFE_S)
    assert demand.queue == MAX_QUEUE


def test_help_comes_to_where_sessions_are_refused_and_stays() -> None:
    """Fifteen machines serve a third of the model each; users ask for the first third nine times as often."""
    places = [(start, start + 4) for start in (0, 4, 8) for _ in range(5)]
    spans = [
        Span(f"p{i}", 0, *place, SpanState.ONLINE, DType.FLOAT32, tokens_per_s=10.0, movable=True)
        for i, place in enumerate(places)
    ]
    asked = {0: 72.0, 4: 8.0, 8: 8.0}  # tokens/s, by the first block that users ask for
    demands = {span.peer: Demand() for span in spans}
    refused = dict.fromkeys(demands, 0)
    by_minute, num_moves = [], []
    for step in range(80):
        shares = {span.peer: _asked_of(span, spans, asked) / span.tokens_per_s for span in spans}
        for peer, share in shares.items():
            refused[peer] += round(5 * max(0.0, share - 1))
            waiting = min(40, round(8 * share / max(0.1, 1 - share))) if share < 1 else 40
            demands[peer].note(waiting, refused[peer], step * CHECK_EVERY_S)
        by_minute.append(sum(max(0.0, share - 1) for share in shares.values()))
        spans = [replace(span, queue=demands[span.peer].queue) for span in spans]
        moves = {move.hop: move for move in plan_moves(SwarmView("f", 12, tuple(spans)))}
        num_moves.append(len(moves))
        spans = [
            replace(span, start=moves[span.hop].start, end=moves[span.hop].end) if span.hop in moves else span
            for span in spans
        ]
    assert by_minute[0] > 1.0
    assert by_minute[-1] == 0.0
    assert sum(num_moves[20:]) <= 4, "machines go to and fro"


def _asked_of(span: Span, spans: list[Span], asked: dict[int, float]) -> float:
    """Tokens per second that users ask of a span: each block's demand is shared evenly by those who serve it."""
    counts = {start: sum(one.start <= start < one.end for one in spans) for start in asked}
    return max(
        (rate / counts[start] for start, rate in asked.items() if span.start <= start < span.end), default=0.0
    )
