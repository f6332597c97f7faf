"""The way of a few tokens through a span's blocks, by a team of threads in step. Compiled; decides nothing.

Every member runs the same function. What can be shared out is claimed piece by piece from counters, so that a member
whose processor is taken away for a while holds up the others by one piece at most; between two stages all meet.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from ..strips import STRIP
from .compilation import Numbers, Words, compiled
from .intrinsics import claim, clear, give_way, numbers_at, peek
from .kernels import KEYS, exp_negative, gate, gather, narrow, normalize, score, soften, sum_of, turn, widen
from .layers import NUM_WORDS, multiply_strip

# What `Blocks.parts` holds of a block: addresses of norms, 0 for what it has not; layers; addresses in the cache.
FIRST_NORM, SECOND_NORM, QUERY_NORM, KEY_NORM = range(4)
ALL_HEADS, OUTPUT, GATE_UP, DOWN = range(4, 4 + 4 * NUM_WORDS, NUM_WORDS)
CACHED_KEYS, CACHED_VALUES = range(DOWN + NUM_WORDS, DOWN + NUM_WORDS + 2)
NUM_PARTS: Final = CACHED_VALUES + 1

NUM_STAGES: Final = 5  # of a block, each with a counter
LINE: Final = 8  # 64-bit words in a line of the processor's caches, which no two counters share
_PATIENCE: Final = 4000  # looks at a counter before the processor is offered to others: some 100 µs


class Blocks(NamedTuple):
    """What stays from pass to pass. parts: (num_blocks, NUM_PARTS) int64. eps: (num_blocks, 4), of the norms in
    their order there. scalings: (num_blocks,). windows, groups: (num_blocks,) int64; how many tokens are attended,
    and by which table. number_bytes: of a key's numbers, 4 for float32 and 2 for bfloat16."""

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
    number_bytes: int


class Tokens(NamedTuple):
    """What a pass is about. states: (num_tokens, hidden_size), which become the output.

    cosines, sines: (num_tokens, head_dim). positions: (num_tokens,) int64. slots: (num_groups, num_tokens) int64,
    where each token's keys and values go. reaches: (num_groups, num_tokens, 2) int64, which of `runs` are of a
    token's row. runs: (num_runs, 3) int64: first slot, first position, number. bunches: (num_bunches, 2) int64,
    first token and the one behind the last: neighbours in a row, which read its keys together. num_splits: parts in
    which the keys of a row are attended.
    """

    states: Numbers
    cosines: Numbers
    sines: Numbers
    positions: Words
    slots: Words
    reaches: Words
    runs: Words
    bunches: Words
    num_splits: int


class Room(NamedTuple):
    """Where members leave for each other what is between, and for themselves.

    heads: (tokens, heads + 2 * kv_heads, dim). gated: (tokens, inner_size). parts: (tokens, splits, heads, dim), and
    marks: (tokens, splits, heads, 2), maximum and sum of each. normed: (members, tokens, largest size). sums:
    (members, 3, tokens, STRIP). scores: (members, bunch, group, KEYS). wide: (members, KEYS, dim), keys or values as
    float32. counters: (num_blocks, NUM_STAGES, LINE) int64, all 0. meeting: (2, LINE) int64.
    """

    heads: Numbers
    gated: Numbers
    parts: Numbers
    marks: Numbers
    normed: Numbers
    sums: Numbers
    scores: Numbers
    wide: Numbers
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
    normed, sums = room.normed[member, :num_tokens], room.sums[member]
    heads = room.heads[:num_tokens]
    flat = heads.reshape(num_tokens, heads.shape[1] * dim)
    gated = room.gated[:num_tokens]
    for block in range(first, last):
        parts, eps, counters = blocks.parts[block], blocks.eps[block], room.counters[block]

        weight = carray(numbers_at(parts[FIRST_NORM]), (hidden_size,))
        normalize(tokens.states, weight, eps[FIRST_NORM], normed)
        project(normed, hidden_size, parts[ALL_HEADS:OUTPUT], counters[0], sums, flat)
        meet(room.meeting, num_members)

        place(member, num_members, block, blocks, tokens, heads)
        meet(room.meeting, num_members)

        attend(member, block, blocks, tokens, room, counters[1])
        meet(room.meeting, num_members)

        merge(room.parts, room.marks, num_tokens, tokens.num_splits, normed)
        project_onto(normed, num_heads * dim, parts[OUTPUT:GATE_UP], counters[2], sums, tokens.states)
        meet(room.meeting, num_members)

        weight = carray(numbers_at(parts[SECOND_NORM]), (hidden_size,))
        normalize(tokens.states, weight, eps[SECOND_NORM], normed)
        project_gated(normed, hidden_size, parts[GATE_UP:DOWN], counters[3], sums, gated)
        meet(room.meeting, num_members)

        project_onto(gated, blocks.inner_size, parts[DOWN:CACHED_KEYS], counters[4], sums, tokens.states)
        meet(room.meeting, num_members)


