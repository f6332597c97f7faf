"""Worker processes under supervision: real processes of a small program without a model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from corolla.daemon.serving import process
from corolla.daemon.serving.port import Pending
from corolla.daemon.serving.workers import Worker, WorkerState
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import NEW_ROW, Row
from corolla.protocol.tensors import Encoding
from corolla.protocol.work import CloseCache, Compute, Configure, Done, ModelSource, OpenCache, SourceKind

pytestmark = pytest.mark.anyio

PROGRAM = Path(__file__).with_name("fake_worker.py")
PATIENCE_S = 30


def command(descriptor: int) -> list[str]:
    return [sys.executable, str(PROGRAM), str(descriptor)]


def no_command(descriptor: int) -> list[str]:
    return ["/nowhere/to/be/found", str(descriptor)]


@asynccontextmanager
async def a_worker(
    habit: str = "", *, run: Callable[[int], list[str]] = command, silence_s: float = 20.0
) -> AsyncIterator[Worker]:
    """A worker that runs, and is stopped at the end."""
    configure = Configure(ModelSource(SourceKind.FOLDER, habit), "/cache")
    worker = Worker(3, configure, command=run, silence_s=silence_s, backoff_s=(0.01,))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        with trio.fail_after(PATIENCE_S):
            yield worker
            worker.stop()
            await until(worker, lambda: worker.state in (WorkerState.STOPPED, WorkerState.FAILED))


async def until(worker: Worker, condition: Callable[[], bool]) -> None:
    """Wait for changes of the worker's state until a condition holds."""
    changed = trio.Event()
    worker.on_change(lambda: changed.set())
    while not condition():
        await changed.wait()
        changed = trio.Event()


def compute(step_id: int, payload: bytes = b"") -> Compute:
    return Compute(0, b"s" * 16, step_id, 0, (Row(NEW_ROW, 0, 1),), payload=payload)


async def problem_of(pending: Pending) -> CorollaError:
    with pytest.raises(CorollaError) as raised:
        await pending.answer()
    return raised.value


async def payload_of(pending: Pending) -> bytes:
    answer = await pending.answer()
    assert isinstance(answer, Done)
    return answer.payload


async def test_requests_are_answered_whatever_the_order() -> None:
    async with a_worker() as worker:
        ready = await worker.wait_ready()
        assert (ready.start, ready.end, worker.status().state) == (0, 4, "online")
        await worker.submit(OpenCache(0, b"s" * 16, 0, 4, Encoding.FLOAT32, 1, 8)).answer()
        large = bytes(range(256)) * (1 << 14)  # more than the socket takes at once
        asked = [worker.submit(compute(n, payload)) for n, payload in enumerate((b"one", large, b"two"))]
        assert worker.queue == 3
        worker.tell(CloseCache(b"s" * 16))
        assert [await payload_of(pending) for pending in asked] == [b"eno", large[::-1], b"owt"]
        assert worker.queue == 0


async def test_a_failed_request_fails_alone() -> None:
    async with a_worker() as worker:
        await worker.wait_ready()
        bad, good = worker.submit(compute(13)), worker.submit(compute(1, b"ab"))
        worker.tell(CloseCache(b"s" * 16))
        assert (await problem_of(bad)).code is Code.NOT_FINITE
        assert await payload_of(good) == b"ba"


async def test_progress_shows_in_beats() -> None:
    async with a_worker() as worker:
        await worker.wait_ready()
        first = worker.progress
        while worker.progress < first + 2:  # noqa: ASYNC110 - a beat is nothing that anybody waits for
            await trio.sleep(0.01)
        assert worker.status().free_tokens == 900


@pytest.mark.parametrize("habit", ["dies", "babbles", "boasts"])
async def test_a_worker_that_breaks_is_restarted_and_its_requests_fail(habit: str) -> None:
    async with a_worker(habit) as worker:
        await worker.wait_ready()
        lost: list[str] = []
        forget = worker.on_lost(lambda: lost.append(worker.state.value))
        assert (await problem_of(worker.submit(compute(1)))).code is Code.WORKER_LOST
        assert lost == ["loading"]
        assert (await problem_of(worker.submit(compute(2)))).code is Code.WORKER_LOST  # at once
        await worker.wait_ready()
        assert worker.restarts == 1
        forget()
        await problem_of(worker.submit(compute(1)))
        assert len(lost) == 1


@pytest.mark.parametrize("habit", ["silent", "stuck"])
async def test_a_worker_that_hangs_is_killed_and_restarted(habit: str) -> None:
    async with a_worker(habit, silence_s=0.3) as worker:
        await worker.wait_ready()
        pending = worker.submit(compute(1))
        assert (await problem_of(pending)).code is Code.WORKER_LOST
        await worker.wait_ready()
        assert worker.restarts >= 1


