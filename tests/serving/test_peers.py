"""Sessions on hops, over the network's twin and with twins for workers, spoken with by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from corolla.daemon.network.conversation import Conversation
from corolla.daemon.serving import peers
from corolla.daemon.serving.hop import HopSession
from corolla.daemon.serving.served import MAX_UNDER_WAY
from corolla.daemon.serving.twin import not_finite
from corolla.protocol.errors import Code
from corolla.protocol.limits import (
    MAX_SESSIONS_PER_CLIENT,
    MIN_HISTORY_BYTES,
    SESSION_GRACE_S,
    WORKING_EVERY_S,
)
from corolla.protocol.messages import Message
from corolla.protocol.steps import (
    NEW_ROW,
    PUSH,
    PUSH_PROTOCOL,
    At,
    Attach,
    Attached,
    CloseSession,
    Failure,
    Linked,
    LinkHop,
    Opened,
    OpenSession,
    Receipt,
    Replay,
    Replayed,
    Reply,
    Result,
    Row,
    Stage,
    Step,
    Where,
)
from corolla.protocol.tensors import Encoding

from .stage import (
    FACTS,
    NUM_BLOCKS,
    SESSION_ID,
    TOKEN_BYTES,
    Caller,
    a_stage,
    answer,
    expected,
    links,
    opening,
    step,
    tokens,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time jumps to whatever is awaited next."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


async def failure_of(caller: Caller, code: Code) -> Failure:
    """The failure that comes next, which has to be of this code."""
    failure = await caller.hear(Failure)
    assert failure.problem().code is code, failure.problem()
    return failure


# opening


async def test_what_a_worker_does_not_serve_is_refused_by_name() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 1, 3)
        for fingerprint, worker, start, end, code in (
            ("f" * 64, 7, 1, 3, Code.UNKNOWN_MODEL),
            (FACTS.fingerprint, 7, 0, 3, Code.BLOCKS_OUT_OF_RANGE),
            (FACTS.fingerprint, 8, 1, 3, Code.BUSY),
        ):
            caller = await stage.call(daemon)
            await caller.say(OpenSession(SESSION_ID, fingerprint, worker, start, end, Encoding.FLOAT32, 1, 8))
            await failure_of(caller, code)
            await caller.ended()
        assert stage.daemons["hop0"].service.statistics().num_sessions == 0


async def test_a_session_that_the_cache_has_no_room_for_is_refused() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, NUM_BLOCKS, cache_tokens=300)
        await stage.open(daemon, max_rows=4)
        caller = await stage.call(daemon)
        other = opening(daemon, max_rows=1)
        await caller.say(
            OpenSession(b"b" * 16, other.fingerprint, 7, 0, NUM_BLOCKS, other.encoding, 1, other.max_tokens)
        )
        await failure_of(caller, Code.BUSY)
        assert daemon.service.statistics().num_sessions == 1


async def test_one_client_cannot_have_all_sessions() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, 1, cache_tokens=1 << 20)
        for number in range(MAX_SESSIONS_PER_CLIENT + 1):
            caller = await stage.call(daemon)
            message = opening(daemon)
            await caller.say(
                OpenSession(number.to_bytes(16), message.fingerprint, 7, 0, 1, message.encoding, 1, 8)
            )
            if number < MAX_SESSIONS_PER_CLIENT:
                await caller.hear(Opened)
        await failure_of(caller, Code.BUSY)
        await stage.open(daemon, network=stage.hub.network("another client"))


async def test_all_clients_together_have_so_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MAX_SESSIONS", 2)
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, 1)
        for name in ("ada", "bob"):
            await stage.open(daemon, network=stage.hub.network(name))
        caller = await stage.call(daemon, network=stage.hub.network("cyd"))
        await caller.say(opening(daemon))
        await failure_of(caller, Code.BUSY)


async def test_one_client_is_promised_half_of_all_history_and_then_the_least() -> None:
    budget = 64 * MIN_HISTORY_BYTES
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, 1, history_bytes=budget, cache_tokens=1 << 24)
        wanted = 1 << 20  # tokens: more than half of it

        async def promised_to(name: str) -> int:
            before = daemon.service.statistics().history_promised_bytes
            await stage.open(daemon, max_tokens=wanted, network=stage.hub.network(name))
            return daemon.service.statistics().history_promised_bytes - before

        assert [await promised_to(name) for name in ("ada", "bob", "cyd")] == [
            budget // 2,
            budget // 2,
            MIN_HISTORY_BYTES,
        ]


async def test_a_stream_that_says_nothing_is_dropped() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, 1)
        await stage.call(daemon)
        await stage.until_released()


async def test_two_clients_with_the_same_session_id_do_not_meet() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, NUM_BLOCKS)
        mine = [await stage.open(daemon)]
        await stage.link(mine, 1)
        await answer(mine, step(1, 0, 1, 2))
        theirs = [await stage.open(daemon, network=stage.hub.network("another client"))]
        await stage.link(theirs, 1)
        assert await answer(theirs, step(1, 0, 8, 9)) == expected(8, 9)
        assert await answer(mine, step(2, 2, 3)) == expected(1, 2, 3)[2:]


async def test_opening_on_other_blocks_begins_anew() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, NUM_BLOCKS)
        await stage.open(daemon)
        caller = await stage.call(daemon)
        message = opening(daemon)
        await caller.say(
            OpenSession(SESSION_ID, message.fingerprint, 7, 2, NUM_BLOCKS, Encoding.FLOAT32, 4, 64)
        )
        await caller.hear(Opened)
        assert daemon.service.statistics().num_sessions == 1
        assert daemon.worker.statistics().num_caches == 1
        await stage.link([caller], 1)
        assert await answer([caller], step(1, 0, 5)) == expected(5, start=2)


# steps


async def test_steps_pass_through_all_hops() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2, 3)
        assert await answer(callers, step(1, 0, 1, 2, 3)) == expected(1, 2, 3)
        assert await answer(callers, step(2, 3, 4)) == expected(1, 2, 3, 4)[3:]
        assert await answer(callers, step(3, 1, 9)) == expected(1, 9)[1:]  # rolled back


async def test_the_last_hop_sends_what_is_asked_for() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        rows = (Row(NEW_ROW, 0, 2), Row(NEW_ROW, 0, 0), Row(NEW_ROW, 0, 3))
        payload = b"".join(tokens(1, 2, 3, 4, 5))
        for step_id, (reply, wanted) in enumerate(
            (
                (Reply.NONE, []),
                (Reply.LAST, [expected(1, 2)[-1], expected(3, 4, 5)[-1]]),
                (Reply.ALL, expected(1, 2) + expected(3, 4, 5)),
            ),
            start=1,
        ):
            message = Step(SESSION_ID, 1, step_id, rows, step_id - 1, reply, payload=payload)
            assert await answer(callers, message) == wanted


async def test_rows_fork_and_are_dropped() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2)
        await answer(callers, step(1, 0, 1, 2))
        rows = (Row(0, 2, 1), Row(0, 1, 1), Row(NEW_ROW, 0, 1))
        forked = Step(SESSION_ID, 1, 2, rows, 1, Reply.LAST, payload=b"".join(tokens(3, 4, 5)))
        assert await answer(callers, forked) == [expected(1, 2, 3)[2], expected(1, 4)[1], expected(5)[0]]
        rest = Step(SESSION_ID, 1, 3, (Row(1, 2, 1),), 2, Reply.LAST, payload=b"".join(tokens(6)))
        assert await answer(callers, rest) == [expected(1, 4, 6)[2]]


async def test_several_steps_are_under_way_together() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2, 4)
        for daemon in stage.daemons.values():
            daemon.worker.compute_s = 1.0
        began = trio.current_time()
        for number in range(4):
            await callers[0].say(step(number + 1, number, number, committed=0))
        whole = expected(0, 1, 2, 3)
        heard: list[bytes] = []
        while len(heard) < 4:
            message = await callers[-1].talk.hear()
            if isinstance(message, Result):
                heard.append(message.payload)
        assert heard == whole
        assert trio.current_time() - began < 4 * 3  # less than one after another


async def test_a_client_may_be_the_hop_itself() -> None:
    async with a_stage() as stage:
        callers = [await stage.open(await stage.daemon("client", 0, 2))]
        callers.append(await stage.open(await stage.daemon("hop1", 2, NUM_BLOCKS)))
        await stage.link(callers, 1)
        assert await answer(callers, step(1, 0, 1, 2)) == expected(1, 2)


# fences


async def test_a_link_that_is_not_newer_changes_nothing() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        await callers[1].say(LinkHop(SESSION_ID, 1, None, None, 0))
        await failure_of(callers[1], Code.STALE_EPOCH)
        assert await answer(callers, step(2, 1, 2)) == expected(1, 2)[1:]


async def test_a_step_of_an_older_epoch_is_refused_and_changes_nothing() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        await stage.link(callers, 2, 1, (1,))
        await callers[0].say(step(2, 0, 7, epoch=1))
        await failure_of(callers[0], Code.STALE_EPOCH)
        assert await answer(callers, step(2, 1, 2, epoch=2)) == expected(1, 2)[1:]


async def test_the_last_step_repeated_is_answered_again_and_lower_ones_are_not() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        first = await answer(callers, step(1, 0, 1))
        second = await answer(callers, step(2, 1, 2))
        assert first != second
        await callers[0].say(step(1, 0, 1))
        assert await answer(callers, step(2, 1, 2)) == second
        assert await answer(callers, step(3, 2, 3)) == expected(1, 2, 3)[2:]


async def test_a_step_left_out_is_noticed() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        await callers[0].say(step(3, 1, 3))
        assert (await failure_of(callers[0], Code.HISTORY_GAP)).step_id == 3


async def attach(stage: Any, peer: str, target: Any, epoch: int) -> tuple[Conversation, Message | None]:
    """Push to a hop in the client's session as `peer`; the stream, and what is answered."""
    stream = await stage.hub.network(peer).open(target.name, PUSH_PROTOCOL, timeout_s=5)
    talk = Conversation(stream, PUSH)
    await talk.say(Attach(SESSION_ID, "client", epoch, 7, 7))
    return talk, await talk.hear()