@compiled
def project(
    rows: Numbers, num_inputs: int, layer: Words, counter: Words, sums: Numbers, output: Numbers
) -> None:
    """output = the layer's for these rows: the strips that this member claims. sums: as in `Room`, its own."""
    mine, spare = sums[0, : rows.shape[0]], sums[2, : rows.shape[0]]
    unit = claim(counter.ctypes.data)
    while unit < output.shape[1] // STRIP:
        multiply_strip(rows, num_inputs, layer, unit, mine, spare)
        output[:, unit * STRIP : (unit + 1) * STRIP] = mine
        unit = claim(counter.ctypes.data)


@compiled
def project_onto(
    rows: Numbers, num_inputs: int, layer: Words, counter: Words, sums: Numbers, states: Numbers
) -> None:
    """As `project`, added to `states`."""
    mine, spare = sums[0, : rows.shape[0]], sums[2, : rows.shape[0]]
    unit = claim(counter.ctypes.data)
    while unit < states.shape[1] // STRIP:
        multiply_strip(rows, num_inputs, layer, unit, mine, spare)
        states[:, unit * STRIP : (unit + 1) * STRIP] += mine
        unit = claim(counter.ctypes.data)


@compiled
def project_gated(
    rows: Numbers, num_inputs: int, layer: Words, counter: Words, sums: Numbers, gated: Numbers
) -> None:
    """As `project`, for a layer whose first outputs are gates of the others, as many: gated = silu(gate) * up."""
    num_rows, num_strips = rows.shape[0], gated.shape[1] // STRIP
    gates, others, spare = sums[0, :num_rows], sums[1, :num_rows], sums[2, :num_rows]
    unit = claim(counter.ctypes.data)
    while unit < num_strips:
        multiply_strip(rows, num_inputs, layer, unit, gates, spare)
        multiply_strip(rows, num_inputs, layer, unit + num_strips, others, spare)
        gate(gates, others, gated[:, unit * STRIP : (unit + 1) * STRIP])
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
            target = cached + (kv_head * blocks.num_slots + slot) * dim * blocks.number_bytes
            if blocks.number_bytes == 2:
                narrow(numbers, target)
            else:
                carray(numbers_at(target), (dim,))[:] = numbers


class Piece(NamedTuple):
    """What is attended at a time: tokens [first, last), neighbours in a row, by the queries of one key head, the first
    of which is `head`, over one of the parts of the row's keys."""

    block: int
    kv_head: int
    head: int
    first: int
    last: int
    split: int


