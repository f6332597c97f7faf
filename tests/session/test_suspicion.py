"""Who is replaced when one accuses another, the client's own accusations too."""

from __future__ import annotations

from corolla.daemon.session.suspicion import MAX_TRIALS, Replace, Suspicion
from corolla.daemon.session.wiring import RouteHop
from corolla.protocol.steps import Hop
from corolla.protocol.tensors import DType


def place(peer: str) -> RouteHop:
    return RouteHop(Hop(peer, 0), 0, 1, DType.FLOAT32, None)


def test_an_accuser_of_two_in_a_row_is_replaced_itself() -> None:
    suspicion = Suspicion()
    accuser, first, second = place("accuser"), place("first"), place("second")
    assert suspicion.accuse(accuser, first, 1) == Replace(first)
    assert suspicion.accuse(accuser, second, 1) == Replace(accuser, restore=first)
    assert suspicion.committed(1) == accuser


def test_the_client_tries_one_last_hop_after_another_until_an_answer_is_good() -> None:
    suspicion = Suspicion()
    for peer in ("liar", "another"):
        assert suspicion.accuse(None, place(peer), 2) == Replace(place(peer))
    assert suspicion.banned == {Hop("liar", 0), Hop("another", 0)}
    assert suspicion.committed(2) == place("another")


def test_the_client_gives_up_when_nobodys_answer_is_good() -> None:
    suspicion = Suspicion()
    for number in range(MAX_TRIALS):
        assert suspicion.accuse(None, place(f"peer{number}"), 2) is not None
    assert suspicion.accuse(None, place("one more"), 2) is None


def test_accusers_that_cover_for_each_other_are_all_away_at_once_and_then_all_come_back() -> None:
    suspicion = Suspicion()
    for accuser in ("one", "another"):
        for accused in ("first", "second"):
            suspicion.accuse(place(accuser), place(accused), 1)
    suspicion.forgive()
    assert suspicion.banned == {Hop("one", 0), Hop("another", 0)}
    suspicion.forgive()
    assert suspicion.banned == frozenset()
