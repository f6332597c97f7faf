"""The arithmetic of a classic block for a few tokens, in float32: compiled, without Python, on one thread each.

All arrays are C-contiguous. Weights, keys and values stand by their addresses. Each token is computed by itself:
what it gets does not depend on those beside it. NaN and infinity come out as they go in.

Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax; Muller et al. 2018, Handbook of
Floating-Point Arithmetic, for exp; Dao et al. 2023, Flash-Decoding, for keys in several parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeVar

import numpy as np
from numba import carray, njit  # type: ignore[attr-defined]
from numpy.typing import NDArray

from ..linear import STRIP
from .intrinsics import (
    add_product_1x1,
    add_product_1x4,
    add_product_2x4,
    add_product_4x1,
    add_product_4x4,
    numbers_at,
    of_bits,
)

KEYS: Final = 128  # that are scored at a time: with 64 numbers each 32 KB

Numbers = NDArray[np.float32]
Number = Any  # a float32; Python has no such arithmetic
Function = TypeVar("Function", bound=Callable[..., Any])

_INPUTS: Final = 128  # of a strip that several rows share while it is in the processor's first cache: 32 KB
_LOG2_E: Final = np.float32(1.4426950408889634)
# ln 2 in two parts: multiples of the first up to 126 are exact.
_LN_2_FIRST: Final = np.float32(0.693359375)
_LN_2_REST: Final = np.float32(math.log(2) - 0.693359375)
_LEAST: Final = np.float32(-87.3)  # whose power of e is a normal float32


def compiled(function: Function) -> Function:
    """Machine code that lets go of Python's lock; kept on disk, beside its source where that can be written."""
    made: Any = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})(function)
    return made  # type: ignore[no-any-return]


def summing(function: Function) -> Function:
    """As `compiled`, with sums in any order, so that they are taken in vectors."""
    loose = {"contract", "reassoc", "nsz"}
    made: Any = njit(nogil=True, cache=True, error_model="numpy", fastmath=loose)(function)
    return made  # type: ignore[no-any-return]


@compiled
def exp_negative(number: Number) -> Number:
    """e^number for number ≤ 0, to two units in the last place; 1e-38 for whatever is less than that."""
    bounded = max(number, _LEAST)
    if number != number:
        bounded = number
    whole = np.int32(bounded * _LOG2_E - np.float32(0.5))
    rest = bounded - np.float32(whole) * _LN_2_FIRST - np.float32(whole) * _LN_2_REST
    # Σ rest^k / k!, to 2e-8 for |rest| ≤ ln 2 / 2
    power = np.float32(1 / 720) + rest * np.float32(1 / 5040)
    power = np.float32(1 / 120) + rest * power
    power = np.float32(1 / 24) + rest * power
    power = np.float32(1 / 6) + rest * power
    power = np.float32(1 / 2) + rest * power
    power = np.float32(1) + rest * power
    power = np.float32(1) + rest * power
    return power * of_bits(np.int32((whole + np.int32(127)) << np.int32(23)))


@summing
def normalize(rows: Numbers, weight: Numbers, eps: Number, normed: Numbers) -> None:
    """normed = rows / sqrt(mean(rows²) + eps) * weight; rows, normed: (num_rows, ≥ size); weight: (size,)."""
    size = weight.shape[0]
    for row in range(rows.shape[0]):
        total = np.float32(0.0)
        for i in range(size):
            total += rows[row, i] * rows[row, i]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for i in range(size):
            normed[row, i] = rows[row, i] * scale * weight[i]


@compiled
def multiply_strip(rows: Numbers, num_inputs: int, strip: int, sums: Numbers) -> None:
    """sums = rows @ strip. rows: (num_rows, ≥ num_inputs). strip: address of (num_inputs, STRIP).

    sums: (num_rows, STRIP).
    """
    num_rows, row_bytes, sums_bytes = rows.shape[0], rows.strides[0], sums.strides[0]
    sums[:num_rows] = 0
    step = num_inputs if num_rows <= 4 else _INPUTS
    for first in range(0, num_inputs, step):
        num = min(step, num_inputs - first)
        part = strip + first * STRIP * 4
        row = 0
        while row < num_rows:
            inputs = rows.ctypes.data + row * row_bytes + first * 4
            place = sums.ctypes.data + row * sums_bytes
            left = num_rows - row
            if left >= 4:
                add_product_4x4(inputs, row_bytes, part, STRIP * 4, num, place, sums_bytes)
                row += 4
            elif left >= 2:
                add_product_2x4(inputs, row_bytes, part, STRIP * 4, num, place, sums_bytes)
                row += 2
            else:
                add_product_1x4(inputs, row_bytes, part, STRIP * 4, num, place, sums_bytes)
                row += 1


@compiled
def project(
    rows: Numbers, num_inputs: int, layer: int, bias: int, unit: int, sums: Numbers, output: Numbers
) -> None:
    """One strip of `rows @ weight.T + bias` into output[:, unit * STRIP :].

    layer, bias: addresses; a bias of 0 is none.
    """
    multiply_strip(rows, num_inputs, layer + unit * num_inputs * STRIP * 4, sums)
    first = unit * STRIP
    if bias:
        offsets = carray(numbers_at(bias + first * 4), (STRIP,))
        for row in range(rows.shape[0]):
            for i in range(STRIP):
                output[row, first + i] = sums[row, i] + offsets[i]
    else:
        for row in range(rows.shape[0]):
            for i in range(STRIP):
                output[row, first + i] = sums[row, i]


