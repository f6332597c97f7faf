"""Charges add up, fade, and are forgotten."""

from __future__ import annotations

import pytest

from corolla.daemon.swarm.blame import HALF_LIFE_S, HEAVY, LIGHT, MAX_PEERS, PENALTY_S, Ledger


def test_an_innocent_peer_costs_nothing() -> None:
    assert Ledger().penalty("peer", 0.0) == 0.0


def test_charges_add_up_and_halve_with_time() -> None:
    ledger = Ledger()
    ledger.charge("peer", LIGHT, "slow", 0.0)
    ledger.charge("peer", LIGHT, "slow", 0.0)
    assert ledger.penalty("peer", 0.0) == pytest.approx(2 * PENALTY_S)
    assert ledger.penalty("peer", HALF_LIFE_S) == pytest.approx(PENALTY_S)
    ledger.charge("peer", HEAVY, "lied", HALF_LIFE_S)
    assert ledger.penalty("peer", HALF_LIFE_S) == pytest.approx((1 + HEAVY) * PENALTY_S)


def test_a_peer_recovers_altogether() -> None:
    ledger = Ledger()
    ledger.charge("peer", HEAVY, "lied", 0.0)
    assert ledger.penalty("peer", 20 * HALF_LIFE_S) == 0.0
    assert ledger.charged(20 * HALF_LIFE_S) == {}


def test_the_least_guilty_are_forgotten_first() -> None:
    ledger = Ledger()
    ledger.charge("liar", HEAVY, "lied", 0.0)
    for index in range(MAX_PEERS + 10):
        ledger.charge(f"peer{index}", LIGHT, "slow", 1.0)
    assert ledger.penalty("liar", 1.0) > 0
    assert len(ledger.charged(1.0)) <= MAX_PEERS


def test_each_charge_is_told() -> None:
    told: list[tuple[str, float, str]] = []
    Ledger(lambda peer, weight, reason: told.append((peer, weight, reason))).charge("p", LIGHT, "slow", 0.0)
    assert told == [("p", LIGHT, "slow")]
