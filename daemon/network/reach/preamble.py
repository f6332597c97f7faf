"""Protobuf messages at the beginning of a stream, each behind its length, as libp2p's protocols have them.

It owns what was read and not taken yet. It bounds the length before it keeps a byte of a message; how long to wait
is the caller's business. Source: https://github.com/multiformats/unsigned-varint.
"""

from __future__ import annotations

from typing import TypeVar

import varint
from google.protobuf.message import DecodeError, Message

from ....protocol.errors import Code, error
from ....protocol.limits import FIRST_WORD_BYTES, MAX_CIRCUIT_MESSAGE_BYTES
from ..seam import Stream

M = TypeVar("M", bound=Message)


class Preamble:
    """The messages at the beginning of a stream; what follows them is not touched.

    rest: bytes that came with the last message and belong to what follows.
    """

    def __init__(self, stream: Stream) -> None:
        self.rest = b""
        self._stream = stream

    async def say(self, message: Message) -> None:
        """Send a message, behind its length. Raises `PEER_LOST`."""
        body = message.SerializeToString()
        await self._stream.send(varint.encode(len(body)) + body)

    async def hear(self, kind: type[M]) -> M:
        """The next message. Raises `PEER_LOST`, `PROTOCOL_VIOLATION`, `LIMIT_EXCEEDED`."""
        size, start = await self._length()
        while len(self.rest) < start + size:
            self.rest += await self._more()
        body, self.rest = self.rest[start : start + size], self.rest[start + size :]
        message = kind()
        try:
            message.ParseFromString(body)
        except DecodeError as problem:
            raise error(
                Code.PROTOCOL_VIOLATION,
                f"{self._stream.peer} sent an unreadable {kind.DESCRIPTOR.name}",
            ) from problem
        return message

    async def _length(self) -> tuple[int, int]:
        """The length that stands in front, and where the message begins."""
        while True:
            for end, byte in enumerate(self.rest[:3], 1):
                if byte < 0x80:
                    size = int(varint.decode_bytes(self.rest[:end]))
                    if size > MAX_CIRCUIT_MESSAGE_BYTES:
                        said = f"{self._stream.peer} announced a message of {size} bytes"
                        raise error(
                            Code.LIMIT_EXCEEDED, f"{said}, at most {MAX_CIRCUIT_MESSAGE_BYTES} are taken"
                        )
                    return size, end
            if len(self.rest) >= 3:
                raise error(Code.LIMIT_EXCEEDED, f"{self._stream.peer} announced too long a message")
            self.rest += await self._more()

    async def _more(self) -> bytes:
        data = await self._stream.receive(FIRST_WORD_BYTES)
        if not data:
            raise error(Code.PEER_LOST, f"{self._stream.peer} ended amid {self._stream.protocol}")
        return data
