"""The client's half of `protocol/control`, without a socket: calls out, answers in.

Many calls share one connection; each has an inbox, from which its own waiter takes. `wire` and `async_wire`
carry the bytes and decide who waits. Nothing here blocks.
"""

from __future__ import annotations

from collections import deque
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from ..protocol.control import FROM_DAEMON, Call, Cancel, Item, Refused, Return
from ..protocol.errors import Code, CorollaError, error
from ..protocol.framing import Frame, FrameParser
from ..protocol.limits import MAX_CALLS_PER_CONNECTION, MAX_LOCAL_HEADER_BYTES, MAX_LOCAL_PAYLOAD_BYTES
from ..protocol.messages import encode, to_plain


@dataclass(slots=True)
class _Open:
    """One call. answered: its last message came. left: nobody waits for it."""

    inbox: deque[Item | Return | Refused] = field(default_factory=deque)
    answered: bool = False
    left: bool = False


class Calls:
    """The calls of one connection that are not yet fully answered."""

    def __init__(self) -> None:
        self._parser = FrameParser(
            max_header_bytes=MAX_LOCAL_HEADER_BYTES, max_payload_bytes=MAX_LOCAL_PAYLOAD_BYTES
        )
        self._open: dict[int, _Open] = {}
        self._next_id = 0
        self._ended: CorollaError | None = None

    def open(self, method: str, arguments: Any = None, payload: bytes = b"") -> tuple[int, bytes]:
        """The id of a new call, and the bytes that ask for it.

        arguments: an instance of the method's argument type; None if it has none.
        Raises the connection's own error when it is over, `LIMIT_EXCEEDED` and `TOO_LONG`.
        """
        if self._ended is not None:
            raise copy(self._ended)
        if len(self._open) >= MAX_CALLS_PER_CONNECTION:
            raise error(
                Code.LIMIT_EXCEEDED,
                f"{len(self._open)} calls are open on this connection",
                "finish some of them first, or connect once more",
            )
        if len(payload) > MAX_LOCAL_PAYLOAD_BYTES:
            raise error(
                Code.TOO_LONG,
                f"{len(payload)} bytes in one call, at most {MAX_LOCAL_PAYLOAD_BYTES} fit",
                "send the hidden states in several steps",
            )
        self._next_id += 1
        frame = encode(Call(self._next_id, method, to_plain(arguments), payload))
        self._open[self._next_id] = _Open()
        return self._next_id, frame

    def tell(self, method: str, arguments: Any = None) -> bytes:
        """The bytes of a call whose answer nobody waits for. Raises as `open` does."""
        call, frame = self.open(method, arguments)
        self._open[call].left = True
        return frame

    def leave(self, call: int) -> bytes:
        """Nobody waits for this call any more; the bytes that tell the daemon, if it is still at work."""
        state = self._open.get(call)
        if state is None:
            return b""
        if state.answered or self._ended is not None:
            self._open.pop(call, None)
            return b""
        state.left = True
        state.inbox.clear()
        return encode(Cancel(call))

    def feed(self, received: bytes) -> None:
        """Take bytes as they came; b"" is the end of the connection."""
        if not received:
            self.end(
                error(
                    Code.NO_DAEMON, "the daemon closed the connection", "see its log; start it with: corollad"
                )
            )
            return
        try:
            self._parser.feed(received)
            for frame in self._parser.frames():
                self._deliver(frame)
        except CorollaError as problem:
            self.end(problem)

    def end(self, problem: CorollaError) -> None:
        """The connection is over; every waiter that has nothing left to take gets this error."""
        if self._ended is None:
            self._ended = problem

    @property
    def ended(self) -> CorollaError | None:
        """Why the connection is over, or None."""
        return self._ended

    def take(self, call: int) -> Item | Return | None:
        """The next part of a call's answer, or None if it has not come yet.

        Raises the error that the daemon answered with, or that of the connection. After `Return` or an
        error the call is forgotten.
        """
        state = self._open.get(call)
        message = state.inbox.popleft() if state is not None and state.inbox else None
        if message is None:
            if self._ended is None:
                return None
            self._open.pop(call, None)
            raise copy(self._ended)
        if not isinstance(message, Item):
            del self._open[call]
        if isinstance(message, Refused):
            raise message.problem()
        return message

    def _deliver(self, frame: Frame) -> None:
        try:
            message = FROM_DAEMON.decode(frame)
        except CorollaError as problem:
            if problem.code is Code.UNSUPPORTED:  # a newer daemon says more than we know
                return
            raise
        if not isinstance(message, (Item, Return, Refused)):
            return
        if message.id == 0 and isinstance(message, Refused):  # of the connection as a whole
            self.end(message.problem())
            return
        state = self._open.get(message.id)
        if state is None:
            return
        state.answered = not isinstance(message, Item)
        if not state.left:
            state.inbox.append(message)
        elif state.answered:
            del self._open[message.id]
