"""A program's sessions of hidden states: handles of its connection, over a swarm in memory."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import pytest
import trio
import trio.testing

from corolla.daemon.control import Ask, Caller, Connection
from corolla.daemon.serving.twin import HIDDEN_SIZE, whole_row
from corolla.daemon.sessions import (
    MAX_SESSIONS_PER_PROGRAM,
    close_for_program,
    open_for_program,
    step_for_program,
)
from corolla.daemon.swarm.standby import LOOK_EVERY_S, LOOKS
from corolla.daemon.training.parts import Adapter
from corolla.protocol.control import (
    Call,
    OpenModelSession,
    Right,
    SessionHandle,
    SessionOpened,
    SessionStep,
)
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import MAX_ROWS
from corolla.protocol.steps import NEW_ROW, Reply, Row
from corolla.protocol.tensors import Encoding
from corolla.protocol.training import NO_PART

from .members import NUM_BLOCKS, TOKEN_BYTES, EndsTwin, Meadow, Member, announce, meadow

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


class Program:
    """A connected program. num_counted: sessions that the daemon counts for it."""

    def __init__(self, client: Member, nursery: trio.Nursery) -> None:
        ours, _ = trio.testing.memory_stream_pair()
        self.connection = Connection(ours, Caller(1000, Right.USE), nursery)  # type: ignore[arg-type]
        self.client = client
        self.num_counted = 0
        self.events: list[str] = []

    @contextlib.contextmanager
    def _counted(self) -> Any:
        self.num_counted += 1
        try:
            yield
        finally:
            self.num_counted -= 1

    def _ask(self, arguments: Any, payload: bytes = b"") -> Ask:
        return Ask(self.connection, Call(1, "session", None, payload), arguments)

    async def open(self, adapter: Adapter = Adapter(), **options: Any) -> SessionOpened:  # noqa: B008 - frozen
        reply = await open_for_program(
            self._ask(OpenModelSession("twin", **{"max_length": 64, **options})),
            self.client.belonging,
            adapter,
            replacement_wait_s=20.0,
            lender=EndsTwin(),
            on_event=lambda event: self.events.append(event.kind.value),
            counted=self._counted,
        )
        opened: SessionOpened = reply.value
        return opened

    async def step(
        self, handle: int, rows: tuple[Row, ...], payload: bytes, reply: Reply = Reply.ALL
    ) -> bytes:
        return (await step_for_program(self._ask(SessionStep(handle, rows, reply), payload))).payload

    async def close(self, handle: int) -> None:
        await close_for_program(self._ask(SessionHandle(handle)))


@asynccontextmanager
async def program(*spans: tuple[int, int]) -> AsyncIterator[tuple[Program, Meadow]]:
    async with meadow() as swarm:
        client = await swarm.client()
        for start, end in spans:
            await swarm.serve(start, end)
        async with trio.open_nursery() as nursery:
            yield Program(client, nursery), swarm
            nursery.cancel_scope.cancel()
        await trio.sleep(300.0)
        for member in swarm.members:
            assert member.belonging.hops.statistics().num_sessions == 0


def hidden(*numbers: float) -> bytes:
    """One token's hidden state of finite numbers."""
    return struct.pack("<8f", *numbers, *(0.5,) * (HIDDEN_SIZE - len(numbers)))


PROMPT = [hidden(1.0), hidden(-2.0, 3e38), hidden(1e-40)]
NEW = (Row(NEW_ROW, 0, 3),)


async def refused(awaitable: Any) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        await awaitable
    return caught.value


async def test_steps_give_what_the_blocks_give_until_it_is_closed() -> None:
    async with program((0, 2), (2, NUM_BLOCKS)) as (user, _):
        opened = await user.open(start=1, end=3)
        assert opened == SessionOpened(opened.handle, HIDDEN_SIZE, Encoding.FLOAT32, 1, 3)
        assert user.num_counted == 1
        whole = whole_row(1, 3, PROMPT)
        assert await user.step(opened.handle, NEW, b"".join(PROMPT)) == b"".join(whole)
        rows = (Row(0, 2, 1), Row(0, 2, 1))
        refusal = await refused(user.step(opened.handle, rows, PROMPT[2] * 2, Reply.LAST))
        assert refusal.code is Code.BAD_REQUEST  # it was opened for one row
        assert await user.step(opened.handle, rows[:1], PROMPT[2], Reply.LAST) == whole[2]
        await user.close(opened.handle)
        await trio.sleep(1.0)
        assert user.num_counted == 0
        gone = await refused(user.step(opened.handle, NEW, b"".join(PROMPT)))
        assert gone.code is Code.UNKNOWN_SESSION
        await user.close(opened.handle)


async def test_sessions_opened_at_once_have_handles_of_their_own() -> None:
    handles: list[int] = []
    async with program((0, NUM_BLOCKS)) as (user, _):

        async def open_one() -> None:
            handles.append((await user.open()).handle)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(open_one)
        assert len(set(handles)) == 4
        for handle in handles:
            assert len(await user.step(handle, NEW, b"".join(PROMPT), Reply.LAST)) == TOKEN_BYTES


