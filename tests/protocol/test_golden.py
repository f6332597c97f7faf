"""Bytes of protocol version 1. If one of these changes, peers of the last release no longer understand us."""

from __future__ import annotations

import pytest

from corolla.protocol.framing import FrameParser
from corolla.protocol.messages import Message, Vocabulary, encode
from corolla.protocol.steps import (
    PUSH,
    SESSION,
    Attach,
    Chain,
    CloseSession,
    Hop,
    KeepPages,
    LinkHop,
    OpenSession,
    Receipt,
    Reply,
    Result,
    Row,
    Stage,
    Step,
)
from corolla.protocol.tensors import Encoding

ID = bytes(range(16))
GOLDEN: list[tuple[Vocabulary, Message, str]] = [
    (
        SESSION,
        OpenSession(ID, "f1" * 32, 0, 8, 16, Encoding.FLOAT32, 2, 512),
        "000000ab00000000a960646f70656e6773657373696f6e50000102030405060708090a0b0c0d0e0f6b66696e67657270"
        "72696e747840663166316631663166316631663166316631663166316631663166316631663166316631663166316631"
        "6631663166316631663166316631663166316631663166776f726b6572006573746172740863656e641068656e636f64"
        "696e6767666c6f61743332686d61785f726f7773026a6d61785f746f6b656e73190200",
    ),
    (
        SESSION,
        OpenSession(ID, "f1" * 32, 0, 8, 10, Encoding.FLOAT32, 2, 512, (bytes(range(32)), b"")),
        "000000d500000000aa60646f70656e6773657373696f6e50000102030405060708090a0b0c0d0e0f6b66696e67657270"
        "72696e747840663166316631663166316631663166316631663166316631663166316631663166316631663166316631"
        "6631663166316631663166316631663166316631663166776f726b6572006573746172740863656e640a68656e636f64"
        "696e6767666c6f61743332686d61785f726f7773026a6d61785f746f6b656e7319020065706172747382582000010203"
        "0405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f40",
    ),
    (
        SESSION,
        LinkHop(ID, 3, None, Hop("12D3KooWPeer", 1), 7, (5, 9)),
        "0000006100000000a760646c696e6b6773657373696f6e50000102030405060708090a0b0c0d0e0f6565706f63680368"
        "757073747265616df66a646f776e73747265616d826c313244334b6f6f57506565720169626173655f7374657007676c"
        "656e67746873820509",
    ),
    (
        PUSH,
        Step(ID, 3, 8, (Row(0, 5, 1), Row(1, 9, 1)), 7, Reply.LAST, payload=b"\x01\x02\x03\x04"),
        "0000005400000004a76064737465706773657373696f6e50000102030405060708090a0b0c0d0e0f6565706f63680367"
        "737465705f69640864726f777382830005018301090169636f6d6d697474656407657265706c79646c61737401020304",
    ),
    (
        PUSH,
        Attach(ID, "12D3KooWClient", 3, 0, 1),
        "0000005700000000a660666174746163686773657373696f6e50000102030405060708090a0b0c0d0e0f66636c69656e"
        "746e313244334b6f6f57436c69656e746565706f6368036b66726f6d5f776f726b65720069746f5f776f726b657201",
    ),
    (
        SESSION,
        Receipt(ID, 3, 8, Stage.SENT),
        "0000003e00000000a56067726563656970746773657373696f6e50000102030405060708090a0b0c0d0e0f6565706f63"
        "680367737465705f6964086573746167656473656e74",
    ),
    (
        SESSION,
        Result(ID, 3, 8, b"\x01\x02"),
        "0000003200000002a46066726573756c746773657373696f6e50000102030405060708090a0b0c0d0e0f6565706f6368"
        "0367737465705f6964080102",
    ),
    (
        SESSION,
        KeepPages(ID, 3, 8, (Chain((ID,)), Chain())),
        "0000005000000000a560646b6565706773657373696f6e50000102030405060708090a0b0c0d0e0f6565706f63680367"
        "737465705f69640864726f777382a1656e616d65738150000102030405060708090a0b0c0d0e0fa0",
    ),
    (
        SESSION,
        CloseSession(ID),
        "0000002100000000a26065636c6f73656773657373696f6e50000102030405060708090a0b0c0d0e0f",
    ),
]


@pytest.mark.parametrize(
    ("vocabulary", "message", "wire"), GOLDEN, ids=lambda value: getattr(value, "KIND", "")
)
def test_version_1_is_written_and_read_as_ever(vocabulary: Vocabulary, message: Message, wire: str) -> None:
    assert encode(message).hex() == wire
    parser = FrameParser()
    parser.feed(bytes.fromhex(wire))
    (frame,) = parser.frames()
    assert vocabulary.decode(frame) == message
