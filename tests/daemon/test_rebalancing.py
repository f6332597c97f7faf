"""Spans that move, drain and pause: fake worker processes and hash workers, in a swarm in memory."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from corolla.daemon.config import Config
from corolla.daemon.lending import ends as ends_module
from corolla.daemon.lending import lending as lending_module
from corolla.daemon.lending.lending import Lending
from corolla.daemon.lending.pausing import Pausing
from corolla.daemon.lending.rebalancing import Rebalancing
from corolla.daemon.network.registry.announcements import Offer
from corolla.daemon.schedule import Lends, Rules, Seen, Verdict, parse_hours
from corolla.daemon.serving.priority import NICENESS, autogroup, half_of_cores
from corolla.daemon.serving.workers import Worker
from corolla.daemon.sessions import Wanted, opened
from corolla.daemon.store import Store, open_store
from corolla.protocol.control import Rebalance
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.records import SpanState
from corolla.protocol.steps import NEW_ROW, Reply, Row
from corolla.protocol.tensors import DType
from corolla.protocol.work import ModelSource, SourceKind

from ..serving.fake_worker import FACTS as FAKE
from .members import FACTS, TOKEN_BYTES, Meadow, Member, meadow, until
from .test_lending import become, fake_command, states

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending_module, "Worker", partial(Worker, backoff_s=(0.05,)))
    monkeypatch.setattr(ends_module, "Worker", partial(Worker, backoff_s=(0.05,)))
    monkeypatch.setattr(lending_module, "source_of", lambda model: ModelSource(SourceKind.HUB, model))
    monkeypatch.setattr(ends_module, "source_of", lambda model: ModelSource(SourceKind.HUB, model))


@asynccontextmanager
async def lender(member: Member, **settings: Any) -> AsyncIterator[tuple[Lending, Rebalancing, list[str]]]:
    """What a member lends, who moves it, and the kinds of events told."""
    told: list[str] = []
    async with trio.open_nursery() as nursery:

        def tell(kind: str, text: str) -> None:
            told.append(kind)

        lends = Lending(
            Config(**{"model": "faithful", "blocks": "0:4"} | settings),
            "/nowhere",
            nursery,
            tell,
            command=fake_command,
        )
        lends.start()
        lends.enter(member.belonging)
        await until(lambda: bool(lends.serving()))
        yield lends, Rebalancing(lends, nursery, tell), told
        lends.stop()
        with trio.fail_after(30):
            await until(lambda: not nursery.child_tasks)


def others_serve(member: Member, *places: tuple[int, int, float]) -> None:
    """Another member's spans of the fake's model, said by hand: start, end, tokens per second."""
    member.belonging.registry.announce_model(FAKE)
    for number, (start, end, speed) in enumerate(places):
        member.belonging.registry.announce(
            Offer(number, FAKE.fingerprint, start, end, SpanState.ONLINE, DType.FLOAT32, tokens_per_s=speed)
        )


async def refused(awaitable: Any) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        await awaitable
    return caught.value


# by hand


async def test_a_dry_run_tells_the_gain_and_moves_nothing() -> None:
    async with meadow() as swarm:
        ours, other = await swarm.client(), await swarm.client()
        others_serve(other, (0, 4, 50.0))
        async with lender(ours) as (lends, rebalancing, told):
            await until(lambda: len(states(ours)) == 2)
            (answer,) = await rebalancing.rebalance(Rebalance(dry_run=True, start=0, end=2))
            assert (answer.start, answer.end, answer.to_start, answer.to_end) == (0, 4, 0, 2)
            assert answer.moves
            assert answer.num_single == (0, 2)
            assert "moving" not in told
            assert [worker.number for worker, _ in lends.serving()] == [0]


async def test_moving_claims_the_new_place_gives_up_the_old_and_ends_its_worker() -> None:
    async with meadow() as swarm:
        ours, other = await swarm.client(), await swarm.client()
        async with lender(ours) as (lends, rebalancing, told):
            ((old, _),) = lends.serving()
            await rebalancing.rebalance(Rebalance(start=1, end=3))
            await until(lambda: (SpanState.LOADING, 1, 3) in states(other) or len(lends.serving()) == 1)
            await until(lambda: [worker.number for worker, _ in lends.serving()] == [1])
            ((new, _),) = lends.serving()
            assert (new.configure.start, new.configure.end) == (1, 3)
            await old.wait_stopped()
            assert told.count("moving") == 1
            await until(become(other, (SpanState.ONLINE, 0, 4)))  # as the fake says


async def test_a_worker_that_cannot_serve_there_serves_again_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with meadow() as swarm:
        ours = await swarm.client()
        async with lender(ours) as (lends, _, told):
            ((old, _),) = lends.serving()
            old.configure = replace(old.configure, source=ModelSource(SourceKind.HUB, "unknown"))
            good = ModelSource(SourceKind.HUB, "faithful")
            start_span = lends._start_span

            def note(number: int, configure: Any) -> None:
                if "worker_failed" in told:
                    configure = replace(configure, source=good)
                start_span(number, configure)

            monkeypatch.setattr(lends, "_start_span", note)
            await lends.move(old, 1, 3)
            await until(lambda: bool(lends.serving()))
            ((back, _),) = lends.serving()
            assert (back.configure.start, back.configure.end) == (0, 4)
            assert "worker_failed" in told


async def test_a_span_that_would_be_missed_serves_until_the_new_one_does() -> None:
    async with meadow() as swarm:
        ours = await swarm.client()
        async with lender(ours) as (lends, _, told):
            ((old, _),) = lends.serving()
            seen: list[tuple[str, str]] = []
            empty = lends._empty

            async def note(worker: Worker, deadline_s: float) -> None:
                seen.extend((worker.state.value, other.state.value) for other in lends._spans)
                await empty(worker, deadline_s)

            lends._empty = note  # type: ignore[method-assign]
            await lends.move(old, 1, 3)
            assert seen == [("online", "online")] * 2  # both, when the old one begins to be emptied
            assert [worker.number for worker in lends._spans] == [1]
            assert "worker_failed" not in told


async def test_an_owners_limit_of_memory_lets_the_old_span_end_first() -> None:
    async with meadow() as swarm:
        ours = await swarm.client()
        async with lender(ours, memory_bytes=10**9) as (lends, _, _told):
            ((old, _),) = lends.serving()
            numbers: list[list[int]] = []
            empty = lends._empty

            async def note(worker: Worker, deadline_s: float) -> None:
                numbers.append([other.number for other in lends._spans])
                await empty(worker, deadline_s)

            lends._empty = note  # type: ignore[method-assign]
            await lends.move(old, 1, 3)
            assert numbers == [[0]]
            await until(lambda: [worker.number for worker, _ in lends.serving()] == [1])


async def test_blocks_that_do_not_exist_and_unclear_requests_are_refused() -> None:
    async with meadow() as swarm:
        ours = await swarm.client()
        async with lender(ours, device=("cpu", "cpu")) as (lends, rebalancing, _):
            await until(lambda: len(lends.serving()) == 2)
            unclear = await refused(rebalancing.rebalance(Rebalance(start=0, end=2)))
            assert unclear.code is Code.BAD_REQUEST
            assert "--worker" in unclear.remedy
            beyond = await refused(rebalancing.rebalance(Rebalance(start=3, end=9, worker=0)))
            assert beyond.code is Code.BLOCKS_OUT_OF_RANGE
            nobody = await refused(rebalancing.rebalance(Rebalance(worker=7)))
            assert nobody.code is Code.NOT_READY
            lends.leave()
            assert (await refused(rebalancing.rebalance(Rebalance()))).code is Code.NO_SWARM


# by itself


async def test_a_machine_does_its_own_part_of_the_plan_once() -> None:
    async with meadow() as swarm:
        ours, other = await swarm.client(), await swarm.client()
        async with lender(ours, blocks="auto") as (lends, rebalancing, told):
            await trio.sleep(5)  # its first placement is over
            ((worker, ready),) = lends.serving()
            others_serve(other, (0, 2, 9.0), (0, 2, 9.0))
            worker._ready = replace(ready, start=0, end=2)  # the fake serves all; suppose half
            lends._announce(worker)
            await until(lambda: len(states(ours)) == 3)
            await rebalancing.look()
            await until(lambda: len(told) >= 3)
            assert told.count("rebalanced") == told.count("moving") == 1
            (moved,) = lends._spans
            assert (moved.configure.start, moved.configure.end) == (2, 4)


async def test_fixed_blocks_are_never_moved_by_the_plan() -> None:
    async with meadow() as swarm:
        ours = await swarm.client()
        async with lender(ours, blocks="0:2") as (lends, rebalancing, told):
            await rebalancing.look()
            assert "moving" not in told
            assert len(lends.serving()) == 1


# sessions


async def compute(swarm: Meadow, user: Member, num_steps: int, disturb: Any) -> tuple[list[bytes], int]:
    """A session of hidden states with a disturbance in its middle: its answers and number of repairs."""
    answers: list[bytes] = []
    context = opened(
        user.belonging,
        FACTS,
        Wanted(FACTS.name, 0, 4, 1, 64),
        replacement_wait_s=30.0,
        on_event=lambda event: None,
    )
    async with context as session:
        for index in range(num_steps):
            if index == num_steps // 2:
                await disturb(session)
            row = Row(NEW_ROW if index == 0 else 0, index, 1)
            answers.append(await session.step((row,), bytes([index + 1]) * TOKEN_BYTES, Reply.ALL))
        return answers, session.statistics().num_repairs


async def test_a_session_asked_to_leave_goes_on_at_a_replica_and_charges_nobody() -> None:
    async def nothing(session: Any) -> None:
        await trio.lowlevel.checkpoint()

    async with meadow() as swarm:
        serving = [await swarm.serve(0, 4), await swarm.serve(0, 4)]
        user = await swarm.client()
        expected, _ = await compute(swarm, user, 8, nothing)

        async def drain(session: Any) -> None:
            (hop,) = session.statistics().hops
            (left,) = (member for member in serving if member.peer == hop.hop.peer)
            left.belonging.hops.drain(0)
            left.belonging.hops.ask_to_leave(0, amid_steps=False)
            with trio.fail_after(30):
                await left.belonging.hops.wait_idle(0)
            assert session.statistics().hops[0].hop.peer != left.peer

        answers, num_repairs = await compute(swarm, user, 8, drain)
        assert answers == expected
        assert num_repairs == 1
        assert user.belonging.ledger.charged(trio.current_time()) == {}


async def test_a_drained_worker_refuses_new_sessions_until_it_is_taken_back() -> None:
    async with meadow() as swarm:
        server = await swarm.serve(0, 4)
        user = await swarm.client()

        async def nothing(session: Any) -> None:
            await trio.lowlevel.checkpoint()

        server.belonging.hops.drain(0)
        problem = await refused(compute(swarm, user, 1, nothing))
        assert problem.code in (Code.BLOCKS_UNSERVED, Code.DRAINING)
        server.belonging.hops.undrain(0)
        answers, _ = await compute(swarm, user, 1, nothing)
        assert len(answers) == 1


async def test_a_session_that_nobody_else_could_serve_stays_while_its_hop_drains() -> None:
    async with meadow() as swarm:
        ours, user = await swarm.client(), await swarm.client()
        async with lender(ours) as (lends, _, _):
            await until(become(user, (SpanState.ONLINE, 0, 4)))
            hops = ours.belonging.hops
            asked: list[int] = []
            hops.ask_to_leave = lambda worker, amid_steps: asked.append(worker)  # type: ignore[method-assign,misc]
            hops.num_sessions = lambda worker: 1  # type: ignore[method-assign]
            lends.drain()
            await until(become(user, (SpanState.DRAINING, 0, 4)))
            assert asked == []
            others_serve(user, (0, 4, 9.0))
            await until(lambda: bool(asked))
            lends.resume()
            await until(lambda: (SpanState.ONLINE, 0, 4) in states(ours))
            assert lends.lends == "yes"


# pauses, and rules

NIGHT = Rules(parse_hours("22:00-07:00"))
OUTSIDE = Verdict(Lends.OUTSIDE_HOURS, "later")


@asynccontextmanager
async def pausing(
    lends: Lending, store: Store, now: list[float], **options: Any
) -> AsyncIterator[tuple[Pausing, list[str]]]:
    told: list[str] = []

    def tell(kind: str, text: str) -> None:
        told.append(kind)

    async with trio.open_nursery() as nursery:
        yield (
            Pausing(lends, store, nursery, tell, unix=lambda: now[0], **options),
            told,
        )
        nursery.cancel_scope.cancel()


async def test_a_pause_ends_workers_is_remembered_and_ends_by_itself(tmp_path: Path) -> None:
    now = [1000.0]
    with open_store(tmp_path) as store:
        async with meadow() as swarm:
            ours = await swarm.client()
            async with lender(ours) as (lends, _, _), pausing(lends, store, now) as (pauses, told):
                await pauses.pause(3.0)
                assert lends.statuses() == ()
                assert states(ours) == []
                assert (store.state.paused, store.state.paused_until) == (True, 1003.0)
                await until(lambda: bool(lends.serving()))
                assert told == ["paused", "resumed"]
                assert not store.state.paused


async def test_a_daemon_that_starts_amid_a_pause_lends_nothing_until_it_resumes(tmp_path: Path) -> None:
    now = [1000.0]
    with open_store(tmp_path) as store:
        store.update(paused=True)
        async with trio.open_nursery() as nursery:
            config = Config(model="faithful", blocks="0:4")
            lends = Lending(config, "/nowhere", nursery, lambda kind, text: None, command=fake_command)
            async with pausing(lends, store, now) as (pauses, told):
                pauses.start()
                assert told == ["paused"]
                assert lends.statuses() == ()
                pauses.resume()
                await until(lambda: bool(lends.serving()))
                assert not store.state.paused
            lends.stop()
            with trio.fail_after(30):
                await until(lambda: not nursery.child_tasks)


async def test_a_pause_that_is_over_is_over_also_after_a_restart(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.update(paused=True, paused_until=900.0)
        async with trio.open_nursery() as nursery:
            config = Config(model="faithful", blocks="0:4")
            lends = Lending(config, "/nowhere", nursery, lambda kind, text: None, command=fake_command)
            async with pausing(lends, store, [1000.0]) as (pauses, _):
                pauses.start()
                await until(lambda: bool(lends.serving()))
            lends.stop()
            with trio.fail_after(30):
                await until(lambda: not nursery.child_tasks)


async def test_a_pause_of_no_time_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            lends = Lending(
                Config(blocks="none"), "/nowhere", nursery, lambda kind, text: None, command=fake_command
            )
            async with pausing(lends, store, [0.0]) as (pauses, _):
                assert (await refused(pauses.pause(-1.0))).code is Code.BAD_REQUEST
                assert (await refused(pauses.pause(float("nan")))).code is Code.BAD_REQUEST
                assert not store.state.paused


def local(hour: int, minute: int = 0) -> float:
    """A unix time at which clocks here show this time of day."""
    return time.mktime((2026, 3, 3, hour, minute, 0, 0, 0, -1))


@asynccontextmanager
async def ruled(
    tmp_path: Path, now: list[float], rules: list[Rules], seen: dict[str, float] | None = None
) -> AsyncIterator[tuple[Lending, Pausing, list[str]]]:
    """A lender who keeps to rules at a time that tests set. seen: fields of each look."""

    async def look(rules: Rules, minute: int) -> Seen:
        await trio.lowlevel.checkpoint()
        return Seen(minute, **(seen or {}))

    config = Config(model="faithful", blocks="0:4")
    with open_store(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            lends = Lending(config, "/nowhere", nursery, lambda kind, text: None, command=fake_command)
            options: Any = {"rules": lambda: rules[0], "look": look}
            async with pausing(lends, store, now, **options) as (pauses, told):
                yield lends, pauses, told
            lends.stop()
            with trio.fail_after(30):
                await until(lambda: not nursery.child_tasks)


async def test_outside_its_hours_a_machine_lends_nothing_and_says_when_it_will(tmp_path: Path) -> None:
    now = [local(12)]
    async with ruled(tmp_path, now, [NIGHT]) as (lends, pauses, told):
        pauses.start()
        assert lends.statuses() == ()
        assert (lends.lends, told) == (Lends.OUTSIDE_HOURS, ["held"])
        assert "22:00" in str(pauses.explain())
        now[0] = local(22)
        async with following(pauses):
            await until(lambda: bool(lends.serving()))
            assert (lends.lends, pauses.explain()) == (Lends.YES, None)
            now[0] = local(7)  # the night is over; or the clock jumped
            pauses.stir()
            await until(lambda: lends.statuses() == ())
            assert lends.lends.name == "OUTSIDE_HOURS"
            now[0] = local(6)  # and back by an hour
            pauses.stir()
            await until(lambda: bool(lends.serving()))
        assert told == ["held", "resumed", "held", "resumed"]


@asynccontextmanager
async def following(pauses: Pausing) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pauses.follow)
        yield
        nursery.cancel_scope.cancel()


async def test_when_its_owner_is_back_a_machine_lends_nothing(tmp_path: Path) -> None:
    seen = {"idle_s": 700.0}
    async with ruled(tmp_path, [0.0], [Rules(idle_s=600.0)], seen) as (lends, pauses, told):
        pauses.start()
        assert lends.lends.name == "NOT_IDLE"  # nobody has looked yet
        async with following(pauses):
            await until(lambda: bool(lends.serving()))
            seen["idle_s"] = 0.0
            pauses.stir()
            await until(lambda: lends.statuses() == ())
            assert lends.lends.name == "NOT_IDLE"
        assert told == ["held", "resumed", "held"]


async def test_other_rules_count_at_once(tmp_path: Path) -> None:
    rules = [NIGHT]
    async with ruled(tmp_path, [local(12)], rules) as (lends, pauses, _):
        pauses.start()
        async with following(pauses):
            rules[0] = Rules()
            pauses.stir()
            await until(lambda: bool(lends.serving()))


async def test_a_pause_outlasts_the_rules_and_the_rules_a_resume(tmp_path: Path) -> None:
    async with ruled(tmp_path, [local(12)], [NIGHT]) as (lends, pauses, told):
        pauses.start()
        pauses.resume()
        assert lends.lends.name == "OUTSIDE_HOURS"
        await pauses.pause(0.0)
        await pauses.obey(Verdict(Lends.YES))
        assert lends.lends.name == "PAUSED"
        assert "daemonctl resume" in str(pauses.explain())
        pauses.resume()
        await until(lambda: bool(lends.serving()))
        assert told == ["held", "held", "paused", "resumed"]


async def test_a_resume_amid_a_pause_starts_anew_when_all_have_ended(tmp_path: Path) -> None:
    async with ruled(tmp_path, [0.0], [Rules()]) as (lends, pauses, _):
        pauses.start()
        await until(lambda: bool(lends.serving()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pauses.pause, 0.0)
            await until(lambda: lends.is_paused)
            pauses.resume()
        await until(lambda: bool(lends.serving()))
        assert len(lends.statuses()) == 1
        assert lends.lends.name == "YES"


async def test_a_model_that_may_not_be_lent_is_refused_by_name_and_never_announced() -> None:
    async with meadow() as swarm:
        ours = await swarm.client()
        async with lender(ours, models=("llama", "eeeeee")) as (lends, _, told):
            await until(lambda: "worker_failed" in told)
            (status,) = lends.statuses()
            assert (status.state, status.error["code"]) == ("failed", Code.BAD_CONFIG)
            assert "fake@ffffffff" in status.error["message"]
            assert "llama, eeeeee" in status.error["message"]
            assert states(ours) == []


@pytest.mark.parametrize("allowed", [("FAKE",), ("llama", "ffffff"), ("f" * 64,), ()])
async def test_a_model_may_be_allowed_by_name_or_fingerprint(allowed: tuple[str, ...]) -> None:
    async with meadow() as swarm, lender(await swarm.client(), models=allowed) as (lends, _, _):
        await until(lambda: bool(lends.serving()))


async def test_workers_that_serve_others_stand_behind_other_programs() -> None:
    async with meadow() as swarm:
        member = await swarm.client()
        own = os.nice(0)
        behind, beside = (max(NICENESS, own), os.SCHED_BATCH, NICENESS), (own, os.SCHED_OTHER, 0)
        for polite, (niceness, policy, group) in ((True, behind), (False, beside)):
            async with lender(member, low_priority=polite) as (lends, _, _):
                await until(lambda lends=lends: bool(lends.serving()))  # type: ignore[misc]
                ((worker, _),) = lends.serving()
                assert worker.process is not None
                assert os.getpriority(os.PRIO_PROCESS, worker.process) == niceness
                assert os.sched_getscheduler(worker.process) == policy
                if autogroup(worker.process).exists():
                    assert autogroup(worker.process).read_text().split()[-1] == str(group)


async def test_half_of_the_cores_are_lent_unless_told() -> None:
    async with meadow() as swarm:
        member = await swarm.client()
        for threads in (0, 3):
            async with lender(member, threads=threads) as (lends, _, _):
                await until(lambda lends=lends: bool(lends.serving()))  # type: ignore[misc]
                ((worker, _),) = lends.serving()
                assert worker.configure.threads == (threads or half_of_cores())
