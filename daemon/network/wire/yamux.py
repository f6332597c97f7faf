"""Our stream muxer: /yamux/1.0.0 on the wire, py-libp2p's `IMuxedConn` towards the library.

One task reads, one writes, one keeps the connection alive. Whoever sends only queues (and, where the socket
takes it at once, sends without waiting): cancelling a send can therefore never cut a frame, and harms its own
stream only. The rules of the protocol are in `muxing.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final

import structlog
import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from multiaddr import Multiaddr

from ....protocol.limits import MAX_PACE_S, SILENCE_S, WRITE_STALL_S
from ..allowance import Allowance
from .frames import GoAway
from .multistream import agree, answer
from .muxing import (
    Acknowledged,
    Departed,
    Event,
    Mux,
    MuxStream,
    Opened,
    Pong,
    Readable,
    ViolationError,
    Writable,
)
from .noise import NoiseSession

PROTOCOL: Final = "/yamux/1.0.0"

# Senders wait while more than this is queued: enough to keep the wire busy while they are woken, little
# enough that a small step is not stuck behind a large one.
MAX_QUEUED_BYTES: Final = 256 * 1024
# A silent peer is asked for a sign of life at the first silent tick and given up at the fifth, which is at
# most 9 s after it stopped. Ticks are counted, not seconds, so that a stall of our own accuses nobody.
TICK_S: Final = 1.5
MAX_SILENT_TICKS: Final = round(SILENCE_S / TICK_S)
RTT_EVERY_TICKS: Final = 10  # a ping although there is traffic, to know the round trip
FRAMES_PER_TURN: Final = 16  # sends that need not wait still let others run now and then
MESSAGES_AT_ONCE: Final = 4  # to the socket in one call
FLUSH_TIMEOUT_S: Final = 1.0  # for what is queued, when a connection is closed
LINGER_TICKS: Final = 40  # a closed stream whose far side has not closed after a minute is reset

_log = structlog.get_logger("corolla.yamux")


class YamuxStream(IMuxedStream):
    """One stream of a connection."""

    def __init__(self, connection: Yamux, stream: MuxStream) -> None:
        self.muxed_conn: Yamux = connection
        self.stream_id = stream.stream_id
        self._mux = connection.mux
        self._stream = stream
        self.readers = trio.lowlevel.ParkingLot()
        self.writers = trio.lowlevel.ParkingLot()
        self.left_at_tick: int | None = None
        self._num_frames = 0  # sent
        stream.tag = self

    async def read(self, n: int | None = None) -> bytes:
        """What has arrived, at least one byte and at most `n`; waits for it.

        Raises `MuxedStreamEOF` at the end, and `MuxedStreamReset` when stream or connection broke.
        """
        stream = self._stream
        await trio.lowlevel.checkpoint_if_cancelled()
        asked_at = trio.current_time()
        while not stream.inbox.num_bytes:
            if stream.reset:
                raise MuxedStreamReset(f"stream {self.stream_id} was reset")
            if stream.remote_end:
                raise MuxedStreamEOF(f"stream {self.stream_id} has ended")
            self.muxed_conn.check_alive()
            await self.readers.park()
        limit = None if n is None or n < 0 else n
        now = trio.current_time()
        data = self._mux.read(stream, limit, now, now - asked_at)
        self.muxed_conn.wake_writer()
        return data

    async def write(self, data: bytes) -> None:
        """Queue all of `data`; waits while the far side's window is closed or much is queued already.

        When cancelled, a first part of `data` may have been sent: the stream should then be reset.
        Raises `MuxedStreamClosed` after `close`, `MuxedStreamReset` when stream or connection broke.
        """
        stream, connection = self._stream, self.muxed_conn
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(data)
        while view:
            if stream.reset:
                raise MuxedStreamReset(f"stream {self.stream_id} was reset")
            if stream.local_end:
                raise MuxedStreamClosed(f"stream {self.stream_id} was closed here")
            connection.check_alive()
            if self._mux.queued_bytes >= MAX_QUEUED_BYTES:
                await connection.room.park()
            elif not stream.send_window_bytes:
                await self.writers.park()
            else:
                view = view[self._mux.send(stream, view) :]
                connection.send_soon()
                self._num_frames += 1
                if self._num_frames % FRAMES_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()

    def accept(self) -> None:
        """Tell the far side that we took its stream up."""
        self._mux.accept(self._stream)
        self.muxed_conn.wake_writer()

    async def close(self) -> None:
        """Send the end; reading goes on until the far side's end."""
        self.finish()

    def finish(self) -> None:
        """`close`, without waiting for anything."""
        self._mux.finish(self._stream)
        self.writers.unpark_all()
        self.muxed_conn.wake_writer()

    def linger(self) -> None:
        """Declare that we are done with this stream: unless the far side ends it, it is reset in a minute."""
        self.left_at_tick = self.muxed_conn.num_ticks

    async def reset(self) -> None:
        """End both directions at once, here and on the far side."""
        self.break_off()

    def break_off(self) -> None:
        """`reset`, without being a coroutine."""
        self._mux.reset(self._stream)
        self.wake_all()
        self.muxed_conn.wake_writer()

    def wake_all(self) -> None:
        """Let readers and writers look again."""
        self.readers.unpark_all()
        self.writers.unpark_all()

    def set_deadline(self, ttl: int) -> None:
        """Not kept: wait under `trio.fail_after` instead, which this stream bears."""
        raise ValueError(f"no deadline of {ttl} s can be set on a stream; use trio.fail_after")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.muxed_conn.get_remote_address()

    async def __aenter__(self) -> YamuxStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()


