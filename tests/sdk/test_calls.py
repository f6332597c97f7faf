"""The sans-IO half of a connection, by itself."""

from __future__ import annotations

import pytest

from corolla.protocol.control import TO_DAEMON, Call, Cancel, Item, Refused, Return
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.framing import FrameParser, encode_frame
from corolla.protocol.limits import MAX_CALLS_PER_CONNECTION, MAX_LOCAL_PAYLOAD_BYTES
from corolla.protocol.messages import Message, encode
from corolla.sdk.calls import Calls


def said(frame: bytes) -> Message:
    parser = FrameParser()
    parser.feed(frame)
    (only,) = parser.frames()
    return TO_DAEMON.decode(only)


def test_answers_find_their_call_however_they_are_cut() -> None:
    calls = Calls()
    first, frame = calls.open("status")
    second, _ = calls.open("models")
    assert said(frame) == Call(first, "status", None)
    data = encode(Item(second, "a")) + encode(Return(first, "done")) + encode(Return(second, "b", b"payload"))
    for byte in data:
        calls.feed(bytes([byte]))
    assert calls.take(first) == Return(first, "done")
    assert calls.take(second) == Item(second, "a")
    assert calls.take(second) == Return(second, "b", b"payload")
    assert calls.take(second) is None


def test_a_refusal_comes_after_the_items_before_it() -> None:
    calls = Calls()
    call, _ = calls.open("generate")
    calls.feed(encode(Item(call, 1)) + encode(Refused.of(call, error(Code.BUSY, "full"))))
    assert calls.take(call) == Item(call, 1)
    with pytest.raises(CorollaError, match="full"):
        calls.take(call)


def test_leaving_cancels_once_and_only_what_is_unanswered() -> None:
    calls = Calls()
    call, _ = calls.open("generate")
    assert said(calls.leave(call)) == Cancel(call)
    calls.feed(encode(Item(call, 1)) + encode(Return(call)))
    assert calls.leave(call) == b""
    other, _ = calls.open("status")
    calls.feed(encode(Return(other)))
    assert calls.leave(other) == b""


def test_the_end_reaches_every_waiter_after_what_came_before() -> None:
    calls = Calls()
    first, _ = calls.open("generate")
    second, _ = calls.open("status")
    calls.feed(encode(Item(first, 1)))
    calls.feed(b"")
    assert calls.take(first) == Item(first, 1)
    for call in (first, second):
        with pytest.raises(CorollaError) as caught:
            calls.take(call)
        assert caught.value.code is Code.NO_DAEMON
    with pytest.raises(CorollaError):
        calls.open("status")


def test_garbage_ends_the_connection_and_a_newer_daemon_does_not() -> None:
    calls = Calls()
    call, _ = calls.open("status")
    calls.feed(encode_frame(b"\xa1\x60\x65novel"))  # {"": "novel"}: a kind unknown here
    assert calls.take(call) is None
    calls.feed(encode_frame(b"\xff"))
    with pytest.raises(CorollaError) as caught:
        calls.take(call)
    assert caught.value.code is Code.PROTOCOL_VIOLATION


def test_a_refused_connection_says_why() -> None:
    calls = Calls()
    call, _ = calls.open("status")
    calls.feed(encode(Refused.of(0, error(Code.BUSY, "256 programs are connected"))))
    calls.feed(b"")
    with pytest.raises(CorollaError, match="256 programs"):
        calls.take(call)


def test_calls_and_payloads_are_bounded() -> None:
    calls = Calls()
    with pytest.raises(CorollaError) as caught:
        calls.open("session.step", None, bytes(MAX_LOCAL_PAYLOAD_BYTES + 1))
    assert caught.value.code is Code.TOO_LONG
    for _ in range(MAX_CALLS_PER_CONNECTION):
        calls.open("status")
    with pytest.raises(CorollaError) as caught:
        calls.open("status")
    assert caught.value.code is Code.LIMIT_EXCEEDED
