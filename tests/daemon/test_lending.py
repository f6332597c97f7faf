"""What a daemon lends: workers as real processes without a model, in a swarm in memory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from corolla.daemon.config import Config
from corolla.daemon.lending import ends as ends_module
from corolla.daemon.lending import lending as module
from corolla.daemon.lending.ends import MAX_LOADS
from corolla.daemon.lending.lending import Lending
from corolla.daemon.network.registry.announcements import Offer
from corolla.daemon.serving.workers import Worker
from corolla.protocol.control import PullProgress
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.records import SpanState
from corolla.protocol.steps import NEW_ROW, Row
from corolla.protocol.work import Compute, ModelSource, SourceKind

from ..serving.fake_worker import FACTS
from .members import Member, meadow, until

pytestmark = pytest.mark.anyio


def fake_command(descriptor: int) -> list[str]:
    """The worker program without a model: its habit is its model's name."""
    program = Path(__file__).parents[1] / "serving" / "fake_worker.py"
    return [sys.executable, str(program), str(descriptor)]


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Worker", partial(Worker, backoff_s=(0.05,)))
    monkeypatch.setattr(ends_module, "Worker", partial(Worker, backoff_s=(0.05,)))
    monkeypatch.setattr(module, "source_of", lambda model: ModelSource(SourceKind.HUB, model))
    monkeypatch.setattr(ends_module, "source_of", lambda model: ModelSource(SourceKind.HUB, model))


@asynccontextmanager
async def lending(**settings: Any) -> AsyncIterator[tuple[Lending, list[str]]]:
    """The lending of a daemon, and the kinds of events it told."""
    told: list[str] = []
    async with trio.open_nursery() as nursery:
        lends = Lending(
            Config(**settings),
            "/nowhere",
            nursery,
            lambda kind, text: told.append(kind),
            command=fake_command,
        )
        lends.start()
        yield lends, told
        lends.stop()
        with trio.fail_after(30):
            await until(lambda: not nursery.child_tasks)


async def refused(awaitable: Any) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        await awaitable
    return caught.value


# ends


async def test_ends_are_loaded_once_and_kept() -> None:
    async with lending(model="faithful", blocks="none") as (lends, told):
        assert lends.statuses() == ()
        worker = await lends.ends.ends_of(FACTS)
        assert await lends.ends.ends_of(FACTS) is worker
        assert [status.ends for status in lends.statuses()] == [True]
        assert told == ["ends_loading"]


async def test_weights_of_another_version_are_no_ends() -> None:
    facts = replace(FACTS, fingerprint="e" * 64)
    async with lending(model="faithful", blocks="none") as (lends, _):
        problem = await refused(lends.ends.ends_of(facts))
        assert problem.code is Code.UNKNOWN_MODEL
        assert "eeeeeeee" in problem.message
        assert "faithful is ffffffff" in problem.message
        assert lends.statuses() == ()


async def test_a_model_without_a_source_says_what_to_name() -> None:
    async with lending(blocks="none") as (lends, _):
        problem = await refused(lends.ends.ends_of(FACTS))
        assert problem.code is Code.UNKNOWN_MODEL
        assert "--model" in problem.remedy


async def test_the_hub_is_a_source_when_the_manifest_names_one() -> None:
    async with lending(blocks="none") as (lends, _):
        worker = await lends.ends.ends_of(replace(FACTS, hub_id="someone/faithful"))
        assert worker.configure.source.location == "someone/faithful"


async def test_ends_that_die_again_and_again_are_given_up() -> None:
    async with lending(model="stumbles", blocks="none") as (lends, _):
        problem = await refused(lends.ends.ends_of(FACTS))
        assert problem.code is Code.WORKER_LOST
        assert "then I stumble" in problem.message
        assert MAX_LOADS > 1


async def test_pulling_tells_the_folder_or_why_not() -> None:
    heard: list[PullProgress] = []

    async def emit(progress: PullProgress) -> None:
        await trio.lowlevel.checkpoint()
        heard.append(progress)

    async with lending(blocks="none") as (lends, _):
        assert await lends.ends.pull(ModelSource(SourceKind.HUB, "faithful"), emit) == ""  # the fake has none
        problem = await refused(lends.ends.pull(ModelSource(SourceKind.HUB, "unknown"), emit))
        assert problem.code is Code.UNKNOWN_MODEL


# what people see meanwhile


async def test_status_shows_what_is_being_installed_and_how_far_it_is() -> None:
    async with lending(model="installs", blocks="0:4") as (lends, _):
        await until(lambda: [status.stage for status in lends.statuses()] == ["installing torch"])
        (status,) = lends.statuses()
        assert (status.state, status.progress) == ("loading", 0.25)