class Yamux(IMuxedConn):
    """The streams of one connection. The library runs `start` in a task of its own.

    on_broken: called once, at the moment when the connection is known to be of no more use.
    allowance: of the peer; None bounds it by the muxer's own limits alone.
    """

    def __init__(
        self,
        secured_conn: ISecureConn,
        peer_id: ID,
        is_initiator: bool | None = None,
        on_close: Callable[[], Awaitable[Any]] | None = None,
    ) -> None:
        self.secured_conn = secured_conn
        self._carrier = secured_conn if isinstance(secured_conn, NoiseSession) else Plainly(secured_conn)
        self.peer_id = peer_id
        self.on_close = on_close
        self.on_broken: Callable[[], None] | None = None
        self.allowance: Allowance | None = None
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self._initiator = secured_conn.is_initiator if is_initiator is None else is_initiator
        self.mux = Mux(initiator=self._initiator)
        self.room = trio.lowlevel.ParkingLot()  # senders that wait for the queue to shrink
        self.num_ticks = 0
        self._work = trio.lowlevel.ParkingLot()  # the writer task
        self._openers = trio.lowlevel.ParkingLot()
        self._drained = trio.lowlevel.ParkingLot()
        self._accepted_in, self._accepted_out = trio.open_memory_channel[YamuxStream](256)
        self._scope = trio.CancelScope()
        self._broken: str | None = None
        self._num_messages = 0
        self._pings: dict[int, float] = {}
        self._nonce = 0
        self._writing = False
        self._writing_since = 0  # the tick in which the socket was given what it has not taken yet

    @property
    def is_initiator(self) -> bool:
        return self._initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and self._broken is None

    @property
    def is_closed(self) -> bool:
        return self._broken is not None

    def rtt(self) -> float:
        """The smoothed round trip in seconds; 0.0 while unknown."""
        return self.mux.rtt_s

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.secured_conn.get_connection_type()

    def tcp_info(self) -> bytes:
        """What the kernel tells of the socket below; nothing where there is none."""
        return self._carrier.tcp_info()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.secured_conn.get_remote_address()

    def check_alive(self) -> None:
        """Raise `MuxedStreamReset` when the connection has ended."""
        if self._broken is not None:
            raise MuxedStreamReset(self._broken)

    async def open_stream(self) -> YamuxStream:
        """A new stream; waits while too many are unanswered. Raises `MuxedConnUnavailable`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._broken is None and not self.mux.may_open:
            await self._openers.park()
        if self._broken is not None:
            raise MuxedConnUnavailable(self._broken)
        stream = YamuxStream(self, self.mux.open())
        self.wake_writer()
        return stream

    async def accept_stream(self) -> YamuxStream:
        """The next stream that the far side opens. Raises `MuxedConnUnavailable` at the connection's end."""
        try:
            stream = await self._accepted_out.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable(self._broken or "the connection has ended") from None
        stream.accept()
        return stream

    async def start(self) -> None:
        """Serve the connection until it ends. Raises nothing: an ended connection is no error of the host."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_alive)
                    nursery.start_soon(self._read)
                    self.event_started.set()
        finally:
            self._break("the connection was closed")
            await self._close_below()

    async def close(self) -> None:
        """Send what is queued and a farewell, in bounded time, then close. Idempotent."""
        if self._broken is None:
            self.mux.go_away(GoAway.NORMAL)
            self.wake_writer()
            with trio.move_on_after(FLUSH_TIMEOUT_S):
                while self._broken is None and (self.mux.queued_bytes or self._writing):
                    await self._drained.park()
            self._break("the connection was closed here")
        await self._close_below()
        if self.on_close is not None:
            await self.on_close()

    async def _close_below(self) -> None:
        if self.event_closed.is_set():
            return
        self.event_closed.set()
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + FLUSH_TIMEOUT_S):
                await self.secured_conn.close()
        except Exception as failure:  # whatever layer below: the connection is gone either way
            _log.debug("close_failed", peer=str(self.peer_id), reason=repr(failure))

    # the three tasks

    async def _read(self) -> None:
        try:
            while self._broken is None:
                messages = await self._carrier.receive()
                self._num_messages += len(messages)
                for message in messages:
                    frames, opened = self.mux.num_frames, self.mux.num_opened
                    for event in self.mux.receive(message):
                        self._act(event)
                    self.wake_writer()
                    if self.allowance is not None:
                        wait_s = self._pace_s(
                            len(message), self.mux.num_frames - frames, self.mux.num_opened - opened
                        )
                        if wait_s > 0:
                            await trio.sleep(wait_s)
        except ViolationError as violation:
            _log.warning("violation", peer=str(self.peer_id), reason=str(violation))
            self.mux.go_away(GoAway.PROTOCOL_ERROR)
            self.wake_writer()
            with trio.move_on_after(FLUSH_TIMEOUT_S):
                while self.mux.queued_bytes or self._writing:
                    await self._drained.park()
            self._break(f"the peer broke the muxer's protocol: {violation}")
        except Exception as failure:  # a dozen types of TCP, Noise and cryptography: all end the connection
            self._break(f"the connection ended: {_reason(failure)}")

    def _pace_s(self, num_bytes: int, num_frames: int, num_opens: int) -> float:
        """For how long to read no more, until the peer may send again.

        Raises `ViolationError` for one that sends beyond all measure.
        """
        allowance = self.allowance
        if allowance is None:
            return 0.0
        self.mux.max_unread_bytes = allowance.unread_bytes
        wait_s = allowance.take(num_bytes, num_frames, num_opens, trio.current_time())
        if wait_s > MAX_PACE_S:
            raise ViolationError(
                f"{num_bytes} bytes in {num_frames} frames, which open {num_opens} streams, are a flood"
            )
        return wait_s

    async def _write(self) -> None:
        try:
            while self._broken is None:
                self._writing_since = self.num_ticks
                if not await self._carrier.flush():
                    continue
                messages = self.mux.next_messages(MESSAGES_AT_ONCE)
                if not messages:
                    self._writing = False
                    self._drained.unpark_all()
                    await self._work.park()
                    continue
                self._writing = True
                if self._carrier.send_nowait(messages):
                    await trio.lowlevel.checkpoint()
                if self.room and self.mux.queued_bytes < MAX_QUEUED_BYTES:
                    self.room.unpark_all()
        except Exception as failure:  # as in `_read`
            self._break(f"sending failed: {_reason(failure)}")

    async def _keep_alive(self) -> None:
        seen = silent = 0
        self._ping()
        while self._broken is None:
            await trio.sleep(TICK_S)
            self.num_ticks += 1
            silent = silent + 1 if self._num_messages == seen else 0
            seen = self._num_messages
            if silent >= MAX_SILENT_TICKS:
                self._break(f"the peer has been silent for {silent * TICK_S:.0f} s")
            elif self._writing and self.num_ticks - self._writing_since > WRITE_STALL_S / TICK_S:
                self._break(f"the peer took nothing of what was sent for {WRITE_STALL_S:.0f} s")
            elif silent or self.num_ticks % RTT_EVERY_TICKS == 0:
                self._ping()
            self._reset_left()

    def _ping(self) -> None:
        if not self._pings or len(self._pings) < MAX_SILENT_TICKS:
            self._nonce = (self._nonce + 1) & 0xFFFFFFFF
            self._pings[self._nonce] = trio.current_time()
            self.mux.ping(self._nonce)
            self.wake_writer()

    def _reset_left(self) -> None:
        for stream in self.mux.streams:
            match stream.tag:
                case YamuxStream(left_at_tick=int(tick)) as left if self.num_ticks - tick >= LINGER_TICKS:
                    left.break_off()

    def _act(self, event: Event) -> None:
        match event:
            case Readable(MuxStream(tag=YamuxStream() as stream)):
                stream.readers.unpark_all()
            case Writable(MuxStream(tag=YamuxStream() as stream)):
                stream.writers.unpark_all()
            case Opened(state):
                stream = YamuxStream(self, state)
                try:
                    self._accepted_in.send_nowait(stream)
                except (trio.WouldBlock, trio.ClosedResourceError):
                    stream.break_off()
            case Acknowledged():
                self._openers.unpark_all()
            case Pong(nonce):
                sent_at = self._pings.pop(nonce, None)
                if sent_at is not None:
                    self._pings.clear()  # older ones were overtaken
                    sample = trio.current_time() - sent_at
                    self.mux.rtt_s = 0.75 * self.mux.rtt_s + 0.25 * sample if self.mux.rtt_s else sample
            case Departed():
                self._break("the peer said good-bye")

    def wake_writer(self) -> None:
        """There may be something to send."""
        if self._work and self.mux.queued_bytes:
            self._work.unpark_all()

    def send_soon(self) -> None:
        """Send what is queued now, without a turn of the writer task, when it idles and the socket takes it."""
        while self._work and (messages := self.mux.next_messages(MESSAGES_AT_ONCE)):
            if not self._carrier.send_nowait(messages):
                self._writing = True
                self._work.unpark_all()

    def _break(self, reason: str) -> None:
        """The connection has ended: everyone who waits on it learns now."""
        if self._broken is not None:
            return
        self._broken = reason
        for stream in self.mux.streams:
            if isinstance(stream.tag, YamuxStream):
                stream.tag.wake_all()
        for lot in (self.room, self._openers, self._drained):
            lot.unpark_all()
        self._accepted_in.close()
        self._scope.cancel()
        if self.on_broken is not None:
            self.on_broken()


class Plainly:
    """A secured connection that is no `NoiseSession`, used as one: all waiting is left to `flush`."""

    def __init__(self, connection: ISecureConn) -> None:
        self._connection = connection
        self._unsent = b""

    async def receive(self) -> Sequence[bytes]:
        """See `NoiseSession`, as below."""
        return (await self._connection.read(),)

    def send_nowait(self, messages: Sequence[bytes]) -> bool:
        self._unsent = b"".join(messages)
        return not self._unsent

    async def flush(self) -> bool:
        unsent, self._unsent = self._unsent, b""
        if unsent:
            await self._connection.write(unsent)
        return True

    def tcp_info(self) -> bytes:
        return b""


class YamuxOnly(MuxerMultistream):
    """Agrees on /yamux/1.0.0 and nothing else, and then uses ours.

    The library's `new_conn` names its own class, which this overrides; nothing global is replaced, so both
    muxers can run in one process.
    """

    def __init__(self, on_connection: Callable[[Yamux], None] | None = None) -> None:
        super().__init__({PROTOCOL: Yamux})  # type: ignore[dict-item]
        self._on_connection = on_connection

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Agree on the protocol with the far side; the muxer is not started yet."""
        with trio.fail_after(self.negotiate_timeout):
            if conn.is_initiator:
                await agree(conn, str(peer_id), PROTOCOL)
            else:
                await answer(conn, lambda protocol: protocol == PROTOCOL)
        connection = Yamux(conn, peer_id)
        if self._on_connection is not None:
            self._on_connection(connection)
        return self._annotate_connection(connection, conn, TProtocol(PROTOCOL))


def _reason(failure: Exception) -> str:
    return str(failure) or type(failure).__name__
