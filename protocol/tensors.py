"""Tensors as bytes: dtype, shape, encoding. The daemon counts these bytes and never looks inside.

Hidden states travel flattened and without padding, `(num_tokens, hidden_size)`, rows one after another.
Every encoding spends the same number of bytes on every token and none of its blocks crosses a token, so
that any cut between tokens is a cut between bytes: chunks, batches, histories and replays encode alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .errors import Code, error


class DType(StrEnum):
    """Number formats of hidden states and weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def num_bytes(self) -> int:
        """Bytes of one number."""
        return 4 if self is DType.FLOAT32 else 2


class Quantization(StrEnum):
    """How weights are kept in fewer bits; computing goes on in the worker's dtype.

    INT8: one scale for each output. INT4: a step and a middle for each 32 weights of an output. NF4: a scale for 64.
    """

    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"


# Numbers of a token that share a scale in `Encoding.INT8`: an outlier coarsens only so many; a scale costs 3 %.
INT8_BLOCK: Final = 64


class Encoding(StrEnum):
    """How hidden states are written on the wire; fixed when a session opens.

    INT8: of each token first the scales of its blocks of `INT8_BLOCK` numbers (the last may be shorter), as
    bfloat16, then a signed byte for each number. A number is its byte, -127 to 127, times its block's scale.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"

    def token_bytes(self, hidden_size: int) -> int:
        """Bytes of one token's hidden state."""
        if self is Encoding.INT8:
            return 2 * int8_blocks(hidden_size) + hidden_size
        return DType(self.value).num_bytes * hidden_size


def int8_blocks(hidden_size: int) -> int:
    """Blocks, and so scales, of one token in `Encoding.INT8`."""
    return -(-hidden_size // INT8_BLOCK)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a raw tensor's bytes mean: C order, little endian."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Length of the tensor's bytes."""
        total = self.dtype.num_bytes
        for size in self.shape:
            total *= size
        return total


def count_tokens(payload: bytes, encoding: Encoding, hidden_size: int) -> int:
    """How many tokens a payload of hidden states holds. Raises `BAD_SHAPE` if it is no whole number."""
    token_bytes = encoding.token_bytes(hidden_size)
    num_tokens, rest = divmod(len(payload), token_bytes)
    if rest:
        raise error(
            Code.BAD_SHAPE,
            f"{len(payload)} bytes of hidden states, expected a multiple of {token_bytes}"
            f" (hidden_size {hidden_size}, {encoding})",
        )
    return num_tokens


def is_finite(payload: bytes, encoding: Encoding, hidden_size: int) -> bool:
    """Whether no number of these is NaN or infinite: none has an exponent of ones alone.

    Little endian, so a number's last byte holds its sign and seven bits of the exponent (float16: all five).
    Such bytes are rare, so that mostly two searches in C answer for all numbers. In `INT8` the scales decide.
    """
    if encoding is Encoding.INT8:
        token, scales = encoding.token_bytes(hidden_size), 2 * int8_blocks(hidden_size)
        payload = b"".join(payload[at : at + scales] for at in range(0, len(payload), token))
        encoding = Encoding.BFLOAT16
    size = DType(encoding.value).num_bytes
    high = payload[size - 1 :: size]
    if encoding is Encoding.FLOAT16:
        return not any(byte & 0x7C == 0x7C for byte in set(high))
    if b"\x7f" not in high and b"\xff" not in high:
        return True
    return not any(
        a & 0x7F == 0x7F and b & 0x80 for a, b in zip(high, payload[size - 2 :: size], strict=True)
    )