async def test_only_the_linked_upstream_can_push() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        _, refused = await attach(stage, "stranger", callers[1].daemon, 1)
        assert isinstance(refused, Failure)
        assert refused.problem().code is Code.STALE_EPOCH
        assert await answer(callers, step(2, 1, 2)) == expected(1, 2)[1:]


async def test_pushing_without_an_attachment_ends_the_stream() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        stream = await stage.hub.network("stranger").open("hop1", PUSH_PROTOCOL, timeout_s=5)
        talk = Conversation(stream, PUSH)
        await talk.say(step(1, 0, 7))
        with pytest.raises(Exception, match="reset"):
            await talk.hear()
        assert await answer(callers, step(1, 0, 1)) == expected(1)


async def test_a_zombie_that_wakes_up_can_erase_nothing() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2, 4)
        await answer(callers, step(1, 0, 1, 2))
        stage.daemons["hop0"].worker.hang()
        await callers[0].say(step(2, 2, 3))  # it has this step, and will push it when it wakes
        fresh = [await stage.open(await stage.daemon("spare", 0, 2)), *callers[1:]]
        await stage.link(fresh, 2, 1, (2,))
        replay = Step(
            SESSION_ID, 2, 1, (Row(NEW_ROW, 0, 2),), 1, replay_hops=1, payload=b"".join(tokens(1, 2))
        )
        await fresh[0].say(replay)
        await fresh[0].hear(Replayed)
        stage.daemons["hop0"].worker.wake()
        assert await answer(fresh, step(2, 2, 9, epoch=2)) == expected(1, 2, 9)[2:]
        assert await answer(fresh, step(3, 3, 10, epoch=2)) == expected(1, 2, 9, 10)[3:]


