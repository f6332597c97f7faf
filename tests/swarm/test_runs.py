"""Two daemons that take turns in one name are told from one that starts again."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from corolla.daemon.network.members.greeting import greet_with
from corolla.daemon.network.members.membership import GOSSIP_EVERY_S
from corolla.daemon.network.members.runs import MAX_PEERS, MAX_RUNS, MEMORY_S, Runs
from corolla.protocol.limits import HELLO_TIMEOUT_S
from corolla.protocol.registry import Hello

from .test_membership import ROSES, address, garden, until


@pytest.mark.parametrize(
    ("greetings", "take_turns"),
    [
        ("", False),
        ("aaaa", False),
        ("abcd", False),  # it was started again and again
        ("aba", False),  # the first greeting of its old run may have come late
        ("abab", True),
        ("aabba", False),
        ("aabbab", True),
        ("abcabc", True),
    ],
)
def test_runs_that_come_back_take_turns(greetings: str, take_turns: bool) -> None:
    runs = Runs()
    for now, run in enumerate(greetings):
        runs.note("ada", run.encode(), float(now))
        runs.note("bob", b"z", float(now))
    assert runs.take_turns("ada", 10.0) is take_turns
    assert not runs.take_turns("bob", 10.0)
    assert not runs.take_turns("ada", 11.0 + MEMORY_S)


def test_older_programs_tell_no_run() -> None:
    runs = Runs()
    for run in (b"", b"a") * 4:
        runs.note("ada", run, 0.0)
    assert not runs.take_turns("ada", 0.0)


def test_memory_is_bounded() -> None:
    runs = Runs()
    for number in range(2 * MAX_PEERS):
        runs.note(str(number), b"a", 0.0)
    for number in range(2 * MAX_RUNS):
        runs.note("ada", bytes([number]), 0.0)
    assert len(runs._turns) == MAX_PEERS
    assert len(runs._turns["ada"]) == MAX_RUNS


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@pytest.mark.anyio
async def test_a_member_without_blocks_is_told_that_another_greets_in_its_name() -> None:
    async with garden() as g:
        network = g.network("ada")
        ada = await g.enter(network)
        bob = await g.join("bob", "ada")
        told: list[str] = []
        ada.on_twin(lambda: told.append("ada"))
        bob.on_twin(lambda: told.append("bob"))
        await until(lambda: ada.is_member("bob") and bob.is_member("ada"))
        await trio.sleep(10 * GOSSIP_EVERY_S)
        assert told == []
        twin = Hello(ROSES.swarm_id, ROSES.name, "1", addresses=(address("ada"),), run=b"twin")
        for _ in range(4):
            async with greet_with(network, "bob", twin, timeout_s=HELLO_TIMEOUT_S):
                pass
            await trio.sleep(2 * GOSSIP_EVERY_S)
        assert set(told) == {"ada"}
