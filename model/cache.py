"""The tensors behind the pages: one of keys and one of values for every block of a span.

Owns the memory of the KV cache and how it is laid out on a device; which row owns which page is the
business of `pages`. A slot is one token's place: slot = page * page_tokens + offset.

A CPU reads one head of one row at a time, so there all slots of a head lie together and a run of pages is
one stream of memory (measured at 4096 tokens and 16 heads: 1.1 ms a block, against 1.8 with the heads of a
slot together). What reads pages by tables of their numbers wants `(page, slot, head, dim)`: such a cache is
called paged, and has one page more, which belongs to nobody.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..protocol.errors import Code, error
from .groups import Grouping
from .paged import TableAttention
from .pool import PAGE_TOKENS, Memory, PageMove


class CacheShape(NamedTuple):
    """What one block keeps of a token: `num_heads` keys of `key_dim` and values of `value_dim` numbers."""

    num_heads: int
    key_dim: int
    value_dim: int


def page_bytes(shapes: Iterable[CacheShape], dtype: torch.dtype, page_tokens: int = PAGE_TOKENS) -> int:
    """Bytes that one page takes in all of these blocks together."""
    numbers = sum(shape.num_heads * (shape.key_dim + shape.value_dim) for shape in shapes)
    return numbers * dtype.itemsize * page_tokens


class Cache:
    """Keys and values of every block of a span, for `num_pages` pages.

    shapes: block → shape; blocks may differ, unless they are in several groups: then blocks of different groups
    lie in one tensor, in pages of their own. Raises `OUT_OF_MEMORY` if the device refuses.
    """

    def __init__(
        self,
        shapes: Mapping[int, CacheShape],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        page_tokens: int = PAGE_TOKENS,
        *,
        num_host_pages: int = 0,
        grouping: Grouping | None = None,
        tabled: TableAttention | None = None,
    ) -> None:
        """num_host_pages: room in host memory for the pages of sessions that are idle.

        tabled: what attends over it by tables; the cache is paged then.
        """
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.tabled = tabled
        self.growth = tabled.growth if tabled is not None else 2  # columns of tables grow by powers of it
        self.spare_page = num_pages  # where a paged cache takes what fills up a batch
        self.grouping = grouping or Grouping.whole(tuple(shapes))
        self._places = {block: place for block, (_, place) in self.grouping.places.items()}
        shapes = {self._places[block]: shape for block, shape in shapes.items()}
        self.page_bytes = page_bytes(shapes.values(), dtype, page_tokens)
        self._keys: dict[int, Tensor] = {}  # by place in a page
        self._values: dict[int, Tensor] = {}
        self._between: dict[tuple[int, int, int], Tensor] = {}  # by place, keys or values, and slot
        self._parked: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values in host memory, likewise
        try:
            for place, shape in shapes.items():
                if num_host_pages:
                    sizes = (shape.key_dim, shape.value_dim)
                    keys, values = (
                        self._host_pages(shape.num_heads, num_host_pages * page_tokens, dim, dtype, device)
                        for dim in sizes
                    )
                    self._parked[place] = keys, values
                self._keys[place] = self._allocate(shape.num_heads, shape.key_dim, dtype, device)
                self._values[place] = self._allocate(shape.num_heads, shape.value_dim, dtype, device)
        # torch's allocators raise RuntimeError and its children, a mapping the last two.
        except (RuntimeError, MemoryError, OSError, OverflowError) as problem:
            raise error(
                Code.OUT_OF_MEMORY,
                f"no memory on {device} for {num_pages} cache pages of {self.page_bytes} bytes"
                + (f", and beside it for {num_host_pages} more" if num_host_pages else ""),
                "serve fewer blocks, or a smaller cache",
            ) from problem

    @property
    def is_paged(self) -> bool:
        """Whether the heads of a slot lie together, for what attends by tables."""
        return self.tabled is not None

    def _allocate(self, num_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(num_heads, num_slots, dim), whatever lies under it. Memory is touched first when it is written."""
        num_slots = (self.num_pages + self.is_paged) * self.page_tokens
        if self.is_paged:
            return torch.empty((num_slots, num_heads, dim), dtype=dtype, device=device).transpose(0, 1)
        shape = (num_heads, num_slots, dim)
        if device.type == "cpu":
            return _untouched(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)

    def _host_pages(
        self, num_heads: int, num_slots: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """(num_heads, num_slots, dim) in host memory, laid out as on the device, and pinned for one that copies."""
        if not self.is_paged:
            return _untouched((num_heads, num_slots, dim), dtype)
        is_pinned = device.type != "cpu"
        return torch.empty((num_slots, num_heads, dim), dtype=dtype, pin_memory=is_pinned).transpose(0, 1)

    def keys(self, block: int) -> Tensor:
        """All keys of a block, (num_heads, num_slots, key_dim); a view."""
        return self._keys[self._places[block]]

    def values(self, block: int) -> Tensor:
        """All values of a block, (num_heads, num_slots, value_dim); a view."""
        return self._values[self._places[block]]

    def write(self, block: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put new tokens' keys and values, (num_heads, num_tokens, dim), into `slots` (num_tokens,) int64."""
        if self.tabled is not None:
            self.tabled.write(keys, values, self.keys(block), self.values(block), slots)
            return
        self.keys(block).index_copy_(1, slots, keys)
        self.values(block).index_copy_(1, slots, values)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page, in every place of it."""
        at, to = source * self.page_tokens, target * self.page_tokens
        for tensor in (*self._keys.values(), *self._values.values()):
            tensor[:, to : to + self.page_tokens] = tensor[:, at : at + self.page_tokens]

    def move_pages(self, moves: Iterable[PageMove]) -> None:
        """Copy pages from memory to memory, in the order given. What is between is read once."""
        for of, at, to, target, num in _runs(moves, self.page_tokens):
            for place, parked in self._parked.items():
                both = zip((self._keys[place], self._values[place]), parked, strict=True)
                for kind, (device, host) in enumerate(both):
                    if of is Memory.BETWEEN:
                        slots = self._between.pop((place, kind, at))
                    else:
                        slots = (host if of is Memory.HOST else device)[:, at : at + num]
                    if to is Memory.BETWEEN:
                        self._between[place, kind, target] = slots.clone()
                    else:
                        goal = (host if to is Memory.HOST else device)[:, target : target + num]
                        goal.copy_(slots, non_blocking=True)  # pinned; the device keeps to the order asked


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in host memory that takes room as it is written, a few KB at a time. Raises `OSError`, `OverflowError`.

    torch's own memory of this size comes in huge pages, where it is told to use them for the weights: a short row
    would take 2 MB for every head.
    """
    num_numbers = math.prod(shape)
    if sys.platform != "linux" or not num_numbers:
        return torch.empty(shape, dtype=dtype)
    mapped = mmap.mmap(-1, num_numbers * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)


def _runs(moves: Iterable[PageMove], page_tokens: int) -> Iterator[tuple[Memory, int, Memory, int, int]]:
    """Pages that move from neighbours to neighbours, together: memory and first slot of both, number of slots.

    What goes by way of the memory between is moved page by page, so that it is found again by its first slot.
    """
    of, first, to, target, num = Memory.DEVICE, 0, Memory.DEVICE, 0, 0
    for move in moves:
        at, goes = move.source * page_tokens, move.target * page_tokens
        follows = (of, first + num, to, target + num) == (move.of, at, move.to, goes)
        if num and follows and Memory.BETWEEN not in (of, to):
            num += page_tokens
            continue
        if num:
            yield of, first, to, target, num
        of, first, to, target, num = move.of, at, move.to, goes, page_tokens
    if num:
        yield of, first, to, target, num
