"""The pages of one cache by their numbers: which are free, who holds the others, and what is to be copied.

Owns the count of holders of every page, and no table: whose page it is, and what stands in it, is said in
`tables` and `pages`. No tensors, no torch.

Pages are allotted next to each other where possible, because attention on a CPU reads a run of neighbouring
pages in place.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from enum import Enum, auto
from typing import Final, NamedTuple

from ..protocol.errors import Code, error

PAGE_TOKENS: Final = 64  # small enough to waste little on a short row, large enough to read in a stream
GONE: Final = -1  # stands in a table for a page that was let go of, since no window reaches back to it


class PagePool:
    """The pages of one cache, counted by how many tables hold each. Raises `BUSY` when none is left."""

    def __init__(self, num_pages: int, page_tokens: int = PAGE_TOKENS) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise error(Code.BAD_REQUEST, f"a pool of {num_pages} pages of {page_tokens} tokens")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._holders = [0] * num_pages
        self._shared: set[int] = set()  # never written again, while anybody holds them
        self._num_free = num_pages
        # Free runs [start, end), sorted; neighbours are always merged.
        self._starts = [0]
        self._ends = {0: num_pages}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._num_free

    def holders(self, page: int) -> int:
        """How many tables hold a page."""
        return self._holders[page]

    def share(self, pages: tuple[int, ...]) -> None:
        """From now on these pages, which are held, belong to nobody alone: who writes on in one has to copy it."""
        self._shared.update(pages)

    def is_shared(self, page: int) -> bool:
        """Whether a page must not be written in place."""
        return page in self._shared

    def require(self, count: int) -> None:
        """Raise `BUSY` unless `count` pages are free."""
        if count > self._num_free:
            raise error(
                Code.BUSY,
                f"{count} cache pages wanted, {self._num_free} of {self.num_pages} free",
                "close a session, or try again later",
            )

    def take(self, count: int, after: int | None = None) -> tuple[int, ...]:
        """`count` free pages, each held once; beginning right behind page `after` if that is free."""
        self.require(count)
        taken: list[int] = []
        next_page = None if after is None else after + 1
        while len(taken) < count:
            missing = count - len(taken)
            first = (
                next_page if next_page is not None and self._is_free(next_page) else self._roomiest(missing)
            )
            last = min(self._ends[self._starts[self._run_index(first)]], first + missing)
            self._carve(first, last)
            taken.extend(range(first, last))
            next_page = last
        for page in taken:
            self._holders[page] = 1
        self._num_free -= count
        return tuple(taken)

    def hold(self, pages: tuple[int, ...]) -> None:
        """One more holder for each of these pages, all of which are held already."""
        for page in pages:
            if page != GONE:
                self._holders[page] += 1

    def release(self, pages: tuple[int, ...]) -> None:
        """One holder less for each; a page without holders is free."""
        for page in pages:
            if page == GONE:
                continue
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._shared.discard(page)
                self._free(page)

    def _run_index(self, page: int) -> int:
        return bisect_right(self._starts, page) - 1

    def _is_free(self, page: int) -> bool:
        index = self._run_index(page)
        return index >= 0 and page < self._ends[self._starts[index]]

    def _roomiest(self, count: int) -> int:
        """Where a new row should begin: in the middle of the largest run, so that its neighbours can grow."""
        start = max(self._starts, key=lambda first: self._ends[first] - first)
        room = self._ends[start] - start
        if start == 0 or room < 2 * count:
            return start
        return start + room // 2

    def _carve(self, first: int, last: int) -> None:
        index = self._run_index(first)
        start = self._starts[index]
        end = self._ends[start]
        if start == first:
            del self._starts[index], self._ends[start]
        else:
            self._ends[start] = first
        if last < end:
            insort(self._starts, last)
            self._ends[last] = end

    def _free(self, page: int) -> None:
        index = self._run_index(page)
        start, end = page, page + 1
        if index >= 0 and self._ends[self._starts[index]] == page:
            start = self._starts[index]
        else:
            insort(self._starts, page)
            index += 1
        if end in self._ends:
            del self._starts[index + 1]
            end = self._ends.pop(end)
        self._ends[start] = end
        self._num_free += 1


class PageCopy(NamedTuple):
    """Copy every slot of page `source` to page `target`, before anything of the step is written."""

    source: int
    target: int


class Memory(Enum):
    """Where a page may be. BETWEEN: in neither cache, while two sessions change places: for a moment, or, where the one
    that left shared pages with others, until there is room for the one that comes."""

    DEVICE = auto()
    HOST = auto()
    BETWEEN = auto()


class PageMove(NamedTuple):
    """Copy every slot of a page from one memory to another."""

    of: Memory
    source: int
    to: Memory
    target: int
