"""Batches as tensors: tables that name the pages of each token, and what attends by them.

Owns how a batch becomes tensors of page tables and positions. Shapes alone say what is computed: nothing is read back
from the device, a batch is filled up to one of a few sizes, and so a recorded pass can be played again with other
numbers (see `graphs`). There are two ways to attend: `gathered` joins a token's pages first and runs wherever torch
does; `gpu.attention` reads them in place. A CPU is quicker without tables, as `attention` does.

Every new token has a line of its own in the table, also where a row brings a few: they find each other's keys in
the cache, since all are written before any is looked for. A row that brings many has a table for all of them.

Source: Kwon et al. 2023, PagedAttention, section 4.3.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from .form import Form
from .pages import Segment
from .pool import GONE
from .transfers import to_device

FEW_TOKENS: Final = 8  # of a row: with more, it is worth a kernel's call by itself
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
    Tokens of one row may share one line, and one first.
    """

    pages: Tensor
    firsts: Tensor
    positions: Tensor

    def part(self, first: int, last: int) -> TokenTable:
        """Lines [first, last)."""
        return TokenTable(self.pages[first:last], self.firsts[first:last], self.positions[first:last])


class RowTable(NamedTuple):
    """Where the keys of one row's many new tokens lie: the tokens [offset, offset + n) of a batch.

    start: position of the first of them. first: that of the table's first slot. table: with one line for all, which
    names pages as far as the last token's.
    """

    offset: int
    n: int
    start: int
    first: int
    table: TokenTable


class TableAttention(Protocol):
    """Causal attention over pages that tables name, in which the new tokens stand already.

    query: (num_tokens, num_heads, key_dim), rotated. keys, values: (num_kv_heads, num_slots, dim), where the heads of a
    slot lie together. Both give (num_tokens, num_heads, value_dim), and wait for nothing of the device.
    """

    @property
    def growth(self) -> int:
        """Columns of a table grow by powers of it: greater where columns that nobody needs cost little."""

    def write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Put new tokens' keys and values, (num_kv_heads, num_tokens, dim) each, into `slots` (num_tokens,) int64."""

    def attend_lines(
        self, query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, page_tokens: int
    ) -> Tensor:
        """Each token over the pages in its line. Programs and memory follow from shapes alone."""

    def attend_row(
        self, query: Tensor, keys: Tensor, values: Tensor, row: RowTable, form: Form, page_tokens: int
    ) -> Tensor:
        """The tokens of one row over its pages."""


class Group(NamedTuple):
    """A batch in one group of blocks. slots: of the new tokens, (num_tokens,) int64."""

    slots: Tensor
    table: TokenTable


def filled(count: int) -> int:
    """The size that a batch of `count` is filled up to: 1, 2, 4, 8, 16, 32, 64, 96, …"""
    if count <= _DOUBLED:
        return 1 << max(count - 1, 0).bit_length()
    return -(-count // _DOUBLED) * _DOUBLED


def shape_of(
    segments: Sequence[Segment], windows: Sequence[int | None], page_tokens: int, growth: int = 2
) -> Shape:
    """The size that these segments are filled up to. windows: of each group of blocks; growth: of columns."""
    num_tokens = sum(segment.n for segment in segments)
    longest = max((segment.start + segment.n for segment in segments), default=1)
    return Shape(
        filled(num_tokens),
        tuple(_num_columns(longest, window, page_tokens, growth) for window in windows),
    )


def _num_columns(longest: int, window: int | None, page_tokens: int, growth: int) -> int:
    """Pages in a line: all, filled up to a power, or as many as a window ever reaches over."""
    num_pages = -(-longest // page_tokens)
    whole = 1
    while whole < num_pages:
        whole *= growth
    return whole if window is None else min(whole, -(-(window - 1) // page_tokens) + 1)


def numbers_of(
    segments: Sequence[Segment],
    shape: Shape,
    windows: Sequence[int | None],
    page_tokens: int,
    spare_page: int,
) -> Tensor:
    """All tensors of a batch in one row of numbers, int64, as `groups_of` reads them: one transfer to the device.

    spare_page: of nobody, where the tokens that fill the batch up are written and look.
    """
    tokens = [(segment, segment.start + i) for segment in segments for i in range(segment.n)]
    missing = shape.num_tokens - len(tokens)
    numbers = array("q", [position for _, position in tokens] + [0] * missing)
    for group, (window, num_pages) in enumerate(zip(windows, shape.num_pages, strict=True)):
        slots = array("q", [spare_page * page_tokens]) * shape.num_tokens
        firsts = array("q", [0]) * shape.num_tokens
        pages = array("q", [spare_page]) * (shape.num_tokens * num_pages)
        for line, (segment, position) in enumerate(tokens):
            own = _pages(segment, group)
            index, offset = divmod(position, page_tokens)
            oldest = _oldest_page(position, window, page_tokens)
            slots[line] = own[index] * page_tokens + offset
            firsts[line] = oldest * page_tokens
            seen = array("q", _kept(own[oldest : index + 1], spare_page))
            pages[line * num_pages : line * num_pages + len(seen)] = seen
        numbers += slots + firsts + pages
    return torch.frombuffer(numbers, dtype=torch.int64)


def _pages(segment: Segment, group: int) -> tuple[int, ...]:
    return segment.others[group - 1] if group else segment.pages


def _oldest_page(position: int, window: int | None, page_tokens: int) -> int:
    """Index of the first page that a token looks into."""
    return 0 if window is None else max(0, position - window + 1) // page_tokens


def _kept(pages: tuple[int, ...], spare_page: int) -> tuple[int, ...]:
    if GONE not in pages:
        return pages
    return tuple(spare_page if page == GONE else page for page in pages)


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


def row_tables(
    rows: Sequence[tuple[int, Segment]],
    windows: Sequence[int | None],
    page_tokens: int,
    spare_page: int,
    device: torch.device,
) -> list[tuple[RowTable, ...]]:
    """Tables of rows with many new tokens, in each group of blocks. rows: with their offsets in the batch."""
    plans = [
        [(offset, segment, _oldest_page(segment.start, window, page_tokens)) for offset, segment in rows]
        for window in windows
    ]
    numbers, sizes = array("q"), []
    for group, plan in enumerate(plans):
        for _, segment, oldest in plan:
            end = segment.start + segment.n
            pages = _kept(_pages(segment, group)[oldest : -(-end // page_tokens)], spare_page)
            numbers.extend((*pages, oldest * page_tokens, *range(segment.start, end)))
            sizes += [len(pages), 1, segment.n]
    parts = iter(torch.split(to_device(torch.frombuffer(numbers, dtype=torch.int64), device), sizes))
    return [
        tuple(
            RowTable(
                offset,
                segment.n,
                segment.start,
                oldest * page_tokens,
                TokenTable(next(parts)[None], next(parts), next(parts)),
            )
            for offset, segment, oldest in plan
        )
        for plan in plans
    ]
