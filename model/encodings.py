"""Hidden states as bytes of a wire encoding, and back.

Owns the numbers' formats; how bytes are framed is `protocol`'s business. In all encodings one token's bytes
follow another's, so that parts of a payload are parts of the tensor; what one token becomes depends on that
token alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor

from ..protocol.errors import Code, error
from ..protocol.tensors import INT8_BLOCK, DType, Encoding, count_tokens, int8_blocks
from .transfers import to_device

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
    if encoding is Encoding.INT8:
        return _encode_int8(hidden.detach().to(device="cpu", dtype=torch.float32))
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
    if not num_tokens:
        return torch.empty((0, hidden_size), dtype=dtype, device=device)
    if encoding is Encoding.INT8:
        hidden = _decode_int8(payload, num_tokens, hidden_size)
    else:
        wire = _DTYPES[encoding.value]
        hidden = torch.frombuffer(bytearray(payload), dtype=wire).view(num_tokens, hidden_size)
    check_finite(hidden)
    return to_device(hidden, device).to(dtype)


def _encode_int8(hidden: Tensor) -> bytes:
    """hidden: (num_tokens, hidden_size) float32. Scales are rounded up to bfloat16, codes chosen for them."""
    check_finite(hidden)
    num_tokens, hidden_size = hidden.shape
    if not num_tokens:
        return b""
    blocks = F.pad(hidden, (0, -hidden_size % INT8_BLOCK)).view(num_tokens, -1, INT8_BLOCK)
    exact = blocks.abs().amax(dim=-1) / 127  # (num_tokens, blocks)
    halves = ((exact.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16)
    scales = halves.view(torch.bfloat16).float()
    codes = blocks / torch.where(scales > 0, scales, 1.0)[..., None]
    signed = codes.round_().clamp_(-127, 127).to(torch.int8).view(num_tokens, -1)[:, :hidden_size]
    payload = torch.cat([halves.view(torch.uint8), signed.contiguous().view(torch.uint8)], dim=1)
    return payload.numpy().tobytes()


def _decode_int8(payload: bytes, num_tokens: int, hidden_size: int) -> Tensor:
    """(num_tokens, hidden_size) float32."""
    tokens = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(num_tokens, -1)
    num_scale_bytes = 2 * int8_blocks(hidden_size)
    scales = tokens[:, :num_scale_bytes].contiguous().view(torch.bfloat16).float()
    codes = tokens[:, num_scale_bytes:].contiguous().view(torch.int8).float()
    return codes * scales.repeat_interleave(INT8_BLOCK, dim=1)[:, :hidden_size]


def check_finite(hidden: Tensor) -> None:
    """Raise `NOT_FINITE`, naming the first token, unless all of (num_tokens, hidden_size) is finite."""
    if math.isfinite(hidden.sum().item()):  # one number that is not makes the sum so, too
        return
    finite = torch.isfinite(hidden)
    if bool(finite.all()):  # a sum may be too large where no number is
        return
    token = int((~finite.all(dim=-1)).nonzero()[0])
    value = float(hidden[token][~finite[token]][0])
    raise error(
        Code.NOT_FINITE,
        f"{int((~finite).sum())} hidden numbers are not finite; the first, {value}, is of token {token}",
        token=token,
    )
