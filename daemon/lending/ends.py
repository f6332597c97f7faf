"""Workers for this machine's own users: the ends of models, kept once they are loaded, and what fetches a model.

They serve no peer and no blocks, and are numbered above those of spans.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final

import trio

from ...protocol.control import PullProgress
from ...protocol.errors import Code, error
from ...protocol.work import Configure, Loading, ModelFacts, ModelSource, Ready
from ..config import Config
from ..serving.workers import Worker, WorkerState
from .sources import source_of, source_of_facts
from .wanted import as_configured

FIRST_OTHER: Final = 199  # the first number that no worker of a span has
PULL_WORKER: Final = FIRST_OTHER  # fetches a model and goes
ENDS_WORKER: Final = 200  # the first number of workers that hold ends
PROGRESS_EVERY_S: Final = 0.3
MAX_LOADS: Final = 3  # of a worker that somebody waits for, and that dies each time before it is ready


class Ends:
    """The ends that this daemon holds. config: as it is at the moment. The rest as for `Lending`."""

    def __init__(
        self,
        config: Callable[[], Config],
        cache_folder: str,
        nursery: trio.Nursery,
        on_event: Callable[[str, str], None],
        command: Callable[[int], Sequence[str]],
    ) -> None:
        self._config = config
        self._cache_folder = cache_folder
        self._nursery = nursery
        self._on_event = on_event
        self._command = command
        self._workers: dict[str, Worker] = {}  # by fingerprint
        self._num_ends = 0  # ever
        self._num_pulls = 0
        self._making = trio.Lock()

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Those that hold ends."""
        return tuple(self._workers.values())

    @property
    def is_pulling(self) -> bool:
        """Is a model being fetched?"""
        return self._num_pulls > 0

    async def ends_of(self, facts: ModelFacts) -> Worker:
        """A worker with this model's ends, ready; started at first use.

        Raises `UNKNOWN_MODEL` if this machine knows no source of it, and whatever keeps it from loading.
        """
        async with self._making:
            worker = self._workers.get(facts.fingerprint)
            if worker is None or worker.state in (WorkerState.FAILED, WorkerState.STOPPED):
                worker = await self._make_ends(facts)
        await loaded(worker)
        return worker

    async def pull(self, source: ModelSource, emit: Callable[[PullProgress], Awaitable[None]]) -> str:
        """Fetch a model by a worker that loads just its ends; the folder where it lies then.

        Raises `UNKNOWN_MODEL`, `GATED_MODEL`, `DISK_FULL`, `DAMAGED_WEIGHTS`, `UNREADABLE`.
        """
        worker = self._worker(
            PULL_WORKER, replace(as_configured(self._config(), self._cache_folder, source), ends=True)
        )
        self._nursery.start_soon(worker.run)
        self._num_pulls += 1
        try:
            return (await loaded(worker, emit)).folder
        finally:
            self._num_pulls -= 1
            worker.stop()

    async def _make_ends(self, facts: ModelFacts) -> Worker:
        mismatch = ""
        for source in self._sources(facts):
            number = ENDS_WORKER + self._num_ends
            self._num_ends += 1
            worker = self._worker(
                number,
                replace(as_configured(self._config(), self._cache_folder, source), ends=True),
                facts.name,
            )
            self._on_event("ends_loading", f"loading the ends of {facts.name} from {source.location}")
            self._nursery.start_soon(worker.run)
            try:
                ready = await loaded(worker)
            except BaseException:
                worker.stop()
                raise
            if ready.facts.fingerprint == facts.fingerprint:
                self._workers[facts.fingerprint] = worker
                return worker
            worker.stop()
            mismatch = f"; {source.location} is {ready.facts.fingerprint[:8]}, another version"
        raise error(
            Code.UNKNOWN_MODEL,
            f"the weights of {facts.name}@{facts.fingerprint[:8]} are not on this machine{mismatch}",
            "name their folder, GGUF file or hub id: corollad --blocks none --model …",
        )

    def _sources(self, facts: ModelFacts) -> list[ModelSource]:
        model = self._config().model
        found = [source_of(model)] if model else []
        elsewhere = source_of_facts(facts)
        if elsewhere is not None and elsewhere not in found:
            found.append(elsewhere)
        return found

    def _worker(self, number: int, configure: Configure, model: str = "") -> Worker:
        return Worker(number, configure, model=model, command=self._command)


async def loaded(worker: Worker, emit: Callable[[PullProgress], Awaitable[None]] | None = None) -> Ready:
    """What a worker serves, once it does. emit: hears of the loading.

    Raises what keeps it from ever serving, and `WORKER_LOST` when it dies again and again.
    """
    told: Loading | None = None
    num_before = worker.restarts
    while True:
        with trio.move_on_after(PROGRESS_EVERY_S):
            return await worker.wait_ready()
        if worker.problem is not None and worker.restarts - num_before >= MAX_LOADS - 1:
            problem = worker.problem
            raise error(problem.code, problem.message, problem.remedy or "see the daemon's log")
        loading = worker.loading
        if emit is not None and loading is not None and loading != told:
            told = loading
            await emit(PullProgress(loading.stage, loading.done_bytes, loading.total_bytes))