async def test_hanging_up_ends_them() -> None:
    async with program((0, NUM_BLOCKS)) as (user, swarm):
        await user.open()
        await user.open()
        assert swarm.members[1].belonging.hops.statistics().num_sessions == 2
        user.connection.nursery.cancel_scope.cancel()


async def test_a_lost_hop_is_repaired_and_told() -> None:
    async with program((0, NUM_BLOCKS), (0, NUM_BLOCKS)) as (user, swarm):
        handle = (await user.open()).handle
        await user.step(handle, NEW, b"".join(PROMPT))
        (used,) = [m for m in swarm.members if m.belonging.hops.statistics().num_sessions]
        swarm.kill(used)
        answer = await user.step(handle, (Row(0, 3, 1),), PROMPT[0])
        assert answer == whole_row(0, NUM_BLOCKS, [*PROMPT, PROMPT[0]])[-1]
        assert user.events[-1] == "repaired"


async def test_a_hop_whose_queue_grows_is_left_before_it_fails_and_nobody_is_charged() -> None:
    async with program((0, NUM_BLOCKS), (0, NUM_BLOCKS)) as (user, swarm):
        handle = (await user.open()).handle
        await user.step(handle, NEW, b"".join(PROMPT))
        used, other = sorted(swarm.members[1:], key=lambda m: -m.belonging.hops.statistics().num_sessions)
        announce(used, queue=40)
        await trio.sleep((LOOKS + 1) * LOOK_EVERY_S[1])
        assert user.events[-1] == "repaired"
        assert other.belonging.hops.statistics().num_sessions == 1
        answer = await user.step(handle, (Row(0, 3, 1),), PROMPT[0])
        assert answer == whole_row(0, NUM_BLOCKS, [*PROMPT, PROMPT[0]])[-1]
        assert user.client.belonging.ledger.penalty(used.peer, trio.current_time()) == 0
        num_told = len(user.events)
        await trio.sleep((LOOKS + 1) * LOOK_EVERY_S[1])
        assert len(user.events) == num_told  # it stays where it went


PARTS = {sha256(data).digest(): data for data in (b"first", b"second", b"third")}
FIRST, SECOND, THIRD = PARTS


async def test_hops_get_the_parts_that_they_lack_and_nobody_is_charged() -> None:
    async with program((0, 2), (2, NUM_BLOCKS)) as (user, _):
        handle = (await user.open(Adapter((FIRST, NO_PART, SECOND, THIRD), PARTS))).handle
        expected = whole_row(0, NUM_BLOCKS, PROMPT, (FIRST, NO_PART, SECOND, THIRD))
        assert await user.step(handle, NEW, b"".join(PROMPT)) == b"".join(expected)
        assert user.client.belonging.ledger.charged(trio.current_time()) == {}
        assert user.events == []


async def test_an_adapter_of_few_blocks_leaves_the_others_alone() -> None:
    async with program((0, NUM_BLOCKS)) as (user, _):
        handle = (await user.open(Adapter((NO_PART, FIRST), PARTS), start=1)).handle
        expected = whole_row(1, NUM_BLOCKS, PROMPT, (FIRST, NO_PART, NO_PART))
        assert await user.step(handle, NEW, b"".join(PROMPT)) == b"".join(expected)


async def test_a_replacement_gets_the_parts_too() -> None:
    async with program((0, NUM_BLOCKS), (0, NUM_BLOCKS)) as (user, swarm):
        parts = (FIRST, SECOND, THIRD, FIRST)
        handle = (await user.open(Adapter(parts, PARTS))).handle
        await user.step(handle, NEW, b"".join(PROMPT))
        (used,) = [m for m in swarm.members if m.belonging.hops.statistics().num_sessions]
        swarm.kill(used)
        answer = await user.step(handle, (Row(0, 3, 1),), PROMPT[0])
        assert answer == whole_row(0, NUM_BLOCKS, [*PROMPT, PROMPT[0]], parts)[-1]
        assert user.events[-1] == "repaired"


async def test_a_worker_that_forgot_the_parts_gets_them_again() -> None:
    async with program((0, 2), (2, NUM_BLOCKS)) as (user, swarm):
        parts = (FIRST, SECOND, THIRD, FIRST)
        handle = (await user.open(Adapter(parts, PARTS))).handle
        await user.step(handle, NEW, b"".join(PROMPT))
        worker = swarm.members[2].worker
        assert worker is not None
        worker.crash()
        answer = await user.step(handle, (Row(0, 3, 1),), PROMPT[0])
        assert answer == whole_row(0, NUM_BLOCKS, [*PROMPT, PROMPT[0]], parts)[-1]


def limit(member: Member, max_parts: int) -> None:
    assert member.worker is not None
    member.worker.max_parts = max_parts


