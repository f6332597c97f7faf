"""Hidden states between the caller's arrays and the wire's bytes: numpy or torch in, the same kind out.

Neither library is imported here unless the caller's own array brought it along. numpy knows no bfloat16: its
arrays are float32 or float16, and a session whose wire is bfloat16 rounds them to the nearest, ties to even.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final

from ..protocol.errors import Code, error
from ..protocol.tensors import INT8_BLOCK, DType, Encoding, int8_blocks

_REMEDY: Final = "give a numpy array or a torch tensor of float32, float16 or (torch) bfloat16"


@dataclass(frozen=True, slots=True)
class Kind:
    """What the caller gave, so that the answer can be given alike."""

    library: str  # "numpy" or "torch"
    dtype: DType
    device: Any = None


def kind_of(hidden: Any) -> Kind:
    """The library, dtype and device of an array. Raises `BAD_DTYPE`."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(hidden, torch.Tensor):
        return Kind("torch", _dtype(str(hidden.dtype).removeprefix("torch.")), hidden.device)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(hidden, numpy.ndarray):
        return Kind("numpy", _dtype(str(hidden.dtype)))
    raise error(Code.BAD_DTYPE, f"hidden states as {type(hidden).__name__}", _REMEDY)


def check_shape(hidden: Any, num_dimensions: int, hidden_size: int) -> None:
    """Raise `BAD_SHAPE` unless the array has so many dimensions, the last of them `hidden_size`."""
    shape = tuple(int(size) for size in hidden.shape)
    expected = ("rows, n, " if num_dimensions == 3 else "tokens, ") + str(hidden_size)
    if len(shape) != num_dimensions:
        raise error(
            Code.BAD_SHAPE,
            f"hidden states of shape {shape}, expected {num_dimensions} dimensions: ({expected})",
        )
    if shape[-1] != hidden_size:
        raise error(
            Code.BAD_SHAPE,
            f"hidden_size {shape[-1]}, expected {hidden_size}",
            "give the hidden states of this model: its embeddings, or what its earlier blocks gave",
        )


def to_bytes(hidden: Any, kind: Kind, encoding: Encoding) -> bytes:
    """The wire's bytes of hidden states (…, hidden_size), in C order.

    Raises `NOT_FINITE` for NaN and infinity, also those that a narrower wire would make of large numbers.
    """
    return _torch_bytes(hidden, encoding) if kind.library == "torch" else _numpy_bytes(hidden, encoding)


def from_bytes(data: bytes, shape: tuple[int, ...], kind: Kind, encoding: Encoding) -> Any:
    """Hidden states of this shape, as the kind of array that the caller gave."""
    return (
        _torch_from(data, shape, kind, encoding)
        if kind.library == "torch"
        else _numpy_from(data, shape, kind, encoding)
    )


def _dtype(name: str) -> DType:
    try:
        return DType(name)
    except ValueError:
        raise error(Code.BAD_DTYPE, f"hidden states of {name}", _REMEDY) from None


def _not_finite(count: int, total: int, encoding: Encoding) -> Exception:
    return error(
        Code.NOT_FINITE,
        f"{count} of {total} hidden values are NaN or infinite as {encoding}",
        "look for an overflow in what computed them; float32 holds the largest numbers",
    )


def _torch_bytes(hidden: Any, encoding: Encoding) -> bytes:
    import torch

    if encoding is Encoding.INT8:
        return _numpy_bytes(hidden.detach().to(device="cpu", dtype=torch.float32).numpy(), encoding)
    wire = hidden.detach().to(device="cpu", dtype=getattr(torch, encoding.value)).contiguous()
    if not bool(wire.isfinite().all()):
        raise _not_finite(int((~wire.isfinite()).sum()), wire.numel(), encoding)
    data: bytes = wire.view(torch.uint8).numpy().tobytes()
    return data


