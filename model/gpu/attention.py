"""Attention whose keys and values are read where they lie, page by page, as tables on the device name them.

Owns the kernels, and how work is cut for them: a few new tokens of many rows are a program for each line of the table,
key head and share of the line's keys, and a second kernel joins what the shares found; many new tokens of one row are a
program for each tile of them and key head. Both let a tile of queries absorb a range of keys in one pass, with sums
in float32. A program ends where its tokens stand, so columns of a table that nobody needs cost nothing, and how many
programs there are follows from shapes alone: what was launched can be recorded and played again with other numbers.

The rows of a tile are the heads that share a key head, of one token or of several, so that each key is read once for
all of them. Slots that a row does not attend are never loaded: what nobody wrote there may be anything.

Source: Dao et al. 2022, FlashAttention, and Dao 2023, FlashAttention-2, for the pass; Dao et al. 2023, Flash-Decoding,
for the shares; Kwon et al. 2023, PagedAttention, for the tables.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..alibi import Alibi
from ..form import Form
from ..gathered import Gathering
from ..paged import RowTable, TokenTable

_LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x * _LOG2_E), and exp2 is what a device has

_LEAST_DIM: Final = 16  # of a tile in a product, in each direction
_LEAST_SHARE: Final = 128  # keys of a line that are worth a program
_MOST_SHARES: Final = 64
# Programs for each processor of the device: one computes while another waits for memory.
_PROGRAMS: Final = 2
# Of keys and values in a tile; while one is absorbed the next is loaded. A gamer's GPU has 99 KB for a program.
_TILE_BYTES: Final = 1 << 15
_CHUNK_ROWS: Final = 64  # of a tile of queries, where there are many
_MOST_CHUNK_ROWS: Final = 128


class BlockTables:
    """Attention by tables on one GPU; see `paged.TableAttention`."""

    growth = 4  # few sizes to record: what nobody needs of a table costs its transfer alone

    def __init__(self, num_processors: int) -> None:
        """num_processors: of the device, which are to be kept busy."""
        self._num_processors = num_processors
        self._otherwise = Gathering()

    def attend_lines(
        self, query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, page_tokens: int
    ) -> Tensor:
        """As `paged.TableAttention` says; (num_tokens, num_heads, value_dim)."""
        if not _is_known(form):
            return self._otherwise.attend_lines(query, keys, values, table, form, page_tokens)
        num_tokens, num_heads, _ = query.shape
        num_kv_heads, _, value_dim = values.shape
        num_columns = table.pages.shape[1]
        num_keys = num_columns * page_tokens
        shares = num_shares(
            num_tokens * num_kv_heads,
            num_keys if form.window is None else min(num_keys, form.window),
            self._num_processors,
        )
        output = query.new_empty((num_tokens, num_heads, value_dim))
        found, sums = output, output
        if shares > 1:
            found = output.new_empty((num_tokens, num_heads, shares, value_dim), dtype=torch.float32)
            sums = output.new_empty((num_tokens, num_heads, shares), dtype=torch.float32)
        sinks = None if form.sinks is None else form.sinks.float().contiguous()
        slopes, bias_scale = _bias(form, query.device)
        attend_lines[(num_tokens, num_kv_heads, shares)](
            query.contiguous(),
            keys,
            values,
            found,
            sums,
            table.pages,
            table.firsts,
            table.positions,
            sinks,
            slopes,
            num_columns,
            form.scaling,
            bias_scale,
            IS_SHARED=shares > 1,
            **constants(num_heads, keys, values, form, page_tokens, _LEAST_DIM),
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
        if shares > 1:
            join_shares[(num_tokens, num_heads)](
                found,
                sums,
                sinks,
                output,
                VALUE_DIM=value_dim,
                VALUE_PAD=_padded(value_dim),
                SHARES=shares,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return output

    def attend_row(
        self, query: Tensor, keys: Tensor, values: Tensor, row: RowTable, form: Form, page_tokens: int
    ) -> Tensor:
        """As `paged.TableAttention` says; (n, num_heads, value_dim)."""
        if not _is_known(form):
            return self._otherwise.attend_row(query, keys, values, row, form, page_tokens)
        num_tokens, num_heads, _ = query.shape
        num_kv_heads, _, value_dim = values.shape
        output = query.new_empty((num_tokens, num_heads, value_dim))
        is_wide = max(keys.shape[2], value_dim) * keys.dtype.itemsize > 256  # no room for more queries
        rows = _CHUNK_ROWS if is_wide else _MOST_CHUNK_ROWS
        numbers = constants(num_heads, keys, values, form, page_tokens, rows)
        slopes, bias_scale = _bias(form, query.device)
        tokens = numbers["ROWS"] // numbers["GROUP"]
        attend_chunk[(triton.cdiv(num_tokens, tokens), num_kv_heads)](
            query.contiguous(),
            keys,
            values,
            output,
            row.pages,
            None if form.sinks is None else form.sinks.float().contiguous(),
            slopes,
            row.first,
            row.start,
            num_tokens,
            form.scaling,
            bias_scale,
            **numbers,
            num_warps=numbers["ROWS"] // 16,
            num_stages=2,
            enable_fp_fusion=True,
        )
        return output


def num_shares(num_programs: int, num_keys: int, num_processors: int) -> int:
    """Programs that share a line's keys, a power of two: as few as keep the device busy. Of shapes alone.

    num_programs: if nobody shared. num_keys: of the longest line.
    """
    wanted = _PROGRAMS * num_processors // num_programs
    worthwhile = -(-num_keys // _LEAST_SHARE)
    most = max(1, min(wanted, worthwhile, _MOST_SHARES))
    return 1 << (most.bit_length() - 1)


def constants(
    num_heads: int, keys: Tensor, values: Tensor, form: Form, page_tokens: int, rows: int
) -> dict[str, Any]:
    """What kernels are compiled for. rows: of a tile of queries, if no key head has more query heads."""
    num_kv_heads, _, key_dim = keys.shape
    value_dim = values.shape[2]
    group = num_heads // num_kv_heads
    key_pad, value_pad = _padded(key_dim), _padded(value_dim)
    tile = _TILE_BYTES // ((key_pad + value_pad) * keys.dtype.itemsize)
    return {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "ROWS": max(rows, _padded(group)),
        "KEY_DIM": key_dim,
        "KEY_PAD": key_pad,
        "VALUE_DIM": value_dim,
        "VALUE_PAD": value_pad,
        "PAGE": page_tokens,
        "TILE": min(max(_padded(tile + 1) // 2, _LEAST_DIM), 128),
        "WINDOW": form.window or 0,
        "SOFTCAP": form.softcap or 0.0,
        "IS_ROUNDED": isinstance(form.bias, Alibi) and form.bias.is_rounded,
    }


def _padded(dim: int) -> int:
    return max(_LEAST_DIM, 1 << (dim - 1).bit_length())


def _is_known(form: Form) -> bool:
    return form.bias is None or isinstance(form.bias, Alibi)


def _bias(form: Form, device: torch.device) -> tuple[Tensor | None, float]:
    """Slopes (num_heads,) float32, and what their products are scaled by."""
    if not isinstance(form.bias, Alibi):
        return None, 0.0
    return form.bias.slopes_on(device), form.bias.scale


@triton.jit(
    do_not_specialize=["num_columns"], do_not_specialize_on_alignment=["pages", "firsts", "positions"]
)
def attend_lines(
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
    num_columns,
    scaling,
    bias_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
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
    """A program is one token, key head and share of the keys: grid (num_tokens, KV_HEADS, shares).

    query: (num_tokens, num_heads, KEY_DIM). keys, values: (num_slots, KV_HEADS, dim). pages: (num_tokens, num_columns)
    int64; firsts, positions: (num_tokens,) int64. sinks, slopes: (num_heads,) float32, or None.
    found: (num_tokens, num_heads, VALUE_DIM) as query; or, where keys are shared, (num_tokens, num_heads, shares,
    VALUE_DIM) float32, with sums (num_tokens, num_heads, shares): logarithms to base 2 of the weights' sums, -inf for
    a share that had no keys, which writes nothing else.
    """
    line, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + line).to(tl.int32)
    first = tl.load(firsts + line).to(tl.int32)
    oldest = first
    if WINDOW > 0:
        oldest = tl.maximum(first, position - WINDOW + 1)
    num_keys = tl.cdiv(tl.cdiv(position + 1 - oldest, tl.num_programs(2)), TILE) * TILE
    begin = oldest + share * num_keys
    end = tl.minimum(begin + num_keys, position + 1)
    rows = tl.arange(0, ROWS)
    is_row = rows < GROUP
    heads = line * (KV_HEADS * GROUP) + head * GROUP + rows
    places = heads * tl.num_programs(2) + share if IS_SHARED else heads
    if begin >= end:
        tl.store(sums + places, float("-inf"), mask=is_row)  # a share of several: one token alone has itself
        return
    output, weight, most = _absorbed(
        _queries(query, heads, is_row, KEY_DIM, KEY_PAD),
        tl.full((ROWS,), position, tl.int32),
        None if slopes is None else tl.load(slopes + head * GROUP + rows, mask=is_row, other=0.0),
        keys + head * KEY_DIM,
        values + head * VALUE_DIM,
        pages + line * num_columns,
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
        tl.store(sums + places, most + tl.log2(weight), mask=is_row)
    elif sinks is not None:
        weight += tl.exp2(tl.load(sinks + head * GROUP + rows, mask=is_row, other=0.0) * _LOG2_E - most)
    _keep(found, places, is_row, output / weight[:, None], VALUE_DIM, VALUE_PAD)


@triton.jit
def join_shares(
    found,
    sums,
    sinks,
    output,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    SHARES: tl.constexpr,
):
    """A program is one head of one token, (num_tokens, num_heads): its output, of what `attend_lines` found in shares.

    found, sums, sinks: as there. output: (num_tokens, num_heads, VALUE_DIM).
    """
    head = tl.program_id(1)
    place = tl.program_id(0) * tl.num_programs(1) + head
    shares = tl.arange(0, SHARES)
    logarithms = tl.load(sums + place * SHARES + shares)
    most = tl.max(logarithms, 0)
    weights = tl.exp2(logarithms - most)
    weight = tl.sum(weights, 0)
    if sinks is not None:
        weight += tl.exp2(tl.load(sinks + head) * _LOG2_E - most)
    dims = tl.arange(0, VALUE_PAD)
    parts = tl.load(
        found + (place * SHARES + shares[:, None]) * VALUE_DIM + dims[None],
        mask=(logarithms > float("-inf"))[:, None] & (dims[None] < VALUE_DIM),
        other=0.0,
    )
    joined = tl.sum(parts * weights[:, None], 0) / weight
    tl.store(output + place * VALUE_DIM + dims, joined.to(output.dtype.element_ty), mask=dims < VALUE_DIM)


@triton.jit(do_not_specialize=["first", "start", "num_tokens"], do_not_specialize_on_alignment=["pages"])
def attend_chunk(
    query,
    keys,
    values,
    output,
    pages,
    sinks,
    slopes,
    first,
    start,
    num_tokens,
    scaling,
    bias_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
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
):
    """A program is a tile of a row's new tokens and a key head: grid (tiles of ROWS // GROUP tokens, KV_HEADS).

    query: (num_tokens, num_heads, KEY_DIM), of positions from `start` on. keys, values: (num_slots, KV_HEADS, dim),
    which hold the new tokens too. pages: of the row, int64, from position `first` on. sinks, slopes: (num_heads,)
    float32, or None. output: (num_tokens, num_heads, VALUE_DIM).
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last has most to do, and begins
    head = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    tokens = tile * TOKENS + rows // GROUP
    own_heads = head * GROUP + rows % GROUP
    is_row = (rows < TOKENS * GROUP) & (tokens < num_tokens)
    heads = tokens * (KV_HEADS * GROUP) + own_heads
    oldest = first
    if WINDOW > 0:
        oldest = tl.maximum(first, start + tile * TOKENS - WINDOW + 1)
    found, weight, most = _absorbed(
        _queries(query, heads, is_row, KEY_DIM, KEY_PAD),
        start + tokens,
        None if slopes is None else tl.load(slopes + own_heads, mask=is_row, other=0.0),
        keys + head * KEY_DIM,
        values + head * VALUE_DIM,
        pages,
        first,
        oldest,
        start + tl.minimum((tile + 1) * TOKENS, num_tokens),
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
    if sinks is not None:
        weight += tl.exp2(tl.load(sinks + own_heads, mask=is_row, other=0.0) * _LOG2_E - most)
    _keep(output, heads, is_row, found / weight[:, None], VALUE_DIM, VALUE_PAD)


@triton.jit
def _queries(query, heads, is_row, KEY_DIM: tl.constexpr, KEY_PAD: tl.constexpr):
    """(ROWS, KEY_PAD), with zeros where there is nothing."""
    dims = tl.arange(0, KEY_PAD)
    there = is_row[:, None] & (dims[None] < KEY_DIM)
    return tl.load(query + heads[:, None] * KEY_DIM + dims[None], mask=there, other=0.0)


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
    for at in range(begin, end, TILE):
        places = at + tl.arange(0, TILE)
        is_there = places < end
        offsets = places - first
        slots = tl.load(pages + offsets // PAGE, mask=is_there, other=0) * PAGE + offsets % PAGE
        key = tl.load(
            keys + slots[:, None] * (KV_HEADS * KEY_DIM) + key_dims[None],
            mask=is_there[:, None] & (key_dims[None] < KEY_DIM),
            other=0.0,
        )
        products = tl.dot(queries, tl.trans(key), input_precision="ieee")
        scores = _scored(products * scaling, places, positions, slopes, bias_scale, SOFTCAP, IS_ROUNDED)
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
    return found, weight, most


@triton.jit
def _scored(scores, places, positions, slopes, bias_scale, SOFTCAP: tl.constexpr, IS_ROUNDED: tl.constexpr):
    """Scores (ROWS, TILE) of keys at `places`, capped and biased, to base 2.

    Softmax does not see what all keys of a query share: an exact bias is counted from the query, to lose nothing far
    into a text; one that is rounded has to be taken as it is.
    """
    if SOFTCAP > 0:
        scores = SOFTCAP - 2 * SOFTCAP / (tl.exp2(scores * (2 * _LOG2_E / SOFTCAP)) + 1)  # of tanh
    if slopes is not None:
        if IS_ROUNDED:
            biases = _rounded(slopes[:, None] * _rounded(places.to(tl.float32))[None])
        else:
            biases = slopes[:, None] * (places[None] - positions[:, None]).to(tl.float32)
        scores += biases * bias_scale
    return scores * _LOG2_E


@triton.jit
def _rounded(numbers):
    """Finite float32, rounded to what bfloat16 holds, ties to even: on its bits, as Triton's interpreter cuts them off."""
    bits = numbers.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
