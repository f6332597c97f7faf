"""Attention by tables on a GPU: how its work is cut for the kernels of `attention`, and handed to them.

A program has a tile of tokens, a key head and a share of the keys; a tile is one token with a line of the table of its
own, or many of one row. Where tiles and heads alone keep the device busy nobody shares; else a second kernel joins what
the shares found. How many programs there are, and what memory they need, follows from shapes alone: what was launched
can be recorded and played again with other numbers.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import triton
from torch import Tensor

from ..alibi import Alibi
from ..form import Form
from ..paged import RowTable, TokenTable
from .attention import attend_tiles, join_shares, keep_tokens

_LEAST_DIM: Final = 16  # of a tile in a product, in each direction
_LEAST_SHARE: Final = 128  # keys that are worth a program
_MOST_SHARES: Final = 64
# Programs for each processor of the device: one computes while another waits for memory.
_PROGRAMS: Final = 2
# Bytes of the keys and values in a tile; another one is on its way meanwhile, and a gamer's GPU has 99 KB for a
# program. Half of it where there are more queries than fill one product: their sums take the registers.
_TILE_BYTES: Final = 1 << 15
_MOST_TILE: Final = 128
# A tile of queries where there are many, in rows and in bytes; float32 is multiplied without tensor cores, and needs
# more registers for it.
_MOST_ROWS: Final = 128
_QUERY_BYTES: Final = 1 << 15


class Plan(NamedTuple):
    """What kernels are compiled for, and how they are launched. grid: tiles, key heads, and shares of the keys.

    is_chunk: for many new tokens of one row.
    """

    is_chunk: bool
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for all that the same kernels compute."""
        return (self.is_chunk, *self.constants.values(), self.grid[2] > 1)


class BlockTables:
    """Attention by tables on one GPU; see `paged.TableAttention`. Of biases it knows ALiBi alone."""

    growth = 4  # few sizes to record: what nobody needs of a table costs its transfer alone

    def __init__(self, num_processors: int) -> None:
        """num_processors: of the device, which are to be kept busy."""
        self._num_processors = num_processors

    def write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """As `paged.TableAttention` says: both by one kernel."""
        key, value = (new if new.stride(2) == 1 else new.contiguous() for new in (key, value))
        key_dim, value_dim = keys.shape[2], values.shape[2]
        keep_tokens[(key.shape[1], key.shape[0])](
            key,
            value,
            keys,
            values,
            slots,
            key.stride(1),
            key.stride(0),
            value.stride(1),
            value.stride(0),
            KEY_DIM=key_dim,
            KEY_PAD=_padded(key_dim),
            VALUE_DIM=value_dim,
            VALUE_PAD=_padded(value_dim),
            num_warps=1,
            enable_fp_fusion=True,
        )

    def attend_lines(
        self, query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, page_tokens: int
    ) -> Tensor:
        """As `paged.TableAttention` says: tiles of one token, each with a line of the table."""
        plan = self.plan(query, keys, values, table, form, page_tokens, is_chunk=False)
        return self.attend(query, keys, values, table, form, plan)

    def attend_row(
        self, query: Tensor, keys: Tensor, values: Tensor, row: RowTable, form: Form, page_tokens: int
    ) -> Tensor:
        """As `paged.TableAttention` says: tiles of many tokens, all with the one line of the table."""
        plan = self.plan(query, keys, values, row.table, form, page_tokens, is_chunk=True)
        return self.attend(query, keys, values, row.table, form, plan)

    def plan(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: TokenTable,
        form: Form,
        page_tokens: int,
        *,
        is_chunk: bool,
    ) -> Plan:
        """How such tokens are attended. Of shapes alone."""
        (num_tokens, num_heads, _), num_kv_heads = query.shape, keys.shape[0]
        constants, options = cut(num_heads, keys, values, form, page_tokens, is_chunk=is_chunk)
        num_tiles = triton.cdiv(num_tokens, constants["TOKENS"])
        num_keys = table.pages.shape[1] * page_tokens
        if form.window is not None:
            num_keys = min(num_keys, form.window + constants["TOKENS"] - 1)
        shares = num_shares(num_tiles * num_kv_heads, num_keys, self._num_processors)
        return Plan(is_chunk, (num_tiles, num_kv_heads, shares), constants, options)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, plan: Plan
    ) -> Tensor:
        """(num_tokens, num_heads, value_dim). What shares find takes memory besides, for a moment."""
        (num_tokens, num_heads, _), value_dim = query.shape, values.shape[2]
        num_lines, num_columns = table.pages.shape
        shares = plan.grid[2]
        output = query.new_empty((num_tokens, num_heads, value_dim))
        found, sums = output, output
        if shares > 1:
            found = output.new_empty((num_tokens, num_heads, shares, value_dim), dtype=torch.float32)
            sums = output.new_empty((num_tokens, num_heads, shares), dtype=torch.float32)
        slopes, bias_scale = _bias(form, query.device)
        attend_tiles[plan.grid](
            query.contiguous(),
            keys,
            values,
            found,
            sums,
            table.pages,
            table.firsts,
            table.positions,
            form.sinks,
            slopes,
            num_tokens,
            num_columns if num_lines > 1 else 0,
            form.scaling,
            bias_scale,
            IS_SHARED=shares > 1,
            **plan.constants,
            **plan.options,
        )
        if shares > 1:
            join_shares[(num_tokens, num_heads)](
                found,
                sums,
                form.sinks,
                output,
                shares,
                VALUE_DIM=value_dim,
                VALUE_PAD=plan.constants["VALUE_PAD"],
                MOST_SHARES=_MOST_SHARES,
                num_warps=4,
                enable_fp_fusion=True,
            )
        return output


