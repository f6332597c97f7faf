"""The way of a few tokens through a span's blocks, by a team of threads in step. Compiled; decides nothing.

Every member runs the same function. What can be shared out is claimed piece by piece from counters, so that a member
whose processor is taken away for a while holds up the others by one piece at most; between two stages all meet.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numba import carray  # type: ignore[attr-defined]
from numpy.typing import NDArray

from ..linear import STRIP
from .intrinsics import claim, clear, give_way, numbers_at, peek
from .kernels import (
    KEYS,
    Numbers,
    compiled,
    exp_negative,
    gate,
    gather,
    normalize,
    project,
    project_onto,
    score,
    soften,
    sum_of,
    turn,
)

Words = NDArray[np.int64]

# What `Blocks.parts` holds of a block, in this order: addresses, 0 for what it has not.
FIRST_NORM, SECOND_NORM, QUERY_NORM, KEY_NORM = range(4)
ALL_HEADS, ALL_HEADS_BIAS, OUTPUT, OUTPUT_BIAS = range(4, 8)
GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS = range(8, 12)
CACHED_KEYS, CACHED_VALUES = range(12, 14)
NUM_PARTS: Final = 14

NUM_STAGES: Final = 5  # of a block, each with a counter
LINE: Final = 8  # 64-bit words in a line of the processor's caches, which no two counters share
_PATIENCE: Final = 4000  # looks at a counter before the processor is offered to others: some 100 µs


class Blocks(NamedTuple):
    """What stays from pass to pass. parts: (num_blocks, NUM_PARTS) int64. eps: (num_blocks, 4), of the norms in
    their order there. scalings: (num_blocks,). windows, groups: (num_blocks,) int64; how many tokens are attended,
    and by which table."""

    parts: Words
    eps: Numbers
    scalings: Numbers
    windows: Words
    groups: Words
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner_size: int
    num_slots: int


class Tokens(NamedTuple):
    """What a pass is about. states: (num_tokens, hidden_size), which become the output.

    cosines, sines: (num_tokens, head_dim). positions: (num_tokens,) int64. slots: (num_groups, num_tokens) int64,
    where each token's keys and values go. reaches: (num_groups, num_tokens, 2) int64, which of `runs` are of a
    token's row. runs: (num_runs, 3) int64: first slot, first position, number. num_splits: parts in which the
    keys of a row are attended.
    """

    states: Numbers
    cosines: Numbers
    sines: Numbers
    positions: Words
    slots: Words
    reaches: Words
    runs: Words
    num_splits: int


class Room(NamedTuple):
    """Where members leave for each other what is between, and for themselves.

    heads: (tokens, heads + 2 * kv_heads, dim). gated: (tokens, inner_size). parts: (tokens, splits, heads, dim), and
    marks: (tokens, splits, heads, 2), maximum and sum of each. normed: (members, tokens, largest size). sums:
    (members, 2, tokens, STRIP). scores: (members, group, KEYS). counters: (num_blocks, NUM_STAGES, LINE) int64, all
    0. meeting: (2, LINE) int64.
    """

    heads: Numbers
    gated: Numbers
    parts: Numbers
    marks: Numbers
    normed: Numbers
    sums: Numbers
    scores: Numbers
    counters: Words
    meeting: Words


@compiled
def meet(meeting: Words, num_members: int) -> None:
    """Wait until every member is here."""
    arrived = meeting.ctypes.data
    round_ = arrived + LINE * 8
    before = peek(round_)
    if claim(arrived) == num_members - 1:
        clear(arrived)
        claim(round_)
        return
    looks = 0
    while peek(round_) == before:
        looks += 1
        if looks > _PATIENCE:
            give_way()


@compiled
def walk(
    member: int, num_members: int, first: int, last: int, blocks: Blocks, tokens: Tokens, room: Room
) -> None:
    """Blocks [first, last), counted from the span's first."""
    num_tokens, hidden_size = tokens.states.shape
    dim, num_heads = blocks.head_dim, blocks.num_heads
    normed = room.normed[member, :num_tokens]
    sums, others = room.sums[member, 0, :num_tokens], room.sums[member, 1, :num_tokens]
    heads = room.heads[:num_tokens]
    flat = heads.reshape(num_tokens, heads.shape[1] * dim)
    gated = room.gated[:num_tokens]
    for block in range(first, last):
        parts, eps, counters = blocks.parts[block], blocks.eps[block], room.counters[block]

        weight = carray(numbers_at(parts[FIRST_NORM]), (hidden_size,))
        normalize(tokens.states, weight, eps[FIRST_NORM], normed)
        share_project(normed, hidden_size, parts[ALL_HEADS], parts[ALL_HEADS_BIAS], counters[0], sums, flat)
        meet(room.meeting, num_members)

        place(member, num_members, block, blocks, tokens, heads)
        meet(room.meeting, num_members)

        share_attend(block, blocks, tokens, room, counters[1], room.scores[member])
        meet(room.meeting, num_members)

        merge(room.parts, room.marks, num_tokens, tokens.num_splits, normed)
        share_project_onto(
            normed, num_heads * dim, parts[OUTPUT], parts[OUTPUT_BIAS], counters[2], sums, tokens.states
        )
        meet(room.meeting, num_members)

        weight = carray(numbers_at(parts[SECOND_NORM]), (hidden_size,))
        normalize(tokens.states, weight, eps[SECOND_NORM], normed)
        share_gate(normed, hidden_size, parts[GATE_UP], parts[GATE_UP_BIAS], counters[3], sums, others, gated)
        meet(room.meeting, num_members)

        share_project_onto(
            gated, blocks.inner_size, parts[DOWN], parts[DOWN_BIAS], counters[4], sums, tokens.states
        )
        meet(room.meeting, num_members)