# links


async def test_a_link_waits_until_the_next_hop_knows_of_it() -> None:
    async with a_stage() as stage:
        callers = [await stage.open(await stage.daemon(f"hop{n}", 3 * n, 3 * n + 3)) for n in range(2)]
        upper, lower = links(callers, 1, 0, ())
        await callers[0].say(upper)
        await trio.sleep(1.0)
        await callers[1].say(lower)
        await callers[0].hear(Linked)
        await callers[1].hear(Linked)
        assert await answer(callers, step(1, 0, 1)) == expected(1)


async def test_a_next_hop_that_is_not_there_is_named() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, 3)
        caller = await stage.open(daemon)
        nobody = daemon.hop._replace(peer="nobody")
        await caller.say(LinkHop(SESSION_ID, 1, None, nobody, 0))
        assert (await failure_of(caller, Code.LINK_FAILED)).about == nobody


async def test_a_next_hop_that_was_not_linked_is_named_in_time() -> None:
    async with a_stage() as stage:
        callers = [await stage.open(await stage.daemon(f"hop{n}", 3 * n, 3 * n + 3)) for n in range(2)]
        await callers[0].say(links(callers, 1, 0, ())[0])
        began = trio.current_time()
        assert (await failure_of(callers[0], Code.LINK_FAILED)).about == callers[1].daemon.hop
        assert trio.current_time() - began < 10


