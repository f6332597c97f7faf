"""Routes: cheapest, deterministic, around what is to be avoided; and what is said when there is none."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest

from corolla.daemon.swarm.routing import HOP_S, SPREAD, Path, Wanted, find_path
from corolla.daemon.swarm.view import Span, SwarmView
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.records import SpanState
from corolla.protocol.steps import Hop
from corolla.protocol.tensors import DType, Encoding


def span(peer: str, start: int, end: int, **more: Any) -> Span:
    plain = Span(peer, 0, start, end, SpanState.ONLINE, DType.FLOAT32, rtt_s=0.01, tokens_per_s=100.0)
    return dataclasses.replace(plain, **more)


def view(*spans: Span, num_blocks: int = 12) -> SwarmView:
    return SwarmView("f", num_blocks, spans)


WHOLE = Wanted(0, 12)


def told(path: Path) -> list[tuple[str, int, int]]:
    return [(leg.span.peer, leg.start, leg.end) for leg in path.legs]


def test_a_chain_of_spans_covers_all_blocks_in_order() -> None:
    path = find_path(view(span("c", 8, 12), span("a", 0, 4), span("b", 4, 8)), WHOLE)
    assert told(path) == [("a", 0, 4), ("b", 4, 8), ("c", 8, 12)]
    assert not path.precision_changed


def test_fewer_hops_are_cheaper() -> None:
    path = find_path(view(span("a", 0, 6), span("b", 6, 12), span("c", 0, 12, tokens_per_s=50.0)), WHOLE)
    assert told(path) == [("c", 0, 12)]


def test_a_hop_may_serve_a_part_of_its_span() -> None:
    path = find_path(view(span("a", 0, 8), span("b", 4, 12)), WHOLE)
    assert [(start, end) for _, start, end in told(path)] in ([(0, 4), (4, 12)], [(0, 8), (8, 12)])


def test_an_overlap_goes_to_the_faster_worker() -> None:
    fast = span("fast", 4, 12, tokens_per_s=1000.0)
    assert told(find_path(view(span("slow", 0, 8, tokens_per_s=5.0), fast), WHOLE)) == [
        ("slow", 0, 4),
        ("fast", 4, 12),
    ]


def test_only_the_interval_wanted_is_routed() -> None:
    path = find_path(view(span("a", 0, 12)), Wanted(3, 7))
    assert told(path) == [("a", 3, 7)]


def test_a_long_queue_is_gone_round() -> None:
    busy, free = span("busy", 0, 12, queue=5), span("free", 0, 12, tokens_per_s=60.0)
    assert told(find_path(view(busy, free), WHOLE)) == [("free", 0, 12)]
    assert told(find_path(view(dataclasses.replace(busy, queue=0), free), WHOLE)) == [("busy", 0, 12)]


def test_a_far_peer_is_gone_round() -> None:
    far, near = span("far", 0, 12, rtt_s=0.5), span("near", 0, 12, tokens_per_s=20.0)
    assert told(find_path(view(far, near), WHOLE)) == [("near", 0, 12)]


def test_a_penalty_is_gone_round_but_borne_if_it_must_be() -> None:
    charged = span("charged", 0, 12, penalty_s=10.0)
    assert told(find_path(view(charged, span("slow", 0, 12, tokens_per_s=1.0)), WHOLE)) == [("slow", 0, 12)]
    assert told(find_path(view(charged), WHOLE)) == [("charged", 0, 12)]


def test_two_workers_of_one_peer_cost_no_trip_between_them() -> None:
    far: dict[str, Any] = {"rtt_s": 0.2}
    spans = (span("p", 0, 6, **far), span("p", 6, 12, worker=1, **far), span("q", 6, 12, **far))
    for seed in range(20):
        path = find_path(view(*spans), WHOLE, seed=seed)
        assert [leg.span.hop for leg in path.legs] == [Hop("p", 0), Hop("p", 1)]


def test_no_worker_is_on_a_route_twice() -> None:
    """A slow span under a fast one in its middle: leaving and coming back would be cheaper still."""
    slow, fast = span("slow", 0, 12, tokens_per_s=0.5), span("fast", 4, 8, tokens_per_s=1000.0)
    path = find_path(view(slow, fast), WHOLE)
    hops = [leg.span.hop for leg in path.legs]
    assert len(set(hops)) == len(hops)
    assert (path.legs[0].start, path.legs[-1].end) == (0, 12)


@pytest.mark.parametrize(
    "unfit",
    [
        {"state": SpanState.LOADING},
        {"state": SpanState.DRAINING},
        {"suspect": True},
        {"majors": (2,)},
        {"encodings": (Encoding.FLOAT16,)},
        {"cache_tokens": 100},
    ],
)
def test_spans_that_cannot_serve_are_not_used(unfit: dict[str, Any]) -> None:
    wanted = dataclasses.replace(WHOLE, encoding=Encoding.FLOAT32, cache_tokens=101)
    other = span("other", 0, 12, tokens_per_s=0.1)
    assert told(find_path(view(span("unfit", 0, 12, **unfit), other), wanted)) == [("other", 0, 12)]


def test_avoided_workers_and_peers_are_not_used() -> None:
    spans = (
        span("a", 0, 12),
        span("a", 0, 12, worker=1, tokens_per_s=9.0),
        span("b", 0, 12, tokens_per_s=1.0),
    )
    avoid = dataclasses.replace(WHOLE, avoid=frozenset({Hop("a", 0)}))
    assert find_path(view(*spans), avoid).legs[0].span.hop == Hop("a", 1)
    avoid = dataclasses.replace(WHOLE, avoid_peers=frozenset({"a"}))
    assert told(find_path(view(*spans), avoid)) == [("b", 0, 12)]


def test_an_avoided_link_is_gone_round() -> None:
    spans = (span("a", 0, 6), span("b", 6, 12), span("slow", 6, 12, tokens_per_s=1.0))
    assert told(find_path(view(*spans), WHOLE))[1][0] == "b"
    avoid = dataclasses.replace(WHOLE, avoid_links=frozenset({("a", "b")}))
    assert told(find_path(view(*spans), avoid)) == [("a", 0, 6), ("slow", 6, 12)]


def test_links_to_pinned_neighbours_count() -> None:
    spans = (span("a", 4, 8), span("b", 4, 8, tokens_per_s=1.0))
    lost = Wanted(4, 8, upstream="up", downstream="down")
    assert told(find_path(view(*spans), lost)) == [("a", 4, 8)]
    for link in (("up", "a"), ("a", "down")):
        avoid = dataclasses.replace(lost, avoid_links=frozenset({link}))
        assert told(find_path(view(*spans), avoid)) == [("b", 4, 8)]


def test_the_precision_of_the_lost_span_is_kept_if_anyhow_possible() -> None:
    half = span("half", 4, 8, dtype=DType.BFLOAT16)
    pair = (span("left", 4, 6, tokens_per_s=0.1), span("right", 6, 8, tokens_per_s=0.1))
    lost = Wanted(4, 8, dtype=DType.FLOAT32)
    path = find_path(view(half, *pair), lost)
    assert told(path) == [("left", 4, 6), ("right", 6, 8)]
    assert not path.precision_changed
    assert path.expected_s < 60
    path = find_path(view(half, pair[0]), lost)
    assert path.precision_changed
    assert path.expected_s < 60


def test_quantization_is_a_matter_of_precision_too() -> None:
    path = find_path(
        view(span("a", 0, 12, quantization="int8")), dataclasses.replace(WHOLE, dtype=DType.FLOAT32)
    )
    assert path.precision_changed


def test_same_arguments_same_path_and_other_seeds_spread_over_replicas() -> None:
    spans = tuple(span(f"p{i}", 0, 12) for i in range(4))
    paths = [find_path(view(*spans), WHOLE, seed=seed) for seed in range(40)]
    again = [find_path(view(*reversed(spans)), WHOLE, seed=seed) for seed in range(40)]
    assert paths == again
    assert {path.legs[0].span.peer for path in paths} == {"p0", "p1", "p2", "p3"}


def refused(swarm: SwarmView, wanted: Wanted = WHOLE) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        find_path(swarm, wanted)
    return caught.value


def test_unserved_blocks_are_named_with_who_is_loading_them() -> None:
    problem = refused(view(span("a", 0, 4), span("x", 4, 8, state=SpanState.LOADING)))
    assert problem.code is Code.BLOCKS_UNSERVED
    assert problem.message == "blocks 4:12 are served by nobody; peer x is loading them"
    assert "--wait" in problem.remedy
    assert problem.details["gaps"] == [[4, 12]]


def test_unserved_blocks_are_named_with_who_was_lost() -> None:
    problem = refused(view(span("a", 0, 8), span("y", 8, 12, suspect=True), span("z", 8, 12, suspect=True)))
    assert "8:12" in problem.message
    assert "peers y, z are no longer connected" in problem.message


def test_blocks_served_only_over_links_that_fail_are_told_apart() -> None:
    spans = (span("a", 0, 6), span("b", 6, 12))
    problem = refused(view(*spans), dataclasses.replace(WHOLE, avoid_links=frozenset({("a", "b")})))
    assert problem.code is Code.BLOCKS_UNSERVED
    assert "reach each other" in problem.message


@pytest.mark.parametrize(("start", "end"), [(0, 13), (-1, 5), (5, 5), (7, 3)])
def test_blocks_out_of_range_are_the_users_fault(start: int, end: int) -> None:
    assert refused(view(span("a", 0, 12)), Wanted(start, end)).code is Code.BLOCKS_OUT_OF_RANGE


def brute_force(swarm: SwarmView, wanted: Wanted) -> float | None:
    """The least cost over every sequence of workers and every place to change, noise left out."""
    best: float | None = None

    def extend(block: int, cost: float, peer: str | None, rtt: float, used: frozenset[Hop]) -> None:
        nonlocal best
        if block == wanted.end:
            if peer == wanted.downstream or (peer, wanted.downstream) not in wanted.avoid_links:
                total = cost + (0 if peer == wanted.downstream else rtt / 2)
                best = total if best is None else min(best, total)
            return
        for one in swarm.spans:
            if one.hop in used or not one.start <= block < one.end or (peer, one.peer) in wanted.avoid_links:
                continue
            link = 0.0 if peer == one.peer else max(rtt, one.rtt_s or 0.0) / 2
            for stop in range(block + 1, min(one.end, wanted.end) + 1):
                work = (stop - block) / one.num_blocks / one.tokens_per_s * (1 + one.queue)
                extend(stop, cost + link + HOP_S + work, one.peer, one.rtt_s or 0.0, used | {one.hop})

    extend(wanted.start, 0.0, wanted.upstream, 0.0, frozenset())
    return best


@pytest.mark.parametrize("seed", range(60))
def test_no_other_chain_would_be_much_cheaper(seed: int) -> None:
    """Against all chains, within the noise that spreads clients."""
    rng = random.Random(seed)
    peers = ["a", "b", "c", "d"]
    spans = []
    for worker in range(rng.randint(2, 6)):
        start = rng.randrange(0, 6)
        peer = rng.choice(peers)
        spans.append(
            span(
                peer,
                start,
                rng.randint(start + 1, 7),
                worker=worker,
                rtt_s={"a": 0.001, "b": 0.02, "c": 0.02, "d": 0.2}[peer],
                tokens_per_s=rng.choice([5.0, 50.0, 500.0]),
                queue=rng.choice([0, 0, 3]),
            )
        )
    links = [pair for pair in itertools.permutations(peers, 2) if rng.random() < 0.15]
    wanted = Wanted(0, 7, avoid_links=frozenset(links))
    swarm = view(*spans, num_blocks=7)
    best = brute_force(swarm, wanted)
    if best is None:
        assert refused(swarm, wanted).code is Code.BLOCKS_UNSERVED
        return
    path = find_path(swarm, wanted, seed=seed)
    assert best <= path.expected_s * (1 + 1e-9)
    assert path.expected_s <= best * (1 + SPREAD) + 1e-9


def test_a_swarm_of_ten_thousand_is_routed() -> None:
    rng = random.Random(1)
    spans = []
    for index in range(10_000):
        start = rng.randrange(0, 80)
        end = min(80, start + rng.randint(1, 16))
        speed, rtt = rng.uniform(5, 100), rng.uniform(0.001, 0.3)
        spans.append(span(f"p{index}", start, end, tokens_per_s=speed, rtt_s=rtt))
    path = find_path(view(*spans, num_blocks=80), Wanted(0, 80))
    assert path.legs[0].start == 0
    assert path.legs[-1].end == 80
    assert all(left.end == right.start for left, right in itertools.pairwise(path.legs))