@compiled
def share_project(
    rows: Numbers, num_inputs: int, layer: int, bias: int, counter: Words, sums: Numbers, output: Numbers
) -> None:
    """`project`, strip by strip."""
    num_units = output.shape[1] // STRIP
    unit = claim(counter.ctypes.data)
    while unit < num_units:
        project(rows, num_inputs, layer, bias, unit, sums, output)
        unit = claim(counter.ctypes.data)


@compiled
def share_project_onto(
    rows: Numbers, num_inputs: int, layer: int, bias: int, counter: Words, sums: Numbers, states: Numbers
) -> None:
    """`project_onto`, strip by strip."""
    num_units = states.shape[1] // STRIP
    unit = claim(counter.ctypes.data)
    while unit < num_units:
        project_onto(rows, num_inputs, layer, bias, unit, sums, states)
        unit = claim(counter.ctypes.data)


@compiled
def share_gate(
    rows: Numbers,
    num_inputs: int,
    layer: int,
    bias: int,
    counter: Words,
    sums: Numbers,
    others: Numbers,
    gated: Numbers,
) -> None:
    """`gate`, strip by strip."""
    inner_size = gated.shape[1]
    unit = claim(counter.ctypes.data)
    while unit < inner_size // STRIP:
        gate(rows, num_inputs, layer, bias, inner_size, unit, sums, others, gated)
        unit = claim(counter.ctypes.data)


@compiled
def share_attend(
    block: int, blocks: Blocks, tokens: Tokens, room: Room, counter: Words, scores: Numbers
) -> None:
    """`attend`, piece by piece."""
    num_units = tokens.states.shape[0] * blocks.num_kv_heads * tokens.num_splits
    unit = claim(counter.ctypes.data)
    while unit < num_units:
        attend(unit, block, blocks, tokens, room, scores)
        unit = claim(counter.ctypes.data)


