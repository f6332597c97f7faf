"""Which row owns which page of a worker's KV cache: growth, forks, rollback, snapshots.

Owns page numbers and lengths, nothing else: no tensors, no torch, no clock. A page is a fixed number of
token slots; page k of a row holds its tokens [k * page_tokens, (k + 1) * page_tokens), so that a page
stands at the same place in every row that shares it.

Pages are allotted next to each other where possible, because attention on a CPU reads a run of
neighbouring pages in place.

Source: Kwon et al. 2023, PagedAttention, section 4; the one rule of rows is `protocol.steps.Row`.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final, NamedTuple

from ..protocol.errors import Code, error
from ..protocol.steps import NEW_ROW, Row

PAGE_TOKENS: Final = 64  # small enough to waste little on a short row, large enough to read in a stream

ROLLBACK_TOKENS: Final = (
    64  # kept beyond a window: a guess of a few tokens is taken back much more often than that
)
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
    """Where a page may be. BETWEEN: in neither cache, for the moment in which two sessions change places."""

    DEVICE = auto()
    HOST = auto()
    BETWEEN = auto()


class PageMove(NamedTuple):
    """Copy every slot of a page from one memory to another."""

    of: Memory
    source: int
    to: Memory
    target: int


class Segment(NamedTuple):
    """One row's part of a batch: its pages, and that its `n` new tokens stand at [start, start + n).

    limit: tokens that the row may ever have, the same in every step of a session and after every repair; 0
    where it has no more than these. others: its pages in the second group of blocks, the third, ….
    """

    pages: tuple[int, ...]
    start: int
    n: int
    limit: int = 0
    others: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class _CachedRow:
    """length: the tokens it had; intact: how many of them no later step has overwritten."""

    pages: tuple[int, ...]
    length: int
    intact: int


@dataclass(frozen=True, slots=True)
class _Growth:
    """How one row of a step comes to be: shared pages, perhaps a copy of the last of them, new ones."""

    kept: tuple[int, ...]
    copies_last: bool
    num_new: int
    position: int
    n: int

    @property
    def num_pages(self) -> int:
        """Free pages that it takes."""
        return self.num_new + self.copies_last


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step would need; made without changing anything."""

    groups: tuple[tuple[_Growth, ...], ...]  # of blocks, and the rows in each
    num_pages: int  # free pages that it takes


@dataclass(frozen=True, slots=True)
class Applied:
    """What a step has to do: first the copies, then write and attend the segments, one a row."""

    copies: tuple[PageCopy, ...]
    segments: tuple[Segment, ...]


