"""Who would take over from each hop of a route, and which hop is left before it fails."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from corolla.daemon.swarm.routing import Wanted, find_path
from corolla.daemon.swarm.standby import LOOK_EVERY_S, LOOKS, Standing, Unrest, stand
from corolla.daemon.swarm.view import Span, SwarmView
from corolla.protocol.records import SpanState
from corolla.protocol.steps import Hop
from corolla.protocol.tensors import DType

WHOLE = Wanted(0, 8)
ROUTE = ((Hop("a", 0), 0, 4), (Hop("b", 0), 4, 8))


def span(peer: str, start: int, end: int, *, tokens_per_s: float = 100.0, rtt_s: float = 0.01) -> Span:
    return Span(peer, 0, start, end, SpanState.ONLINE, DType.FLOAT32, tokens_per_s=tokens_per_s, rtt_s=rtt_s)


def view(*spans: Span) -> SwarmView:
    return SwarmView("f", 8, spans)


SWARM = view(span("a", 0, 4), span("b", 4, 8), span("c", 0, 4), span("d", 4, 6), span("e", 6, 8))


def left(unrest: Unrest, standings: Sequence[Standing]) -> str | None:
    slow = unrest.look(standings)
    return None if slow is None else slow.leg.span.peer


def test_every_hop_has_a_standby_that_is_not_on_the_route() -> None:
    standings = stand(SWARM, WHOLE, ROUTE)
    assert [one.leg.span.peer for one in standings] == ["a", "b"]
    standbys = [one.standby for one in standings]
    told = [[leg.span.peer for leg in path.legs] for path in standbys if path is not None]
    assert told == [["c"], ["d", "e"]]


def test_without_anybody_else_a_hop_has_no_standby_and_is_kept_however_slow_it_is() -> None:
    lonely = view(replace(span("a", 0, 4), queue=100), span("b", 4, 8))
    standings = stand(lonely, WHOLE, ROUTE)
    assert [one.standby for one in standings] == [None, None]
    assert not any(one.is_worth_leaving for one in standings)


def test_a_hop_whose_queue_or_distance_grows_is_left_after_two_looks_that_agree() -> None:
    for change in ({"queue": 20}, {"rtt_s": 0.5}, {"tokens_per_s": 5.0}, {"penalty_s": 0.5}):
        slow = view(replace(SWARM.spans[0], **change), *SWARM.spans[1:])
        unrest = Unrest(random.Random(1))
        looks = [left(unrest, stand(slow, WHOLE, ROUTE)) for _ in range(LOOKS)]
        assert looks == [None] * (LOOKS - 1) + ["a"], change


def test_a_moment_of_slowness_and_a_small_gain_move_nobody() -> None:
    busy = view(replace(SWARM.spans[0], queue=20), *SWARM.spans[1:])
    unrest = Unrest(random.Random(1))
    for now in (busy, SWARM, busy, SWARM):
        assert left(unrest, stand(now, WHOLE, ROUTE)) is None
    bit = view(replace(SWARM.spans[0], tokens_per_s=70.0), *SWARM.spans[1:])
    assert not any(one.is_worth_leaving for one in stand(bit, WHOLE, ROUTE))


def test_our_own_steps_are_no_reason_to_leave() -> None:
    ours = view(replace(SWARM.spans[0], queue=4), *SWARM.spans[1:])
    assert not any(one.is_worth_leaving for one in stand(ours, WHOLE, ROUTE))


def test_a_hop_that_drains_or_is_unknown_is_nobodys_business_here() -> None:
    drains = view(replace(SWARM.spans[0], state=SpanState.DRAINING), *SWARM.spans[1:])
    assert [one.leg.span.peer for one in stand(drains, WHOLE, ROUTE)] == ["b"]
    assert [one.leg.span.peer for one in stand(view(*SWARM.spans[1:]), WHOLE, ROUTE)] == ["b"]


def test_another_precision_is_no_reason_to_leave() -> None:
    other = replace(span("c", 0, 4), dtype=DType.BFLOAT16)
    slow = view(replace(SWARM.spans[0], queue=20), SWARM.spans[1], other)
    assert not any(one.is_worth_leaving for one in stand(slow, WHOLE, ROUTE))


def test_a_route_just_found_is_never_left_for_what_was_known_then() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        spans = []
        for index in range(12):
            start = rng.randrange(0, 8, 2)
            end = rng.randrange(start + 2, 9, 2)
            speed, rtt_s = rng.uniform(10, 200), rng.uniform(0.001, 0.2)
            spans.append(span(f"p{index}", start, end, tokens_per_s=speed, rtt_s=rtt_s))
        spans += [span("first", 0, 4), span("last", 4, 8)]
        path = find_path(view(*spans), WHOLE, seed=seed)
        route = [(leg.span.hop, leg.start, leg.end) for leg in path.legs]
        assert not any(one.is_worth_leaving for one in stand(view(*spans), WHOLE, route, seed=seed)), seed


def test_clients_look_at_moments_of_their_own() -> None:
    moments = {round(Unrest(random.Random(seed)).next_look_s(), 3) for seed in range(50)}
    assert len(moments) > 40
    assert all(LOOK_EVERY_S[0] <= moment <= LOOK_EVERY_S[1] for moment in moments)
