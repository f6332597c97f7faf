"""What a daemon did for others: counted by hops, summed over runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from corolla.daemon.lending.contribution import SAVE_EVERY_S, Contributing
from corolla.daemon.lending.lending import Lending
from corolla.daemon.network.traffic import Traffic
from corolla.daemon.store import CONTRIBUTION_FILE, Store, open_store
from corolla.protocol.views import Contribution

from .members import Member, knows, meadow, until
from .test_rebalancing import compute

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Trio, whose clock jumps."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


class Lender:
    """The part of `Lending` that counting reads."""

    def __init__(self, member: Member) -> None:
        self.belonging = member.belonging

    def serving(self) -> tuple[object, ...]:
        return (object(),)


async def nothing(session: Any) -> None:
    await trio.lowlevel.checkpoint()


def told(kind: str, text: str) -> None:
    raise AssertionError(f"{kind}: {text}")


def contributing(member: Member, store: Store, traffic: Traffic | None = None) -> Contributing:
    tally = member.belonging.hops.tally
    return Contributing(cast(Lending, Lender(member)), store, told, tally, traffic or Traffic())


async def test_steps_for_others_count_and_survive_a_restart(tmp_path: Path) -> None:
    async with meadow() as swarm:
        server = await swarm.serve(0, 4)
        user = await swarm.client()
        with open_store(tmp_path) as store:
            counting = contributing(server, store)
            assert counting.so_far() == Contribution(0, 0.0)
            await compute(swarm, user, 6, nothing)
            assert counting.so_far().block_tokens == 6 * 4
            async with trio.open_nursery() as nursery:
                nursery.start_soon(counting.run)
                await trio.sleep(SAVE_EVERY_S + 10)
                nursery.cancel_scope.cancel()
            assert counting.so_far().lending_s == pytest.approx(SAVE_EVERY_S + 10, abs=10)
        with open_store(tmp_path) as store:
            again = contributing(user, store)
            assert again.so_far().block_tokens == 24
            assert again.so_far().lending_s >= SAVE_EVERY_S


async def test_what_a_daemon_computes_for_itself_is_no_contribution(tmp_path: Path) -> None:
    async with meadow() as swarm:
        server = await swarm.serve(0, 4)
        await until(lambda: knows(server.belonging, server.peer))
        await compute(swarm, server, 3, nothing)
        assert server.belonging.hops.statistics().block_tokens == 0


async def test_a_damaged_count_begins_anew(tmp_path: Path) -> None:
    (tmp_path / CONTRIBUTION_FILE).write_text("[not a count")
    async with meadow() as swarm:
        member = await swarm.client()
        with open_store(tmp_path) as store:
            assert contributing(member, store).so_far() == Contribution(0, 0.0)


async def test_training_and_relaying_count_and_survive_a_restart(tmp_path: Path) -> None:
    async with meadow() as swarm:
        member, other = await swarm.client(), await swarm.client()
        hops, traffic = member.belonging.hops, Traffic()
        for run in (1, 2):
            with open_store(tmp_path) as store:
                counting = contributing(member if run == 1 else other, store, traffic)
                if run == 1:
                    hops.note_training(other.peer, 70)
                    hops.note_training(member.peer, 5)  # its own is no contribution
                    traffic.relayed(900)
                counting.save()
                assert counting.so_far().training_tokens == 70
                assert (
                    counting.so_far().relayed_bytes == 900 * run
                )  # the traffic object lives on in this test
