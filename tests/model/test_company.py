"""Waiting for those who are due, and for nobody else."""

from __future__ import annotations

import pytest

from corolla.model.company import Company, Rhythm


def cycle(company: Company, name: str, left_s: float, absence_s: float) -> None:
    company.leave(name, left_s)
    company.come(name, left_s + absence_s)


def test_nobody_is_waited_for_before_an_absence_was_seen() -> None:
    company = Company()
    assert company.wait_s(0.0, 1.0) == 0.0
    company.leave("a", 0.0)
    assert company.wait_s(0.0, 1.0) == 0.0


def test_the_usual_absence_is_waited_out_and_a_little_more() -> None:
    company = Company()
    cycle(company, "a", 0.0, 0.010)
    company.leave("a", 1.0)
    assert company.wait_s(1.0, 1.0) == pytest.approx(0.016)
    assert company.wait_s(1.010, 1.0) == pytest.approx(0.006)
    assert company.wait_s(1.017, 1.0) == 0.0  # it is late: who knows when it comes


def test_who_is_here_is_not_waited_for() -> None:
    company = Company()
    cycle(company, "a", 0.0, 0.010)
    assert company.wait_s(0.011, 1.0) == 0.0


def test_who_is_usually_away_for_longer_than_it_pays_is_not_waited_for() -> None:
    company = Company()
    cycle(company, "far", 0.0, 0.200)
    company.leave("far", 1.0)
    assert company.wait_s(1.0, 0.050) == 0.0
    assert company.wait_s(1.160, 0.050) == pytest.approx(0.050)  # now it is due


def test_the_last_of_several_decides_within_what_pays() -> None:
    company = Company()
    for name, absence_s in (("a", 0.002), ("b", 0.020), ("c", 0.300)):
        cycle(company, name, 0.0, absence_s)
        company.leave(name, 1.0)
    assert company.wait_s(1.0, 0.1) == pytest.approx(0.031)
    assert company.wait_s(1.0, 0.025) == pytest.approx(0.025)


def test_one_long_pause_changes_nothing() -> None:
    company = Company()
    for absence_s in (0.010, 60.0, 0.010):
        cycle(company, "a", 0.0, absence_s)
    company.leave("a", 100.0)
    assert company.wait_s(100.0, 1.0) == pytest.approx(0.016)


def test_who_is_gone_is_forgotten() -> None:
    company = Company()
    cycle(company, "a", 0.0, 0.010)
    company.leave("a", 1.0)
    company.forget("a")
    company.forget("never seen")
    assert company.wait_s(1.0, 1.0) == 0.0


def test_halves_that_take_turns_are_waited_for_and_come_together() -> None:
    rhythm, now_s = Rhythm(), 0.0
    sessions = (b"a", b"b")
    for turn in range(
        6
    ):  # each asks 2 ms after its answer, amid the other's pass, and is heard when that is over
        began_s, now_s = now_s, now_s + 0.050
        rhythm.step_answered(sessions[turn % 2])
        rhythm.passed(began_s, now_s)
        if turn:
            rhythm.step_comes(sessions[(turn + 1) % 2], now_s + 0.001)
        now_s += 0.001
    assert 0 < rhythm.grace_s(now_s, to_sample=False) <= 0.025  # for the other one, just answered


def test_who_is_away_for_long_while_nothing_runs_is_not_waited_for() -> None:
    rhythm, now_s = Rhythm(), 0.0
    for _ in range(4):
        rhythm.step_answered(b"far")
        rhythm.passed(now_s, now_s + 0.050)
        now_s += 0.250
        rhythm.step_comes(b"far", now_s)
    rhythm.step_answered(b"far")
    rhythm.passed(now_s, now_s + 0.050)
    assert rhythm.grace_s(now_s + 0.050, to_sample=False) == 0.0


def test_a_session_that_ends_with_its_last_answer_is_not_waited_for() -> None:
    rhythm = Rhythm()
    rhythm.step_answered(b"a")
    rhythm.passed(0.0, 0.050)
    rhythm.step_comes(b"a", 0.052)
    rhythm.step_answered(b"a")
    rhythm.session_ends(b"a")
    rhythm.passed(0.052, 0.100)
    assert rhythm.grace_s(0.100, to_sample=False) == 0.0
