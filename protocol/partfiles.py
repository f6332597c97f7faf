"""Adapter parts as bytes: what a safetensors file holds, and whether gradients fit the part that they are of.

Reads headers alone; numbers are looked at only for being finite. It trusts nobody: every bound is checked, and what
is wrong is a ValueError with the values, which the caller turns into an error that names the guilty.
Source: the safetensors format (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .tensors import Encoding, is_finite

MAX_HEADER_BYTES: Final = 1 << 24  # of thousands of tensors; a part has a dozen
WIDTHS: Final[Mapping[str, int]] = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8}


class Layout(NamedTuple):
    """A tensor of a file. data: its bytes, little endian, row after row."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def layouts(file: bytes) -> dict[str, Layout]:
    """The tensors of a safetensors file, by name. Raises ValueError."""
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8 or length > min(len(file) - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a file of {len(file)} bytes with a header of {length}")
    try:
        header = json.loads(file[8 : 8 + length])
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"a header that is no JSON: {problem}") from problem
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    data = memoryview(file)[8 + length :]
    return {name: _layout(name, told, data) for name, told in header.items() if name != "__metadata__"}


def _layout(name: str, told: Any, data: memoryview) -> Layout:
    if not isinstance(told, dict):
        raise ValueError(f"{name[:100]!r} is described by a {type(told).__name__}")
    dtype: Any = told.get("dtype")
    shape: Any = told.get("shape")
    offsets: Any = told.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(
            f"{name[:100]!r} is of the type {str(dtype)[:20]!r}, expected one of {', '.join(WIDTHS)}"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:100]!r} has the shape {str(shape)[:60]} at {str(offsets)[:60]}")
    start, end = offsets
    num_bytes = math.prod(shape) * WIDTHS[dtype]
    if not start <= end <= len(data) or end - start != num_bytes:
        raise ValueError(f"{name[:100]!r} of {num_bytes} bytes lies at {start}:{end} of {len(data)}")
    return Layout(dtype, tuple(shape), data[start:end])


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(value) is int and 0 <= value < 1 << 40 for value in values)
    )


def check_gradients(part: bytes | None, gradients: bytes) -> None:
    """Raise ValueError unless these may be the gradients of this part: its names and shapes, finite, in float32.

    part: None if it is not at hand; then names and shapes are not compared.
    """
    found = layouts(gradients)
    if part is not None:
        expected = {name: layout.shape for name, layout in layouts(part).items()}
        if odd := sorted(found.keys() ^ expected.keys()):
            raise ValueError(
                f"gradients of {len(found)} tensors, expected {len(expected)}; {odd[0][:100]!r} is odd"
            )
        for name, shape in expected.items():
            if found[name].shape != shape:
                raise ValueError(
                    f"the gradient of {name} has the shape {found[name].shape}, expected {shape}"
                )
    for name, layout in found.items():
        if layout.dtype != "F32":
            raise ValueError(f"the gradient of {name[:100]} is {layout.dtype}, expected F32")
        if not is_finite(bytes(layout.data), Encoding.FLOAT32, 1):
            raise ValueError(f"the gradient of {name[:100]} holds numbers that are not finite")
