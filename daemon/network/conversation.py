"""Messages over one stream: say one, hear the next. It owns the parser, and knows no message by name."""

from __future__ import annotations

import anyio

from ...protocol.errors import Code, error
from ...protocol.framing import FrameParser
from ...protocol.limits import (
    FIRST_WORD_BYTES,
    FIRST_WORD_S,
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    MESSAGE_TIMEOUT_S,
    SESSION_IDLE_S,
)
from ...protocol.messages import Message, Vocabulary, encode
from .room import Room
from .seam import Stream


class Conversation:
    """A stream on which one vocabulary is spoken. Use it from one task; the stream stays its opener's.

    max_header_bytes, max_payload_bytes: bounds of what is heard, checked before any of it is kept.
    idle_s: how long the far side may say nothing; for those who do not bound it themselves. A message that it
    has begun has to end within `MESSAGE_TIMEOUT_S`.
    """

    def __init__(
        self,
        stream: Stream,
        vocabulary: Vocabulary,
        *,
        max_header_bytes: int = MAX_HEADER_BYTES,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        idle_s: float = SESSION_IDLE_S,
    ) -> None:
        self.stream = stream
        self._idle_s = idle_s
        self._vocabulary = vocabulary
        self._begun_at: float | None = None  # when the first bytes of an unfinished message were there
        self._parser = FrameParser(max_header_bytes=max_header_bytes, max_payload_bytes=max_payload_bytes)

    @classmethod
    def begun_by(cls, stream: Stream, vocabulary: Vocabulary) -> Conversation:
        """One that a peer begins: until `trust`, it may only say what a request needs."""
        return cls(
            stream, vocabulary, max_header_bytes=FIRST_WORD_BYTES, max_payload_bytes=0, idle_s=FIRST_WORD_S
        )

    def trust(self) -> None:
        """The far side's request is admitted: it may say the rest, and take its time."""
        self._parser.widen(max_header_bytes=MAX_HEADER_BYTES, max_payload_bytes=MAX_PAYLOAD_BYTES)
        self._idle_s = SESSION_IDLE_S

    async def say(self, message: Message) -> None:
        """Send one message. Raises `PEER_LOST`, and `TIMEOUT` if the far side does not take it."""
        try:
            with anyio.fail_after(MESSAGE_TIMEOUT_S):
                await self.stream.send(encode(message))
        except TimeoutError as problem:
            raise error(
                Code.TIMEOUT, f"{self.stream.peer} did not take {message.KIND} in {MESSAGE_TIMEOUT_S:g} s"
            ) from problem

    async def hear(self) -> Message | None:
        """The next message, or None once the far side has ended.

        Raises `PEER_LOST`, `TIMEOUT`, `LIMIT_EXCEEDED`, `PROTOCOL_VIOLATION`, and `UNSUPPORTED` for a kind
        unknown here.
        """
        with _Claim(self.stream.room) as claim:
            while True:
                # One at a time: a thousand small frames, taken apart, cost many times their bytes.
                frame = next(self._parser.frames(), None)
                if frame is not None:
                    self._begun_at = None
                    return self._vocabulary.decode(frame)
                data = await self._receive(claim)
                if not data:
                    if self._parser.num_buffered_bytes:
                        raise error(Code.PROTOCOL_VIOLATION, f"{self.stream.peer} ended amid a message")
                    return None
                self._parser.feed(data)

    async def _receive(self, claim: _Claim) -> bytes:
        """Some bytes, in the time that is left for them, once there is room for their message. Raises `TIMEOUT`."""
        now = anyio.current_time()
        if not self._parser.num_buffered_bytes:
            left_s = self._idle_s
        else:
            self._begun_at = now if self._begun_at is None else self._begun_at
            left_s = self._begun_at + MESSAGE_TIMEOUT_S - now
        try:
            with anyio.fail_after(left_s):
                if self._parser.num_announced_bytes <= FIRST_WORD_BYTES:
                    return await self.stream.receive(FIRST_WORD_BYTES)
                await claim.make(self._parser.num_announced_bytes)
                return await self.stream.receive()
        except TimeoutError as problem:
            what = "did not finish its message in" if self._begun_at is not None else "said nothing for"
            limit_s = MESSAGE_TIMEOUT_S if self._begun_at is not None else self._idle_s
            raise error(Code.TIMEOUT, f"{self.stream.peer} {what} {limit_s:g} s") from problem

    async def ask(self, message: Message, *, timeout_s: float) -> Message:
        """Say `message` and hear the answer. Raises as `hear`, and `TIMEOUT`, and `PEER_LOST` at the end."""
        try:
            with anyio.fail_after(timeout_s):
                await self.say(message)
                answer = await self.hear()
        except TimeoutError as problem:
            peer, kind = self.stream.peer, message.KIND
            raise error(Code.TIMEOUT, f"{peer} did not answer {kind} in {timeout_s:g} s") from problem
        if answer is None:
            raise error(Code.PEER_LOST, f"{self.stream.peer} ended instead of answering {message.KIND}")
        return answer


class _Claim:
    """Of the message that is heard, on the room of its peer: at most one, given back in the end."""

    __slots__ = ("_num_bytes", "_room")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._num_bytes = 0

    async def make(self, num_bytes: int) -> None:
        """Wait for room; once is enough."""
        if not self._num_bytes:
            await self._room.take(num_bytes)
            self._num_bytes = num_bytes

    def __enter__(self) -> _Claim:
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_bytes:
            self._room.give_back(self._num_bytes)
