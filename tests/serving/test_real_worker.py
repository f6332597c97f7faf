"""The worker program itself under supervision: a tiny model, steps, a kill, and the same steps again."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import cast

import pytest
import trio

torch = pytest.importorskip("torch")

from corolla.daemon.serving.workers import Worker, WorkerState, worker_command  # noqa: E402
from corolla.protocol.steps import NEW_ROW, Reply, Row  # noqa: E402
from corolla.protocol.tensors import DType, Encoding  # noqa: E402
from corolla.protocol.work import (  # noqa: E402
    Compute,
    Configure,
    Done,
    ModelSource,
    OpenCache,
    Restore,
    Restored,
    SourceKind,
)

from ..model.tiny import save_tiny  # noqa: E402

pytestmark = pytest.mark.anyio

CACHE = b"a cache"
HIDDEN_SIZE = 64
PATIENCE_S = 240
STATES = bytes(torch.linspace(-1, 1, 3 * HIDDEN_SIZE).numpy().tobytes())


async def output_of(worker: Worker, step_id: int, row: Row) -> bytes:
    payload = STATES[row.position * 4 * HIDDEN_SIZE :][: row.n * 4 * HIDDEN_SIZE]
    ask = Compute(0, CACHE, step_id, step_id - 1, (row,), Reply.ALL, payload)
    return cast(Done, await worker.submit(ask).answer()).payload


async def steps_of(worker: Worker) -> list[bytes]:
    """Open a cache, take two steps and the second one again."""
    await worker.submit(OpenCache(0, CACHE, 1, 3, Encoding.FLOAT32, 1, 16)).answer()
    first = await output_of(worker, 1, Row(NEW_ROW, 0, 2))
    second = await output_of(worker, 2, Row(0, 2, 1))
    restored = cast(Restored, await worker.submit(Restore(0, CACHE, 1, (2,))).answer())
    assert restored.held == (2,)
    assert await output_of(worker, 2, Row(0, 2, 1)) == second
    return [first, second]


async def test_the_worker_program_computes_dies_and_computes_again(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    configure = Configure(
        ModelSource(SourceKind.FOLDER, str(tmp_path / "tiny")),
        str(tmp_path / "cache"),
        start=1,
        end=3,
        device="cpu",
        dtype=DType.FLOAT32,
        threads=1,
        cache_tokens=64,
    )
    told_pid = tmp_path / "pid"

    def command(descriptor: int) -> list[str]:
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(told_pid), *worker_command(descriptor)]

    worker = Worker(0, configure, command=command, backoff_s=(0.01,))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        with trio.fail_after(PATIENCE_S):
            ready = await worker.wait_ready()
            assert (ready.start, ready.end, ready.facts.hidden_size) == (1, 3, HIDDEN_SIZE)
            told = await steps_of(worker)
            lost = trio.Event()
            worker.on_lost(lost.set)
            os.kill(int(told_pid.read_text()), signal.SIGKILL)
            await lost.wait()
            await worker.wait_ready()
            assert await steps_of(worker) == told
            worker.stop()
    assert worker.state is WorkerState.STOPPED
    assert worker.restarts == 1
