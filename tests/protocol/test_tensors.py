"""Tensors are counted by their bytes alone."""

from __future__ import annotations

import random
import struct

import pytest

from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import Row, check_payload
from corolla.protocol.tensors import DType, Encoding, TensorSpec, count_tokens, is_finite


def test_bytes_of_a_token() -> None:
    assert Encoding.FLOAT32.token_bytes(576) == 2304
    assert Encoding.BFLOAT16.token_bytes(576) == Encoding.FLOAT16.token_bytes(576) == 1152


def test_bytes_of_a_tensor() -> None:
    assert TensorSpec(DType.FLOAT32, (3, 5)).num_bytes == 60
    assert TensorSpec(DType.BFLOAT16, ()).num_bytes == 2


def test_tokens_are_counted_and_fractions_refused() -> None:
    assert count_tokens(bytes(48), Encoding.FLOAT32, 4) == 3
    with pytest.raises(CorollaError, match="multiple of 16") as caught:
        count_tokens(bytes(50), Encoding.FLOAT32, 4)
    assert caught.value.code is Code.BAD_SHAPE


def test_a_payload_must_hold_just_the_rows_tokens() -> None:
    rows = (Row(0, 3, 2), Row(1, 8, 1))
    check_payload(rows, bytes(12), 4)
    with pytest.raises(CorollaError, match="expected 12"):
        check_payload(rows, bytes(13), 4)


def test_a_number_that_is_not_finite_is_found_in_every_encoding() -> None:
    rng = random.Random(3)
    for encoding, form in ((Encoding.FLOAT32, "f"), (Encoding.FLOAT16, "e")):
        numbers = [rng.uniform(-6e4, 6e4) for _ in range(64)]
        assert is_finite(struct.pack(f"<64{form}", *numbers), encoding, 8)
        for bad in (float("nan"), float("inf"), float("-inf")):
            numbers[rng.randrange(64)] = bad
            assert not is_finite(struct.pack(f"<64{form}", *numbers), encoding, 8)
    for bits, finite in ((0x7F7F, True), (0xFF7F, True), (0x7F80, False), (0xFF80, False), (0x7FC0, False)):
        assert is_finite(struct.pack("<4H", 0, 0x3F80, bits, 1), Encoding.BFLOAT16, 4) is finite
    assert is_finite(b"", Encoding.FLOAT32, 4)


def test_scales_decide_whether_bytes_in_blocks_are_finite() -> None:
    """Of 100 numbers a token has two blocks; its codes are any bytes, also those that look like infinity."""
    token = struct.pack("<2H", 0x3F80, 0x7F7F) + bytes([0x80, 0x7F] * 50)
    assert len(token) == Encoding.INT8.token_bytes(100) == 104
    assert is_finite(token * 3, Encoding.INT8, 100)
    for bits in (0x7F80, 0xFF80, 0x7FC0):
        bad = struct.pack("<2H", 0, bits) + bytes(100)
        assert not is_finite(token + bad, Encoding.INT8, 100)