@compiled
def place(member: int, num_members: int, block: int, blocks: Blocks, tokens: Tokens, heads: Numbers) -> None:
    """Turn queries and keys, and put keys and values into the cache: each member some heads."""
    num_tokens, num_all, dim = heads.shape
    num_heads, num_kv_heads = blocks.num_heads, blocks.num_kv_heads
    parts, group = blocks.parts[block], blocks.groups[block]
    for index in range(member, num_tokens * num_all, num_members):
        token, head = index // num_all, index % num_all
        numbers = heads[token, head]
        slot = tokens.slots[group, token]
        if head < num_heads + num_kv_heads:
            kind = QUERY_NORM if head < num_heads else KEY_NORM
            if parts[kind]:
                weight = carray(numbers_at(parts[kind]), (dim,))
                normalize(
                    heads[token, head : head + 1],
                    weight,
                    blocks.eps[block, kind],
                    heads[token, head : head + 1],
                )
            turn(numbers, tokens.cosines[token], tokens.sines[token])
        if head >= num_heads:
            kv_head = head - num_heads
            cached = parts[CACHED_KEYS]
            if kv_head >= num_kv_heads:
                kv_head -= num_kv_heads
                cached = parts[CACHED_VALUES]
            line = carray(numbers_at(cached + (kv_head * blocks.num_slots + slot) * dim * 4), (dim,))
            for i in range(dim):
                line[i] = numbers[i]


@compiled
def attend(unit: int, block: int, blocks: Blocks, tokens: Tokens, room: Room, scores: Numbers) -> None:
    """One token's queries of one key head over a part of its row's keys."""
    num_splits, dim = tokens.num_splits, blocks.head_dim
    split, rest = unit % num_splits, unit // num_splits
    kv_head, token = rest % blocks.num_kv_heads, rest // blocks.num_kv_heads
    num_queries = blocks.num_heads // blocks.num_kv_heads
    head = kv_head * num_queries
    queries = room.heads[token, head : head + num_queries]
    group = blocks.groups[block]
    end = tokens.positions[token] + 1
    oldest = max(0, end - blocks.windows[block])
    begin = oldest + (end - oldest) * split // num_splits
    end = oldest + (end - oldest) * (split + 1) // num_splits
    parts = room.parts[token, split, head : head + num_queries]
    marks = room.marks[token, split, head : head + num_queries]
    parts[:] = 0
    for query in range(num_queries):
        marks[query, 0] = -np.inf
        marks[query, 1] = 0
    keys = blocks.parts[block, CACHED_KEYS] + kv_head * blocks.num_slots * dim * 4
    values = blocks.parts[block, CACHED_VALUES] + kv_head * blocks.num_slots * dim * 4
    for run in range(tokens.reaches[group, token, 0], tokens.reaches[group, token, 1]):
        slot, first, num = tokens.runs[run]
        position, last = max(begin, first), min(end, first + num)
        while position < last:
            num_keys = min(KEYS, last - position)
            offset = (slot + position - first) * dim * 4
            score(queries, keys + offset, num_keys, blocks.scalings[block], scores)
            for query in range(num_queries):
                top, total = soften(scores[query], num_keys, marks[query, 0], marks[query, 1], parts[query])
                marks[query, 0], marks[query, 1] = top, total + sum_of(scores[query], num_keys)
            gather(scores, num_keys, values + offset, parts)
            position += num_keys


@compiled
def merge(parts: Numbers, marks: Numbers, num_tokens: int, num_splits: int, attended: Numbers) -> None:
    """attended (num_tokens, ≥ heads * dim): softmax attention over all keys, of what it is over parts of them."""
    _, _, num_heads, dim = parts.shape
    for token in range(num_tokens):
        for head in range(num_heads):
            top = marks[token, 0, head, 0]
            for split in range(1, num_splits):
                top = max(top, marks[token, split, head, 0])
            total = np.float32(0.0)
            place_ = head * dim
            for i in range(dim):
                attended[token, place_ + i] = 0
            for split in range(num_splits):
                if marks[token, split, head, 1] == 0:
                    continue
                share = exp_negative(marks[token, split, head, 0] - top)
                total += marks[token, split, head, 1] * share
                for i in range(dim):
                    attended[token, place_ + i] += parts[token, split, head, i] * share
            for i in range(dim):
                attended[token, place_ + i] /= total


@compiled
def multiply(
    member: int,
    num_members: int,
    rows: Numbers,
    layer: int,
    bias: int,
    output: Numbers,
    sums: Numbers,
    counter: Words,
    meeting: Words,
) -> None:
    """`rows @ weight.T + bias`. output: (num_rows, out_features). sums: (members, ≥ num_rows, STRIP). counter: 0."""
    mine = sums[member, : rows.shape[0]]
    share_project(rows, rows.shape[1], layer, bias, counter, mine, output)
    meet(meeting, num_members)