class SessionPages:
    """The rows of one session: the live table, and the tables after recent steps.

    windows: of each group of blocks whose pages are of their own; None attends everything. Pages that lie more
    than `ROLLBACK_TOKENS` beyond a window are let go of, in the groups that have one.
    """

    def __init__(
        self, pool: PagePool, max_rows: int, max_tokens: int, windows: tuple[int | None, ...] = (None,)
    ) -> None:
        self._pool = pool
        self._max_tokens = max_tokens
        self._groups = tuple(_GroupPages(pool, max_rows, max_tokens, window) for window in windows)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each live row holds."""
        return self._groups[0].lengths

    @property
    def num_pages(self) -> int:
        """Different pages that this session holds, snapshots included."""
        return sum(len(group.pages()) for group in self._groups)

    def forget(self, step_id: int, committed: int) -> None:
        """Before step `step_id`: forget the tables below `committed`, and of steps that were taken back."""
        for group in self._groups:
            group.forget(step_id, committed)

    def plan(self, rows: tuple[Row, ...]) -> Plan:
        """What a step of these rows takes; changes nothing.

        Raises `BAD_REQUEST` for a parent that does not exist or too many rows, `TOO_LONG` beyond
        `max_tokens`, and `HISTORY_GAP` with `first_position` in its details when a row would begin beyond
        what its parent holds, or, with the detail `window`, so far back that its window was let go of.
        """
        plans = tuple(group.plan(rows) for group in self._groups)
        return Plan(plans, sum(growth.num_pages for plan in plans for growth in plan))

    def apply(self, step_id: int, committed: int, rows: tuple[Row, ...]) -> Applied:
        """Take the step: allot pages, make its table the live one, and remember it under `step_id`.

        Tables of steps below `committed` are forgotten. Raises as `plan`, and `BUSY` when the pool has too
        few pages left; the rows then stand as before.
        """
        plan = self.plan(rows)
        self.forget(step_id, committed)
        self._pool.require(plan.num_pages)
        copies: list[PageCopy] = []
        tables = [
            group.apply(step_id, growths, copies)
            for group, growths in zip(self._groups, plan.groups, strict=True)
        ]
        segments = tuple(
            Segment(first, row.position, row.n, self._max_tokens, tuple(others))
            for row, first, *others in zip(rows, *tables, strict=True)
        )
        return Applied(tuple(copies), segments)

    def adopt(self, step_id: int, pages: tuple[tuple[int, ...], ...]) -> None:
        """Begin with one row of full pages that others hold too, as if step `step_id` had written them.

        pages: of each group of blocks.
        """
        for group, table in zip(self._groups, pages, strict=True):
            group.adopt(step_id, table)

    def first_row(self, index: int) -> tuple[int, ...] | None:
        """The full page at this place of the first row, in each group of blocks; None if one has let go of it."""
        pages = tuple(group.page_of_first_row(index) for group in self._groups)
        return None if GONE in pages else pages

    def restore(self, base_step: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Set the rows back to how they stood after `base_step`, cut to `lengths`; forget later tables.

        Returns how many tokens of each row are really still there; none, if its window is not. A table that is
        not known any more, and `base_step` 0, clear the session: zeros. Raises `BAD_REQUEST` if the table has
        not that many rows.
        """
        found = [group.restore(base_step, lengths) for group in self._groups]
        held = tuple(min(row) for row in zip(*found, strict=True)) if lengths else ()
        if any(lengths != held for lengths in found):
            for group in self._groups:
                group.restore(base_step, held)
        return held

    def move(self, pool: PagePool) -> tuple[tuple[int, int], ...]:
        """Let go of every page, for one of `pool` each; all tables stand as before.

        Returns (page before, page now) of each, to copy before anything else is written there.
        Raises `BUSY`, and nothing has changed.
        """
        pool.require(self.num_pages)
        self._pool = pool
        return tuple(place for group in self._groups for place in group.move(pool))

    def close(self) -> None:
        """Release every page; the session is as new."""
        for group in self._groups:
            group.close()