async def test_a_next_hop_that_dies_is_reported_although_nothing_is_sent() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        stage.hub.kill("hop1")
        failure = await failure_of(callers[0], Code.LINK_FAILED)
        assert (failure.about, failure.epoch) == (callers[1].daemon.hop, 1)
        del stage.daemons["hop1"]


async def test_where_is_answered_while_a_link_is_being_made() -> None:
    async with a_stage() as stage:
        callers = [await stage.open(await stage.daemon(f"hop{n}", 3 * n, 3 * n + 3)) for n in range(2)]
        await callers[0].say(links(callers, 1, 0, ())[0])
        await callers[0].say(Where(SESSION_ID, 1, 0))
        assert (await callers[0].hear(At)).stage is Stage.UNKNOWN


async def test_a_newer_link_takes_the_place_of_one_that_hangs() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        stage.hub.hang("hop1")
        await callers[0].say(links(callers, 2, 1, (1,))[0])
        spare = await stage.open(await stage.daemon("spare", 3, NUM_BLOCKS))
        rewired = [callers[0], spare]
        upper, lower = await stage.link(rewired, 3, 1, (1,))
        assert (upper.held, upper.history_from, lower.held) == ((1,), (0,), (0,))
        stage.hub.wake("hop1")


# repair


async def test_history_is_replayed_through_a_replacement() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2, 4)
        await answer(callers, step(1, 0, 1, 2, 3))
        await answer(callers, step(2, 3, 4))
        stage.hub.kill("hop1")
        await failure_of(callers[0], Code.LINK_FAILED)
        del stage.daemons["hop1"]
        spare = await stage.open(await stage.daemon("spare", 2, 4))
        repaired = [callers[0], spare, callers[2]]
        upper, fresh, lower = await stage.link(repaired, 2, 2, (4,))
        assert (upper.held, upper.history_from) == ((4,), (0,))
        assert (fresh.held, fresh.history_from) == ((0,), (0,))
        assert lower.held == (4,)
        await callers[0].say(Replay(SESSION_ID, 2, 2, (0,), (4,), 1))
        await spare.hear(Replayed)
        assert await answer(repaired, step(3, 4, 5, epoch=2)) == expected(1, 2, 3, 4, 5)[4:]
        # And the replacement has a history of its own by now.
        again = await stage.link(repaired, 3, 3, (5,))
        assert again[1].history_from == (0,)


async def test_a_replay_passes_through_two_replacements() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(1, 4)
        await answer(callers, step(1, 0, 1, 2, 3))
        spares = [
            await stage.open(await stage.daemon("spare0", 1, 3)),
            await stage.open(await stage.daemon("spare1", 3, 4)),
        ]
        repaired = [callers[0], *spares, callers[2]]
        await stage.link(repaired, 2, 1, (3,))
        await callers[0].say(Replay(SESSION_ID, 2, 1, (0,), (3,), 2))
        await spares[1].hear(Replayed)
        assert await answer(repaired, step(2, 3, 4, epoch=2)) == expected(1, 2, 3, 4)[3:]


async def test_the_client_replays_to_a_lost_first_hop() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1, 2))
        repaired = [await stage.open(await stage.daemon("spare", 0, 3)), callers[1]]
        await stage.link(repaired, 2, 1, (2,))
        for position, value, final in ((0, 1, False), (1, 2, True)):
            row = Row(0 if position else NEW_ROW, position, 1)
            await repaired[0].say(
                Step(SESSION_ID, 2, 1, (row,), 1, replay_hops=1, final=final, payload=tokens(value)[0])
            )
        await repaired[0].hear(Replayed)
        assert await answer(repaired, step(2, 2, 3, epoch=2)) == expected(1, 2, 3)[2:]


async def test_a_hop_ahead_is_set_back_to_what_is_committed() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1, 2))
        await answer(callers, step(2, 2, 3, committed=1))
        held = await stage.link(callers, 2, 1, (2,))
        assert [linked.held for linked in held] == [(2,), (2,)]
        assert await answer(callers, step(2, 2, 9, epoch=2)) == expected(1, 2, 9)[2:]