async def test_a_hop_without_memory_for_an_adapter_makes_room_for_another_and_is_not_charged() -> None:
    async with program((0, NUM_BLOCKS), (0, NUM_BLOCKS)) as (user, swarm):
        limit(swarm.members[1], 2)
        parts = (FIRST, SECOND, THIRD, FIRST)
        for _ in range(6):  # whichever is asked first
            handle = (await user.open(Adapter(parts, PARTS))).handle
            expected = whole_row(0, NUM_BLOCKS, PROMPT, parts)
            assert await user.step(handle, NEW, b"".join(PROMPT)) == b"".join(expected)
            await user.close(handle)
        assert user.client.belonging.ledger.charged(trio.current_time()) == {}


async def test_where_no_hop_has_memory_for_an_adapter_the_user_hears_why() -> None:
    async with program((0, NUM_BLOCKS)) as (user, swarm):
        limit(swarm.members[1], 2)
        problem = await refused(user.open(Adapter((FIRST, SECOND, THIRD), PARTS)))
        assert problem.code is Code.BLOCKS_UNSERVED
        assert "a part beyond the 2 that fit" in problem.message


async def test_an_adapter_for_more_blocks_is_refused_by_number() -> None:
    async with program((0, NUM_BLOCKS)) as (user, _):
        problem = await refused(user.open(Adapter((FIRST,) * 5, PARTS)))
        assert problem.code is Code.BAD_SHAPE
        assert "5 blocks, twin has 4" in problem.message


async def test_a_part_that_no_worker_can_use_is_told_at_once() -> None:
    async with program((0, NUM_BLOCKS), (0, NUM_BLOCKS)) as (user, _):
        problem = await refused(user.open(Adapter((FIRST,), {FIRST: b"another"})))
        assert problem.code is Code.BAD_REQUEST
        assert FIRST.hex()[:8] in problem.message
        assert user.num_counted == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
async def test_what_is_not_finite_is_refused_here_and_the_session_goes_on(bad: float) -> None:
    async with program((0, NUM_BLOCKS)) as (user, _):
        handle = (await user.open()).handle
        problem = await refused(user.step(handle, NEW, PROMPT[0] + hidden(0.0, bad) + PROMPT[1]))
        assert problem.code is Code.NOT_FINITE
        assert "float32" in problem.message
        assert await user.step(handle, NEW, b"".join(PROMPT)) == b"".join(whole_row(0, NUM_BLOCKS, PROMPT))


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"start": 2, "end": 9}, Code.BLOCKS_OUT_OF_RANGE, "2:9"),
        ({"start": 3, "end": 3}, Code.BLOCKS_OUT_OF_RANGE, "3:3"),
        ({"max_rows": 0}, Code.BAD_REQUEST, "0 rows"),
        ({"max_rows": MAX_ROWS + 1}, Code.BAD_REQUEST, f"{MAX_ROWS + 1} rows"),
        ({"max_length": 0}, Code.BAD_REQUEST, "of 0 tokens"),
        ({"max_length": 1 << 20}, Code.TOO_LONG, "twin"),
    ],
)
async def test_what_cannot_be_opened_is_refused_by_name(
    options: dict[str, Any], code: Code, named: str
) -> None:
    async with program((0, 2)) as (user, _):
        problem = await refused(user.open(**options))
        assert problem.code is code
        assert named in problem.message
        assert user.num_counted == 0
        assert not user.connection.opened


@pytest.mark.parametrize("num_bytes", [0, 1, 3 * TOKEN_BYTES - 1, 4 * TOKEN_BYTES])
async def test_a_payload_of_another_size_is_refused(num_bytes: int) -> None:
    async with program((0, NUM_BLOCKS)) as (user, _):
        handle = (await user.open()).handle
        problem = await refused(user.step(handle, NEW, bytes(num_bytes)))
        assert problem.code is Code.BAD_SHAPE
        assert str(num_bytes) in problem.message


async def test_a_program_has_so_many_sessions_and_no_more() -> None:
    async with program((0, NUM_BLOCKS)) as (user, _):
        for number in range(MAX_SESSIONS_PER_PROGRAM):
            user.connection.opened[-number - 1] = None
        problem = await refused(user.open())
        assert problem.code is Code.LIMIT_EXCEEDED


async def test_leaving_the_swarm_ends_a_step_with_the_reason() -> None:
    async with program((0, NUM_BLOCKS)) as (user, swarm):
        handle = (await user.open()).handle
        worker = swarm.members[1].worker
        assert worker is not None
        worker.compute_s = 5.0
        problems: list[CorollaError] = []

        async def take() -> None:
            problems.append(await refused(user.step(handle, NEW, b"".join(PROMPT))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await trio.sleep(1.0)
            user.client.belonging.over.set()
        assert problems[0].code is Code.SESSION_LOST
        assert "left swarm meadow" in problems[0].message
        await trio.sleep(5.0)
        assert not user.connection.opened


async def test_opening_that_is_cancelled_leaves_nothing() -> None:
    async with program((0, 2)) as (user, _):
        with trio.move_on_after(5.0) as scope:
            await user.open(wait_s=60.0)
        assert scope.cancelled_caught
        await trio.sleep(5.0)
        assert user.num_counted == 0
