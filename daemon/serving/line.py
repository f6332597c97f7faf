"""What is said on one stream: in order, from whichever task, by one that writes.

Saying never waits, so that whoever decides something can say it at once. A far side that does not read is
given up when too much waits for it.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

from ...protocol.errors import CorollaError
from ...protocol.limits import MAX_PAYLOAD_BYTES
from ...protocol.messages import Message, encode
from ..network.seam import Stream

MAX_QUEUED: Final = 1024  # small messages to one who does not read: receipts of a quarter of an hour
_FULL_BYTES: Final = 2 * MAX_PAYLOAD_BYTES  # then those who can wait do; see `wait_room`


class Line:
    """The writing side of a stream. `run` does the writing, until the stream breaks or it is cancelled."""

    def __init__(self, stream: Stream) -> None:
        self.stream: Final = stream
        self._queue: deque[bytes] = deque()
        self._num_bytes = 0
        self._is_lost = False
        self._lot = trio.lowlevel.ParkingLot()  # the writer, and those who wait for room

    def say(self, message: Message) -> None:
        """Send this after what was said before. A broken stream swallows it: its reader learns of the end."""
        if self._is_lost:
            return
        data = encode(message)
        self._queue.append(data)
        self._num_bytes += len(data)
        if len(self._queue) > MAX_QUEUED:
            self.drop()
        self._lot.unpark_all()

    async def wait_room(self) -> None:
        """Wait while much is queued. Before large messages, so that a slow reader slows us down."""
        while self._num_bytes > _FULL_BYTES:
            await self._lot.park()

    def drop(self) -> None:
        """Reset the stream; nothing more is sent."""
        self._is_lost = True
        self._queue.clear()
        self._num_bytes = 0
        self.stream.reset()
        self._lot.unpark_all()

    async def run(self) -> None:
        """Write what is said."""
        while not self._is_lost:
            while self._queue:
                data = self._queue.popleft()
                try:
                    await self.stream.send(data)
                except CorollaError:
                    self.drop()  # the task that reads the stream learns the reason, and says it
                    return
                self._num_bytes -= len(data)
                if self._num_bytes <= _FULL_BYTES:
                    self._lot.unpark_all()
            if not self._is_lost:
                await self._lot.park()
