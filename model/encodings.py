"""Hidden states as bytes of a wire encoding, and back.

Owns the numbers' formats; how bytes are framed is `protocol`'s business. All encodings so far are raw:
C order, little endian, token after token, so that parts of a payload are parts of the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from ..protocol.errors import Code, error
from ..protocol.tensors import DType, Encoding, count_tokens

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    DType.FLOAT32.value: torch.float32,
    DType.BFLOAT16.value: torch.bfloat16,
    DType.FLOAT16.value: torch.float16,
}


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's name of a number format."""
    return _DTYPES[dtype.value]


def encode(hidden: Tensor, encoding: Encoding) -> bytes:
    """Bytes of hidden states (num_tokens, hidden_size) of any dtype and device.

    Raises `NOT_FINITE` if a number is not finite, or is too large for the encoding.
    """
    numbers = hidden.detach().to(device="cpu", dtype=_DTYPES[encoding.value]).contiguous()
    check_finite(numbers)
    return numbers.view(torch.uint8).numpy().tobytes()


def decode(
    payload: bytes, encoding: Encoding, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Hidden states (num_tokens, hidden_size) in `dtype` on `device`.

    Raises `BAD_SHAPE` if the payload holds no whole number of tokens, `NOT_FINITE` if a number is not finite.
    """
    num_tokens = count_tokens(payload, encoding, hidden_size)
    wire = _DTYPES[encoding.value]
    if not num_tokens:
        return torch.empty((0, hidden_size), dtype=dtype, device=device)
    hidden = torch.frombuffer(bytearray(payload), dtype=wire).view(num_tokens, hidden_size)
    check_finite(hidden)
    return hidden.to(device=device, dtype=dtype)


def check_finite(hidden: Tensor) -> None:
    """Raise `NOT_FINITE`, naming the first token, unless all of (num_tokens, hidden_size) is finite."""
    finite = torch.isfinite(hidden)
    if bool(finite.all()):
        return
    token = int((~finite.all(dim=-1)).nonzero()[0])
    value = float(hidden[token][~finite[token]][0])
    raise error(
        Code.NOT_FINITE,
        f"{int((~finite).sum())} hidden numbers are not finite; the first, {value}, is of token {token}",
        token=token,
    )
