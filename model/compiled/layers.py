"""A linear layer for a few rows, strip by strip of `STRIP` outputs, whatever its weights are made of.

A layer is five words: the addresses of its weights, of its bias (float32, 0 if it has none) and of its scales, its
`Form`, and how many outputs it has scales for. Sums are float32.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from ..strips import INT4_GROUP, LINE_INPUTS, STRIP, Form
from .compilation import Numbers, Words, compiled
from .intrinsics import numbers_at, of_bits, pairs_at
from .kernels import sum_of
from .tiles import MOST_ROWS, add_bfloat16, add_codes4, add_codes8, add_float32

WEIGHTS, BIAS, SCALES, FORM, NUM_SCALED = range(5)
NUM_WORDS: Final = 5

_FLOAT32, _BFLOAT16, _INT8, _INT4 = (int(form) for form in Form)
_INPUTS: Final = 128  # of a strip that several rows share while the first cache holds it: 32 KB of float32


@compiled
def multiply_strip(
    rows: Numbers, num_inputs: int, layer: Words, unit: int, sums: Numbers, spare: Numbers
) -> None:
    """sums = (rows @ weight.T + bias)[:, unit * STRIP : (unit + 1) * STRIP].

    rows: (num_rows, ≥ num_inputs). sums, spare: (num_rows, STRIP); the latter is for what is between.
    """
    sums[:] = 0
    form, weights = layer[FORM], layer[WEIGHTS]
    if form == _FLOAT32:
        _add_columns(rows, num_inputs, weights + unit * num_inputs * STRIP * 4, 4, sums)
    elif form == _BFLOAT16:
        _add_columns(rows, num_inputs, weights + unit * num_inputs * STRIP * 2, 2, sums)
    elif form == _INT8:
        _add_lines(rows, num_inputs, weights + unit * num_inputs * STRIP, sums)
        scales = carray(numbers_at(layer[SCALES] + unit * STRIP * 4), (STRIP,))
        for row in range(rows.shape[0]):
            for i in range(STRIP):
                sums[row, i] *= scales[i]
    else:
        _add_groups(rows, num_inputs, layer, unit, sums, spare)
    if layer[BIAS]:
        bias = carray(numbers_at(layer[BIAS] + unit * STRIP * 4), (STRIP,))
        for row in range(rows.shape[0]):
            for i in range(STRIP):
                sums[row, i] += bias[i]


@compiled
def _add_columns(rows: Numbers, num_inputs: int, strip: int, number_bytes: int, sums: Numbers) -> None:
    """strip: (num_inputs, STRIP) float32, of 4 bytes, or (num_inputs / 2, STRIP, 2) bfloat16, of 2."""
    num_rows, row_bytes, sums_bytes = rows.shape[0], rows.strides[0], sums.strides[0]
    step = num_inputs if num_rows <= MOST_ROWS else _INPUTS
    for first in range(0, num_inputs, step):
        num = min(step, num_inputs - first)
        piece = strip + first * STRIP * number_bytes
        for row in range(0, num_rows, MOST_ROWS):
            inputs = rows.ctypes.data + row * row_bytes + first * 4
            place = sums.ctypes.data + row * sums_bytes
            many = min(MOST_ROWS, num_rows - row)
            if number_bytes == 4:
                add_float32(many, inputs, row_bytes, piece, STRIP * 4, num, place, sums_bytes)
            else:
                add_bfloat16(many, inputs, row_bytes, piece, STRIP * 4, num // 2, place, sums_bytes)


@compiled
def _add_lines(rows: Numbers, num_inputs: int, lines: int, sums: Numbers) -> None:
    """lines: (STRIP, num_inputs) int8."""
    num_rows, row_bytes, sums_bytes = rows.shape[0], rows.strides[0], sums.strides[0]
    for output in range(STRIP):
        piece = lines + output * num_inputs
        for row in range(0, num_rows, MOST_ROWS):
            inputs = rows.ctypes.data + row * row_bytes
            place = sums.ctypes.data + row * sums_bytes + output * 4
            many = min(MOST_ROWS, num_rows - row)
            num_turns = num_inputs // LINE_INPUTS
            add_codes8(many, inputs, row_bytes, piece, LINE_INPUTS, num_turns, place, sums_bytes)


@compiled
def _add_groups(
    rows: Numbers, num_inputs: int, layer: Words, unit: int, sums: Numbers, spare: Numbers
) -> None:
    """Codes (num_inputs, STRIP / 2), two in a byte; scales (num_groups, num_scaled, 2) bfloat16.

    A scale is a step and the value of code 8, for the inputs of a group.
    """
    num_rows, row_bytes, spare_bytes = rows.shape[0], rows.strides[0], spare.strides[0]
    codes = layer[WEIGHTS] + unit * num_inputs * (STRIP // 2)
    num_groups = num_inputs // INT4_GROUP
    scales, group_bytes = layer[SCALES] + unit * STRIP * 4, layer[NUM_SCALED] * 4
    for group in range(num_groups):
        first = group * INT4_GROUP
        spare[:] = 0
        for row in range(0, num_rows, MOST_ROWS):
            inputs = rows.ctypes.data + row * row_bytes + first * 4
            place = spare.ctypes.data + row * spare_bytes
            many = min(MOST_ROWS, num_rows - row)
            piece = codes + first * (STRIP // 2)
            add_codes4(many, inputs, row_bytes, piece, STRIP // 2, INT4_GROUP, place, spare_bytes)
        pairs = carray(pairs_at(scales + group * group_bytes), (STRIP,))
        for row in range(num_rows):
            total = sum_of(rows[row, first:], INT4_GROUP)
            for i in range(STRIP):
                step = of_bits(pairs[i] << np.uint32(16))
                middle = of_bits(pairs[i] & np.uint32(0xFFFF0000))
                sums[row, i] += spare[row, i] * step + total * (middle - np.float32(8) * step)
