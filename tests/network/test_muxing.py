"""The muxer's rules, without any waiting: frames, windows, ends, and what a hostile far side gets."""

from __future__ import annotations

import contextlib
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.daemon.network.wire import muxing
from corolla.daemon.network.wire.frames import HEADER_BYTES, MAX_FRAME_BODY_BYTES, MAX_MESSAGE_BYTES, GoAway
from corolla.daemon.network.wire.muxing import (
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
from corolla.daemon.network.wire.windows import wanted_window_bytes
from corolla.protocol.limits import (
    INITIAL_WINDOW_BYTES,
    MAX_STREAMS,
    MAX_UNACKNOWLEDGED,
    MAX_WINDOW_BYTES,
    MIB,
    RAISED_WINDOW_BYTES,
    WINDOW_BUDGET_BYTES,
)

DATA, UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8


def frame(kind: int, flags: int, stream: int, length: int, body: bytes = b"", version: int = 0) -> bytes:
    return struct.pack(">BBHII", version, kind, flags, stream, length) + body


class Couple:
    """Two muxes joined back to back; `events` collects what each has seen."""

    def __init__(self) -> None:
        self.one, self.two = Mux(initiator=True), Mux(initiator=False)
        self.events: dict[Mux, list[Event]] = {self.one: [], self.two: []}

    def settle(self) -> None:
        """Carry messages both ways until nobody has anything to say."""
        moved = True
        while moved:
            moved = False
            for source, target in ((self.one, self.two), (self.two, self.one)):
                while message := b"".join(source.next_messages(1)):
                    assert len(message) <= MAX_MESSAGE_BYTES
                    self.events[target] += target.receive(message)
                    moved = True

    def stream(self) -> tuple[MuxStream, MuxStream]:
        """A stream that `one` opened and `two` accepted."""
        near = self.one.open()
        self.settle()
        opened = [event for event in self.events[self.two] if isinstance(event, Opened)][-1]
        self.two.accept(opened.stream)
        self.settle()
        return near, opened.stream


def send_all(couple: Couple, mux: Mux, stream: MuxStream, data: bytes) -> int:
    view, sent = memoryview(data), 0
    while taken := mux.send(stream, view[sent:]):
        sent += taken
    couple.settle()
    return sent


def test_the_first_frames_are_those_of_the_specification() -> None:
    mux = Mux(initiator=True)
    stream = mux.open()
    mux.send(stream, memoryview(b"hello"))
    mux.finish(stream)
    expected = (
        frame(UPDATE, SYN, 1, RAISED_WINDOW_BYTES - INITIAL_WINDOW_BYTES)
        + frame(DATA, 0, 1, 5, b"hello")
        + frame(UPDATE, FIN, 1, 0)
    )
    assert b"".join(mux.next_messages(1)) == expected


def test_initiators_use_odd_ids_and_responders_even_ones() -> None:
    assert [Mux(initiator=True).open().stream_id, Mux(initiator=False).open().stream_id] == [1, 2]


@given(data=st.binary(min_size=1, max_size=5000), cuts=st.lists(st.integers(0, 5100), max_size=8))
def test_bytes_may_be_cut_anywhere(data: bytes, cuts: list[int]) -> None:
    wire = frame(UPDATE, SYN, 1, 0) + frame(DATA, FIN, 1, len(data), data)
    mux, events = Mux(initiator=False), []
    places = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    for start, end in itertools.pairwise(places):
        events += mux.receive(wire[start:end])
    assert isinstance(events[0], Opened)
    stream = events[0].stream
    assert mux.read(stream, None, 0.0) == data
    assert stream.remote_end


@given(pieces=st.lists(st.binary(max_size=3000), max_size=20), limit=st.integers(1, 4000))
def test_reading_by_pieces_gives_what_was_sent(pieces: list[bytes], limit: int) -> None:
    couple = Couple()
    near, far = couple.stream()
    for piece in pieces:
        send_all(couple, couple.one, near, piece)
    read = b""
    while far.inbox.num_bytes:
        piece = couple.two.read(far, limit, 0.0)
        assert 0 < len(piece) <= limit
        read += piece
    assert read == b"".join(pieces)


def test_a_sender_stops_at_the_window_and_goes_on_when_it_opens() -> None:
    couple = Couple()
    near, far = couple.stream()
    assert send_all(couple, couple.one, near, bytes(RAISED_WINDOW_BYTES + 1)) == RAISED_WINDOW_BYTES
    assert couple.one.send(near, memoryview(b"x")) == 0
    couple.two.read(far, RAISED_WINDOW_BYTES // 2, 0.0)
    couple.settle()
    assert Writable(near) in couple.events[couple.one]
    assert couple.one.send(near, memoryview(b"x")) == 1


def test_credit_is_given_in_large_batches() -> None:
    couple = Couple()
    near, far = couple.stream()
    send_all(couple, couple.one, near, bytes(RAISED_WINDOW_BYTES))
    for _ in range(RAISED_WINDOW_BYTES // 2 // 1024 - 1):
        couple.two.read(far, 1024, 0.0)
    assert b"".join(couple.two.next_messages(1)) == b""
    couple.two.read(far, 1024, 0.0)
    assert len(b"".join(couple.two.next_messages(1))) == HEADER_BYTES


def test_windows_grow_for_a_quick_reader_up_to_their_bound() -> None:
    couple = Couple()
    near, far = couple.stream()
    couple.two.rtt_s = 1.0
    for round_number in range(40):
        while couple.one.send(near, memoryview(bytes(MAX_FRAME_BODY_BYTES))):
            couple.settle()
        while far.inbox.num_bytes:
            couple.two.read(far, 65536, 100.0 + round_number * 0.01)
            couple.settle()
    assert far.window_bytes == MAX_WINDOW_BYTES
    assert near.send_window_bytes <= MAX_WINDOW_BYTES


def test_windows_stay_for_a_slow_reader() -> None:
    couple = Couple()
    near, far = couple.stream()
    for round_number in range(10):
        send_all(couple, couple.one, near, bytes(RAISED_WINDOW_BYTES))
        couple.two.read(far, None, 100.0 * (1 + round_number))
        couple.settle()
    # The first grant cannot know the reader's pace yet, and takes it for quick.
    assert far.window_bytes == 5 * RAISED_WINDOW_BYTES


def read_slices(couple: Couple, far: MuxStream, at: float, slice_s: float, waited_s: float) -> float:
    """Read all in pieces of 64 KiB, one each `slice_s`, the first after a wait; gives the time of the last."""
    while far.inbox.num_bytes:
        couple.two.read(far, 65536, at, waited_s)
        at, waited_s = at + slice_s, 0.0
    couple.settle()
    return at


def test_the_first_burst_after_a_pause_opens_a_far_window_at_once() -> None:
    couple = Couple()
    near, far = couple.stream()
    couple.two.rtt_s = 0.05
    send_all(couple, couple.one, near, b"a question")
    couple.two.read(far, None, 100.0)
    send_all(couple, couple.one, near, bytes(RAISED_WINDOW_BYTES // 2))
    read_slices(couple, far, 103.0, 0.0002, waited_s=3.0)
    assert far.window_bytes == MAX_WINDOW_BYTES


def test_a_stream_that_trickles_keeps_its_window() -> None:
    couple = Couple()
    near, far = couple.stream()
    couple.two.rtt_s = 0.05
    for step in range(200):
        send_all(couple, couple.one, near, bytes(14_000))
        couple.two.read(far, None, 100.0 + step * 0.1, 0.1)
        couple.settle()
    assert far.window_bytes == RAISED_WINDOW_BYTES


@pytest.mark.parametrize(
    ("consumed_bytes", "elapsed_s", "rtt_s", "expected"),
    [
        (MIB, 0.5, 0.25, 2 * MIB),  # a window a round trip would be read: four of them
        (MIB, 64.0, 0.25, MIB // 64),  # slow
        (MIB, 0.5, 0.0, MIB // 100),  # near: the horizon is 5 ms
        (MIB, 0.0, 0.0, 5 * MIB),  # read at once
        (MIB, 0.002, 0.05, MAX_WINDOW_BYTES),
    ],
)
def test_a_window_follows_its_readers_pace(
    consumed_bytes: int, elapsed_s: float, rtt_s: float, expected: int
) -> None:
    assert wanted_window_bytes(consumed_bytes, elapsed_s, rtt_s) == expected


def test_a_quick_stream_leaves_budget_to_later_ones() -> None:
    couple = Couple()
    couple.two.rtt_s = 0.05
    claims = []
    for _ in range(6):
        near, far = couple.stream()
        for _ in range(5):
            send_all(couple, couple.one, near, bytes(RAISED_WINDOW_BYTES))
            read_slices(couple, far, 100.0, 0.0001, waited_s=1.0)
        claims.append(far.window_bytes - INITIAL_WINDOW_BYTES)
    assert claims[0] == MAX_WINDOW_BYTES - INITIAL_WINDOW_BYTES
    assert all(claim > RAISED_WINDOW_BYTES - INITIAL_WINDOW_BYTES for claim in claims)
    assert sum(claims) <= WINDOW_BUDGET_BYTES


def test_all_windows_together_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = RAISED_WINDOW_BYTES
    monkeypatch.setattr(muxing, "WINDOW_BUDGET_BYTES", budget)
    couple = Couple()
    far_ends = []
    for _ in range(3):
        near, far = couple.stream()
        far_ends.append(far)
        for _ in range(5):
            send_all(couple, couple.one, near, bytes(RAISED_WINDOW_BYTES))
            couple.two.read(far, None, 1.0)
            couple.settle()
    assert sum(far.window_bytes for far in far_ends) == 3 * INITIAL_WINDOW_BYTES + budget


def test_both_ends_forget_a_stream_that_both_have_ended() -> None:
    couple = Couple()
    near, far = couple.stream()
    send_all(couple, couple.one, near, b"last words")
    couple.one.finish(near)
    couple.settle()
    assert (couple.one.num_streams, couple.two.num_streams) == (1, 1)
    couple.two.finish(far)
    couple.settle()
    assert (couple.one.num_streams, couple.two.num_streams) == (0, 0)
    assert couple.two.read(far, None, 0.0) == b"last words"


def test_a_reset_ends_both_sides_and_takes_back_what_was_queued() -> None:
    couple = Couple()
    near, far = couple.stream()
    couple.one.send(near, memoryview(b"never sent"))
    couple.one.reset(near)
    couple.settle()
    assert far.reset
    assert near.reset
    assert far.inbox.num_bytes == 0
    assert (couple.one.num_streams, couple.two.num_streams) == (0, 0)


def test_a_stream_reset_before_it_was_sent_is_still_opened_first() -> None:
    couple = Couple()
    couple.one.reset(couple.one.open())
    couple.settle()  # a RST for a stream never opened would be a violation
    assert couple.two.num_streams == 0


def test_data_for_a_stream_that_is_gone_is_skipped() -> None:
    couple = Couple()
    near, far = couple.stream()
    couple.two.reset(far)
    b"".join(couple.two.next_messages(1))  # lost on its way, for now
    couple.one.send(near, memoryview(b"late"))
    other = couple.one.open()
    couple.settle()
    assert couple.two.num_streams == 1
    assert not other.reset


def test_pings_are_answered_and_answers_reported() -> None:
    couple = Couple()
    couple.one.ping(7)
    couple.settle()
    assert couple.events[couple.one] == [Pong(7)]


def test_a_farewell_is_reported_with_its_reason() -> None:
    couple = Couple()
    couple.one.go_away(GoAway.INTERNAL_ERROR)
    couple.settle()
    assert couple.events[couple.two] == [Departed(2)]


def test_openers_wait_for_answers() -> None:
    couple = Couple()
    streams = [couple.one.open() for _ in range(MAX_UNACKNOWLEDGED)]
    assert not couple.one.may_open
    couple.settle()
    opened = couple.events[couple.two][0]
    assert isinstance(opened, Opened)
    couple.two.accept(opened.stream)
    couple.settle()
    assert couple.one.may_open
    assert Acknowledged() in couple.events[couple.one]
    for stream in streams:
        couple.one.reset(stream)
    assert couple.one.num_streams == 0


def test_streams_beyond_the_limit_are_refused() -> None:
    mux = Mux(initiator=False)
    events: list[Event] = []
    for number in range(MAX_STREAMS + 1):
        events += mux.receive(frame(UPDATE, SYN, 2 * number + 1, 0))
    assert len([event for event in events if isinstance(event, Opened)]) == MAX_STREAMS
    assert b"".join(mux.next_messages(1)) == frame(UPDATE, RST, 2 * MAX_STREAMS + 1, 0)


def test_a_connection_full_of_unread_bytes_loses_the_stream_that_fills_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(muxing, "MAX_UNREAD_BYTES", 1000)
    couple = Couple()
    first, _ = couple.stream()
    second, far = couple.stream()
    send_all(couple, couple.one, first, bytes(900))
    send_all(couple, couple.one, second, bytes(200))
    assert (first.reset, second.reset) == (False, True)
    assert Readable(far) in couple.events[couple.two]


def test_small_pieces_are_joined() -> None:
    couple = Couple()
    near, far = couple.stream()
    for _ in range(1000):
        couple.one.send(near, memoryview(b"x"))
    couple.settle()
    assert far.inbox.num_pieces == 1
    assert couple.two.read(far, 999, 0.0) == b"x" * 999
    send_all(couple, couple.one, near, b"y")
    assert couple.two.read(far, None, 0.0) == b"xy"


def test_a_busy_answerer_is_no_victim() -> None:
    """Pings answered over time are no flood, however much else is queued."""
    mux = Mux(initiator=False)
    stream = mux.open()
    for number in range(3 * 1000):
        mux.receive(frame(PING, SYN, 0, number))
        mux.receive(frame(UPDATE, 0, stream.stream_id, 10))
        mux.send(stream, memoryview(b"0123456789"))
        b"".join(mux.next_messages(1))


def test_an_asker_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muxing, "MAX_QUEUED_FRAMES", 100)
    mux = Mux(initiator=False)
    with pytest.raises(ViolationError, match="without reading"):
        mux.receive(frame(PING, SYN, 0, 1) * 101)


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        (frame(DATA, 0, 1, 0, version=1), "version 1"),
        (frame(9, 0, 1, 0), "type 9"),
        (frame(DATA, 0, 1, 0), "never opened"),
        (frame(UPDATE, 0, 2, 5), "never opened"),
        (frame(UPDATE, SYN, 0, 0), "cannot be opened"),
        (frame(UPDATE, SYN, 2, 0), "cannot be opened"),
        (frame(UPDATE, SYN, 1, 0) * 2, "cannot be opened"),
        (frame(UPDATE, SYN, 5, 0) + frame(UPDATE, SYN, 3, 0), "opened after"),
        (frame(DATA, SYN, 1, INITIAL_WINDOW_BYTES + 1), "were granted"),
        (frame(UPDATE, SYN, 1, 2**32 - 1) + frame(UPDATE, 0, 1, 2**32 - 1), "window beyond"),
        (frame(UPDATE, SYN | FIN, 1, 0) + frame(DATA, 0, 1, 1, b"x"), "after its end"),
    ],
)
def test_violations_are_named(wire: bytes, complaint: str) -> None:
    with pytest.raises(ViolationError, match=complaint):
        Mux(initiator=False).receive(wire)


@given(st.binary(max_size=400))
def test_garbage_is_a_violation_or_nothing(wire: bytes) -> None:
    mux = Mux(initiator=False)
    with contextlib.suppress(ViolationError):
        mux.receive(wire)
    assert mux.queued_bytes <= len(wire)


@given(st.lists(st.tuples(st.sampled_from("osrfx"), st.integers(0, 3), st.integers(1, 70_000)), max_size=60))
def test_any_course_of_events_agrees_on_both_sides(course: list[tuple[str, int, int]]) -> None:
    couple = Couple()
    pairs: list[tuple[MuxStream, MuxStream]] = []
    sent: dict[MuxStream, bytes] = {}
    got: dict[MuxStream, bytes] = {}
    for act, which, size in course:
        if act == "o" and len(pairs) < 4:
            pairs.append(couple.stream())
            sent[pairs[-1][0]] = got[pairs[-1][0]] = b""
        if which >= len(pairs):
            continue
        near, far = pairs[which]
        data = bytes([which]) * size
        if act == "s":
            sent[near] += data[: send_all(couple, couple.one, near, data)]
        elif act == "r" and far.inbox.num_bytes:
            got[near] += couple.two.read(far, size, 0.0)
            couple.settle()
        elif act == "f":
            couple.one.finish(near)
            couple.settle()
        elif act == "x":
            couple.two.reset(far)
            couple.settle()
    for near, far in pairs:
        got[near] += couple.two.read(far, None, 0.0)
        assert sent[near].startswith(got[near])
        assert near.reset or got[near] == sent[near] or far.reset
        assert near.local_end == far.remote_end or near.reset