async def test_dropped_history_is_said_to_be_gone() -> None:
    async with a_stage() as stage:
        daemons = [
            await stage.daemon(name, start, end, history_bytes=0, cache_tokens=1 << 17)
            for name, start, end in (("hop0", 0, 1), ("hop1", 1, NUM_BLOCKS))
        ]
        callers = [await stage.open(daemon, max_tokens=1 << 14) for daemon in daemons]
        promised = daemons[0].service.statistics().history_promised_bytes
        assert promised == MIN_HISTORY_BYTES
        await stage.link(callers, 1)
        num_tokens, step_id = 0, 0
        while num_tokens * TOKEN_BYTES <= promised:
            step_id += 1
            await answer(callers, step(step_id, num_tokens, *range(512), reply=Reply.NONE))
            num_tokens += 512
        assert daemons[0].service.statistics().history_bytes <= promised
        _, lower = await stage.link(callers, 2, step_id, (num_tokens,))
        assert lower.history_from == (num_tokens,)  # the last hop has nothing to send on
        await callers[0].say(Replay(SESSION_ID, 2, step_id, (0,), (num_tokens,), 1))
        await failure_of(callers[0], Code.HISTORY_GONE)


async def test_the_last_hop_promises_no_history() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        promised = [caller.daemon.service.statistics().history_promised_bytes for caller in callers]
        assert promised[0] > 0
        assert promised[1] == 0


# the worker


async def test_a_lost_worker_is_told_to_idle_sessions_and_their_history_is_kept() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1, 2))
        worker = callers[0].daemon.worker
        worker.crash()
        failure = await failure_of(callers[0], Code.WORKER_LOST)
        assert (failure.epoch, failure.about) == (1, None)
        await trio.sleep(2.0)
        assert worker.ready is not None
        upper, _ = await stage.link(callers, 2, 1, (2,))
        assert (upper.held, upper.history_from) == ((0,), (0,))
        row = Row(NEW_ROW, 0, 2)
        await callers[0].say(Step(SESSION_ID, 2, 1, (row,), 1, replay_hops=1, payload=b"".join(tokens(1, 2))))
        await callers[0].hear(Replayed)
        assert await answer(callers, step(2, 2, 3, epoch=2)) == expected(1, 2, 3)[2:]


async def test_a_worker_lost_in_a_step_fails_it_once() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        worker = callers[0].daemon.worker
        worker.hang()
        for number in range(3):
            await callers[0].say(step(number + 1, number, number, committed=0))
        await trio.sleep(0.05)
        worker.crash()
        await failure_of(callers[0], Code.WORKER_LOST)
        await callers[0].say(Where(SESSION_ID, 1, 1))
        await callers[0].hear(At)  # and no second failure
        assert callers[0].daemon.service.statistics().num_steps == 0


async def test_a_lost_worker_that_is_not_back_refuses_the_link() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        callers[1].daemon.worker.crash()
        await failure_of(callers[1], Code.WORKER_LOST)
        await callers[1].say(links(callers, 2, 0, ())[1])
        assert (await failure_of(callers[1], Code.WORKER_LOST)).epoch == 2


@pytest.mark.parametrize(
    ("payload", "code"),
    [(not_finite(TOKEN_BYTES), Code.NOT_FINITE), (bytes(TOKEN_BYTES - 1), Code.BAD_SHAPE)],
)
async def test_values_that_cannot_be_used_accuse_whoever_sent_them(payload: bytes, code: Code) -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2, 4)
        bad = Step(SESSION_ID, 1, 1, (Row(NEW_ROW, 0, 1),), payload=payload)
        await callers[0].say(bad)
        failure = await failure_of(callers[0], code)
        assert (failure.step_id, failure.about) == (1, None)  # the client itself sent it


async def test_wrong_values_from_a_hop_accuse_it_and_break_the_link() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2, 4)
        callers[0].daemon.worker.spoil = lambda output: not_finite(TOKEN_BYTES)
        await callers[0].say(step(1, 0, 1))
        await callers[0].say(step(2, 1, 2, committed=0))
        failure = await failure_of(callers[1], Code.NOT_FINITE)
        assert (failure.step_id, failure.about) == (1, callers[0].daemon.hop)
        callers[0].daemon.worker.spoil = None
        await stage.link(callers, 2)
        assert await answer(callers, step(1, 0, 1, epoch=2)) == expected(1)


