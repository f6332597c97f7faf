"""The frames of one connection that wait to be sent, joined into messages as they leave. It knows no windows."""

from __future__ import annotations

from collections import deque

from .frames import ACK, MAX_MESSAGE_BYTES, SYN


class Outbox:
    """Frames in order; urgent ones, which belong to no stream's order, before all others."""

    def __init__(self) -> None:
        self._urgent: deque[bytes] = deque()
        self._queue: deque[tuple[int, bytes]] = deque()  # (stream, frame)
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """What waits."""
        return self._num_bytes

    @property
    def num_frames(self) -> int:
        """How many wait."""
        return len(self._urgent) + len(self._queue)

    def put(self, stream_id: int, frame: bytes) -> None:
        """Send a frame after all others."""
        self._queue.append((stream_id, frame))
        self._num_bytes += len(frame)

    def put_urgent(self, frame: bytes) -> None:
        """Send a frame before those that are not urgent."""
        self._urgent.append(frame)
        self._num_bytes += len(frame)

    def withdraw(self, stream_id: int) -> None:
        """Take back a stream's frames, except its opening, which the far side must see first."""
        kept = deque(
            (owner, frame) for owner, frame in self._queue if owner != stream_id or frame[3] & (SYN | ACK)
        )
        if len(kept) != len(self._queue):
            self._num_bytes += sum(len(f) for _, f in kept) - sum(len(f) for _, f in self._queue)
            self._queue = kept

    def next_messages(self, count: int) -> list[bytes]:
        """The next bytes to send, in at most `count` messages of at most `MAX_MESSAGE_BYTES`."""
        messages: list[bytes] = []
        while self._num_bytes and len(messages) < count:
            messages.append(self._next_message())
        return messages

    def _next_message(self) -> bytes:
        frames: list[bytes] = []
        size = 0
        while self._urgent and size + len(self._urgent[0]) <= MAX_MESSAGE_BYTES:
            frames.append(self._urgent.popleft())
            size += len(frames[-1])
        while self._queue and size + len(self._queue[0][1]) <= MAX_MESSAGE_BYTES:
            frames.append(self._queue.popleft()[1])
            size += len(frames[-1])
        self._num_bytes -= size
        return frames[0] if len(frames) == 1 else b"".join(frames)
