"""The rules of /yamux/1.0.0 for one connection: bytes in, events out, frames queued to be sent.

It owns windows and stream states, and keeps the far side within `protocol/limits.py`. It knows no sockets,
no tasks and no clock of its own: `yamux.py` waits, this decides.
What frames look like is in `frames.py`, how windows grow in `windows.py`.
Source: https://github.com/hashicorp/yamux/blob/master/spec.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ....protocol.limits import (
    INITIAL_WINDOW_BYTES,
    MAX_QUEUED_FRAMES,
    MAX_STREAMS,
    MAX_UNACKNOWLEDGED,
    MAX_UNREAD_BYTES,
    RAISED_WINDOW_BYTES,
    WINDOW_BUDGET_BYTES,
)
from .frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    HEADER_BYTES,
    MAX_FRAME_BODY_BYTES,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    GoAway,
    bare_frame,
    data_frame,
)
from .inbox import Inbox
from .outbox import Outbox
from .windows import MAX_CREDIT_BYTES, fair_window_bytes, is_long_wait, wanted_window_bytes

_MAX_U32: Final = (1 << 32) - 1


class ViolationError(Exception):
    """The far side broke the rules; the connection is of no further use. Tell it `GoAway.PROTOCOL_ERROR`."""


class MuxStream:
    """One stream's state. Written by `Mux` only; `tag` is the caller's own."""

    __slots__ = (
        "acknowledged",
        "consumed_bytes",
        "granted_bytes",
        "inbox",
        "local_end",
        "ours",
        "paced_at",
        "paced_bytes",
        "remote_end",
        "reset",
        "send_window_bytes",
        "stream_id",
        "tag",
        "window_bytes",
    )

    def __init__(self, stream_id: int, *, ours: bool) -> None:
        self.stream_id = stream_id
        self.ours = ours
        self.tag: object = None
        self.send_window_bytes = INITIAL_WINDOW_BYTES  # what we may still send
        self.window_bytes = INITIAL_WINDOW_BYTES  # what the far side may have on its way to our reader
        self.granted_bytes = INITIAL_WINDOW_BYTES  # what the far side may still send
        self.consumed_bytes = 0  # read here since the last grant
        self.paced_at = 0.0  # the last grant, or the end of the reader's last long wait since
        self.paced_bytes = 0  # read here since then
        self.inbox = Inbox()
        self.acknowledged = False
        self.local_end = False  # we sent FIN
        self.remote_end = False  # the far side sent FIN
        self.reset = False


@dataclass(frozen=True, slots=True)
class Opened:
    """The far side opened a stream."""

    stream: MuxStream


@dataclass(frozen=True, slots=True)
class Readable:
    """A stream has bytes, its end, or a reset for its reader."""

    stream: MuxStream


@dataclass(frozen=True, slots=True)
class Writable:
    """A stream's window opened, or it was reset: its writer should look again."""

    stream: MuxStream


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A stream of ours was accepted or refused: another may be opened."""


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to our ping `nonce`."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Departed:
    """The far side will open no more streams, and closes soon."""

    code: int


Event = Opened | Readable | Writable | Acknowledged | Pong | Departed


class Mux:
    """One connection's streams.

    initiator: whether we dialled; our streams then have odd ids.
    rtt_s: may be set as it becomes known; windows grow by it. max_unread_bytes: may be set; beyond, the stream
    that is being filled is reset. num_frames, num_opened: what the far side sent so far, and opened.
    """

    def __init__(self, *, initiator: bool) -> None:
        self._parity = 1 if initiator else 0
        self._next_id = 1 if initiator else 2
        self._streams: dict[int, MuxStream] = {}
        self._highest_theirs = 0
        self._num_theirs = 0
        self._num_unacknowledged = 0
        self._unread_bytes = 0
        self._extra_window_bytes = 0
        self._partial = bytearray()  # of a header
        self._body: MuxStream | None = None  # whom the rest of the current body belongs to
        self._body_left = 0
        self._body_ends = False
        self._outbox = Outbox()
        self.rtt_s = 0.0
        self.max_unread_bytes = MAX_UNREAD_BYTES
        self.num_frames = 0
        self.num_opened = 0

    # what is there

    @property
    def streams(self) -> tuple[MuxStream, ...]:
        """The open streams, oldest first."""
        return tuple(self._streams.values())

    @property
    def num_streams(self) -> int:
        """How many are open."""
        return len(self._streams)

    @property
    def queued_bytes(self) -> int:
        """What waits to be sent."""
        return self._outbox.num_bytes

    @property
    def unread_bytes(self) -> int:
        """What has arrived and waits for readers."""
        return self._unread_bytes

    @property
    def may_open(self) -> bool:
        """Whether one more stream keeps within what the far side queues for us."""
        return self._num_unacknowledged < MAX_UNACKNOWLEDGED

    # what we do

    def open(self) -> MuxStream:
        """A new stream of ours. Raises OverflowError when the ids are used up: then dial anew."""
        if self._next_id > _MAX_U32:
            raise OverflowError("all 2^31 stream ids of this connection are used up")
        stream = MuxStream(self._next_id, ours=True)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        self._num_unacknowledged += 1
        self._outbox.put(
            stream.stream_id,
            bare_frame(WINDOW_UPDATE, SYN, stream.stream_id, self._grow(stream, RAISED_WINDOW_BYTES)),
        )
        return stream

    def accept(self, stream: MuxStream) -> None:
        """Tell the far side that the stream it opened has been taken up."""
        if not (stream.acknowledged or stream.reset):
            stream.acknowledged = True
            delta = self._grow(stream, RAISED_WINDOW_BYTES)
            self._outbox.put(stream.stream_id, bare_frame(WINDOW_UPDATE, ACK, stream.stream_id, delta))

    def send(self, stream: MuxStream, data: memoryview) -> int:
        """Queue the first bytes of `data`, as many as window and frame allow; gives how many."""
        size = min(len(data), stream.send_window_bytes, MAX_FRAME_BODY_BYTES)
        if size and not (stream.local_end or stream.reset):
            stream.send_window_bytes -= size
            self._outbox.put(stream.stream_id, data_frame(stream.stream_id, data[:size]))
            return size
        return 0

    def read(self, stream: MuxStream, limit: int | None, now: float, waited_s: float = 0.0) -> bytes:
        """What has arrived, at most `limit` bytes; opens the far side's window again in large batches.

        waited_s: how long the reader, ready, has waited for it. What comes after a long wait is a new burst.
        """
        if not stream.paced_at or is_long_wait(waited_s, self.rtt_s):
            stream.paced_at, stream.paced_bytes = now, 0
        data = stream.inbox.take(limit)
        self._unread_bytes -= len(data)
        stream.consumed_bytes += len(data)
        stream.paced_bytes += len(data)
        self._grant(stream, now)
        return data

    def finish(self, stream: MuxStream) -> None:
        """Send the end, after what is queued. The far side may go on sending."""
        if stream.local_end or stream.reset:
            return
        stream.local_end = True
        self._outbox.put(stream.stream_id, bare_frame(WINDOW_UPDATE, FIN, stream.stream_id, 0))
        self._forget_if_done(stream)

    def reset(self, stream: MuxStream) -> None:
        """End a stream at once; what it has queued is not sent any more."""
        if stream.reset or (stream.local_end and stream.remote_end):
            self._drop_inbox(stream)
            return
        self._outbox.withdraw(stream.stream_id)
        self._outbox.put(stream.stream_id, bare_frame(WINDOW_UPDATE, RST, stream.stream_id, 0))
        self._break(stream)

    def ping(self, nonce: int) -> None:
        """Ask for a `Pong`."""
        self._outbox.put_urgent(bare_frame(PING, SYN, 0, nonce))

    def go_away(self, code: GoAway) -> None:
        """Announce the end of the connection, after what is queued."""
        self._outbox.put(0, bare_frame(GO_AWAY, 0, 0, code))

    def next_messages(self, count: int) -> Sequence[bytes]:
        """The next bytes to send, in at most `count` messages: frames joined up to one Noise message each."""
        return self._outbox.next_messages(count) if self._outbox.num_bytes else ()

    # what the far side does

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes as they arrived, cut anywhere. Raises `ViolationError`."""
        events: list[Event] = []
        at, end = 0, len(data)
        while True:
            if self._body_left:
                if at == end:
                    return events
                size = min(self._body_left, end - at)
                # Most of the message is kept as it is; a small part is copied, lest it keep the rest alive.
                piece = memoryview(data)[at : at + size] if 2 * size >= end else data[at : at + size]
                at += size
                self._body_left -= size
                self._take_body(piece, events)
                continue
            if self._partial or end - at < HEADER_BYTES:
                size = min(HEADER_BYTES - len(self._partial), end - at)
                self._partial += data[at : at + size]
                at += size
                if len(self._partial) < HEADER_BYTES:
                    return events
                header = HEADER.unpack(self._partial)
                self._partial.clear()
            else:
                header = HEADER.unpack_from(data, at)
                at += HEADER_BYTES
            self._take_header(header, events)

    def _take_header(self, header: tuple[int, int, int, int, int], events: list[Event]) -> None:
        version, kind, flags, stream_id, length = header
        self.num_frames += 1
        if version != 0 or kind > GO_AWAY:
            raise ViolationError(f"frame of version {version}, type {kind}")
        if kind == PING:
            if flags & SYN:
                self._check_queue()
                self._outbox.put_urgent(bare_frame(PING, ACK, 0, length))
            else:
                events.append(Pong(length))
            return
        if kind == GO_AWAY:
            events.append(Departed(length))
            return
        stream = self._streams.get(stream_id)
        if flags & SYN:
            stream = self._take_open(stream_id, stream, events)
        elif stream is None and not self._was_open(stream_id):
            raise ViolationError(f"frame of type {kind} for stream {stream_id}, which was never opened")
        if stream is not None and flags & (ACK | RST) and stream.ours:
            self._acknowledge(stream, events)
        if stream is not None and flags & RST:
            self._outbox.withdraw(stream_id)
            self._break(stream)
            events += (Readable(stream), Writable(stream))
            stream = None
        if kind == DATA:
            self._take_data(stream, length, flags, events)
            return
        if stream is not None and length:
            stream.send_window_bytes += length
            if stream.send_window_bytes > _MAX_U32:
                raise ViolationError(f"stream {stream_id} was given a window beyond {_MAX_U32} bytes")
            events.append(Writable(stream))
        if stream is not None and flags & FIN:
            self._take_end(stream, events)

    def _take_data(self, stream: MuxStream | None, length: int, flags: int, events: list[Event]) -> None:
        if stream is None:
            self._body, self._body_left, self._body_ends = None, length, False
            return
        if length > stream.granted_bytes:
            raise ViolationError(
                f"stream {stream.stream_id} sent {length} bytes, {stream.granted_bytes} were granted"
            )
        if length and stream.remote_end:
            raise ViolationError(f"stream {stream.stream_id} sent {length} bytes after its end")
        stream.granted_bytes -= length
        self._body, self._body_left, self._body_ends = stream, length, bool(flags & FIN)
        if not length and self._body_ends:
            self._take_end(stream, events)

    def _take_body(self, piece: bytes | memoryview, events: list[Event]) -> None:
        stream = self._body
        if stream is None:
            return
        if not stream.reset:
            if self._unread_bytes + len(piece) > self.max_unread_bytes:
                self.reset(stream)
                events += (Readable(stream), Writable(stream))
            else:
                stream.inbox.append(piece)
                self._unread_bytes += len(piece)
                events.append(Readable(stream))
        if not self._body_left and self._body_ends:
            self._take_end(stream, events)

    def _take_end(self, stream: MuxStream, events: list[Event]) -> None:
        stream.remote_end = True
        events.append(Readable(stream))
        self._forget_if_done(stream)

    def _take_open(self, stream_id: int, stream: MuxStream | None, events: list[Event]) -> MuxStream | None:
        if stream is not None or stream_id == 0 or stream_id % 2 == self._parity:
            raise ViolationError(f"stream {stream_id} cannot be opened by the far side")
        if stream_id <= self._highest_theirs:
            raise ViolationError(f"stream {stream_id} opened after stream {self._highest_theirs}")
        self._highest_theirs = stream_id
        self.num_opened += 1
        if self._num_theirs >= MAX_STREAMS:
            self._check_queue()
            self._outbox.put(stream_id, bare_frame(WINDOW_UPDATE, RST, stream_id, 0))
            return None
        stream = MuxStream(stream_id, ours=False)
        self._streams[stream_id] = stream
        self._num_theirs += 1
        events.append(Opened(stream))
        return stream

    def _was_open(self, stream_id: int) -> bool:
        if stream_id == 0:
            return False
        if stream_id % 2 == self._parity:
            return stream_id < self._next_id
        return stream_id <= self._highest_theirs

    def _acknowledge(self, stream: MuxStream, events: list[Event]) -> None:
        if not stream.acknowledged:
            stream.acknowledged = True
            self._num_unacknowledged -= 1
            events.append(Acknowledged())

    # bookkeeping

    def _grant(self, stream: MuxStream, now: float) -> None:
        batch = min(stream.window_bytes // 2, MAX_CREDIT_BYTES)
        if stream.consumed_bytes < batch or stream.remote_end or stream.reset:
            return
        delta = stream.consumed_bytes
        stream.granted_bytes += stream.consumed_bytes
        if stream.paced_bytes * 2 >= batch:  # else it trickles
            wanted = wanted_window_bytes(stream.paced_bytes, now - stream.paced_at, self.rtt_s)
            fair = fair_window_bytes(stream.window_bytes, WINDOW_BUDGET_BYTES - self._extra_window_bytes)
            delta += self._grow(stream, min(wanted, fair))
        stream.consumed_bytes = stream.paced_bytes = 0
        stream.paced_at = now
        self._outbox.put_urgent(bare_frame(WINDOW_UPDATE, 0, stream.stream_id, delta))

    def _grow(self, stream: MuxStream, window_bytes: int) -> int:
        """Widen a stream's window, as far as the budget allows; gives by how much."""
        room = WINDOW_BUDGET_BYTES - self._extra_window_bytes
        growth = max(0, min(window_bytes - stream.window_bytes, room))
        stream.window_bytes += growth
        stream.granted_bytes += growth
        self._extra_window_bytes += growth
        return growth

    def _break(self, stream: MuxStream) -> None:
        stream.reset = True
        self._drop_inbox(stream)
        self._forget(stream)

    def _drop_inbox(self, stream: MuxStream) -> None:
        self._unread_bytes -= stream.inbox.num_bytes
        stream.inbox.clear()

    def _forget_if_done(self, stream: MuxStream) -> None:
        if stream.local_end and stream.remote_end:
            self._forget(stream)

    def _forget(self, stream: MuxStream) -> None:
        if self._streams.pop(stream.stream_id, None) is None:
            return
        self._extra_window_bytes -= stream.window_bytes - INITIAL_WINDOW_BYTES
        if not stream.ours:
            self._num_theirs -= 1
        elif not stream.acknowledged:
            stream.acknowledged = True
            self._num_unacknowledged -= 1

    def _check_queue(self) -> None:
        """Before an answer: the far side cannot make us keep ever more of them."""
        if self._outbox.num_frames >= MAX_QUEUED_FRAMES:
            raise ViolationError(
                f"{MAX_QUEUED_FRAMES} frames wait, and the peer asks on without reading them"
            )
