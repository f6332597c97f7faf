"""Real daemons of which one answers garbage, or cannot reach another: tokens stay right, only liars are charged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from .fleet import SPANS, Fleet, Liar, fleet_of, generate, peer_of, prompt_of  # noqa: E402

pytestmark = pytest.mark.timeout(600)
PROMPT = prompt_of(9)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of(tmp_path_factory.mktemp("m") / "tiny", tmp_path_factory.mktemp("cache"), Liar) as fleet:
        yield fleet


@pytest.fixture
def fleet(standing: Fleet) -> Fleet:
    standing.restock()  # a hop that was left may keep its session for a while, and would be taken for the one in use
    return standing


def in_use(fleet: Fleet, span: tuple[int, int]) -> Liar:
    daemon = fleet.in_use(span)
    assert isinstance(daemon, Liar)
    return daemon


@pytest.mark.parametrize("span", [SPANS[0], SPANS[2]], ids=str)
@pytest.mark.parametrize("lie", ["short", "nan"])
def test_a_hop_that_answers_garbage_is_replaced_and_charged(
    fleet: Fleet, lie: str, span: tuple[int, int]
) -> None:
    before = fleet.charges()
    liars: list[str] = []

    def disturb(count: int) -> None:
        if count == 7:
            liar = in_use(fleet, span)
            liars.append(peer_of(liar))
            liar.lie(lie)

    outcome = generate(fleet, PROMPT, disturb, until="repaired")

    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "repaired" in outcome.events
    assert fleet.charges()[len(before) :] == liars


def test_a_step_at_a_wrong_position_is_a_gap_that_is_filled_and_charges_nobody(fleet: Fleet) -> None:
    before = fleet.charges()

    def disturb(count: int) -> None:
        if count == 7:
            in_use(fleet, SPANS[0]).lie("shifted")

    outcome = generate(fleet, PROMPT, disturb, until="repaired")

    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "repaired" in outcome.events
    assert fleet.charges() == before


def test_two_live_hops_that_cannot_reach_each_other_are_led_round_and_nobody_is_charged(fleet: Fleet) -> None:
    before = fleet.charges()

    def disturb(count: int) -> None:
        if count == 7:
            upstream, downstream = in_use(fleet, SPANS[0]), in_use(fleet, SPANS[1])
            upstream.cut(downstream)

    outcome = generate(fleet, PROMPT, disturb, until="repaired")

    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "repaired" in outcome.events
    assert fleet.charges() == before


def test_where_hops_reach_no_next_one_their_steps_pass_through_the_client(fleet: Fleet) -> None:
    before = fleet.charges()
    upstreams = [daemon for daemon in fleet.serving[SPANS[0]] if isinstance(daemon, Liar)]

    def disturb(count: int) -> None:
        if count == 7:
            for daemon in upstreams:
                daemon.cut(*fleet.serving[SPANS[1]])

    try:
        outcome = generate(fleet, PROMPT, disturb, until="bridged")
    finally:
        for daemon in upstreams:
            daemon.cut()

    assert outcome.tokens == fleet.chosen(PROMPT, outcome.tokens)
    assert "bridged" in outcome.events
    assert fleet.charges() == before
