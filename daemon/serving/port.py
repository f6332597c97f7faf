"""What a worker is to the rest of the daemon: someone who answers requests, and may be lost.

`workers.Worker` is one behind a process, `twin.WorkerTwin` one in memory. Requests are handed over at once and in
order by `submit`; waiting for the answer is another matter, so that steps of a session can be in flight
together without changing places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

import trio

from ...protocol.errors import CorollaError, error_from_wire
from ...protocol.work import (
    Backward,
    BeginGeneration,
    Begun,
    CloseCache,
    Compute,
    Done,
    EmbedPrompt,
    EndGeneration,
    Forward,
    Gradients,
    HoldPart,
    NamePages,
    OpenCache,
    Ready,
    Restore,
    Restored,
    Sample,
    Sampled,
)

Request: TypeAlias = (
    OpenCache | Compute | Restore | BeginGeneration | EmbedPrompt | Sample | Forward | Backward | HoldPart
)
Notice: TypeAlias = CloseCache | EndGeneration | NamePages
Answer: TypeAlias = Done | Restored | Begun | Sampled | Gradients

# The one kind of answer that each request has; another is a defect of the worker.
ANSWERS: Final[dict[type[Request], type[Answer]]] = {
    OpenCache: Done,
    Compute: Done,
    Restore: Restored,
    BeginGeneration: Begun,
    EmbedPrompt: Done,
    Sample: Sampled,
    Forward: Done,
    Backward: Gradients,
    HoldPart: Done,
}


class Pending:
    """A request whose answer will come, or will not. expects: the kind of its answer."""

    __slots__ = ("_answer", "_done", "_listener", "_problem", "expects", "request")

    def __init__(self, request: int, expects: type[Answer]) -> None:
        self.request = request
        self.expects = expects
        self._done: trio.Event | None = None  # only where somebody waits: most steps have a listener
        self._listener: Callable[[], None] | None = None
        self._answer: Answer | None = None
        self._problem: CorollaError | None = None

    @property
    def is_done(self) -> bool:
        """Whether `answer` would return at once."""
        return self._answer is not None or self._problem is not None

    def resolve(self, answer: Answer) -> None:
        """Give the answer; the first word counts."""
        if not self.is_done:
            self._answer = answer
            self._tell()

    def fail(self, problem: CorollaError) -> None:
        """There will be no answer; the first word counts."""
        if not self.is_done:
            self._problem = problem
            self._tell()

    def when_done(self, listener: Callable[[], None]) -> None:
        """Call back once it is done, in the task that got the answer: so it must be quick, and not raise."""
        self._listener = listener
        if self.is_done:
            listener()

    def result(self) -> Answer:
        """The answer of a request that is done. Raises what the worker failed with, or `WORKER_LOST`."""
        if self._problem is not None:
            raise error_from_wire(self._problem.to_wire())  # a new one for each who asks
        if self._answer is None:
            raise RuntimeError(f"request {self.request} has no answer yet")
        return self._answer

    async def answer(self) -> Answer:
        """The answer, once it is there. Raises as `result`."""
        if not self.is_done:
            if self._done is None:
                self._done = trio.Event()
            await self._done.wait()
        return self.result()

    def _tell(self) -> None:
        if self._done is not None:
            self._done.set()
        if self._listener is not None:
            self._listener()


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

    def on_lost(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call back when the process behind it is gone, and with it all caches; the result ends that."""
