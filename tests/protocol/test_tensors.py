"""Tensors are counted by their bytes alone."""

from __future__ import annotations

import pytest

from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import Row, check_payload
from corolla.protocol.tensors import DType, Encoding, TensorSpec, count_tokens


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
