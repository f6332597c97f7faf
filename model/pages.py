"""What a session holds of a worker's KV cache: its rows, in every group of blocks at once.

Owns the rows' lengths, and that all groups grow, are set back and move together; `tables` knows one group, `pool`
the pages' numbers. No tensors, no torch, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..protocol.steps import Row
from .pool import GONE, PageCopy, PagePool
from .tables import Growth, Tables


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
class Plan:
    """What a step would need; made without changing anything."""

    groups: tuple[tuple[Growth, ...], ...]  # of blocks, and the rows in each
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
        self._groups = tuple(Tables(pool, max_rows, max_tokens, window) for window in windows)

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

    def adopt(self, step_id: int, rows: tuple[tuple[tuple[int, ...], ...], ...]) -> None:
        """Begin with rows of full pages that others hold too, as if step `step_id` had written them.

        rows: the pages of each in each group of blocks.
        """
        for index, group in enumerate(self._groups):
            group.adopt(step_id, tuple(row[index] for row in rows))

    def full_page(self, index: int, row: int = 0) -> tuple[int, ...] | None:
        """The full page at this place of a row, in each group of blocks; None if one has let go of it."""
        pages = tuple(group.full_page(index, row) for group in self._groups)
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