async def test_a_worker_that_answers_too_little_is_our_own_fault() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        callers[0].daemon.worker.spoil = lambda output: output[:-1]
        await callers[0].say(step(1, 0, 1))
        assert (await failure_of(callers[0], Code.INTERNAL)).about is None


async def test_a_row_that_begins_beyond_what_is_held_is_a_gap() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        await callers[0].say(step(2, 5, 1))
        failure = await failure_of(callers[0], Code.HISTORY_GAP)
        assert failure.problem().details["first_position"] == 1


# receipts


async def test_a_slow_step_is_acknowledged_and_its_progress_told() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        callers[0].daemon.worker.compute_s = 3.5 * WORKING_EVERY_S
        await callers[0].say(step(1, 0, 1))
        stages = [(await callers[0].hear(Receipt)).stage for _ in range(5)]
        assert stages == [Stage.RECEIVED, Stage.WORKING, Stage.WORKING, Stage.WORKING, Stage.SENT]
        await callers[1].hear(Result)


async def test_a_quick_step_needs_no_receipt() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        await trio.sleep(1)
        await callers[0].say(Where(SESSION_ID, 1, 1))
        assert (await callers[0].hear(At)).stage is Stage.SENT


async def test_a_hung_worker_shows_in_where() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        callers[1].daemon.worker.hang()
        await callers[0].say(step(1, 0, 1))
        assert (await callers[1].hear(Receipt)).stage is Stage.RECEIVED
        await trio.sleep(5)
        for caller, seen in zip(callers, (Stage.SENT, Stage.RECEIVED), strict=True):
            await caller.say(Where(SESSION_ID, 1, 1))
            assert (await caller.hear(At)).stage is seen
            await caller.say(Where(SESSION_ID, 1, 2))
            assert (await caller.hear(At)).stage is Stage.UNKNOWN


async def test_where_is_answered_while_a_replay_waits_for_the_worker() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        await stage.link(callers, 2, 1, (40,))
        callers[0].daemon.worker.hang()
        for position in range(1, 40):
            row = Row(0, position, 1)
            part = Step(
                SESSION_ID, 2, 1, (row,), 1, replay_hops=1, final=position == 39, payload=tokens(position)[0]
            )
            await callers[0].say(part)
        await callers[0].say(Where(SESSION_ID, 2, 1))
        assert (await callers[0].hear(At)).stage is Stage.RECEIVED
        callers[0].daemon.worker.wake()
        await callers[0].hear(Replayed)


async def test_steps_pushed_to_a_stuck_worker_wait_in_their_stream() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        callers[1].daemon.worker.hang()
        for number in range(30):
            await callers[0].say(step(number + 1, number, number, committed=0))
        await trio.sleep(1)
        assert callers[1].daemon.service.statistics().num_steps == MAX_UNDER_WAY
        callers[1].daemon.worker.wake()
        heard: list[bytes] = []
        while len(heard) < 30:
            message = await callers[1].talk.hear()
            heard += [message.payload] if isinstance(message, Result) else []
        assert heard == expected(*range(30))


# its end


async def test_close_frees_everything() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2, 4)
        await answer(callers, step(1, 0, 1, 2))
        for caller in callers:
            await caller.say(CloseSession(SESSION_ID))
        await stage.until_released()


async def test_close_amid_a_step_frees_everything() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(2, 4)
        for caller in callers:
            caller.daemon.worker.compute_s = 5.0
        for number in range(4):
            await callers[0].say(step(number + 1, number, number, committed=0))
        await trio.sleep(7)
        for caller in callers:
            await caller.say(CloseSession(SESSION_ID))
        await stage.until_released()


async def test_a_session_outlives_its_stream_and_is_resumed() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1, 2))
        for caller in callers:
            caller.leave()
        await trio.sleep(SESSION_GRACE_S - 1)
        back = [await stage.call(caller.daemon) for caller in callers]
        for caller in back:
            await caller.say(opening(caller.daemon))
            assert (await caller.hear(Opened)).epoch == 1
        held = await stage.link(back, 2, 1, (2,))
        assert [linked.held for linked in held] == [(2,), (2,)]
        assert await answer(back, step(2, 2, 3, epoch=2)) == expected(1, 2, 3)[2:]
        await trio.sleep(2 * SESSION_GRACE_S)
        assert await answer(back, step(3, 3, 4, epoch=2)) == expected(1, 2, 3, 4)[3:]


