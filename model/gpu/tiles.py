"""Tokens sorted by expert, in tiles that each belong to one: found on the device, which the host never asks.

A token is sent to a few experts, each time as an entry. How many tiles there may be follows from shapes alone, some
stay empty, and so a pass can be recorded. A few entries are sorted by counting, in one kernel; torch takes thirty
calls for that, longer than the weights of small experts take to be read. Many go through torch, which sorts faster.

Source: Gale et al. 2022, MegaBlocks; Tan et al. 2024, ScatterMoE, for rows that are gathered and scattered by products.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COUNTED: Final = 2048  # entries; each is compared with all others, and that is worked out, not measured
_AT_ONCE: Final = 64  # entries or tiles of a program
_SIZES: Final = (8, 16, 32, 64)  # rows that a tile may have, as `products.cut_of` cuts them


class Tiles(NamedTuple):
    """Where the entries of tokens go. An entry is a token's number times the experts of each, plus which of them.

    order: (num_entries,) int32 or int64, entries by expert, and by number within it. firsts, ends, experts:
    (num_tiles,) int32: a tile begins at firsts of `order`, and its expert's entries go up to ends; where both are the
    same, it is empty. num_rows: of a full tile. num_chosen: experts of each token. num_experts: in all.
    """

    order: Tensor
    firsts: Tensor
    ends: Tensor
    experts: Tensor
    num_rows: int
    num_chosen: int
    num_experts: int


def tiles_of(chosen: Tensor, num_experts: int) -> Tiles:
    """The tiles of tokens that are sent to these experts. chosen: (num_tokens, num_chosen) int64."""
    entries = chosen.reshape(-1)
    count = len(entries)
    size = next((size for size in _SIZES if count <= size * num_experts), _SIZES[-1])
    # Of each expert that has entries all tiles are full but one.
    num_tiles = count // size + min(num_experts, count)
    find = _counted if 0 < count <= _MOST_COUNTED else _sorted
    order, firsts, ends, experts = find(entries, num_experts, size, num_tiles)
    return Tiles(order, firsts, ends, experts, size, chosen.shape[1], num_experts)


def _sorted(
    entries: Tensor, num_experts: int, size: int, num_tiles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By torch: order, firsts, ends, experts."""
    in_order, order = torch.sort(entries, stable=True)
    each = torch.arange(num_experts, device=entries.device)
    ends = torch.searchsorted(in_order, each, right=True)  # (num_experts,) entries of all up to this one
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    last_tiles = torch.cumsum((ends - begins + size - 1) // size, dim=0)
    tiles = torch.arange(num_tiles, device=entries.device)
    owners = torch.searchsorted(last_tiles, tiles, right=True).clamp_(max=num_experts - 1)
    num_before = torch.where(owners > 0, last_tiles[owners - 1], 0)
    own_ends = ends[owners]
    firsts = torch.minimum(begins[owners] + (tiles - num_before) * size, own_ends)
    return order, firsts.int(), own_ends.int(), owners.int()


def _counted(
    entries: Tensor, num_experts: int, size: int, num_tiles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By counting: order, firsts, ends, experts."""
    count = len(entries)
    order = torch.empty(count, dtype=torch.int32, device=entries.device)
    tiles = torch.empty((3, num_tiles), dtype=torch.int32, device=entries.device)
    with torch.cuda.device_of(entries):
        _count[(-(-max(count, num_tiles) // _AT_ONCE),)](
            entries,
            order,
            tiles,
            count,
            num_experts,
            num_tiles,
            size=size,
            at_once=_AT_ONCE,
            filled_experts=max(triton.next_power_of_2(num_experts), 16),
            num_warps=8,
            enable_fp_fusion=True,
        )
    firsts, ends, experts = tiles
    return order, firsts, ends, experts


@triton.jit(do_not_specialize=["count", "num_experts", "num_tiles"])
def _count(
    entries,
    order,
    tiles,
    count,
    num_experts,
    num_tiles,
    size: tl.constexpr,
    at_once: tl.constexpr,
    filled_experts: tl.constexpr,
):
    """The places of some entries, and some tiles.

    entries: (count,) int64, their experts. order: (count,) int32. tiles: (3, num_tiles) int32, firsts, ends, experts.
    An entry's place is the number of those that come before it.
    """
    mine = tl.program_id(0) * at_once + tl.arange(0, at_once)
    expert = tl.load(entries + mine, mask=mine < count, other=0).to(tl.int32)
    each = tl.arange(0, filled_experts)
    place = tl.zeros((at_once,), tl.int32)
    begins = tl.zeros((filled_experts,), tl.int32)
    ends = tl.zeros((filled_experts,), tl.int32)
    for first in range(0, count, at_once):
        others = first + tl.arange(0, at_once)
        # Those beyond the last entry come after everything.
        other = tl.load(entries + others, mask=others < count, other=filled_experts).to(tl.int32)
        is_before = (other[None, :] < expert[:, None]) | (
            (other[None, :] == expert[:, None]) & (others[None, :] < mine[:, None])
        )
        place += tl.sum(is_before.to(tl.int32), 1)
        begins += tl.sum((other[None, :] < each[:, None]).to(tl.int32), 1)
        ends += tl.sum((other[None, :] <= each[:, None]).to(tl.int32), 1)
    tl.store(order + place, mine, mask=mine < count)

    own_tiles = (ends - begins + size - 1) // size  # (filled_experts,)
    last_tiles = tl.cumsum(own_tiles, 0)
    is_past = last_tiles[None, :] <= mine[:, None]  # tile by expert: all of the expert's are before it
    owner = tl.sum(is_past.to(tl.int32), 1)
    num_before = tl.sum(tl.where(is_past, own_tiles[None, :], 0), 1)
    is_owner = each[None, :] == owner[:, None]
    begin = tl.sum(tl.where(is_owner, begins[None, :], 0), 1)
    end = tl.sum(tl.where(is_owner, ends[None, :], 0), 1)
    is_tile = mine < num_tiles
    tl.store(tiles + mine, tl.minimum(begin + (mine - num_before) * size, end), mask=is_tile)
    tl.store(tiles + num_tiles + mine, end, mask=is_tile)
    tl.store(tiles + 2 * num_tiles + mine, tl.minimum(owner, num_experts - 1), mask=is_tile)