class _GroupPages:
    """The rows of one session in one group of blocks. The pages of a table that were let go of are `GONE`."""

    def __init__(self, pool: PagePool, max_rows: int, max_tokens: int, window: int | None) -> None:
        self._pool = pool
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._window = window
        self._live: tuple[_CachedRow, ...] = ()
        self._snapshots: dict[int, tuple[_CachedRow, ...]] = {}

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(row.length for row in self._live)

    def pages(self) -> set[int]:
        """Those that it holds."""
        tables = (self._live, *self._snapshots.values())
        return {page for table in tables for row in table for page in row.pages} - {GONE}

    def forget(self, step_id: int, committed: int) -> None:
        for step in [step for step in self._snapshots if step < committed or step > step_id]:
            self._release(self._snapshots.pop(step))

    def plan(self, rows: tuple[Row, ...]) -> tuple[_Growth, ...]:
        if len(rows) > self._max_rows:
            raise error(Code.BAD_REQUEST, f"{len(rows)} rows, the session was opened for {self._max_rows}")
        for index, row in enumerate(rows):
            self._check(index, row)
        page_tokens = self._pool.page_tokens
        kept = [self._kept(row) for row in rows]
        writers = _in_place_writers(rows, kept, self._pool)
        growths = []
        for index, row in enumerate(rows):
            partial = row.n > 0 and row.position % page_tokens != 0
            num_new = -(-(row.position + row.n) // page_tokens) - len(kept[index])
            copies_last = partial and index not in writers
            growths.append(_Growth(kept[index], copies_last, num_new, row.position, row.n))
        return tuple(growths)

    def apply(
        self, step_id: int, growths: tuple[_Growth, ...], copies: list[PageCopy]
    ) -> list[tuple[int, ...]]:
        """Grow the rows; adds what is to be copied, and gives the pages of each."""
        table = tuple(self._grow(growth, copies) for growth in growths)
        self._shorten_snapshots(growths)
        self._release(self._live)
        self._live = table
        self._remember(step_id)
        return [row.pages for row in table]

    def adopt(self, step_id: int, pages: tuple[int, ...]) -> None:
        self._pool.hold(pages)
        self._pool.share(pages)
        length = len(pages) * self._pool.page_tokens
        self._live = (_CachedRow(pages, length, length),)
        self._remember(step_id)

    def page_of_first_row(self, index: int) -> int:
        """`GONE` where it is not full, or not held any more."""
        row = self._live[0] if self._live else None
        if row is None or (index + 1) * self._pool.page_tokens > row.length:
            return GONE
        return row.pages[index]

    def restore(self, base_step: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
        base = self._snapshots.get(base_step) if base_step else None
        if base is None:
            self.close()
            return (0,) * len(lengths)
        if len(lengths) != len(base) or min(lengths, default=0) < 0:
            raise error(
                Code.BAD_REQUEST, f"lengths {lengths} for the {len(base)} rows after step {base_step}"
            )
        table = tuple(
            self._cut(row, min(length, row.intact)) for row, length in zip(base, lengths, strict=True)
        )
        for row in table:
            self._pool.hold(row.pages)
        self._release(self._live)
        self._live = table
        for step in [step for step in self._snapshots if step >= base_step]:
            self._release(self._snapshots.pop(step))
        self._remember(base_step)
        return self.lengths

    def close(self) -> None:
        for table in (self._live, *self._snapshots.values()):
            self._release(table)
        self._live = ()
        self._snapshots.clear()

    def move(self, pool: PagePool) -> tuple[tuple[int, int], ...]:
        places: dict[int, int] = {GONE: GONE}
        for pages in (row.pages for table in (self._live, *self._snapshots.values()) for row in table):
            missing = tuple(page for page in pages if page not in places)
            places.update(zip(missing, pool.take(len(missing)), strict=True))
        tables = {step: _moved(table, places) for step, table in self._snapshots.items()}
        live = _moved(self._live, places)
        for table in (live, *tables.values()):
            for row in table:
                pool.hold(row.pages)
        del places[GONE]
        pool.release(tuple(places.values()))  # which `take` held; the tables do now
        self.close()
        self._pool, self._live, self._snapshots = pool, live, tables
        return tuple(places.items())

    def _check(self, index: int, row: Row) -> None:
        if row.parent != NEW_ROW and not 0 <= row.parent < len(self._live):
            raise error(
                Code.BAD_REQUEST, f"row {index} continues row {row.parent}, there are {len(self._live)} rows"
            )
        if row.position + row.n > self._max_tokens:
            raise error(
                Code.TOO_LONG,
                f"row {index} would hold {row.position + row.n} tokens,"
                f" the session was opened for {self._max_tokens}",
                "open the session with a larger max_length",
            )
        held = self._live[row.parent].length if row.parent != NEW_ROW else 0
        if row.position > held:
            raise error(
                Code.HISTORY_GAP,
                f"row {index} begins at position {row.position}, row {row.parent} holds {held} tokens",
                first_position=held,
                row=index,
            )
        if row.parent != NEW_ROW and not self._reaches(self._live[row.parent], row.position):
            raise error(
                Code.HISTORY_GAP,
                f"row {index} begins at position {row.position}, further back than {ROLLBACK_TOKENS} tokens"
                f" beyond what its window of {self._window} reaches",
                "send its hidden states again up to there",
                first_position=0,
                row=index,
                window=True,
            )

    def _reaches(self, row: _CachedRow, position: int) -> bool:
        """Whether all is there that a token at `position` attends."""
        if self._window is None or not position:
            return True
        first = max(0, position - self._window + 1) // self._pool.page_tokens
        return first * self._pool.page_tokens >= position or row.pages[first] != GONE

    def _kept(self, row: Row) -> tuple[int, ...]:
        """The parent's pages that hold positions below `row.position`."""
        if row.parent == NEW_ROW:
            return ()
        pages = self._live[row.parent].pages[: -(-row.position // self._pool.page_tokens)]
        if self._window is None:
            return pages
        beyond = max(0, row.position - self._window + 1 - ROLLBACK_TOKENS) // self._pool.page_tokens
        return (GONE,) * beyond + pages[beyond:]

    def _cut(self, row: _CachedRow, length: int) -> _CachedRow:
        if not self._reaches(row, length):
            length = 0
        return _CachedRow(row.pages[: -(-length // self._pool.page_tokens)], length, length)

    def _grow(self, growth: _Growth, copies: list[PageCopy]) -> _CachedRow:
        kept = growth.kept[:-1] if growth.copies_last else growth.kept
        self._pool.hold(kept)
        last = kept[-1] if kept else None
        added = self._pool.take(growth.num_new + growth.copies_last, after=last)
        if growth.copies_last:
            copies.append(PageCopy(growth.kept[-1], added[0]))
        length = growth.position + growth.n
        return _CachedRow(kept + added, length, length)

    def _shorten_snapshots(self, growths: tuple[_Growth, ...]) -> None:
        """Snapshots lose what the step writes in place into a page of theirs."""
        page_tokens = self._pool.page_tokens
        written: dict[int, int] = {}  # page → the first position written in it
        for growth in growths:
            if growth.n and growth.kept and not growth.copies_last and growth.position % page_tokens:
                written[growth.kept[-1]] = growth.position
        if not written:
            return
        for step, table in self._snapshots.items():
            self._snapshots[step] = tuple(self._shortened(row, written) for row in table)

    def _shortened(self, row: _CachedRow, written: dict[int, int]) -> _CachedRow:
        intact = min((written[page] for page in row.pages if page in written), default=row.intact)
        if intact >= row.intact:
            return row
        num_pages = -(-intact // self._pool.page_tokens)
        self._pool.release(row.pages[num_pages:])
        return replace(row, pages=row.pages[:num_pages], intact=intact)

    def _remember(self, step_id: int) -> None:
        if step_id in self._snapshots:
            self._release(self._snapshots[step_id])
        for row in self._live:
            self._pool.hold(row.pages)
        self._snapshots[step_id] = self._live

    def _release(self, table: tuple[_CachedRow, ...]) -> None:
        for row in table:
            self._pool.release(row.pages)


def _moved(table: tuple[_CachedRow, ...], places: dict[int, int]) -> tuple[_CachedRow, ...]:
    return tuple(replace(row, pages=tuple(places[page] for page in row.pages)) for row in table)


def _in_place_writers(rows: tuple[Row, ...], kept: list[tuple[int, ...]], pool: PagePool) -> frozenset[int]:
    """The rows of a step that may write into the partly filled page they keep.

    Several live rows may keep one page. One of them may write into it, from its position on, if no other
    keeps more of that page than lies before this position; the rest write into copies. So does everyone whose
    page is shared with other sessions.
    """
    holders = Counter(page for pages in kept for page in pages)
    writers: dict[int, int] = {}  # page → the row that writes into it
    for index, row in enumerate(rows):
        if not row.n or row.position % pool.page_tokens == 0:
            continue
        page = kept[index][-1]
        if page in writers or pool.is_shared(page):
            continue
        if holders[page] == 1 or all(
            other.position <= row.position for other, pages in zip(rows, kept, strict=True) if page in pages
        ):
            writers[page] = index
    return frozenset(writers.values())
