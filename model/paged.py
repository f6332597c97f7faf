"""Attention of many tokens at once, each over the pages that a tensor names: the way of a GPU.

Owns how a batch becomes tensors of page tables and positions, and the attention over them. Shapes alone say what
is computed: nothing is read back from the device, a batch is filled up to one of a few sizes, and so a recorded
pass can be played again with other numbers (see `graphs`). It runs on any device; a CPU is quicker reading pages in
place, as `attention` does.

Every new token has a line of its own in the table, also where a row brings a few: they find each other's keys in
the cache, since all are written before any is looked for. Pages are gathered, which a kernel that reads block tables
would save: torch's wants pages of 256 tokens.

Source: Kwon et al. 2023, PagedAttention, section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor

from .form import Form
from .pages import Segment
from .pool import GONE

FEW_TOKENS: Final = 8  # of a row: with more, it is worth a kernel's call by itself
# Numbers of keys and values gathered at a time: 256 MiB in bfloat16.
_MAX_GATHERED: Final = 1 << 27
# Sizes of batches double up to here, and grow by it from there: each is recorded by itself.
_DOUBLED: Final = 32


class Shape(NamedTuple):
    """The size of a batch: tokens, and pages in a line of the table of each group of blocks."""

    num_tokens: int
    num_pages: tuple[int, ...]


class TokenTable(NamedTuple):
    """Where the keys of each token lie.

    pages: (num_tokens, num_pages) int64; their slots hold the positions from `firsts` on, and what is beyond the
    token is not looked at. firsts, positions: (num_tokens,) int64; position of the first slot, and of the token.
    """

    pages: Tensor
    firsts: Tensor
    positions: Tensor

    def part(self, first: int, last: int) -> TokenTable:
        """Lines [first, last)."""
        return TokenTable(self.pages[first:last], self.firsts[first:last], self.positions[first:last])


class Group(NamedTuple):
    """A batch in one group of blocks. slots: of the new tokens, (num_tokens,) int64."""

    slots: Tensor
    table: TokenTable


def filled(count: int) -> int:
    """The size that a batch of `count` is filled up to: 1, 2, 4, 8, 16, 32, 64, 96, …"""
    if count <= _DOUBLED:
        return 1 << max(count - 1, 0).bit_length()
    return -(-count // _DOUBLED) * _DOUBLED


def shape_of(segments: Sequence[Segment], windows: Sequence[int | None], page_tokens: int) -> Shape:
    """The size that these segments are filled up to. windows: of each group of blocks."""
    num_tokens = sum(segment.n for segment in segments)
    longest = max((segment.start + segment.n for segment in segments), default=1)
    return Shape(
        filled(num_tokens),
        tuple(_num_columns(longest, window, page_tokens) for window in windows),
    )


def numbers_of(
    segments: Sequence[Segment],
    shape: Shape,
    windows: Sequence[int | None],
    page_tokens: int,
    spare_page: int,
) -> list[int]:
    """All tensors of a batch in one row of numbers, as `groups_of` reads them: one transfer to the device.

    spare_page: of nobody, where the tokens that fill the batch up are written and look.
    """
    tokens = [(segment, segment.start + i) for segment in segments for i in range(segment.n)]
    missing = shape.num_tokens - len(tokens)
    numbers = [position for _, position in tokens] + [0] * missing
    for group, window in enumerate(windows):
        slots, firsts, pages = [], [], []
        for segment, position in tokens:
            own = segment.others[group - 1] if group else segment.pages
            index, offset = divmod(position, page_tokens)
            oldest = 0 if window is None else max(0, position - window + 1) // page_tokens
            line = [spare_page if page == GONE else page for page in own[oldest : index + 1]]
            slots.append(own[index] * page_tokens + offset)
            firsts.append(oldest * page_tokens)
            pages.extend(line + [spare_page] * (shape.num_pages[group] - len(line)))
        numbers += slots + [spare_page * page_tokens] * missing
        numbers += firsts + [0] * missing
        numbers += pages + [spare_page] * (missing * shape.num_pages[group])
    return numbers


def groups_of(numbers: Tensor, shape: Shape) -> tuple[Tensor, tuple[Group, ...]]:
    """Positions (num_tokens,), and the batch in each group of blocks: views of what `numbers_of` wrote."""
    count = shape.num_tokens
    positions, rest = numbers[:count], numbers[count:]
    groups = []
    for num_pages in shape.num_pages:
        slots, firsts, pages, rest = torch.split(
            rest, [count, count, count * num_pages, len(rest) - count * (2 + num_pages)]
        )
        groups.append(Group(slots, TokenTable(pages.view(count, num_pages), firsts, positions)))
    return positions, tuple(groups)


def attend_table(
    query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, page_tokens: int
) -> Tensor:
    """Causal attention of each token over its pages, in which it stands itself already.

    query: (num_tokens, num_heads, head_dim), rotated. keys, values: (num_kv_heads, num_slots, dim), where the heads
    of a slot lie together. Returns (num_tokens, num_heads, value_dim).
    """
    num_tokens = query.shape[0]
    numbers = table.pages.shape[1] * page_tokens * keys.shape[0] * (keys.shape[2] + values.shape[2])
    step = max(1, _MAX_GATHERED // numbers)
    parts = [
        _attend_some(
            query[first : first + step], keys, values, table.part(first, first + step), form, page_tokens
        )
        for first in range(0, num_tokens, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_some(
    query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, page_tokens: int
) -> Tensor:
    num_tokens, num_heads, _ = query.shape
    num_kv_heads = keys.shape[0]
    own_keys = _gathered(keys, table.pages, page_tokens)  # (num_tokens, kv heads, num_keys, dim)
    own_values = _gathered(values, table.pages, page_tokens)
    places = table.firsts[:, None] + torch.arange(own_keys.shape[2], device=query.device)
    hidden = places > table.positions[:, None]  # (num_tokens, num_keys)
    if form.window is not None:
        hidden |= places <= table.positions[:, None] - form.window
    # Neither a mask that is added to scores nor a weight of 0 hides a number that is not finite, and whoever had
    # the page before may have left one.
    for own in (own_keys, own_values):
        own.masked_fill_(hidden[:, None, :, None], 0)
    folded = query.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, -1)
    if form.is_plain:
        seen = ~hidden[:, None, None].expand(-1, -1, folded.shape[2], -1)
        output = F.scaled_dot_product_attention(
            folded, own_keys, own_values, attn_mask=seen, scale=form.scaling
        )
        return output.reshape(num_tokens, num_heads, -1)
    scores = folded @ own_keys.transpose(2, 3) * form.scaling  # (num_tokens, kv heads, group, num_keys)
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    if form.bias is not None:
        scores = scores + form.bias(places).transpose(0, 1).view(scores.shape)
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    if form.sinks is not None:
        sinks = form.sinks.to(scores.dtype).view(1, num_kv_heads, -1, 1)
        scores = torch.cat([scores, sinks.expand(num_tokens, -1, -1, -1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : places.shape[1]]
    output = weights.to(query.dtype) @ own_values
    return output.reshape(num_tokens, num_heads, -1)


def _gathered(slots: Tensor, pages: Tensor, page_tokens: int) -> Tensor:
    """(num_heads, num_slots, dim) → (num_tokens, num_heads, num_pages * page_tokens, dim), a copy."""
    num_heads, _, dim = slots.shape
    by_page = slots.transpose(0, 1).view(-1, page_tokens, num_heads, dim)
    found = by_page.index_select(0, pages.flatten())
    return found.view(pages.shape[0], -1, num_heads, dim).transpose(1, 2)


def _num_columns(longest: int, window: int | None, page_tokens: int) -> int:
    """Pages in a line: all, a power of two of them, or as many as a window ever reaches over."""
    whole = filled(-(-longest // page_tokens))
    return whole if window is None else min(whole, -(-(window - 1) // page_tokens) + 1)
