"""Sessions under random schedules of everything that can go wrong, from one seed each.

Two kinds of worlds: the state machine among simulated hops (`schedules.py`), and whole daemons, the code that
ships, over the network in memory (`daemons.py`). By default 2,000 schedules of the first kind and 120 of the
second run. By hand, any number from any seed, and one seed told in full:

    python -m tests.simulation.test_sessions machine 0 100000
    python -m tests.simulation.test_sessions daemons 0 10000
    python -m tests.simulation.test_sessions links 0 10000
    python -m tests.simulation.test_sessions parted 0 1000
    python -m tests.simulation.test_sessions machine 4711
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import pytest

from corolla.daemon.session.events import Kind

from .daemons import Story, play_daemons
from .schedules import play_machine
from .world import World

NUM_MACHINES = 2000
NUM_LINKS = 500  # of the first kind, with links that never work
NUM_DAEMONS = 120
PER_TEST = 100
DAEMONS_PER_TEST = 20


@pytest.mark.parametrize("first", range(0, NUM_MACHINES, PER_TEST))
def test_no_schedule_changes_an_answer_or_charges_an_innocent(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        play_machine(seed)


@pytest.mark.parametrize("first", range(0, NUM_LINKS, PER_TEST))
def test_links_that_never_work_are_gone_round_or_pass_through_the_client(first: int) -> None:
    kinds = set()
    for seed in range(first, first + PER_TEST):
        kinds |= {event.kind for event in play_machine(seed, links_break=True).outcome.events}
    assert Kind.BRIDGED in kinds


@pytest.mark.parametrize("first", range(0, NUM_DAEMONS, DAEMONS_PER_TEST))
def test_no_schedule_of_whole_daemons_changes_an_answer_or_charges_an_innocent(first: int) -> None:
    for seed in range(first, first + DAEMONS_PER_TEST):
        play_daemons(seed)


@pytest.mark.parametrize("first", range(0, NUM_DAEMONS, DAEMONS_PER_TEST))
def test_whole_daemons_that_never_reach_each_other_are_gone_round_or_bridged(first: int) -> None:
    stories = [play_daemons(seed, links_break=True) for seed in range(first, first + DAEMONS_PER_TEST)]
    assert any(story.num_bridges for story in stories)


def test_a_schedule_with_links_that_never_work_replays_exactly() -> None:
    for play in (play_machine, play_daemons):
        assert play(3, links_break=True).lines == play(3, links_break=True).lines


@pytest.mark.parametrize("seed", [7452, 16171, 33096])
def test_slanderers_that_cover_for_each_other_do_not_end_a_session_that_honest_hops_could_serve(
    seed: int,
) -> None:
    assert len(play_machine(seed).liars) > 1


def test_a_schedule_of_the_machine_replays_exactly() -> None:
    assert play_machine(7).lines == play_machine(7).lines


def test_a_schedule_of_whole_daemons_replays_exactly() -> None:
    first, second = play_daemons(5), play_daemons(5)
    assert first.lines == second.lines
    assert first.num_repairs > 0


def test_replacements_get_the_parts_of_the_adapter_amid_a_session() -> None:
    told = play_daemons(5).lines
    opened = next(place for place, line in enumerate(told) if line.endswith(" open"))
    assert any("parts of" in line for line in told[opened:])


def test_the_default_schedules_repair_replay_wait_and_charge() -> None:
    told = [line for seed in range(200) for line in play_machine(seed).lines]
    for what in ("Replay(", "repaired", "Charge(", "Where(", "link_failed", "not_finite", "is late, and"):
        assert any(what.lower() in line.lower() for line in told), what


def main(kind: str, first: int, last: int | None = None) -> None:
    """Play seeds [first, last), or tell one in full."""
    plays: dict[str, Callable[[int], World | Story]] = {
        "machine": play_machine,
        "links": partial(play_machine, links_break=True),
        "daemons": play_daemons,
        "parted": partial(play_daemons, links_break=True),
    }
    play = plays[kind]
    if last is None:
        print("\n".join(play(first).lines))
        return
    failed = 0
    for seed in range(first, last):
        try:
            play(seed)
        except AssertionError as problem:
            failed += 1
            print(problem)
    print(f"{last - first} schedules, {failed} failed")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
