"""Where a batch lies in the cache: made once for a pass, read by every block.

Owns how segments become slots, runs of neighbouring slots, and tables; it computes nothing of what is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..protocol.errors import Code, error
from .cache import Cache
from .paged import FEW_TOKENS, Group, RowTable, TokenTable, groups_of, numbers_of, row_tables, shape_of
from .pages import Segment
from .pool import GONE
from .transfers import to_device


@dataclass(frozen=True, slots=True)
class Batch:
    """New tokens of many rows, one segment after the other; segments without pages attend only themselves."""

    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the flattened batch."""
        return sum(segment.n for segment in self.segments)

    @property
    def is_stateless(self) -> bool:
        """Whether nothing is cached: each segment is a whole sequence, and gradients may flow."""
        return not any(segment.pages for segment in self.segments)

    @classmethod
    def stateless(cls, lengths: tuple[int, ...]) -> Batch:
        """Whole sequences of these lengths, side by side, that leave nothing behind."""
        return cls(tuple(Segment((), 0, length) for length in lengths))


class Run(NamedTuple):
    """Neighbouring slots [slot, slot + num) that hold positions [first, first + num) of a row."""

    slot: int
    first: int
    num: int


class Reach(NamedTuple):
    """One row in a placement: its tokens [offset, offset + n) of the batch, and where all its tokens lie.

    length: of the text that it is a part of, as far as anybody said.
    """

    offset: int
    n: int
    start: int
    runs: tuple[Run, ...]
    length: int


class Layout(NamedTuple):
    """Where a batch lies in one group of blocks. slots: of the new tokens, (num_tokens,), or empty.

    In a paged cache besides: table, of the tokens of rows with few new ones; lined: which tokens those are, None is
    all; rows: those with many new tokens.
    """

    reaches: tuple[Reach, ...]
    slots: Tensor
    table: TokenTable | None = None
    lined: Tensor | None = None
    rows: tuple[RowTable, ...] = ()


class Placement:
    """A batch laid out on a cache: made once a forward pass, read by every block.

    reaches: in the first group of blocks.
    """

    def __init__(self, batch: Batch, cache: Cache | None, device: torch.device) -> None:
        self.cache = None if batch.is_stateless else cache
        self._places = self.cache.grouping.places if self.cache is not None else {}
        num_groups = self.cache.grouping.num_groups if self.cache is not None else 1
        self._layouts = [self._laid_out(batch, group, device) for group in range(num_groups)]
        if self.cache is not None and self.cache.is_paged:
            self._layouts = _with_tables(self._layouts, batch, self.cache, device)
        self.reaches = self._layouts[0].reaches
        positions = [reach.start + i for reach in self.reaches for i in range(reach.n)]
        self.positions = to_device(torch.tensor(positions, dtype=torch.int64), device)  # (num_tokens,)

    @classmethod
    def recorded(cls, cache: Cache, positions: Tensor, groups: tuple[Group, ...]) -> Placement:
        """A batch that stands in tensors alone, every token of it in the tables."""
        placement = cls.__new__(cls)
        placement.cache = cache
        placement.positions = positions
        placement.reaches = ()
        placement._places = cache.grouping.places
        placement._layouts = [Layout((), group.slots, group.table) for group in groups]
        return placement

    @property
    def layouts(self) -> list[Layout]:
        """Where the batch lies, in each group of blocks."""
        return self._layouts

    @property
    def is_cached(self) -> bool:
        """Whether every row has pages."""
        return all(reach.runs for reach in self.reaches)

    def at(self, block: int, window: int | None) -> Layout:
        """Where the batch lies in a block that attends so far back. Raises `INTERNAL` if not all of that is kept."""
        group = self._places[block][0] if self.cache is not None else 0
        kept = self.cache.grouping.windows[group] if self.cache is not None else None
        if kept is not None and (window is None or window > kept):
            raise error(Code.INTERNAL, f"block {block} attends {window or 'all'} tokens, {kept} are kept")
        return self._layouts[group]

    def _laid_out(self, batch: Batch, group: int, device: torch.device) -> Layout:
        page_tokens = self.cache.page_tokens if self.cache is not None else 1
        slots: list[int] = []
        reaches: list[Reach] = []
        offset = 0
        for segment in batch.segments:
            if not segment.n:
                continue
            end = segment.start + segment.n
            runs: tuple[Run, ...] = ()
            if self.cache is not None:
                pages = segment.others[group - 1] if group else segment.pages
                runs = _runs(pages, end, page_tokens)
                slots.extend(_slots(pages, segment.start, end, page_tokens))
            reaches.append(Reach(offset, segment.n, segment.start, runs, segment.limit or end))
            offset += segment.n
        return Layout(tuple(reaches), to_device(torch.tensor(slots, dtype=torch.int64), device))


def _with_tables(layouts: list[Layout], batch: Batch, cache: Cache, device: torch.device) -> list[Layout]:
    """With tables for all rows: those with few new tokens share one."""
    windows, page_tokens, spare = cache.grouping.windows, cache.page_tokens, cache.spare_page
    reaches = layouts[0].reaches
    segments = [segment for segment in batch.segments if segment.n]
    placed = [(reach.offset, segment) for reach, segment in zip(reaches, segments, strict=True)]
    long = [(offset, segment) for offset, segment in placed if segment.n > FEW_TOKENS]
    if long:
        rows = row_tables(long, windows, page_tokens, spare, device)
        layouts = [layout._replace(rows=own) for layout, own in zip(layouts, rows, strict=True)]
    few = [(offset, segment) for offset, segment in placed if segment.n <= FEW_TOKENS]
    if not few:
        return layouts
    short = [segment for _, segment in few]
    places = [offset + i for offset, segment in few for i in range(segment.n)]
    shape = shape_of(short, windows, page_tokens, cache.growth)._replace(num_tokens=len(places))
    numbers = numbers_of(short, shape, windows, page_tokens, spare)
    _, groups = groups_of(to_device(numbers, device), shape)
    lined = to_device(torch.tensor(places), device) if long else None
    return [
        layout._replace(table=group.table, lined=lined) for layout, group in zip(layouts, groups, strict=True)
    ]


def _slots(pages: tuple[int, ...], start: int, end: int, page_tokens: int) -> list[int]:
    slots = []
    for position in range(start, end):
        page, offset = divmod(position, page_tokens)
        slots.append(pages[page] * page_tokens + offset)
    return slots


def _runs(pages: tuple[int, ...], end: int, page_tokens: int) -> tuple[Run, ...]:
    """What is kept of positions [0, end) of a row, as few runs of neighbouring slots as its pages allow."""
    runs: list[Run] = []
    index = next((index for index, page in enumerate(pages) if page != GONE), len(pages))
    num_pages = -(-end // page_tokens)
    while index < num_pages:
        last = index + 1
        while last < num_pages and pages[last] == pages[last - 1] + 1:
            last += 1
        first = index * page_tokens
        runs.append(Run(pages[index] * page_tokens, first, min(last * page_tokens, end) - first))
        index = last
    return tuple(runs)
