"""Messages over one stream: say one, hear the next. It owns the parser, and knows no message by name."""

from __future__ import annotations

import anyio

from ...protocol.errors import Code, error
from ...protocol.framing import FrameParser
from ...protocol.limits import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES
from ...protocol.messages import Message, Vocabulary, encode
from .seam import Stream


class Conversation:
    """A stream on which one vocabulary is spoken. Use it from one task; the stream stays its opener's.

    max_header_bytes, max_payload_bytes: bounds of what is heard, checked before any of it is kept.
    """

    def __init__(
        self,
        stream: Stream,
        vocabulary: Vocabulary,
        *,
        max_header_bytes: int = MAX_HEADER_BYTES,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        self.stream = stream
        self._vocabulary = vocabulary
        self._parser = FrameParser(max_header_bytes=max_header_bytes, max_payload_bytes=max_payload_bytes)

    async def say(self, message: Message) -> None:
        """Send one message. Raises `PEER_LOST`."""
        await self.stream.send(encode(message))

    async def hear(self) -> Message | None:
        """The next message, or None once the far side has ended.

        Raises `PEER_LOST`, `LIMIT_EXCEEDED`, `PROTOCOL_VIOLATION`, and `UNSUPPORTED` for a kind unknown here.
        """
        while True:
            for (
                frame
            ) in self._parser.frames():  # one at a time: a thousand small ones cost more than their bytes
                return self._vocabulary.decode(frame)
            data = await self.stream.receive()
            if not data:
                if self._parser.num_buffered_bytes:
                    raise error(Code.PROTOCOL_VIOLATION, f"{self.stream.peer} ended amid a message")
                return None
            self._parser.feed(data)

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
