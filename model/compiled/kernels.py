"""The arithmetic of a classic block for a few tokens, in float32: compiled, without Python, on one thread each.

All arrays are C-contiguous. Keys and values stand by their addresses. Each token is computed by itself:
what it gets does not depend on those beside it. NaN and infinity come out as they go in.

Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax; Muller et al. 2018, Handbook of
Floating-Point Arithmetic, for exp; Dao et al. 2023, Flash-Decoding, for keys in several parts.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from ..strips import STRIP
from .compilation import Number, Numbers, compiled, summing
from .intrinsics import bits_of, halves_at, numbers_at, of_bits
from .tiles import LANES, MOST_ROWS, add_float32, add_narrow_float32

KEYS: Final = 128  # that are scored at a time: with 64 numbers each 32 KB

_LOG2_E: Final = np.float32(1.4426950408889634)
# ln 2 in two parts: multiples of the first up to 126 are exact.
_LN_2_FIRST: Final = np.float32(0.693359375)
_LN_2_REST: Final = np.float32(math.log(2) - 0.693359375)
_LEAST: Final = np.float32(-87.3)  # whose power of e is a normal float32


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
    return power * of_bits(np.uint32((whole + np.int32(127)) << np.int32(23)))


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
def gate(sums: Numbers, others: Numbers, gated: Numbers) -> None:
    """gated = silu(sums) * others; (num_rows, size) each."""
    for row in range(sums.shape[0]):
        for i in range(sums.shape[1]):
            number = sums[row, i]
            small = exp_negative(-abs(number))  # silu(x) = x / (1 + e^-x), without an overflow
            share = np.float32(1.0) if number >= 0 else small
            gated[row, i] = number * share / (np.float32(1.0) + small) * others[row, i]


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
    for head in range(0, group, MOST_ROWS):
        many = min(MOST_ROWS, group - head)
        inputs = weights.ctypes.data + head * weight_bytes
        place = parts.ctypes.data + head * part_bytes
        wide = dim - dim % STRIP
        for first in range(0, wide, STRIP):
            piece, sums = values + first * 4, place + first * 4
            add_float32(many, inputs, weight_bytes, piece, dim * 4, num, sums, part_bytes)
        for first in range(wide, dim, LANES):
            piece, sums = values + first * 4, place + first * 4
            add_narrow_float32(many, inputs, weight_bytes, piece, dim * 4, num, sums, part_bytes)


@compiled
def widen(source: int, numbers: Numbers) -> None:
    """numbers = the bfloat16 numbers at the address `source`, as many."""
    flat = numbers.reshape(numbers.size)
    halves = carray(halves_at(source), (numbers.size,))
    for i in range(numbers.size):
        flat[i] = of_bits(np.uint32(halves[i]) << np.uint32(16))


@compiled
def narrow(numbers: Numbers, target: int) -> None:
    """Put `numbers` (size,) as bfloat16, rounded to the nearest, at the address `target`."""
    halves = carray(halves_at(target), (numbers.size,))
    for i in range(numbers.size):
        bits = bits_of(numbers[i])
        if numbers[i] != numbers[i]:
            halves[i] = np.uint16(0x7FC0)
        else:
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            halves[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
