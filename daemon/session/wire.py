"""One stream to one hop, as a session uses it: opened, written from a queue, heard, ended.

It owns the stream. What is said on it, and what follows when it breaks, the machine decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import anyio
from anyio.abc import TaskGroup

from ...protocol.errors import Code, CorollaError, error
from ...protocol.messages import Message, encode
from ...protocol.steps import SESSION, SESSION_PROTOCOL
from ..network.conversation import Conversation
from ..network.seam import Network, Stream
from .events import OpenHop

FAREWELL_S: Final = 2.0  # for the last message to leave; then the stream is dropped


class Wire:
    """A stream that lives as long as `run`.

    hear: is called with each message. lose: is called once if the stream cannot be opened, breaks or ends
    before `close`.
    """

    def __init__(
        self,
        network: Network,
        opening: OpenHop,
        hear: Callable[[int, Message], None],
        lose: Callable[[int, CorollaError], None],
    ) -> None:
        self._network = network
        self._opening = opening
        self._hear = hear
        self._lose = lose
        self._queue: deque[Iterable[Message]] = deque([(opening.message,)])
        self._more = anyio.Event()
        self._scope = anyio.CancelScope(shield=True)  # a cancelled session says goodbye all the same
        self._is_closing = False

    def send(self, messages: Iterable[Message]) -> None:
        """Send these after what is queued already. They are taken one by one, as the stream accepts them."""
        self._queue.append(messages)
        self._more.set()

    def close(self, last: Message | None) -> None:
        """End the stream: after what is queued and a last message, or, without one, at once."""
        self._is_closing = True
        if last is None:
            self._scope.cancel()
        else:
            self._scope.deadline = anyio.current_time() + FAREWELL_S
            self.send((last,))

    async def run(self) -> None:
        """Open the stream and use it until it ends."""
        problem: CorollaError | None = None
        with self._scope:
            try:
                await self._use()
            except CorollaError as reason:
                problem = reason
        if not self._is_closing:
            # Without a reason it was cancelled from outside, and nobody wants to know.
            if problem is not None:
                self._lose(self._opening.wire, problem)
            self._is_closing = True

    async def _use(self) -> None:
        opening = self._opening
        stream = await self._network.open(opening.peer, SESSION_PROTOCOL, timeout_s=opening.timeout_s)
        failures: list[CorollaError] = []
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._read, stream, tasks, failures)
                tasks.start_soon(self._write, stream, tasks, failures)
        finally:
            stream.reset()
        if failures:
            raise failures[0]

    async def _read(self, stream: Stream, tasks: TaskGroup, failures: list[CorollaError]) -> None:
        talk = Conversation(stream, SESSION)
        try:
            while True:
                try:
                    message = await talk.hear()
                except CorollaError as problem:
                    if problem.code is not Code.UNSUPPORTED:
                        raise
                    continue  # a newer peer may say what we need not understand
                if message is None:
                    raise error(Code.PEER_LOST, f"{stream.peer} ended the stream")
                if not self._is_closing:
                    self._hear(self._opening.wire, message)
        except CorollaError as problem:
            failures.append(problem)
            tasks.cancel_scope.cancel()

    async def _write(self, stream: Stream, tasks: TaskGroup, failures: list[CorollaError]) -> None:
        try:
            while self._queue or not self._is_closing:
                while self._queue:
                    for message in self._queue.popleft():
                        await stream.send(encode(message))
                if not self._is_closing:
                    self._more = anyio.Event()
                    await self._more.wait()
            await stream.close()
            return  # the far side ends when it has heard the last word; a reset now could overtake that
        except CorollaError as problem:
            failures.append(problem)
        tasks.cancel_scope.cancel()
