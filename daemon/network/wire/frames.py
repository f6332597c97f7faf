"""The frames of /yamux/1.0.0 as they are written: kinds, flags, the header, and how large one may be.

    version u8 = 0 | type u8 | flags u16 | stream u32 | length u32 | body, for DATA only      (big endian)

Source: https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from .sealing import MAX_PLAIN_BYTES

HEADER: Final = struct.Struct(">BBHII")
HEADER_BYTES: Final = HEADER.size

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8

# One frame, its header included, fills one Noise message, so that no frame is cut in two encryptions.
MAX_MESSAGE_BYTES: Final = MAX_PLAIN_BYTES
MAX_FRAME_BODY_BYTES: Final = MAX_MESSAGE_BYTES - HEADER_BYTES


class GoAway(IntEnum):
    """Why a connection ends, on the wire."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


def bare_frame(kind: int, flags: int, stream_id: int, length: int) -> bytes:
    """A frame without a body; what `length` means depends on its kind."""
    return HEADER.pack(0, kind, flags, stream_id, length)


def data_frame(stream_id: int, body: memoryview) -> bytes:
    """A frame that carries `body`, at most `MAX_FRAME_BODY_BYTES`."""
    return b"".join((HEADER.pack(0, DATA, 0, stream_id, len(body)), body))