async def test_other_weights_in_the_same_place_are_told_as_another_model() -> None:
    async with meadow() as swarm:
        ours = await swarm.client()
        async with lending(model="faithful", blocks="0:4") as (lends, told):
            lends.enter(ours.belonging)
            await until(lambda: bool(lends.serving()))
            ((worker, ready),) = lends.serving()
            assert worker.process is not None
            lends._weights[worker.number] = replace(ready.facts, fingerprint="0" * 64)  # as it was before
            os.kill(worker.process, signal.SIGKILL)
            await until(lambda: "weights_changed" in told)
            await until(lambda: bool(lends.serving()))


# spans in public


def states(member: Member) -> list[tuple[SpanState, int, int]]:
    """What a member knows of all spans."""
    spans = member.belonging.registry.all_spans_now()
    return [(seen.record.state, seen.record.start, seen.record.end) for seen in spans]


def become(member: Member, *expected: tuple[SpanState, int, int]) -> Callable[[], bool]:
    return lambda: states(member) == list(expected)


async def test_a_span_is_announced_as_it_is() -> None:
    async with meadow() as swarm:
        ours, other = await swarm.client(), await swarm.client()
        async with lending(model="dies", blocks="0:4") as (lends, told):
            lends.enter(ours.belonging)
            await until(become(other, (SpanState.ONLINE, 0, 4)))
            await until(lambda: bool(other.belonging.registry.manifests_now()))
            assert other.belonging.registry.manifests_now()[0].facts == FACTS
            assert told == ["worker_online"]
            lends.drain()
            await until(become(other, (SpanState.DRAINING, 0, 4)))


async def test_a_worker_that_was_lost_is_announced_as_loading_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "Worker", partial(Worker, command=fake_command, backoff_s=(1.0,)))
    monkeypatch.setattr(ends_module, "Worker", partial(Worker, command=fake_command, backoff_s=(1.0,)))
    async with meadow() as swarm:
        ours, other = await swarm.client(), await swarm.client()
        async with lending(model="faithful", blocks="0:4") as (lends, told):
            lends.enter(ours.belonging)
            await until(become(other, (SpanState.ONLINE, 0, 4)))
            (process,) = lends.processes()
            os.kill(process, signal.SIGKILL)
            await until(become(other, (SpanState.LOADING, 0, 4)))
            await until(become(other, (SpanState.ONLINE, 0, 4)))
            assert told == ["worker_online", "worker_loading", "worker_online"]


async def test_a_span_whose_device_is_lost_is_left_to_others_until_it_is_back(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    async with meadow() as swarm:
        ours, other = await swarm.client(), await swarm.client()
        async with lending(model=str(gone), blocks="0:4") as (lends, told):
            lends.enter(ours.belonging)
            await until(become(other, (SpanState.ONLINE, 0, 4)))
            assert lends.uses_gpu
            ((worker, _),) = lends.serving()
            worker.submit(Compute(0, b"s" * 16, 1, 0, (Row(NEW_ROW, 0, 1),)))
            await until(become(other))
            await until(lambda: worker.restarts >= 2)
            assert states(other) == []
            assert told == ["worker_online", "worker_loading"]  # not once more with each attempt
            gone.unlink()
            await until(become(other, (SpanState.ONLINE, 0, 4)))


async def test_a_worker_that_loads_is_no_other_program_on_our_gpu() -> None:
    async with lending(model="installs", blocks="0:4") as (lends, _):
        await until(lambda: len(lends.processes()) == 1)
        assert lends.serving() == ()


async def test_a_worker_that_cannot_load_is_told_and_never_announced() -> None:
    async with meadow() as swarm:
        ours = await swarm.client()
        async with lending(model="unknown", blocks="0:4") as (lends, told):
            lends.enter(ours.belonging)
            await until(lambda: told == ["worker_failed"])
            assert states(ours) == []
            (status,) = lends.statuses()
            assert status.state == "failed"
            assert status.error["code"] == Code.UNKNOWN_MODEL


async def test_auto_moves_to_what_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.1)
    monkeypatch.setattr(module, "SPREAD_S", 0.1)
    monkeypatch.setattr(module, "choose_span", lambda view, num_fitting, speed: (1, num_fitting))
    announced: list[tuple[SpanState, int, int]] = []
    async with meadow() as swarm:
        ours = await swarm.client()
        announce = ours.belonging.registry.announce

        def note(offer: Offer) -> None:
            announced.append((offer.state, offer.start, offer.end))
            announce(offer)

        monkeypatch.setattr(ours.belonging.registry, "announce", note)
        async with lending(model="faithful", blocks="auto") as (lends, told):
            lends.enter(ours.belonging)
            await until(lambda: told.count("worker_online") == 2)
            await until(lambda: len(lends._spans) == 1)
            (worker,) = lends._spans
            assert (worker.number, worker.configure.start, worker.configure.end) == (1, 1, 4)
            assert told == ["worker_online", "moving", "worker_online"]
    here, claim, old = (SpanState.ONLINE, 0, 4), (SpanState.LOADING, 1, 4), (SpanState.DRAINING, 0, 4)
    assert announced[:2] == [here, claim]
    # The fake serves the same wherever it is put; the old one is given up when the new one is there.
    assert list(dict.fromkeys(announced[2:])) == [claim, here, old]
