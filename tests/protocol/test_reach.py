"""Bytes of the reach protocol, version 1, and what it refuses."""

from __future__ import annotations

import pytest

from corolla.protocol.errors import CorollaError
from corolla.protocol.framing import FrameParser
from corolla.protocol.limits import MAX_NAME_CHARS
from corolla.protocol.messages import Message, Vocabulary, encode
from corolla.protocol.reach import REACH, RING, Dialled, DialMe, Nonce

NONCE = bytes(range(16))
GOLDEN: list[tuple[Vocabulary, Message, str]] = [
    (
        REACH,
        DialMe("/ip4/192.0.2.7/tcp/4517", NONCE),
        "0000004100000000a360676469616c5f6d656761646472657373772f6970342f3139322e302e322e372f7463702f343531"
        "37656e6f6e636550000102030405060708090a0b0c0d0e0f",
    ),
    (
        REACH,
        Dialled(tried=True, reason="refused"),
        "0000002000000000a360676469616c6c6564657472696564f566726561736f6e6772656675736564",
    ),
    (
        RING,
        Nonce(NONCE),
        "0000001f00000000a260656e6f6e6365656e6f6e636550000102030405060708090a0b0c0d0e0f",
    ),
]


@pytest.mark.parametrize(("vocabulary", "message", "wire"), GOLDEN)
def test_version_1_is_written_and_read_as_ever(vocabulary: Vocabulary, message: Message, wire: str) -> None:
    assert encode(message).hex() == wire
    parser = FrameParser()
    parser.feed(bytes.fromhex(wire))
    (frame,) = parser.frames()
    assert vocabulary.decode(frame) == message


@pytest.mark.parametrize(
    "make",
    [
        lambda: DialMe("/ip4/192.0.2.7/tcp/1", b"short"),
        lambda: DialMe("/" * (MAX_NAME_CHARS + 1), NONCE),
        lambda: Dialled(tried=True, reason="x" * (MAX_NAME_CHARS + 1)),
        lambda: Nonce(NONCE + b"x"),
    ],
)
def test_what_is_too_long_or_too_short_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises((ValueError, CorollaError)):
        make()
