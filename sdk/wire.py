"""One connection to the daemon for blocking code: any number of threads, no thread of its own.

Whoever waits for an answer reads from the socket for all the others, until its own has come; then the next
one takes over. So there is no event loop behind the scenes, and Ctrl-C interrupts whoever waits.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from threading import Condition, Lock
from typing import Any, Final

from ..protocol.control import Item, Return
from ..protocol.errors import Code, error
from .calls import Calls
from .sockets import connected_socket

_CHUNK_BYTES: Final = 1 << 18


class Wire:
    """Owns one connected socket. Closing it ends everything that was opened on it."""

    def __init__(self, connection: socket.socket, path: Path) -> None:
        self.path: Final = path
        self._socket = connection
        self._calls = Calls()
        self._changed = Condition()  # guards _calls and _reading
        self._reading = False
        self._sending = Lock()
        self._unsent: deque[bytes] = deque()  # cancels that met a send in progress

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None) -> Wire:
        """Connect to the daemon; see `sockets.connected_socket`."""
        return cls(*connected_socket(path))

    @property
    def is_open(self) -> bool:
        """Whether calls can still be made."""
        return self._calls.ended is None

    def call(self, method: str, arguments: Any = None, payload: bytes = b"") -> Return:
        """Ask, and wait for the end of the answer; items on the way are dropped."""
        stream = self.stream(method, arguments, payload)
        for message in stream:
            if isinstance(message, Return):
                return message
        raise error(Code.PROTOCOL_VIOLATION, f"{method} was never answered")

    def stream(self, method: str, arguments: Any = None, payload: bytes = b"") -> Iterator[Item | Return]:
        """Ask when first iterated, and give the parts of the answer as they come, `Return` last.

        Closing the iterator early, or forgetting it, cancels the call.
        """
        with self._changed:
            call, frame = self._calls.open(method, arguments, payload)
        try:
            self._send(frame)
            while True:
                message = self._next(call)
                yield message
                if isinstance(message, Return):
                    return
        finally:
            self._leave(call)

    def close(self) -> None:
        """End the connection; whoever waits gets an error. May be called twice."""
        with self._changed:
            self._calls.end(
                error(Code.CANCELLED, "this connection was closed by the program", "connect again")
            )
            self._changed.notify_all()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the one who reads
        except OSError:
            self._socket.close()  # it was not connected any more
        self._socket.close()

    def _next(self, call: int) -> Item | Return:
        """Wait for the call's next message, reading for everybody if nobody else does."""
        while True:
            with self._changed:
                message = self._calls.take(call)
                if message is not None:
                    return message
                if self._reading:
                    self._changed.wait()
                    continue
                self._reading = True
            received = None
            try:
                received = self._receive()
            finally:
                with self._changed:
                    self._reading = False
                    if received is not None:
                        self._calls.feed(received)
                    self._changed.notify_all()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_CHUNK_BYTES)
        except OSError:
            return b""  # reset, or closed under us: the end, like any other

    def _send(self, frame: bytes) -> None:
        """Send a frame; a broken connection is found by whoever reads."""
        with self._sending:
            self._send_whole(frame)
        self._flush()

    def _flush(self) -> None:
        """Send the cancels that were put aside, unless somebody sends just now and will do it."""
        while self._unsent and self._sending.acquire(blocking=False):
            try:
                while self._unsent:
                    self._send_whole(self._unsent.popleft())
            finally:
                self._sending.release()

    def _send_whole(self, frame: bytes) -> None:
        try:
            self._socket.sendall(frame)
        except OSError as problem:
            with self._changed:
                self._calls.end(
                    error(
                        Code.NO_DAEMON,
                        f"the daemon closed the connection ({problem.strerror or problem})",
                        "see its log; start it with: corollad",
                    )
                )
                self._changed.notify_all()
        except BaseException:
            self.close()  # interrupted in the midst of a frame: what follows would be unreadable
            raise

    def _leave(self, call: int) -> None:
        # An iterator may be forgotten at any moment, also by the garbage collector in the midst of a send on
        # this very thread: never wait for `_sending` here.
        with self._changed:  # reentrant, and nobody waits for `_sending` while holding it
            frame = self._calls.leave(call)
        if frame:
            self._unsent.append(frame)
            self._flush()
