"""Frames survive any cutting, and are refused by their lengths alone."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.protocol.errors import Code, PeerError
from corolla.protocol.framing import Frame, FrameParser, encode_frame


@given(
    frames=st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=80)), max_size=6),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=20),
)
def test_any_cutting_gives_the_same_frames(frames: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    wire = b"".join(encode_frame(header, payload) for header, payload in frames)
    parser, seen, position, turn = FrameParser(), [], 0, 0
    while position < len(wire):
        size = cuts[turn % len(cuts)]
        parser.feed(wire[position : position + size])
        seen += list(parser.frames())
        position, turn = position + size, turn + 1
    assert seen == [Frame(header, payload) for header, payload in frames]
    assert parser.num_buffered_bytes == 0


def test_an_unfinished_frame_is_seen_at_the_end() -> None:
    parser = FrameParser()
    parser.feed(encode_frame(b"head", b"payload")[:-1])
    assert list(parser.frames()) == []
    assert parser.num_buffered_bytes == 8 + 4 + 6


@pytest.mark.parametrize(("header_bytes", "payload_bytes"), [(11, 0), (0, 21), (2**32 - 1, 2**32 - 1)])
def test_a_frame_over_the_limits_is_refused_by_its_lengths(header_bytes: int, payload_bytes: int) -> None:
    parser = FrameParser(max_header_bytes=10, max_payload_bytes=20)
    parser.feed(struct.pack(">II", header_bytes, payload_bytes))
    with pytest.raises(PeerError, match=str(header_bytes)) as caught:
        list(parser.frames())
    assert caught.value.code is Code.LIMIT_EXCEEDED


def test_frames_at_the_limits_pass() -> None:
    parser = FrameParser(max_header_bytes=10, max_payload_bytes=20)
    parser.feed(encode_frame(b"h" * 10, b"p" * 20))
    assert [frame.header for frame in parser.frames()] == [b"h" * 10]
