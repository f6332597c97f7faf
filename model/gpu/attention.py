"""Kernels of attention whose keys and values are read where they lie, page by page, as tables on the device name them.

A tile of queries absorbs a range of keys in one pass, with sums in float32. Its rows are the heads that share a key
head, of one token or of several, so that each key is read once for all of them. A program ends where its tokens
stand: columns of a table that nobody needs cost nothing. Slots that no query of a tile attends are never loaded; what
nobody wrote there may be anything. How work is cut into programs is the business of `tabled`.

Source: Dao et al. 2022, FlashAttention, and Dao 2023, FlashAttention-2, for the pass; Dao et al. 2023, Flash-Decoding,
for the shares; Kwon et al. 2023, PagedAttention, for the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x * _LOG2_E), and exp2 is what a device has


@triton.jit(
    do_not_specialize=["num_tokens", "num_columns"],
    do_not_specialize_on_alignment=["pages", "firsts", "positions"],
)
def attend_tiles(
    query,
    keys,
    values,
    found,
    sums,
    pages,
    firsts,
    positions,
    sinks,
    slopes,
    num_tokens,
    num_columns,
    scaling,
    bias_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    IS_SHARED: tl.constexpr,
):
    """A program is a tile of TOKENS tokens, a key head and a share of the keys: grid (tiles, KV_HEADS, shares).

    query: (num_tokens, num_heads, KEY_DIM). keys, values: (num_slots, KV_HEADS, dim), which hold the tokens too.
    pages: int64, a line of num_columns for each tile, or one for all with num_columns 0; firsts likewise.
    positions: (num_tokens,) int64, of neighbours within a tile. sinks, slopes: (num_heads,), slopes float32, or None.
    found: (num_tokens, num_heads, VALUE_DIM) as query; or, where keys are shared, (num_tokens, num_heads, shares,
    VALUE_DIM) float32, with sums (num_tokens, num_heads, shares): logarithms to base 2 of the weights' sums, -inf of
    what saw no key in a share, and then nothing else counts.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tile of a row has most to do, and begins
    head, share, num_shares = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    last = tl.minimum((tile + 1) * TOKENS, num_tokens) - 1
    line = tile * num_columns
    first = tl.load(firsts + tl.minimum(line, tile)).to(tl.int32)  # of line 0, if that is for all
    lowest = tl.load(positions + tile * TOKENS).to(tl.int32)
    highest = tl.load(positions + last).to(tl.int32)
    oldest = first
    if WINDOW > 0:
        oldest = tl.maximum(first, lowest - WINDOW + 1)
    num_keys = tl.cdiv(tl.cdiv(highest + 1 - oldest, num_shares), TILE) * TILE
    begin = oldest + share * num_keys
    end = tl.minimum(begin + num_keys, highest + 1)
    rows = tl.arange(0, ROWS)
    tokens = tile * TOKENS + rows // GROUP
    is_row = (rows < TOKENS * GROUP) & (tokens <= last)
    own_heads = head * GROUP + rows % GROUP
    heads = tokens * (KV_HEADS * GROUP) + own_heads
    places = heads * num_shares + share if IS_SHARED else heads
    if begin >= end:
        tl.store(sums + places, float("-inf"), mask=is_row)  # a share of several: a token has at least itself
        return
    own_positions = tl.load(positions + tl.minimum(tokens, last)).to(tl.int32)  # beyond the last, as the last
    output, weight, most = _absorbed(
        _queries(query, heads, is_row, KEY_DIM, KEY_PAD),
        own_positions,
        None if slopes is None else tl.load(slopes + own_heads, mask=is_row, other=0.0),
        keys + head * KEY_DIM,
        values + head * VALUE_DIM,
        pages + line,
        first,
        begin,
        end,
        scaling,
        bias_scale,
        KV_HEADS,
        KEY_DIM,
        VALUE_DIM,
        VALUE_PAD,
        PAGE,
        TILE,
        WINDOW,
        SOFTCAP,
        IS_ROUNDED,
    )
    if IS_SHARED:
        saw_none = weight == 0
        weight = tl.where(saw_none, 1.0, weight)
        tl.store(sums + places, tl.where(saw_none, float("-inf"), most + tl.log2(weight)), mask=is_row)
    elif sinks is not None:
        weight += _sunk(tl.load(sinks + own_heads, mask=is_row, other=0.0), most)
    _keep(found, places, is_row, output / weight[:, None], VALUE_DIM, VALUE_PAD)


