"""Bytes to frames and back: two lengths, a CBOR header, a raw payload.

    u32 header length | u32 payload length | header | payload          (big endian)

The payload lies outside the CBOR so that tensors are neither copied through nor inspected by it. The
parser is incremental and refuses a frame by its lengths alone, before a byte of it is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from .errors import Code, error
from .limits import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

_LENGTHS: Final = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Frame:
    """One message as it travels: `header` is CBOR, `payload` whatever the header says."""

    header: bytes
    payload: bytes = b""


def encode_frame(header: bytes, payload: bytes | memoryview = b"") -> bytes:
    """One frame, ready to send. The sender keeps within the receiver's limits."""
    return b"".join((_LENGTHS.pack(len(header), len(payload)), header, payload))


class FrameParser:
    """Incremental parser of one direction of a connection.

    Feed it what arrives, then iterate over `frames()`. Raises `LIMIT_EXCEEDED` as soon as a frame's lengths
    exceed the limits; the connection is of no use afterwards, since the next frame's start is unknown.
    """

    def __init__(
        self, *, max_header_bytes: int = MAX_HEADER_BYTES, max_payload_bytes: int = MAX_PAYLOAD_BYTES
    ) -> None:
        self._max_header_bytes = max_header_bytes
        self._max_payload_bytes = max_payload_bytes
        self._buffer = bytearray()

    def widen(self, *, max_header_bytes: int, max_payload_bytes: int) -> None:
        """Take larger frames from now on."""
        self._max_header_bytes = max_header_bytes
        self._max_payload_bytes = max_payload_bytes

    def feed(self, data: bytes) -> None:
        """Take bytes as they arrived, cut anywhere."""
        self._buffer += data

    def frames(self) -> Iterator[Frame]:
        """The frames that are complete by now."""
        while (frame := self._next()) is not None:
            yield frame

    @property
    def num_buffered_bytes(self) -> int:
        """Bytes of an unfinished frame: not 0 at the end of a stream means that it was cut off."""
        return len(self._buffer)

    @property
    def num_announced_bytes(self) -> int:
        """The whole length of the unfinished frame; 0 while it is not known."""
        if len(self._buffer) < _LENGTHS.size:
            return 0
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._buffer)
        return int(_LENGTHS.size + header_bytes + payload_bytes)

    def _next(self) -> Frame | None:
        if len(self._buffer) < _LENGTHS.size:
            return None
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._buffer)
        if header_bytes > self._max_header_bytes or payload_bytes > self._max_payload_bytes:
            raise error(
                Code.LIMIT_EXCEEDED,
                f"a frame of {header_bytes} + {payload_bytes} bytes,"
                f" limits {self._max_header_bytes} + {self._max_payload_bytes}",
            )
        end = _LENGTHS.size + header_bytes + payload_bytes
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            frame = Frame(
                bytes(view[_LENGTHS.size : _LENGTHS.size + header_bytes]),
                bytes(view[_LENGTHS.size + header_bytes : end]),
            )
        del self._buffer[:end]
        return frame