@compiled
def attend(member: int, block: int, blocks: Blocks, tokens: Tokens, room: Room, counter: Words) -> None:
    """Attention of all tokens: the pieces that this member claims."""
    num_splits, num_kv_heads = tokens.num_splits, blocks.num_kv_heads
    num_queries = blocks.num_heads // num_kv_heads
    unit = claim(counter.ctypes.data)
    while unit < tokens.bunches.shape[0] * num_kv_heads * num_splits:
        split, kv_head = unit % num_splits, unit // num_splits % num_kv_heads
        bunch = tokens.bunches[unit // num_splits // num_kv_heads]
        piece = Piece(block, kv_head, kv_head * num_queries, bunch[0], bunch[1], split)
        attend_piece(member, piece, blocks, tokens, room)
        unit = claim(counter.ctypes.data)


@compiled
def attend_piece(member: int, piece: Piece, blocks: Blocks, tokens: Tokens, room: Room) -> None:
    """One piece, some keys at a time: they are read from memory once for all its tokens."""
    block, first, last, split = piece.block, piece.first, piece.last, piece.split
    heads = slice(piece.head, piece.head + blocks.num_heads // blocks.num_kv_heads)
    room.parts[first:last, split, heads] = 0
    room.marks[first:last, split, heads, 0] = -np.inf
    room.marks[first:last, split, heads, 1] = 0
    dim, number_bytes, window = blocks.head_dim, blocks.number_bytes, blocks.windows[block]
    cached = piece.kv_head * blocks.num_slots * dim * number_bytes
    cached_keys = blocks.parts[block, CACHED_KEYS] + cached
    cached_values = blocks.parts[block, CACHED_VALUES] + cached
    oldest, newest = max(0, tokens.positions[first] + 1 - window), tokens.positions[last - 1] + 1
    begin = oldest + (newest - oldest) * split // tokens.num_splits
    end = oldest + (newest - oldest) * (split + 1) // tokens.num_splits
    wide, group = room.wide[member], blocks.groups[block]
    for run in range(tokens.reaches[group, first, 0], tokens.reaches[group, first, 1]):
        slot, start, num = tokens.runs[run]
        position, stop = max(begin, start), min(end, start + num)
        while position < stop:
            num_keys = min(KEYS, stop - position)
            offset = (slot + position - start) * dim * number_bytes
            keys, values = cached_keys + offset, cached_values + offset
            if number_bytes == 2:
                widen(keys, wide[:num_keys])
                keys = wide.ctypes.data
            for token in range(first, last):
                low, high = seen(tokens.positions[token], window, position, num_keys)
                weigh(member, piece, token, keys + low * dim * 4, high - low, blocks, room)
            if number_bytes == 2:
                widen(values, wide[:num_keys])
                values = wide.ctypes.data
            for token in range(first, last):
                low, high = seen(tokens.positions[token], window, position, num_keys)
                if low < high:
                    scores, parts = room.scores[member, token - first], room.parts[token, split, heads]
                    gather(scores, high - low, values + low * dim * 4, parts)
            position += num_keys


@compiled
def weigh(
    member: int, piece: Piece, token: int, keys: int, num_keys: int, blocks: Blocks, room: Room
) -> None:
    """The weights of these keys for the queries of one token, left in its `Room.scores`."""
    if num_keys <= 0:
        return
    heads = slice(piece.head, piece.head + blocks.num_heads // blocks.num_kv_heads)
    scores, queries = room.scores[member, token - piece.first], room.heads[token, heads]
    parts, marks = room.parts[token, piece.split, heads], room.marks[token, piece.split, heads]
    score(queries, keys, num_keys, blocks.scalings[piece.block], scores)
    for query in range(queries.shape[0]):
        top, total = soften(scores[query], num_keys, marks[query, 0], marks[query, 1], parts[query])
        marks[query, 0], marks[query, 1] = top, total + sum_of(scores[query], num_keys)


@compiled
def seen(token: int, window: int, position: int, num_keys: int) -> tuple[int, int]:
    """Which of `num_keys` keys from `position` on the token at the position `token` attends."""
    return max(0, token + 1 - window - position), min(num_keys, token + 1 - position)


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
    layer: Words,
    output: Numbers,
    sums: Numbers,
    counter: Words,
    meeting: Words,
) -> None:
    """output = the layer's for these rows, (num_rows, out_features). sums: as in `Room`. counter: 0."""
    project(rows, rows.shape[1], layer, counter, sums[member], output)
    meet(meeting, num_members)