async def test_a_process_that_its_driver_holds_is_waited_for_by_nobody_but_its_successor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "GOODBYE_S", 0.05)
    monkeypatch.setattr(process, "KILLED_S", 0.05)
    with monkeypatch.context() as driver:
        driver.setattr(trio.Process, "kill", lambda process: None)  # as SIGKILL is to a process in state D
        async with a_worker("is stuck", silence_s=0.3) as worker:
            await worker.wait_ready()
            stuck = worker.process
            assert stuck is not None
            assert (await problem_of(worker.submit(compute(1)))).code is Code.WORKER_LOST
            await until(worker, lambda: worker.state is WorkerState.LOADING)
            assert worker.status().error["code"] == "device_lost"
            assert f"process {stuck} of worker 3 does not end" in worker.status().error["message"]
            assert (worker.process, worker.restarts) == (None, 0)
            os.kill(stuck, signal.SIGKILL)
            assert (await worker.wait_ready()).facts.name == "fake"
            assert worker.restarts == 1
            driver.undo()


async def test_stop_waits_for_no_process_that_its_driver_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GOODBYE_S", 0.05)
    monkeypatch.setattr(process, "KILLED_S", 0.05)
    with monkeypatch.context() as driver:
        driver.setattr(trio.Process, "kill", lambda process: None)
        async with a_worker("stays") as worker:
            await worker.wait_ready()
            stuck = worker.process
            worker.stop()
            await until(worker, lambda: worker.state is WorkerState.STOPPED)
    assert stuck is not None
    os.kill(stuck, signal.SIGKILL)
    assert worker._stuck is not None
    await worker._stuck.wait_ended()


async def test_a_worker_that_cannot_load_fails_for_good() -> None:
    async with a_worker("unknown") as worker:
        for _ in range(2):
            with pytest.raises(CorollaError, match="no model is called so") as raised:
                await worker.wait_ready()
            assert (raised.value.code, raised.value.remedy) == (Code.UNKNOWN_MODEL, "call it otherwise")
        assert worker.state is WorkerState.FAILED
        assert (await problem_of(worker.submit(compute(1)))).code is Code.UNKNOWN_MODEL
        assert worker.restarts == 0
        assert worker.status().error["code"] == "unknown_model"


async def test_a_device_that_vanishes_is_told_and_served_again_when_it_is_back(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    async with a_worker(str(gone)) as worker:
        await worker.wait_ready()
        assert (await problem_of(worker.submit(compute(1)))).code is Code.WORKER_LOST
        await until(worker, lambda: worker.restarts >= 2)
        assert worker.state is WorkerState.LOADING
        assert worker.status().error["code"] == "device_lost"
        assert not worker.is_back_soon
        gone.unlink()
        assert (
            await worker.wait_ready()
        ).device == "cuda:0"  # it waited for that, and took no slow CPU meanwhile
        assert worker.status().error is None
        assert worker.is_back_soon


async def test_a_device_that_was_never_there_fails_for_good() -> None:
    async with a_worker("gone") as worker:
        await until(worker, lambda: worker.state is WorkerState.FAILED)
        assert worker.status().error["code"] == "device_lost"
        assert worker.restarts == 0


async def test_the_last_words_of_a_worker_are_reported() -> None:
    async with a_worker("stumbles") as worker:
        await until(worker, lambda: worker.problem is not None)
        assert worker.problem is not None
        assert worker.problem.message == "worker 3 ended with exit code 3: then I stumble"
        await until(worker, lambda: worker.restarts >= 2)
        assert worker.state is WorkerState.LOADING


async def test_a_program_that_cannot_be_started_is_tried_again() -> None:
    async with a_worker(run=no_command) as worker:
        await until(worker, lambda: worker.restarts >= 2)
        assert worker.problem is not None
        assert "/nowhere/to/be/found" in worker.problem.message


async def test_an_answer_of_the_wrong_kind_is_a_defect_of_the_worker() -> None:
    async with a_worker("confused") as worker:
        await worker.wait_ready()
        assert (await problem_of(worker.submit(compute(1)))).code is Code.INTERNAL


async def test_an_abandoned_request_fails_and_a_late_answer_is_ignored() -> None:
    async with a_worker() as worker:
        await worker.wait_ready()
        first, second = worker.submit(compute(1, b"ab")), worker.submit(compute(2, b"cd"))
        worker.abandon(first)
        worker.tell(CloseCache(b"s" * 16))
        assert await payload_of(second) == b"dc"
        assert (await problem_of(first)).code is Code.STALE_EPOCH


async def test_stop_ends_the_process_and_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GOODBYE_S", 0.1)
    async with a_worker("stays") as worker:
        await worker.wait_ready()
        pending = worker.submit(compute(1))
        worker.stop()
        assert (await problem_of(pending)).code is Code.WORKER_LOST
        await until(worker, lambda: worker.state is WorkerState.STOPPED)
        with pytest.raises(CorollaError, match="stopped"):
            await worker.wait_ready()
        assert (await problem_of(worker.submit(compute(1)))).code is Code.WORKER_LOST
