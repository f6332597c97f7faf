"""Memory for the long messages that one peer has begun and not ended, shared by all its streams.

A message takes room for all of itself before its body is read, so that messages which were begun always have
what they need to end; the others wait in the order in which they came, and their streams' windows close
meanwhile. A peer that begins many and ends none keeps nobody waiting but itself. It owns counts, no bytes.
"""

from __future__ import annotations

from collections import deque

import trio

from ...protocol.limits import MAX_UNFINISHED_BYTES


class Room:
    """So many bytes."""

    __slots__ = ("_free_bytes", "_waiting")

    def __init__(self, num_bytes: int = MAX_UNFINISHED_BYTES) -> None:
        self._free_bytes = num_bytes
        self._waiting: deque[tuple[int, trio.Event]] = deque()

    @property
    def free_bytes(self) -> int:
        """What is not taken."""
        return self._free_bytes

    async def take(self, num_bytes: int) -> None:
        """Wait for so much room, in order of asking. Nothing is taken when it is cancelled."""
        if not self._waiting and num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            return
        turn = trio.Event()
        place = (num_bytes, turn)
        self._waiting.append(place)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self._free_bytes += num_bytes
            else:
                self._waiting.remove(place)
            self._serve()
            raise

    def give_back(self, num_bytes: int) -> None:
        """A message has ended, or nobody waits for its end any more."""
        self._free_bytes += num_bytes
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free_bytes:
            num_bytes, turn = self._waiting.popleft()
            self._free_bytes -= num_bytes
            turn.set()
