"""What others' records say against a daemon itself: its clock, its identity."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from corolla.daemon.network.registry.doubts import MAX_PEERS, MEMORY_S, TWIN_MEMORY_S, Doubts
from corolla.protocol.limits import REFRESH_EVERY_S
from corolla.protocol.records import SpanState
from corolla.protocol.registry import Store, Stored

from .test_registry import OFFER, UNIX, garden, until

HOUR_S = 3600.0


@pytest.mark.parametrize(
    ("ahead", "behind_s"),
    [
        ([], None),
        ([0.0], None),
        ([HOUR_S], HOUR_S),
        ([HOUR_S, 0.0], None),  # who is right, cannot be told: most are not against us
        ([-HOUR_S, -HOUR_S - 10, -HOUR_S + 10, 0.0], -HOUR_S),
        ([299.0, -299.0], None),
    ],
)
def test_a_clock_is_doubted_when_most_members_differ(ahead: list[float], behind_s: float | None) -> None:
    doubts = Doubts()
    for number, skew in enumerate(ahead):
        doubts.note_clock(f"peer {number}", skew, now=10.0)
    assert doubts.clock_behind_s(10.0) == behind_s
    assert doubts.clock_behind_s(11.0 + MEMORY_S) is None
    assert (doubts.words(10.0) is None) is (behind_s is None)


def test_words_say_by_how_much_and_what_to_do() -> None:
    doubts = Doubts()
    doubts.note_clock("a", HOUR_S, 0.0)
    assert "60 min behind" in str(doubts.words(0.0))
    doubts.note_clock("a", -HOUR_S, 0.0)
    assert "60 min ahead of" in str(doubts.words(0.0))
    doubts.note_clock("a", 0.0, 0.0)
    assert doubts.words(0.0) is None


def test_a_twin_is_told_by_records_newer_than_any_of_ours() -> None:
    doubts = Doubts()
    doubts.note_own(5, 5, 0.0)
    doubts.note_own(4, 5, 0.0)
    doubts.note_own(9, 5, 0.0)
    doubts.note_own(9, 5, 1.0)  # the same again
    assert not doubts.has_twin(1.0)
    doubts.note_own(12, 10, 20.0)
    assert doubts.has_twin(20.0)
    assert "identity.pem" in str(doubts.words(20.0))
    assert not doubts.has_twin(21.0 + TWIN_MEMORY_S)


def test_a_twin_that_a_member_told_of_is_remembered_for_a_while() -> None:
    doubts = Doubts()
    assert not doubts.has_twin(1.0)
    doubts.note_twin(1.0)
    assert "identity.pem" in str(doubts.words(2.0))
    assert not doubts.has_twin(2.0 + TWIN_MEMORY_S)


def test_memory_is_bounded() -> None:
    doubts = Doubts()
    for number in range(2 * MAX_PEERS):
        doubts.note_clock(str(number), HOUR_S, 0.0)
    assert len(doubts._skews) == MAX_PEERS


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@pytest.mark.anyio
@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
async def test_a_clock_that_jumps_by_an_hour_is_told_and_all_is_well_when_it_is_right_again(
    jump_s: float,
) -> None:
    async with garden() as g:
        ada, bob, cyd = await g.grow(3)
        for node in (ada, bob, cyd):
            node.registry.announce(OFFER)
        everybody = {(node.peer, 0): SpanState.ONLINE for node in (ada, bob, cyd)}
        await until(lambda: all(node.sees() == everybody for node in (ada, bob, cyd)), within_s=60)
        ada.clock_error_s = jump_s
        await until(lambda: ada.registry.doubts.words(trio.current_time()) is not None, within_s=120)
        kind, words = ada.registry.doubts.words(trio.current_time()) or ("", "")
        assert kind == "clock_differs"
        assert ("ahead of" if jump_s > 0 else "behind") in words
        assert bob.registry.doubts.words(trio.current_time()) is None
        ada.clock_error_s = 0.0
        await until(lambda: ada.registry.doubts.words(trio.current_time()) is None, within_s=300)
        await until(lambda: all(node.sees() == everybody for node in (ada, bob, cyd)), within_s=120)


@pytest.mark.anyio
async def test_another_that_signs_in_our_name_is_told() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        ada.registry.announce(OFFER)
        await until(lambda: bool(bob.sees()))
        for _ in range(20):  # as often as a daemon says that it lives
            seq = int((UNIX + trio.current_time()) * 1000)
            twin = ada.record(worker=0, seq=seq, start=3, end=9)
            await ada.ask(bob, Store((ada.entry(twin),)))
            await trio.sleep(REFRESH_EVERY_S)
        assert ada.registry.doubts.has_twin(trio.current_time())
        assert bob.registry.doubts.words(trio.current_time()) is None


@pytest.mark.anyio
async def test_a_daemon_that_lost_its_state_has_no_twin() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        before = ada.record(worker=0, seq=int(UNIX * 1000) + 60_000)
        assert await ada.ask(bob, Store((ada.entry(before),))) == Stored()
        ada.registry.announce(OFFER)
        for _ in range(4):
            await ada.registry.spans(OFFER.fingerprint, 30, max_age_s=0)
            await trio.sleep(20)
        assert not ada.registry.doubts.has_twin(trio.current_time())
