"""The push stream to the next hop: opened by us, attached to an epoch, used for steps, watched for its end.

One task hears all that the far side says; whoever attaches waits for its word. It knows no session but by id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import OPEN_TIMEOUT_S
from ...protocol.messages import Message
from ...protocol.steps import PUSH, PUSH_PROTOCOL, Attach, Attached, Failure, Hop
from ..network.conversation import Conversation
from ..network.seam import Network


class Push:
    """One stream to the downstream hop `target`. on_end: called once when it can no longer be used."""

    def __init__(self, talk: Conversation, target: Hop, on_end: Callable[[Push, str], None]) -> None:
        self.target: Final = target
        self._talk = talk
        self._on_end = on_end
        self._answers: dict[int, Attached | Failure] = {}  # by epoch
        self._answered = trio.Event()
        self._saying = trio.Lock()
        self.problem: CorollaError | None = None

    @classmethod
    async def open(cls, network: Network, target: Hop, on_end: Callable[[Push, str], None]) -> Push:
        """A new stream, not yet attached. Raises `PEER_LOST`, `UNSUPPORTED`."""
        stream = await network.open(target.peer, PUSH_PROTOCOL, timeout_s=OPEN_TIMEOUT_S)
        return cls(Conversation(stream, PUSH), target, on_end)

    async def hear(self) -> None:
        """Hear what the far side says until the stream ends; run it as a task."""
        problem = error(Code.PEER_LOST, f"{self.target.peer} ended the push stream")
        try:
            while (message := await self._talk.hear()) is not None:
                if isinstance(message, Attached | Failure):
                    self._answers[message.epoch] = message
                    self._wake()
        except CorollaError as reason:
            problem = reason
        self.end(problem)

    async def attach(self, attach: Attach) -> None:
        """Make the stream carry an epoch's steps. Raises what the far side refuses with, `PEER_LOST`, `TIMEOUT`."""
        with trio.move_on_after(OPEN_TIMEOUT_S):
            await self.say(attach)
            while attach.epoch not in self._answers:
                if self.problem is not None:
                    raise error(Code.PEER_LOST, self.problem.message)
                await self._answered.wait()
            answer = self._answers[attach.epoch]
            self._answers = {attach.epoch: answer}
            if isinstance(answer, Failure):
                raise answer.problem()
            return
        raise error(Code.TIMEOUT, f"{self.target.peer} did not attach in {OPEN_TIMEOUT_S:g} s")

    async def say(self, message: Message) -> None:
        """Send a message after all that was sent before. Raises `PEER_LOST`."""
        try:
            async with self._saying:
                await self._talk.say(message)
        except CorollaError as problem:
            self.end(problem)
            raise
        except trio.Cancelled:
            self.reset()  # a part of the message may have left
            raise

    def end(self, problem: CorollaError) -> None:
        """The stream is of no use any more."""
        if self.problem is None:
            self.problem = problem
            self._talk.stream.reset()
            self._wake()
            self._on_end(self, problem.message)

    def reset(self) -> None:
        """Drop the stream; `on_end` is not called."""
        if self.problem is None:
            self.problem = error(Code.PEER_LOST, "the stream was dropped")
            self._talk.stream.reset()
            self._wake()

    def _wake(self) -> None:
        self._answered.set()
        self._answered = trio.Event()
