"""The upload limit of an owner who names none: half of what the line was seen to carry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from corolla.daemon.lending.profiles import Profiles
from corolla.daemon.lending.uplink import AGAIN_AFTER_S, SETTLE_S, Uplink
from corolla.daemon.network.line import Line
from corolla.daemon.network.traffic import Nearness, Traffic
from corolla.daemon.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path) as opened:
        yield opened


class Bench:
    """An uplink whose findings a test names."""

    def __init__(self, store: Store, owners: int = 0) -> None:
        self.traffic = Traffic()
        self.told: list[str] = []
        self.owners = owners
        self.profiles = Profiles(store, "1", lambda kind, text: None)
        self.uplink = Uplink(
            self.traffic, self.profiles, lambda: self.owners, lambda kind, text: self.told.append(text)
        )

    def find(self, at_s: float, up: float, down: float = 0.0) -> None:
        self.uplink.note(Line(up, down), at_s)

    @property
    def limit(self) -> float:
        return self.traffic.limit_bytes_per_s


def test_nothing_waits_until_the_line_is_known_and_then_half_of_it_is_used(store: Store) -> None:
    bench = Bench(store)
    assert bench.limit == math.inf
    bench.find(1.0, 4e6)
    bench.find(2.0, 6e6)
    bench.find(3.0, 0.0)
    assert bench.limit == math.inf  # more may come
    bench.find(1.0 + SETTLE_S, 5e6)
    assert bench.limit == 3e6
    assert bench.told == ["the line takes 6.00 MB/s"]
    assert bench.traffic.holds(Nearness.WORLD)
    assert not bench.traffic.holds(Nearness.NEAR)


def test_what_was_measured_is_remembered(store: Store) -> None:
    first = Bench(store)
    first.find(1.0, 6e6, 2e6)
    first.find(1.0 + SETTLE_S, 0.0, 1e6)
    second = Bench(store)
    assert second.limit == 3e6
    assert second.uplink.line == Line(6e6, 2e6)
    view = second.uplink.view()
    assert (view.up_bytes_per_s, view.down_bytes_per_s, view.limit_bytes_per_s) == (6e6, 2e6, 3e6)


def test_while_transfers_are_held_back_only_more_is_believed(store: Store) -> None:
    bench = Bench(store)
    bench.find(0.0, 6e6)
    bench.find(SETTLE_S, 0.0)
    bench.find(100.0, 2e6)
    bench.find(100.0 + SETTLE_S, 0.0)
    assert bench.limit == 3e6
    bench.find(200.0, 8e6)
    bench.find(200.0 + SETTLE_S, 0.0)
    assert bench.limit == 4e6


def test_once_a_day_the_line_may_turn_out_to_be_slower(store: Store) -> None:
    bench = Bench(store)
    bench.find(0.0, 6e6)
    bench.find(SETTLE_S, 0.0)
    day = SETTLE_S + AGAIN_AFTER_S
    bench.find(day, 0.0)
    assert bench.limit == math.inf
    bench.find(day + 50, 2e6)
    bench.find(day + 50 + SETTLE_S, 0.0)
    assert bench.limit == 1e6


def test_an_owners_limit_stands_whatever_is_measured(store: Store) -> None:
    bench = Bench(store, owners=1000)
    assert bench.limit == 1000
    assert bench.traffic.holds(Nearness.NEAR)
    bench.find(0.0, 6e6)
    bench.find(SETTLE_S, 0.0)
    bench.find(2 * AGAIN_AFTER_S, 0.0)
    assert bench.limit == 1000
    bench.owners = 0
    bench.uplink.apply()
    assert bench.limit == math.inf  # a day has passed: it is measured again
    bench.find(2 * AGAIN_AFTER_S + 1, 6e6)
    bench.find(2 * AGAIN_AFTER_S + 1 + SETTLE_S, 0.0)
    assert bench.limit == 3e6


@pytest.mark.parametrize("damaged", ['{"line": "fast"}', '{"line": [1]}', '{"line": [-1, -2]}', "{"])
def test_a_damaged_memory_is_measured_anew(store: Store, damaged: str) -> None:
    (store.folder / "profiles.json").write_text(damaged)
    assert Bench(store).limit == math.inf
