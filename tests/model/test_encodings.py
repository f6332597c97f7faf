"""Hidden states as bytes."""

from __future__ import annotations

import math

import pytest
import torch

from corolla.model.encodings import check_finite, decode, encode, torch_dtype
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.tensors import DType, Encoding

CPU = torch.device("cpu")


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_the_encoding_holds_come_back_unchanged(encoding: Encoding, dtype: torch.dtype) -> None:
    hidden = torch.arange(-12, 12, dtype=dtype).view(4, 6) / 4
    payload = encode(hidden, encoding)
    assert len(payload) == 4 * encoding.token_bytes(6)
    back = decode(payload, encoding, 6, dtype, CPU)
    assert back.dtype is dtype
    assert torch.equal(back, hidden)


def test_bytes_are_little_endian_and_token_after_token() -> None:
    hidden = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    assert encode(hidden, Encoding.FLOAT32).hex() == "0000803f000000c00000003f00000000"
    assert encode(hidden.T, Encoding.FLOAT32).hex() == "0000803f0000003f000000c000000000"
    assert encode(hidden, Encoding.BFLOAT16).hex() == "803f00c0003f0000"


def test_parts_of_a_payload_are_parts_of_the_tensor() -> None:
    hidden = torch.randn(5, 3)
    payload = encode(hidden, Encoding.FLOAT16)
    size = Encoding.FLOAT16.token_bytes(3)
    assert payload[2 * size : 4 * size] == encode(hidden[2:4], Encoding.FLOAT16)


def test_no_tokens_are_no_bytes() -> None:
    assert encode(torch.empty(0, 8), Encoding.BFLOAT16) == b""
    assert decode(b"", Encoding.BFLOAT16, 8, torch.float32, CPU).shape == (0, 8)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_both_ways_by_token(value: float) -> None:
    hidden = torch.zeros(4, 3)
    hidden[2, 1] = value
    for attempt in (
        lambda: encode(hidden, Encoding.FLOAT32),
        lambda: decode(hidden.numpy().tobytes(), Encoding.FLOAT32, 3, torch.float32, CPU),
        lambda: check_finite(hidden),
    ):
        with pytest.raises(CorollaError) as caught:
            attempt()
        assert caught.value.code is Code.NOT_FINITE
        assert caught.value.details["token"] == 2


def test_a_number_too_large_for_the_encoding_is_refused() -> None:
    with pytest.raises(CorollaError) as caught:
        encode(torch.tensor([[1e6]]), Encoding.FLOAT16)
    assert caught.value.code is Code.NOT_FINITE


def test_a_payload_of_no_whole_number_of_tokens_is_refused() -> None:
    with pytest.raises(CorollaError) as caught:
        decode(bytes(20), Encoding.FLOAT32, 3, torch.float32, CPU)
    assert caught.value.code is Code.BAD_SHAPE


def test_every_number_format_has_a_name_in_torch() -> None:
    assert {torch_dtype(dtype).itemsize for dtype in DType} == {2, 4}
