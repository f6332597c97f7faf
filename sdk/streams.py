"""A generation while it runs: pieces as they come, and the whole answer at the end.

`Stream` is for blocking code, `AsyncStream` for asynchronous code. Both walk `generation.Progress` and connect
again where it says so.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..protocol.control import Generate, Piece
from ..protocol.errors import CorollaError
from ..protocol.training import missing_parts
from .generation import RECONNECTING, Generation, OnEvent, Progress
from .parts import Adapter, aput_lacking, put_lacking

if TYPE_CHECKING:
    from .async_wire import AsyncWire
    from .wire import Wire


class Stream:
    """Pieces of text as they come; iterate over it. Leaving early (`close`, or forgetting it) cancels."""

    def __init__(
        self,
        connect: Callable[[bool], Wire],
        asked: Generate,
        adapter: Adapter | None = None,
        *,
        events: bool = False,
        on_event: OnEvent | None = None,
    ) -> None:
        """connect: gives the connection; True waits for a daemon that is being restarted. adapter: of `asked`."""
        self._progress = Progress(asked)
        self._events = events
        self._on_event = on_event
        self._pieces = self._run(connect, asked, adapter)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def result(self) -> Generation:
        """The whole answer; waits for what has not come yet."""
        for _ in self._pieces:
            pass
        return self._progress.result()

    def close(self) -> None:
        """Cancel what has not come yet."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, connect: Callable[[bool], Wire], asked: Generate, adapter: Adapter | None
    ) -> Generator[Piece, None, None]:
        restarted = has_put = False
        while True:
            try:
                for message in connect(restarted).stream("generate", asked):
                    piece = self._progress.take(message)
                    if piece is not None and self._wanted(piece):
                        yield piece
                return
            except CorollaError as problem:
                if missing_parts(problem) and not has_put:
                    put_lacking(connect(False), adapter, problem)
                    has_put = True
                    continue
                if not self._progress.may_resume(problem, time.monotonic()):
                    self._progress.note_interruption(problem)
                    raise
            asked = self._progress.resumed()
            restarted, has_put = True, False
            if self._wanted(RECONNECTING):
                yield RECONNECTING

    def _wanted(self, piece: Piece) -> bool:
        if piece.event is not None and self._on_event is not None:
            self._on_event(piece)
        return piece.event is None or self._events


class AsyncStream:
    """As `Stream`, with `async for` and `async with`. Close it when leaving early."""

    def __init__(
        self,
        connect: Callable[[bool], Awaitable[AsyncWire]],
        asked: Generate,
        adapter: Adapter | None = None,
        *,
        events: bool = False,
        on_event: OnEvent | None = None,
    ) -> None:
        self._progress = Progress(asked)
        self._events = events
        self._on_event = on_event
        self._pieces = self._run(connect, asked, adapter)

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    async def result(self) -> Generation:
        """The whole answer; waits for what has not come yet."""
        async for _ in self._pieces:
            pass
        return self._progress.result()

    async def close(self) -> None:
        """Cancel what has not come yet."""
        await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(
        self, connect: Callable[[bool], Awaitable[AsyncWire]], asked: Generate, adapter: Adapter | None
    ) -> AsyncGenerator[Piece, None]:
        restarted = has_put = False
        while True:
            try:
                stream = (await connect(restarted)).stream("generate", asked)
                try:
                    async for message in stream:
                        piece = self._progress.take(message)
                        if piece is not None and self._wanted(piece):
                            yield piece
                finally:
                    await stream.aclose()
                return
            except CorollaError as problem:
                if missing_parts(problem) and not has_put:
                    await aput_lacking(await connect(False), adapter, problem)
                    has_put = True
                    continue
                if not self._progress.may_resume(problem, time.monotonic()):
                    self._progress.note_interruption(problem)
                    raise
            asked = self._progress.resumed()
            restarted, has_put = True, False
            if self._wanted(RECONNECTING):
                yield RECONNECTING

    def _wanted(self, piece: Piece) -> bool:
        if piece.event is not None and self._on_event is not None:
            self._on_event(piece)
        return piece.event is None or self._events
