"""Tensors as bytes: dtype, shape, encoding. The daemon counts these bytes and never looks inside.

Hidden states travel flattened and without padding, `(num_tokens, hidden_size)`, rows one after another.
Every encoding spends the same number of bytes on every token and none of its blocks crosses a token, so
that any cut between tokens is a cut between bytes: chunks, batches, histories and replays encode alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

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

    INT8: one scale for each output. INT4, NF4: groups of 64 weights of an output.
    """

    INT8 = "int8"
    INT4 = "int4"
    NF4 = "nf4"


class Encoding(StrEnum):
    """How hidden states are written on the wire; fixed when a session opens."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    def token_bytes(self, hidden_size: int) -> int:
        """Bytes of one token's hidden state."""
        return DType(self.value).num_bytes * hidden_size


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


def is_finite(payload: bytes, encoding: Encoding) -> bool:
    """Whether no number of these is NaN or infinite: none has an exponent of ones alone.

    Little endian, so a number's last byte holds its sign and seven bits of the exponent (float16: all five).
    Such bytes are rare, so that mostly two searches in C answer for all numbers.
    """
    size = DType(encoding.value).num_bytes
    high = payload[size - 1 :: size]
    if encoding is Encoding.FLOAT16:
        return not any(byte & 0x7C == 0x7C for byte in set(high))
    if b"\x7f" not in high and b"\xff" not in high:
        return True
    return not any(
        a & 0x7F == 0x7F and b & 0x80 for a, b in zip(high, payload[size - 2 :: size], strict=True)
    )
