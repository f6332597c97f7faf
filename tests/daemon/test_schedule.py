"""When a machine lends, as its owner wishes: tables of times, idleness and other programs."""

from __future__ import annotations

import math

import pytest

from corolla.daemon.schedule import Hours, Lends, Rules, Seen, clock_time, may_lend, parse_hours

NIGHT = parse_hours("22:00-07:00")
MEALS = parse_hours("12:00-13:00, 18:30-20:00")


def at(text: str) -> int:
    hour, minute = text.split(":")
    return int(hour) * 60 + int(minute)


@pytest.mark.parametrize(
    ("hours", "time", "holds"),
    [
        (Hours(), "03:00", True),
        (NIGHT, "22:00", True),
        (NIGHT, "21:59", False),
        (NIGHT, "00:00", True),
        (NIGHT, "06:59", True),
        (NIGHT, "07:00", False),
        (MEALS, "12:59", True),
        (MEALS, "13:00", False),
        (MEALS, "18:30", True),
        (parse_hours("09:00-24:00"), "23:59", True),
        (parse_hours("09:00-24:00"), "00:00", False),
    ],
)
def test_hours_begin_and_end_when_they_say(hours: Hours, time: str, holds: bool) -> None:
    assert hours.hold(at(time)) is holds


@pytest.mark.parametrize(
    ("hours", "time", "minutes"),
    [
        (Hours(), "03:00", None),
        (NIGHT, "21:00", 60),
        (NIGHT, "22:00", 9 * 60),
        (NIGHT, "23:30", 7 * 60 + 30),
        (NIGHT, "06:59", 1),
        (MEALS, "20:00", 16 * 60),
        (parse_hours("01:00-02:00,02:00-03:00"), "01:30", 90),  # two that touch are one
        (parse_hours("00:00-12:00,12:00-24:00"), "01:30", None),
    ],
)
def test_the_next_change_is_known(hours: Hours, time: str, minutes: int | None) -> None:
    assert hours.minutes_to_change(at(time)) == minutes


@pytest.mark.parametrize(
    "text", ["22-07", "22:00", "25:00-26:00", "10:60-11:00", "8:00-8:00", "a:b-c:d", "1:5-2:00"]
)
def test_what_is_no_time_of_day_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text.partition("-")[0]):
        parse_hours(text)


@pytest.mark.parametrize(
    ("rules", "seen", "lends"),
    [
        (Rules(), Seen(0), Lends.YES),
        (Rules(NIGHT), Seen(at("23:00")), Lends.YES),
        (Rules(NIGHT), Seen(at("12:00")), Lends.OUTSIDE_HOURS),
        (Rules(idle_s=600), Seen(0, idle_s=599), Lends.NOT_IDLE),
        (Rules(idle_s=600), Seen(0, idle_s=600), Lends.YES),
        (Rules(), Seen(0, idle_s=0), Lends.YES),
        (Rules(), Seen(0, gpu_free_s=10), Lends.GPU_WANTED),
        (Rules(), Seen(0, gpu_free_s=120), Lends.YES),
        (Rules(yields_gpu=False), Seen(0, gpu_free_s=0), Lends.YES),
        (Rules(NIGHT, idle_s=60), Seen(at("12:00"), 0, 0), Lends.OUTSIDE_HOURS),
        (Rules(NIGHT, idle_s=60), Seen(at("22:00"), 0, 0), Lends.NOT_IDLE),
    ],
)
def test_the_rules_decide(rules: Rules, seen: Seen, lends: Lends) -> None:
    verdict = may_lend(rules, seen)
    assert verdict.lends is lends
    assert bool(verdict.words) is (lends is not Lends.YES)


def test_the_words_name_the_remedy_and_the_time() -> None:
    verdict = may_lend(Rules(NIGHT), Seen(at("12:00")))
    assert "22:00" in verdict.words
    assert verdict.until_s == 10 * 3600
    assert may_lend(Rules(idle_s=600), Seen(0, idle_s=200)).until_s == 400
    assert may_lend(Rules(), Seen(0)).until_s == math.inf
    assert clock_time(1440 + 61) == "01:01"