@compiled
def project_onto(
    rows: Numbers, num_inputs: int, layer: int, bias: int, unit: int, sums: Numbers, states: Numbers
) -> None:
    """As `project`, added to `states`."""
    multiply_strip(rows, num_inputs, layer + unit * num_inputs * STRIP * 4, sums)
    first = unit * STRIP
    if bias:
        offsets = carray(numbers_at(bias + first * 4), (STRIP,))
        for row in range(rows.shape[0]):
            for i in range(STRIP):
                sums[row, i] += offsets[i]
    for row in range(rows.shape[0]):
        for i in range(STRIP):
            states[row, first + i] += sums[row, i]


@compiled
def gate(
    rows: Numbers,
    num_inputs: int,
    layer: int,
    bias: int,
    size: int,
    unit: int,
    sums: Numbers,
    others: Numbers,
    gated: Numbers,
) -> None:
    """One strip of silu(gate) * up. The layer's first `size` outputs are the gate's, the others those of up."""
    strip_bytes, first = num_inputs * STRIP * 4, unit * STRIP
    multiply_strip(rows, num_inputs, layer + unit * strip_bytes, sums)
    multiply_strip(rows, num_inputs, layer + (unit + size // STRIP) * strip_bytes, others)
    if bias:
        offsets = carray(numbers_at(bias + first * 4), (STRIP,))
        more = carray(numbers_at(bias + (size + first) * 4), (STRIP,))
        for row in range(rows.shape[0]):
            for i in range(STRIP):
                sums[row, i] += offsets[i]
                others[row, i] += more[i]
    for row in range(rows.shape[0]):
        for i in range(STRIP):
            number = sums[row, i]
            small = exp_negative(-abs(number))  # silu(x) = x / (1 + e^-x), without an overflow
            share = np.float32(1.0) if number >= 0 else small
            gated[row, first + i] = number * share / (np.float32(1.0) + small) * others[row, i]


@compiled
def turn(head: Numbers, cosines: Numbers, sines: Numbers) -> None:
    """Rotary embedding of one head, in place. sines: of the first half negated."""
    half = head.shape[0] // 2
    for i in range(half):
        low, high = head[i], head[half + i]
        head[i] = low * cosines[i] + high * sines[i]
        head[half + i] = high * cosines[half + i] + low * sines[half + i]


@summing
def score(queries: Numbers, keys: int, num: int, scaling: Number, scores: Numbers) -> None:
    """scores = queries @ keys.T * scaling. queries: (group, dim). keys: address of (num, dim).

    scores: (group, ≥ num).
    """
    group, dim = queries.shape
    lines = carray(numbers_at(keys), (num, dim))
    for head in range(group):
        key = 0
        while key + 4 <= num:
            first = second = third = fourth = np.float32(0.0)
            for i in range(dim):
                number = queries[head, i]
                first += number * lines[key, i]
                second += number * lines[key + 1, i]
                third += number * lines[key + 2, i]
                fourth += number * lines[key + 3, i]
            scores[head, key] = first * scaling
            scores[head, key + 1] = second * scaling
            scores[head, key + 2] = third * scaling
            scores[head, key + 3] = fourth * scaling
            key += 4
        while key < num:
            first = np.float32(0.0)
            for i in range(dim):
                first += queries[head, i] * lines[key, i]
            scores[head, key] = first * scaling
            key += 1


@compiled
def soften(scores: Numbers, num: int, top: Number, total: Number, part: Numbers) -> tuple[Number, Number]:
    """Scores to weights in place, for a softmax that goes on: the new maximum, and the sum of all weights so far.

    part: of the weighted values so far, scaled to the new maximum.
    """
    highest = top
    for key in range(num):
        highest = max(highest, scores[key])
    if highest != top:
        fading = exp_negative(top - highest)
        total *= fading
        for i in range(part.shape[0]):
            part[i] *= fading
    for key in range(num):
        scores[key] = exp_negative(scores[key] - highest)
    return highest, total


@summing
def sum_of(numbers: Numbers, num: int) -> Number:
    """Of the first `num`."""
    total = np.float32(0.0)
    for i in range(num):
        total += numbers[i]
    return total


@compiled
def gather(weights: Numbers, num: int, values: int, parts: Numbers) -> None:
    """parts += weights @ values. weights: (group, ≥ num). values: address of (num, dim).

    parts: (group, dim), dim a multiple of LANES.
    """
    group, dim = parts.shape
    weight_bytes, part_bytes = weights.strides[0], parts.strides[0]
    head = 0
    while head < group:
        is_four = group - head >= 4
        inputs = weights.ctypes.data + head * weight_bytes
        place = parts.ctypes.data + head * part_bytes
        first = 0
        while first < dim:
            strip, sums = values + first * 4, place + first * 4
            if dim - first >= 64:
                if is_four:
                    add_product_4x4(inputs, weight_bytes, strip, dim * 4, num, sums, part_bytes)
                else:
                    add_product_1x4(inputs, weight_bytes, strip, dim * 4, num, sums, part_bytes)
                first += 64
            else:
                if is_four:
                    add_product_4x1(inputs, weight_bytes, strip, dim * 4, num, sums, part_bytes)
                else:
                    add_product_1x1(inputs, weight_bytes, strip, dim * 4, num, sums, part_bytes)
                first += 16
        head += 4 if is_four else 1
