"""What a part's bytes say: as the safetensors library reads them, and nothing worse than ValueError for the rest."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.protocol.partfiles import check_gradients, layouts


def file_of(tensors: Mapping[str, tuple[tuple[int, ...], list[float]]], **changes: Any) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"dropout": "0.1"}}
    data = b""
    for name, (shape, numbers) in tensors.items():
        told = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + 4 * len(numbers)],
        }
        header[name] = {**told, **changes}
        data += struct.pack(f"<{len(numbers)}f", *numbers)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data


PART = file_of({"q.lora_A": ((1, 2), [1, 2]), "q.lora_B": ((3, 1), [3, 4, 5])})


def test_tensors_are_read_with_their_bytes() -> None:
    found = layouts(PART)
    assert {name: layout.shape for name, layout in found.items()} == {"q.lora_A": (1, 2), "q.lora_B": (3, 1)}
    assert struct.unpack("<3f", found["q.lora_B"].data) == (3, 4, 5)


@given(
    st.binary(max_size=64) | st.binary(max_size=64).map(lambda data: len(data).to_bytes(8, "little") + data)
)
def test_other_bytes_are_a_value_error(data: bytes) -> None:
    try:
        layouts(data)
    except ValueError:
        return
    assert data[8:].lstrip()[:1] == b"{"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON)
def test_headers_of_any_form_are_a_value_error(field: str, value: Any) -> None:
    file = file_of({"q.lora_A": ((1, 2), [1, 2])}, **{field: value})
    try:
        assert layouts(file)["q.lora_A"].data.nbytes <= 8
    except ValueError:
        return


def test_gradients_of_a_part_have_its_form() -> None:
    check_gradients(PART, PART)
    check_gradients(None, PART)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"q.lora_A": ((1, 2), [1, 2])}, "1 tensors, expected 2; 'q.lora_B'"),
        (
            {"q.lora_A": ((2, 1), [1, 2]), "q.lora_B": ((3, 1), [3, 4, 5])},
            r"shape \(2, 1\), expected \(1, 2\)",
        ),
        (
            {"q.lora_A": ((1, 2), [1, float("nan")]), "q.lora_B": ((3, 1), [3, 4, 5])},
            "q.lora_A holds numbers",
        ),
        (
            {"q.lora_A": ((1, 2), [1, 2]), "q.lora_B": ((3, 1), [3, float("inf"), 5])},
            "q.lora_B holds numbers",
        ),
    ],
)
def test_others_are_refused_with_their_values(tensors: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_gradients(PART, file_of(tensors))


def test_gradients_in_another_dtype_are_refused() -> None:
    half = file_of({"q.lora_A": ((1, 4), [1, 2])}, dtype="F16")
    with pytest.raises(ValueError, match="F16, expected F32"):
        check_gradients(None, half)