async def test_grace_ends_and_frees_everything() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1, 2))
        left_at = trio.current_time()
        for caller in callers:
            caller.leave()
        await trio.sleep(1)
        assert not stage.is_released()
        await stage.until_released()
        assert trio.current_time() - left_at == pytest.approx(SESSION_GRACE_S, abs=1)


async def test_a_second_stream_takes_the_place_of_the_first() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1))
        back = [await stage.open(caller.daemon) for caller in callers]
        with pytest.raises(Exception, match="reset"):
            await callers[0].talk.hear()
        await trio.sleep(2 * SESSION_GRACE_S)
        await stage.link(back, 2, 1, (1,))
        assert await answer(back, step(2, 1, 2, epoch=2)) == expected(1, 2)[1:]


async def test_a_worker_taken_away_ends_its_sessions() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        daemon = callers[0].daemon
        daemon.service.remove_worker(daemon.worker)
        with pytest.raises(Exception, match="reset"):
            await callers[0].talk.hear()
        assert daemon.service.statistics().num_sessions == 0
        assert daemon.worker.statistics().num_caches == 0


async def test_messages_of_another_session_end_the_stream() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await callers[0].say(Where(b"b" * 16, 1, 1))
        with pytest.raises(Exception, match="reset"):
            await callers[0].talk.hear()


async def test_a_step_of_a_session_that_was_not_attached_ends_the_push_stream() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop1", 3, NUM_BLOCKS)
        caller = await stage.open(daemon)
        await caller.say(LinkHop(SESSION_ID, 1, daemon.hop._replace(peer="hand"), None, 0))
        await caller.hear(Linked)
        talk, _ = await attach(stage, "hand", daemon, 1)
        await talk.say(replace(step(1, 0, 1), session=b"b" * 16))
        with pytest.raises(Exception, match="reset"):
            await talk.hear()
        assert daemon.service.statistics().num_steps == 0


async def test_a_second_replay_in_one_wiring_ends_the_stream() -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        await answer(callers, step(1, 0, 1, 2))
        await stage.link(callers, 2, 1, (2,))
        for _ in range(2):
            await callers[0].say(Replay(SESSION_ID, 2, 1, (0,), (2,), 1))
        with pytest.raises(Exception, match="reset"):
            await callers[0].talk.hear()


async def test_attaching_twice_on_one_stream_is_answered_twice() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop1", 3, NUM_BLOCKS)
        caller = await stage.open(daemon)
        upstream = daemon.hop._replace(peer="hand")
        await caller.say(LinkHop(SESSION_ID, 1, upstream, None, 0))
        await caller.hear(Linked)
        talk, heard = await attach(stage, "hand", daemon, 1)
        assert isinstance(heard, Attached)
        await caller.say(LinkHop(SESSION_ID, 2, upstream, None, 0))
        await talk.say(Attach(SESSION_ID, "client", 2, 7, 7))
        assert await talk.hear() == Attached(SESSION_ID, 2)
        await caller.hear(Linked)
        await talk.say(step(1, 0, 1, epoch=2))
        assert (await caller.hear(Result)).payload == expected(1, start=3)[0]


async def test_a_defect_in_one_session_ends_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_stage() as stage:
        callers = await stage.chain(3)
        other = [await stage.open(callers[1].daemon, network=stage.hub.network("another client"))]
        await stage.link(other, 1)

        def defect(hop: HopSession, step: Step) -> None:
            raise RuntimeError("a defect")

        monkeypatch.setattr(HopSession, "sending", defect)
        await callers[0].say(step(1, 0, 1))
        with pytest.raises(Exception, match="reset"):
            await callers[0].talk.hear()
        assert callers[0].daemon.service.statistics().num_sessions == 0
        monkeypatch.undo()
        assert await answer(other, step(1, 0, 1)) == expected(1, start=3)


async def test_sessions_of_a_barred_client_end_without_a_time_of_grace() -> None:
    async with a_stage() as stage:
        daemon = await stage.daemon("hop0", 0, NUM_BLOCKS)
        await stage.open(daemon)
        await stage.open(daemon, network=stage.hub.network("another client"))
        daemon.service.part_with(lambda peer: peer == "another client")
        assert daemon.service.statistics().num_sessions == 1
        daemon.service.part_with(lambda peer: peer == "client")
        assert daemon.service.statistics().num_sessions == 0
        await stage.until_released()
