"""What has arrived on one stream and waits for its reader. It counts bytes and joins pieces, and knows no windows."""

from __future__ import annotations

from collections import deque
from typing import Final

SMALL_PIECE_BYTES: Final = 1024  # smaller ones are joined as they arrive: an object costs more than it holds
_JOINED_BYTES: Final = 64 * 1024


class Inbox:
    """Pieces in the order in which they came."""

    __slots__ = ("_pieces", "num_bytes")

    def __init__(self) -> None:
        self._pieces: deque[bytes | bytearray | memoryview] = deque()
        self.num_bytes = 0

    @property
    def num_pieces(self) -> int:
        """How many objects hold the bytes."""
        return len(self._pieces)

    def append(self, piece: bytes | memoryview) -> None:
        """Keep what has arrived; a view keeps alive what it is a view of."""
        self.num_bytes += len(piece)
        if len(piece) >= SMALL_PIECE_BYTES:
            self._pieces.append(piece)
            return
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, bytearray) and len(last) < _JOINED_BYTES:
            last += piece
        else:
            self._pieces.append(bytearray(piece))

    def take(self, limit: int | None) -> bytes:
        """All of it, or the first `limit` bytes."""
        pieces = self._pieces
        if limit is None or self.num_bytes <= limit:
            data = bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)
            self.clear()
            return data
        taken = []
        left = limit
        while left:
            piece = pieces.popleft()
            if len(piece) > left:
                view = memoryview(bytes(piece) if isinstance(piece, bytearray) else piece)
                pieces.appendleft(view[left:])
                piece = view[:left]
            taken.append(piece)
            left -= len(piece)
        self.num_bytes -= limit
        return b"".join(taken)

    def clear(self) -> None:
        """Drop all of it."""
        self.num_bytes = 0
        self._pieces.clear()