def num_shares(num_programs: int, num_keys: int, num_processors: int) -> int:
    """Programs that share a tile's keys, a power of two: as few as keep the device busy. Of shapes alone.

    num_programs: if nobody shared. num_keys: of the longest line.
    """
    wanted = _PROGRAMS * num_processors // num_programs
    worthwhile = -(-num_keys // _LEAST_SHARE)
    most = max(1, min(wanted, worthwhile, _MOST_SHARES))
    return 1 << (most.bit_length() - 1)


def cut(
    num_heads: int, keys: Tensor, values: Tensor, form: Form, page_tokens: int, *, is_chunk: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a kernel is compiled for, and how it is launched. is_chunk: for many new tokens of one row."""
    num_kv_heads, _, key_dim = keys.shape
    value_dim, itemsize = values.shape[2], keys.dtype.itemsize
    group = num_heads // num_kv_heads
    key_pad, value_pad = _padded(key_dim), _padded(value_dim)
    is_simple = itemsize <= 2
    rows = _LEAST_DIM
    if is_chunk:
        wanted = _QUERY_BYTES // (max(key_pad, value_pad) * itemsize * (1 if is_simple else 2))
        rows = max(_LEAST_DIM, min(wanted, _MOST_ROWS))
    rows = max(rows, _padded(group))
    tile_bytes = _TILE_BYTES if rows == _LEAST_DIM and is_simple else _TILE_BYTES // 2
    tile = tile_bytes // ((key_pad + value_pad) * itemsize)
    constants = {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "TOKENS": rows // group if is_chunk else 1,
        "ROWS": rows,
        "KEY_DIM": key_dim,
        "KEY_PAD": key_pad,
        "VALUE_DIM": value_dim,
        "VALUE_PAD": value_pad,
        "PAGE": page_tokens,
        "TILE": max(_LEAST_DIM, min(1 << (max(tile, 1).bit_length() - 1), _MOST_TILE)),
        "WINDOW": form.window or 0,
        "SOFTCAP": form.softcap or 0.0,
        "IS_ROUNDED": isinstance(form.bias, Alibi) and form.bias.is_rounded,
    }
    options = {"num_warps": 4 if rows == _LEAST_DIM else 8, "num_stages": 3, "enable_fp_fusion": True}
    return constants, options


def _padded(dim: int) -> int:
    return max(_LEAST_DIM, 1 << (dim - 1).bit_length())


def _bias(form: Form, device: torch.device) -> tuple[Tensor | None, float]:
    """Slopes (num_heads,) float32, and what their products are scaled by."""
    if not isinstance(form.bias, Alibi):
        return None, 0.0
    return form.bias.slopes_on(device), form.bias.scale
