"""Rows of one session in one group of blocks: which page holds which of their tokens, now and at earlier steps.

Owns the live table, and a snapshot behind each step that may still be taken back. It takes pages from a pool and
gives them back; what a session is over all groups is the business of `pages`. No tensors, no torch, no clock.

Page k of a row holds its tokens [k * page_tokens, (k + 1) * page_tokens), so that a page stands at the same place
in every row that shares it. What a fork would share but both would write is copied; behind a window pages are let
go of.

Source: Kwon et al. 2023, PagedAttention, section 4; the one rule of rows is `protocol.steps.Row`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

from ..protocol.errors import Code, error
from ..protocol.steps import NEW_ROW, Row
from .pool import GONE, PageCopy, PagePool

# Kept beyond a window: a guess of a few tokens is taken back much more often than that.
ROLLBACK_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class _CachedRow:
    """length: the tokens it had; intact: how many of them no later step has overwritten."""

    pages: tuple[int, ...]
    length: int
    intact: int


@dataclass(frozen=True, slots=True)
class Growth:
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


class Tables:
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
        """Tokens that each live row holds."""
        return tuple(row.length for row in self._live)

    def pages(self) -> set[int]:
        """Those that it holds."""
        tables = (self._live, *self._snapshots.values())
        return {page for table in tables for row in table for page in row.pages} - {GONE}

    def forget(self, step_id: int, committed: int) -> None:
        """Let go of snapshots below `committed`, and of steps beyond `step_id`, which were taken back."""
        for step in [step for step in self._snapshots if step < committed or step > step_id]:
            self._release(self._snapshots.pop(step))

    def plan(self, rows: tuple[Row, ...]) -> tuple[Growth, ...]:
        """How each row of a step comes to be; changes nothing. Raises as `pages.SessionPages.plan`."""
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
            growths.append(Growth(kept[index], copies_last, num_new, row.position, row.n))
        return tuple(growths)

    def apply(
        self, step_id: int, growths: tuple[Growth, ...], copies: list[PageCopy]
    ) -> list[tuple[int, ...]]:
        """Grow the rows; adds what is to be copied, and gives the pages of each."""
        table = tuple(self._grow(growth, copies) for growth in growths)
        self._shorten_snapshots(growths)
        self._release(self._live)
        self._live = table
        self._remember(step_id)
        return [row.pages for row in table]

    def adopt(self, step_id: int, rows: tuple[tuple[int, ...], ...]) -> None:
        """Begin with rows of full pages that others hold too."""
        for pages in rows:
            self._pool.hold(pages)
            self._pool.share(pages)
        lengths = [len(pages) * self._pool.page_tokens for pages in rows]
        self._live = tuple(_CachedRow(*row) for row in zip(rows, lengths, lengths, strict=True))
        self._remember(step_id)

    def full_page(self, index: int, row_index: int) -> int:
        """The page at this place of a row; `GONE` where it is not full, or not held any more."""
        row = self._live[row_index] if row_index < len(self._live) else None
        if row is None or (index + 1) * self._pool.page_tokens > row.length:
            return GONE
        return row.pages[index]

    def restore(self, base_step: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Set back as `pages.SessionPages.restore` does; the tokens that are really there."""
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
        """Let go of everything."""
        for table in (self._live, *self._snapshots.values()):
            self._release(table)
        self._live = ()
        self._snapshots.clear()

    def move(self, pool: PagePool) -> tuple[tuple[int, int], ...]:
        """A page of `pool` for each of ours; (page before, page now) of each."""
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

    def _grow(self, growth: Growth, copies: list[PageCopy]) -> _CachedRow:
        kept = growth.kept[:-1] if growth.copies_last else growth.kept
        self._pool.hold(kept)
        last = kept[-1] if kept else None
        added = self._pool.take(growth.num_new + growth.copies_last, after=last)
        if growth.copies_last:
            copies.append(PageCopy(growth.kept[-1], added[0]))
        length = growth.position + growth.n
        return _CachedRow(kept + added, length, length)

    def _shorten_snapshots(self, growths: tuple[Growth, ...]) -> None:
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