def _torch_from(data: bytes, shape: tuple[int, ...], kind: Kind, encoding: Encoding) -> Any:
    import torch

    if encoding is Encoding.INT8:
        wire = torch.from_numpy(_int8_numbers(data, shape[-1]))
        return wire.reshape(shape).to(device=kind.device, dtype=getattr(torch, kind.dtype.value))
    wire = torch.frombuffer(bytearray(data), dtype=getattr(torch, encoding.value))
    return wire.reshape(shape).to(device=kind.device, dtype=getattr(torch, kind.dtype.value))


def _numpy_bytes(hidden: Any, encoding: Encoding) -> bytes:
    import numpy

    if encoding is Encoding.FLOAT16:
        with numpy.errstate(over="ignore"):  # what overflows is reported below
            hidden = hidden.astype("<f2")
    else:
        hidden = hidden.astype("<f4")
    finite = numpy.isfinite(hidden)
    if not finite.all():
        raise _not_finite(int((~finite).sum()), hidden.size, encoding)
    if encoding is Encoding.INT8:
        return _int8_bytes(hidden.reshape(-1, hidden.shape[-1]))
    if encoding is not Encoding.BFLOAT16:
        data: bytes = hidden.tobytes()
        return data
    bits = numpy.ascontiguousarray(hidden).view("<u4").astype(numpy.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # nearest, ties to even
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise _not_finite(int(((rounded & 0x7F80) == 0x7F80).sum()), hidden.size, encoding)
    return rounded.astype("<u2").tobytes()


def _numpy_from(data: bytes, shape: tuple[int, ...], kind: Kind, encoding: Encoding) -> Any:
    import numpy

    if encoding is Encoding.INT8:
        wire = _int8_numbers(data, shape[-1])
    elif encoding is Encoding.BFLOAT16:
        bits = numpy.frombuffer(data, dtype="<u2").astype("<u4") << 16
        wire = bits.view("<f4")
    else:
        wire = numpy.frombuffer(data, dtype="<f4" if encoding is Encoding.FLOAT32 else "<f2")
    return wire.reshape(shape).astype(kind.dtype.value)  # a copy: the caller may write to it


def _int8_bytes(hidden: Any) -> bytes:
    """hidden: (num_tokens, hidden_size) float32. Scales are rounded up to bfloat16, codes chosen for them."""
    import numpy

    num_tokens, hidden_size = hidden.shape
    if not num_tokens:
        return b""
    blocks = numpy.pad(hidden, ((0, 0), (0, -hidden_size % INT8_BLOCK))).reshape(num_tokens, -1, INT8_BLOCK)
    exact = (numpy.abs(blocks).max(axis=-1) / numpy.float32(127)).astype("<f4")
    halves = ((exact.view("<u4") + 0xFFFF) >> 16).astype("<u2")
    scales = (halves.astype("<u4") << 16).view("<f4")
    codes = numpy.rint(blocks / numpy.where(scales > 0, scales, numpy.float32(1))[..., None])
    signed = codes.clip(-127, 127).astype("i1").reshape(num_tokens, -1)[:, :hidden_size]
    data: bytes = numpy.concatenate([halves.view("u1"), signed.view("u1")], axis=1).tobytes()
    return data


def _int8_numbers(data: bytes, hidden_size: int) -> Any:
    """(num_tokens, hidden_size) float32."""
    import numpy

    tokens = numpy.frombuffer(data, dtype="u1").reshape(-1, Encoding.INT8.token_bytes(hidden_size))
    num_scale_bytes = 2 * int8_blocks(hidden_size)
    halves = numpy.ascontiguousarray(tokens[:, :num_scale_bytes]).view("<u2")
    scales = (halves.astype("<u4") << 16).view("<f4")
    codes = numpy.ascontiguousarray(tokens[:, num_scale_bytes:]).view("i1").astype("<f4")
    return codes * numpy.repeat(scales, INT8_BLOCK, axis=1)[:, :hidden_size]
