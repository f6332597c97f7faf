"""What a worker is to the rest of the daemon: someone who answers requests, and may be lost.

`workers.Worker` is one behind a process, `twin.WorkerTwin` one in memory. Requests are handed over at once and in
order by `submit`; waiting for the answer is another matter, so that steps of a session can be in flight
together without changing places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import anyio

from ...protocol.errors import CorollaError
from ...protocol.work import (
    BeginGeneration,
    Begun,
    CloseCache,
    Compute,
    Done,
    EndGeneration,
    OpenCache,
    Ready,
    Restore,
    Restored,
    Sample,
    Sampled,
)

Request: TypeAlias = OpenCache | Compute | Restore | BeginGeneration | Sample
Notice: TypeAlias = CloseCache | EndGeneration
Answer: TypeAlias = Done | Restored | Begun | Sampled


class Pending:
    """A request whose answer will come, or will not."""

    __slots__ = ("_answer", "_done", "_problem", "request")

    def __init__(self, request: int) -> None:
        self.request = request
        self._done = anyio.Event()
        self._answer: Answer | None = None
        self._problem: CorollaError | None = None

    @property
    def is_done(self) -> bool:
        """Whether `answer` would return at once."""
        return self._done.is_set()

    def resolve(self, answer: Answer) -> None:
        """Give the answer; the first word counts."""
        if not self._done.is_set():
            self._answer = answer
            self._done.set()

    def fail(self, problem: CorollaError) -> None:
        """There will be no answer; the first word counts."""
        if not self._done.is_set():
            self._problem = problem
            self._done.set()

    async def answer(self) -> Answer:
        """The answer. Raises what the worker failed with, or `WORKER_LOST`."""
        await self._done.wait()
        if self._problem is not None:
            raise self._problem
        if self._answer is None:
            raise RuntimeError("a pending request was marked done without an answer")
        return self._answer


class WorkerPort(Protocol):
    """One worker. number: its number in this daemon, as records and hops name it."""

    @property
    def number(self) -> int: ...

    @property
    def ready(self) -> Ready | None:
        """What it serves; None while it loads, is lost, or has stopped."""

    @property
    def progress(self) -> int:
        """Grows while it computes."""

    @property
    def queue(self) -> int:
        """Requests that it has not answered."""

    def submit(self, request: Request) -> Pending:
        """Hand over a request; its `request` number is filled in here."""

    def abandon(self, pending: Pending) -> None:
        """Nobody wants this answer any more; a worker that was told to drop the request never gives it."""

    def tell(self, notice: Notice) -> None:
        """Hand over what needs no answer."""

    def on_lost(self, listener: Callable[[], None]) -> None:
        """Call back when the process behind it is gone, and with it all caches."""
