"""A slow link as a program: forwards connections to a port, every piece half a round trip late.

It is as fast as a thread with a socket at each end can be, so that what is measured is not the link.
"""

from __future__ import annotations

import math
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.stacks import announce, other_process

ROUND_TRIP_S = 0.05
PIECE_BYTES = 256 * 1024


@contextmanager
def slow_link(port: int) -> Iterator[int]:
    """One to a port, in another process; gives its own port."""
    with other_process(__file__, str(port)) as link:
        yield link.port


class Delayed:
    """One way of a slow link, from socket to socket: every piece leaves half a round trip after it came."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self._pieces: deque[tuple[float, bytes]] = deque()

    @property
    def due(self) -> float:
        """When the next piece leaves; inf when none is on its way."""
        return self._pieces[0][0] if self._pieces else math.inf

    def take(self) -> bool:
        """Take what has come in. False at the end."""
        data = self.source.recv(PIECE_BYTES)
        if data:
            self._pieces.append((time.monotonic() + ROUND_TRIP_S / 2, data))
        return bool(data)

    def pass_on(self) -> None:
        """Let leave what is due."""
        while self.due <= time.monotonic():
            self.sink.sendall(self._pieces.popleft()[1])


def forward(target: int) -> None:
    """Forward connections to a port, every piece half a round trip late, each connection in a thread of its own."""

    def carry(near: socket.socket) -> None:
        with (
            near,
            socket.create_connection(("127.0.0.1", target)) as far,
            selectors.DefaultSelector() as ready,
        ):
            ways = Delayed(near, far), Delayed(far, near)
            for way in ways:
                way.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ready.register(way.source, selectors.EVENT_READ, way)
            while True:
                wait_s = min(way.due for way in ways) - time.monotonic()
                for key, _ in ready.select(None if wait_s == math.inf else max(0.0, wait_s)):
                    if not key.data.take():
                        return
                for way in ways:
                    way.pass_on()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        announce(listener.getsockname()[1], "")
        while True:
            threading.Thread(target=carry, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    forward(int(sys.argv[1]))
