"""The asynchronous client, on asyncio and on trio."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

import corolla
from corolla.protocol.control import Call, Item, Piece
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.messages import to_plain

from .fake import Connection, FakeDaemon
from .test_session import numbers, tokens

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "control.sock") as daemon:
        yield daemon


async def test_asking_and_generating(fake: FakeDaemon) -> None:
    async with await corolla.aconnect(fake.path) as daemon:
        assert (await daemon.status()).swarm == "home"
        assert (await daemon.model("tiny").view()).num_blocks == 4
        answer = await daemon.model("tiny").generate("one", max_new_tokens=3)
        assert answer.text == " 0 1 2"
        async with daemon.model("tiny").stream("one", max_new_tokens=2, events=True) as pieces:
            assert [piece.event or piece.text async for piece in pieces] == [" 0", "repairing", " 1"]


async def test_sessions_step(fake: FakeDaemon) -> None:
    async with (
        await corolla.aconnect(fake.path) as daemon,
        await daemon.model("tiny").session(max_length=8) as session,
    ):
        assert numbers(await session.step(tokens([1, 2]))) == [[1, 3]]
        assert numbers(await session.step(tokens([5]), position=1)) == [[6]]
        with pytest.raises(CorollaError, match="hidden_size 4"):
            await session.step(tokens([1])[:, :, :4])
    assert not fake.sessions


async def test_tasks_share_a_connection_without_waiting_for_each_other(fake: FakeDaemon) -> None:
    async with await corolla.aconnect(fake.path) as daemon, anyio.create_task_group() as group:

        async def slow() -> None:
            await daemon._call("slow")

        group.start_soon(slow)
        with anyio.fail_after(20):
            assert (await daemon.status()).state == "online"
        fake.hold.set()


async def test_cancelling_a_task_cancels_its_call_and_spares_the_others(fake: FakeDaemon) -> None:
    def never_ending(connection: Connection, call: Call) -> None:
        connection.send(Item(call.id, to_plain(Piece(0, 1, "once"))))
        fake.hold.wait(20)

    fake.handlers["generate"] = never_ending
    async with await corolla.aconnect(fake.path) as daemon:
        with anyio.CancelScope() as scope:
            async with daemon.model("tiny").stream("one") as pieces:
                async for _ in pieces:
                    scope.cancel()
        with anyio.fail_after(20):
            assert (await daemon.status()).state == "online"
            assert await anyio.to_thread.run_sync(fake.wait_for, lambda: bool(fake.cancelled))


async def test_a_cancelled_session_is_closed(fake: FakeDaemon) -> None:
    async with await corolla.aconnect(fake.path) as daemon:
        with anyio.CancelScope() as scope:
            async with await daemon.model("tiny").session(max_length=8):
                scope.cancel()
                await anyio.sleep_forever()
        with anyio.fail_after(20):
            assert await anyio.to_thread.run_sync(fake.wait_for, lambda: not fake.sessions)


async def test_generation_goes_on_once_after_the_daemon_restarts(fake: FakeDaemon) -> None:
    fake.die_after_tokens = 2

    def revive(piece: Piece) -> None:
        if piece.event == "reconnecting":
            fake.die_after_tokens = None

    async with await corolla.aconnect(fake.path) as daemon:
        answer = await daemon.model("tiny").generate("one", max_new_tokens=5, on_event=revive)
        assert answer.text == " 0 1 2 3 4"


async def test_closing_wakes_whoever_waits(fake: FakeDaemon) -> None:
    daemon = await corolla.aconnect(fake.path)
    caught: list[Code] = []

    async def slow() -> None:
        try:
            await daemon._call("slow")
        except CorollaError as problem:
            caught.append(problem.code)

    async with anyio.create_task_group() as group:
        group.start_soon(slow)
        assert await anyio.to_thread.run_sync(fake.wait_for, lambda: bool(fake.calls))
        await daemon.close()
    assert caught == [Code.CANCELLED]