@triton.jit(do_not_specialize=["num_shares"])
def join_shares(
    found,
    sums,
    sinks,
    output,
    num_shares,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    MOST_SHARES: tl.constexpr,
):
    """A program is one head of one token, (num_tokens, num_heads): its output, of what `attend_tiles` found in shares.

    found, sums, sinks: as there. output: (num_tokens, num_heads, VALUE_DIM).
    """
    head = tl.program_id(1)
    place = tl.program_id(0) * tl.num_programs(1) + head
    shares = tl.arange(0, MOST_SHARES)
    parts = place * num_shares + shares
    logarithms = tl.load(sums + parts, mask=shares < num_shares, other=float("-inf"))
    most = tl.max(logarithms, 0)
    weights = tl.exp2(logarithms - most)
    weight = tl.sum(weights, 0)
    if sinks is not None:
        weight += _sunk(tl.load(sinks + head), most)
    dims = tl.arange(0, VALUE_PAD)
    outputs = tl.load(
        found + parts[:, None] * VALUE_DIM + dims[None],
        mask=(logarithms > float("-inf"))[:, None] & (dims[None] < VALUE_DIM),
        other=0.0,
    )
    joined = tl.sum(outputs * weights[:, None], 0) / weight
    tl.store(output + place * VALUE_DIM + dims, joined.to(output.dtype.element_ty), mask=dims < VALUE_DIM)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def keep_tokens(
    key,
    value,
    keys,
    values,
    slots,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """A program is one head of one new token, grid (num_tokens, KV_HEADS): its key and value go where the slot is.

    key, value: strides from token to token and from head to head, neighbouring numbers together. keys, values:
    (num_slots, KV_HEADS, dim). slots: (num_tokens,) int64.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(slots + token) * tl.num_programs(1) + head
    key_dims, value_dims = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    own_key = key + token * key_stride + head * key_head_stride + key_dims
    own_value = value + token * value_stride + head * value_head_stride + value_dims
    tl.store(
        keys + place * KEY_DIM + key_dims, tl.load(own_key, mask=key_dims < KEY_DIM), mask=key_dims < KEY_DIM
    )
    tl.store(
        values + place * VALUE_DIM + value_dims,
        tl.load(own_value, mask=value_dims < VALUE_DIM),
        mask=value_dims < VALUE_DIM,
    )


@triton.jit
def _queries(query, heads, is_row, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr):
    """(ROWS, KEY_PAD), with zeros where there is nothing."""
    dims = tl.arange(0, KEY_PAD)
    there = is_row[:, None] & (dims[None] < KEY_DIM)
    return tl.load(query + heads[:, None] * KEY_DIM + dims[None], mask=there, other=0.0)


@triton.jit
def _sunk(sinks, most):
    """Weights of scores that belong to no key, relative to `most`."""
    return tl.exp2(sinks.to(tl.float32) * _LOG2_E - most)


@triton.jit
def _keep(output, places, is_row, found, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr):
    dims = tl.arange(0, VALUE_PAD)
    there = is_row[:, None] & (dims[None] < VALUE_DIM)
    to = output + places[:, None] * VALUE_DIM + dims[None]
    tl.store(to, found.to(output.dtype.element_ty), mask=there)


@triton.jit
def _absorbed(
    queries,
    positions,
    slopes,
    keys,
    values,
    pages,
    first,
    begin,
    end,
    scaling,
    bias_scale,
    KV_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
):
    """What a tile of queries (ROWS, KEY_PAD) at positions (ROWS,) finds at positions [begin, end) of its row.

    keys, values: of one head; a slot's lie KV_HEADS * dim behind the last one's. pages: the row's, from position
    `first` on. slopes: (ROWS,), or None.
    Returns sums of weighted values (ROWS, VALUE_PAD) and of weights (ROWS,), and the greatest scores (ROWS,), to base
    2, which all weights are relative to; float32.
    """
    key_dims = tl.arange(0, queries.shape[1])
    value_dims = tl.arange(0, VALUE_PAD)
    found = tl.zeros((queries.shape[0], VALUE_PAD), tl.float32)
    weight = tl.zeros((queries.shape[0],), tl.float32)
    most = tl.full((queries.shape[0],), float("-inf"), tl.float32)
    slots = _slots(pages, begin - first, end - first, PAGE, TILE)
    for at in range(begin, end, TILE):
        places = at + tl.arange(0, TILE)
        is_there = places < end
        key = tl.load(
            keys + slots[:, None] * (KV_HEADS * KEY_DIM) + key_dims[None],
            mask=is_there[:, None] & (key_dims[None] < KEY_DIM),
            other=0.0,
        )
        products = tl.dot(queries, tl.trans(key), input_precision="ieee")
        scores = _scored(products, places, slopes, scaling, bias_scale, SOFTCAP, IS_ROUNDED)
        is_seen = is_there[None] & (places[None] <= positions[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (places[None] > positions[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, float("-inf"))
        greatest = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(greatest == float("-inf"), 0.0, greatest)  # of a query that has seen nothing so far
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(most - base)
        value = tl.load(
            values + slots[:, None] * (KV_HEADS * VALUE_DIM) + value_dims[None],
            mask=is_there[:, None] & (value_dims[None] < VALUE_DIM),
            other=0.0,
        )
        found = tl.dot(weights.to(value.dtype), value, found * kept[:, None], input_precision="ieee")
        weight = weight * kept + tl.sum(weights, 1)
        most = greatest
        # A tile ahead, so that keys are on their way before it is absorbed.
        slots = _slots(pages, at + TILE - first, end - first, PAGE, TILE)
    return found, weight, most


@triton.jit
def _slots(pages, begin, end, PAGE: tl.constexpr, TILE: tl.constexpr):
    """(TILE,) int64: where the keys from place `begin` of a row's pages on lie; 0 from `end` on."""
    places = begin + tl.arange(0, TILE)
    return tl.load(pages + places // PAGE, mask=places < end, other=0) * PAGE + places % PAGE


@triton.jit
def _scored(products, places, slopes, scaling, bias_scale, SOFTCAP: tl.constexpr, IS_ROUNDED: tl.constexpr):
    """Scores (ROWS, TILE) of keys at `places`, scaled, capped and biased, to base 2."""
    if SOFTCAP > 0:
        doubled = tl.exp2(products * (scaling * (2 * _LOG2_E / SOFTCAP)))  # exp(2 x), for tanh(x)
        scores = SOFTCAP * _LOG2_E - 2 * SOFTCAP * _LOG2_E / (doubled + 1)
    else:
        scores = products * (scaling * _LOG2_E)
    if slopes is not None:
        if IS_ROUNDED:
            biases = _rounded(slopes[:, None] * _rounded(places.to(tl.float32))[None])
        else:
            biases = slopes[:, None] * places[None].to(tl.float32)
        scores += biases * (bias_scale * _LOG2_E)
    return scores


@triton.jit
def _rounded(numbers):
    """Finite float32, rounded to what bfloat16 holds, ties to even; by its bits, as the interpreter truncates."""
    bits = numbers.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
