"""Hidden states as bytes."""

from __future__ import annotations

import math

import pytest
import torch

from corolla.model.encodings import check_finite, decode, encode, torch_dtype
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.tensors import INT8_BLOCK, DType, Encoding

CPU = torch.device("cpu")


EXACT = [encoding for encoding in Encoding if encoding is not Encoding.INT8]


@pytest.mark.parametrize("encoding", EXACT)
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


# eight bits


@pytest.mark.parametrize("hidden_size", [64, 100, 576])
def test_eight_bits_are_wrong_by_at_most_half_a_step_of_their_block(hidden_size: int) -> None:
    hidden = torch.randn(7, hidden_size) * torch.logspace(-6, 6, 7)[:, None]
    hidden[3, 5] = 1e6
    payload = encode(hidden, Encoding.INT8)
    assert len(payload) == 7 * Encoding.INT8.token_bytes(hidden_size)
    back = decode(payload, Encoding.INT8, hidden_size, torch.float32, CPU)
    for first in range(0, hidden_size, INT8_BLOCK):
        block = slice(first, first + INT8_BLOCK)
        step = hidden[:, block].abs().amax(dim=1) / 127 * (1 + 2**-7)
        assert bool(((back - hidden)[:, block].abs().amax(dim=1) <= step / 2 * 1.001).all())


def test_eight_bits_of_a_token_do_not_depend_on_its_neighbours() -> None:
    hidden = torch.randn(6, 100)
    hidden[2] *= 1e5
    size = Encoding.INT8.token_bytes(100)
    payload = encode(hidden, Encoding.INT8)
    for token in range(6):
        alone = encode(hidden[token : token + 1], Encoding.INT8)
        assert payload[token * size : (token + 1) * size] == alone


def test_zeros_and_the_largest_numbers_survive_eight_bits() -> None:
    hidden = torch.zeros(2, 64)
    hidden[1, 7] = torch.finfo(torch.float32).max
    back = decode(encode(hidden, Encoding.INT8), Encoding.INT8, 64, torch.float32, CPU)
    assert torch.equal(back[0], hidden[0])
    assert float(back[1, 7] / hidden[1, 7]) == pytest.approx(1, abs=0.01)


def test_a_scale_that_is_not_finite_is_refused() -> None:
    payload = b"\x80\x7f" + bytes([1] * 64)
    with pytest.raises(CorollaError) as caught:
        decode(payload, Encoding.INT8, 64, torch.float32, CPU)
    assert caught.value.code is Code.NOT_FINITE


def test_no_tokens_are_no_bytes_in_eight_bits_too() -> None:
    assert encode(torch.empty(0, 8), Encoding.INT8) == b""
