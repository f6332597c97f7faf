"""Pages of a session against a naive model in which each row is a list of tokens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from corolla.model.pages import SessionPages
from corolla.model.pool import GONE, PagePool
from corolla.model.tables import ROLLBACK_TOKENS
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import NEW_ROW, Row

PAGE_TOKENS = 4
NUM_PAGES = 24
MAX_ROWS = 4
MAX_TOKENS = 20


class PagesAgainstLists(RuleBasedStateMachine):
    """Every step is carried out on a memory of numbered slots, and read back through the pages."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE_TOKENS)
        self.pages = SessionPages(self.pool, MAX_ROWS, MAX_TOKENS)
        self.memory = [[-1] * PAGE_TOKENS for _ in range(NUM_PAGES)]
        self.rows: list[list[int]] = []
        self.placed: list[tuple[int, ...]] = []
        self.snapshots: dict[int, list[list[int]]] = {}
        self.next_token = 0
        self.step_id = 0
        self.committed = 0
        self.truncated_since: dict[int, bool] = {}

    @initialize(n=st.integers(1, 9))
    def prefill(self, n: int) -> None:
        self.take_step((Row(NEW_ROW, 0, n),))

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        rows = []
        for _ in range(data.draw(st.integers(1, MAX_ROWS))):
            parent = data.draw(st.integers(NEW_ROW, len(self.rows) - 1))
            held = len(self.rows[parent]) if parent != NEW_ROW else 0
            position = data.draw(st.one_of(st.just(held), st.integers(0, held)))
            n = data.draw(st.integers(0, min(6, MAX_TOKENS - position)))
            rows.append(Row(parent, position, n))
        self.committed = data.draw(st.integers(max(self.committed, self.step_id - 3), self.step_id))
        self.take_step(tuple(rows))

    def take_step(self, rows: tuple[Row, ...]) -> None:
        before = self.pages.lengths
        num_free = self.pool.num_free
        # Tables that are committed give their pages back first, so that a step may fit that does not yet.
        if self.pages.plan(rows).num_pages > num_free:
            try:
                applied = self.pages.apply(self.step_id + 1, self.committed, rows)
            except CorollaError as refused:
                self.check_refused(refused, before)
                return
        else:
            applied = self.pages.apply(self.step_id + 1, self.committed, rows)
        self.step_id += 1
        for source, target in applied.copies:
            self.memory[target] = list(self.memory[source])
        new_rows = []
        for row, placed in zip(rows, applied.segments, strict=True):
            assert (placed.start, placed.n) == (row.position, row.n)
            prefix = self.rows[row.parent][: row.position] if row.parent != NEW_ROW else []
            tokens = list(range(self.next_token, self.next_token + row.n))
            self.next_token += row.n
            for offset, token in enumerate(tokens):
                page, slot = divmod(row.position + offset, PAGE_TOKENS)
                self.memory[placed.pages[page]][slot] = token
            new_rows.append(prefix + tokens)
            # Rows that were forked share a page: who writes on in it overwrites what a longer one had there.
            tables = (self.rows, *self.snapshots.values())
            if row.position < max((len(other) for table in tables for other in table), default=0):
                self.truncated_since = dict.fromkeys(self.truncated_since, True)
        self.rows = new_rows
        self.placed = [placed.pages for placed in applied.segments]
        self.snapshots = {k: v for k, v in self.snapshots.items() if k >= self.committed}
        self.snapshots[self.step_id] = [list(row) for row in new_rows]
        self.truncated_since[self.step_id] = False

    def check_refused(self, refused: CorollaError, before: tuple[int, ...]) -> None:
        assert refused.code is Code.BUSY
        assert self.pages.lengths == before
        self.snapshots = {k: v for k, v in self.snapshots.items() if k >= self.committed}

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        base = data.draw(st.sampled_from(sorted(self.snapshots)))
        table = self.snapshots[base]
        lengths = tuple(data.draw(st.one_of(st.just(len(row)), st.integers(0, len(row)))) for row in table)
        held = self.pages.restore(base, lengths)
        assert len(held) == len(lengths)
        for length, kept in zip(lengths, held, strict=True):
            assert 0 <= kept <= length
            assert self.truncated_since[base] or kept == length
        if any(kept < len(row) for row, kept in zip(table, held, strict=True)):
            # What was cut off is overwritten by whoever writes on, in older tables too.
            self.truncated_since = dict.fromkeys(self.truncated_since, True)
        self.rows = [row[:kept] for row, kept in zip(table, held, strict=True)]
        self.step_id = base
        self.snapshots = {k: v for k, v in self.snapshots.items() if k < base}
        self.snapshots[base] = [list(row) for row in self.rows]
        self.truncated_since[base] = False
        # Reading needs the pages: continue every row by nothing.
        if self.rows:
            self.take_step(tuple(Row(i, len(row), 0) for i, row in enumerate(self.rows)))

    @rule(lengths=st.lists(st.integers(0, 5), max_size=3))
    def restore_an_unknown_table(self, lengths: list[int]) -> None:
        assert self.pages.restore(self.step_id + 100, tuple(lengths)) == (0,) * len(lengths)
        assert self.pool.num_free == NUM_PAGES
        self.rows, self.placed, self.snapshots = [], [], {}

    @invariant()
    def rows_read_back_as_written(self) -> None:
        assert self.pages.lengths == tuple(len(row) for row in self.rows)
        for row, pages in zip(self.rows, self.placed, strict=True):
            stored = [token for page in pages for token in self.memory[page]]
            assert stored[: len(row)] == row
            assert len(pages) == -(-len(row) // PAGE_TOKENS)

    @invariant()
    def pages_are_held_or_free(self) -> None:
        assert self.pool.num_free + self.pages.num_pages == NUM_PAGES

    def teardown(self) -> None:
        self.pages.close()
        assert self.pool.num_free == NUM_PAGES
        assert self.pool.take(NUM_PAGES) == tuple(range(NUM_PAGES))


TestPagesAgainstLists = PagesAgainstLists.TestCase
TestPagesAgainstLists.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class AtLength(PagesAgainstLists):
    """The same, for the long suite."""


TestPagesAtLength = pytest.mark.long(AtLength.TestCase)
TestPagesAtLength.settings = settings(max_examples=600, stateful_step_count=30, deadline=None)


def session(num_pages: int = 16, max_rows: int = 2, max_tokens: int = 40) -> tuple[PagePool, SessionPages]:
    pool = PagePool(num_pages, PAGE_TOKENS)
    return pool, SessionPages(pool, max_rows, max_tokens)


def test_a_step_beyond_what_the_row_holds_names_the_first_position_needed() -> None:
    _, pages = session()
    pages.apply(1, 0, (Row(NEW_ROW, 0, 5),))
    with pytest.raises(CorollaError) as caught:
        pages.apply(2, 1, (Row(0, 7, 1),))
    assert caught.value.code is Code.HISTORY_GAP
    assert caught.value.details["first_position"] == 5
    assert pages.lengths == (5,)


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ((Row(1, 0, 1),), Code.BAD_REQUEST),
        ((Row(0, 5, 1),) * 3, Code.BAD_REQUEST),
        ((Row(0, 5, 36),), Code.TOO_LONG),
    ],
)
def test_a_step_that_cannot_be_is_refused_and_changes_nothing(rows: tuple[Row, ...], code: Code) -> None:
    pool, pages = session()
    pages.apply(1, 0, (Row(NEW_ROW, 0, 5),))
    free = pool.num_free
    with pytest.raises(CorollaError) as caught:
        pages.apply(2, 1, rows)
    assert caught.value.code is code
    assert (pages.lengths, pool.num_free) == ((5,), free)
    assert pages.restore(1, (5,)) == (5,)


def test_a_full_pool_is_busy_and_the_rows_stay() -> None:
    pool, pages = session(num_pages=2)
    pages.apply(1, 0, (Row(NEW_ROW, 0, 8),))
    with pytest.raises(CorollaError) as caught:
        pages.apply(2, 1, (Row(0, 8, 1),))
    assert caught.value.code is Code.BUSY
    assert pages.lengths == (8,)
    assert pool.num_free == 0


def test_a_fork_copies_only_the_partly_filled_page_and_only_once() -> None:
    pool, pages = session()
    first = pages.apply(1, 0, (Row(NEW_ROW, 0, 6),)).segments[0].pages
    forked = pages.apply(2, 2, (Row(0, 6, 1), Row(0, 6, 1)))
    assert len(forked.copies) == 1
    assert forked.copies[0].source == first[1]
    assert forked.segments[0].pages == first
    assert forked.segments[1].pages == (first[0], forked.copies[0].target)
    assert pages.num_pages == 3
    assert pool.num_free == 13


def test_a_snapshot_holds_only_what_no_later_step_overwrote() -> None:
    _, pages = session()
    pages.apply(1, 0, (Row(NEW_ROW, 0, 7),))
    pages.apply(2, 1, (Row(0, 5, 1),))  # overwrites positions 5 and 6 of the second page
    assert pages.restore(1, (7,)) == (5,)
    assert pages.lengths == (5,)


def test_a_snapshot_cut_at_a_page_boundary_stays_whole() -> None:
    _, pages = session()
    pages.apply(1, 0, (Row(NEW_ROW, 0, 7),))
    pages.apply(2, 1, (Row(0, 4, 2),))
    assert pages.restore(1, (7,)) == (7,)


def test_committed_tables_are_forgotten_and_their_pages_freed() -> None:
    pool, pages = session()
    pages.apply(1, 0, (Row(NEW_ROW, 0, 12),))
    pages.apply(2, 1, (Row(0, 4, 1),))
    assert pool.num_free == 16 - 4
    pages.apply(3, 2, (Row(0, 5, 1),))
    assert pool.num_free == 16 - 2
    assert pages.restore(1, (12,)) == (0,)


def test_negative_or_too_many_lengths_are_refused() -> None:
    _, pages = session()
    pages.apply(1, 0, (Row(NEW_ROW, 0, 4),))
    for lengths in ((-1,), (1, 1)):
        with pytest.raises(CorollaError) as caught:
            pages.restore(1, lengths)
        assert caught.value.code is Code.BAD_REQUEST
    assert pages.lengths == (4,)


def test_rows_that_grow_side_by_side_keep_to_runs_of_neighbouring_pages() -> None:
    pool = PagePool(64, PAGE_TOKENS)
    sessions = [SessionPages(pool, 1, 64) for _ in range(3)]
    for pages in sessions:
        pages.apply(1, 0, (Row(NEW_ROW, 0, 4),))
    for step in range(2, 30):
        for pages in sessions:
            (row,) = pages.apply(step, step, (Row(0, step + 2, 1),)).segments
            assert row.pages == tuple(range(row.pages[0], row.pages[0] + len(row.pages)))


# windows


def windowed(window: int, num_pages: int = 256) -> tuple[PagePool, SessionPages]:
    """A session with one group of blocks that attend everything, and one with a window."""
    pool = PagePool(num_pages, PAGE_TOKENS)
    return pool, SessionPages(pool, 2, 400, (None, window))


def test_pages_further_than_the_rollback_beyond_a_window_are_let_go_of() -> None:
    pool, pages = windowed(window=8)
    pages.apply(1, 0, (Row(NEW_ROW, 0, 100),))
    (row,) = pages.apply(2, 2, (Row(0, 100, 4),)).segments
    assert GONE not in row.pages
    (inner,) = row.others
    first_kept = (100 - 8 + 1 - ROLLBACK_TOKENS) // PAGE_TOKENS
    assert inner[:first_kept] == (GONE,) * first_kept
    assert GONE not in inner[first_kept:]
    assert pages.num_pages == 256 - pool.num_free == 2 * 26 - first_kept


def test_a_rollback_within_reach_of_the_kept_window_is_taken_and_one_behind_it_names_the_beginning() -> None:
    _, pages = windowed(window=8)
    pages.apply(1, 0, (Row(NEW_ROW, 0, 200),))
    pages.apply(2, 2, (Row(0, 200, 1),))
    pages.plan((Row(0, 200 - ROLLBACK_TOKENS, 1),))
    with pytest.raises(CorollaError) as caught:
        pages.plan((Row(0, 100, 1),))
    assert caught.value.code is Code.HISTORY_GAP
    assert (caught.value.details["first_position"], caught.value.details["window"]) == (0, True)
    assert pages.lengths == (201,)
    assert pages.plan((Row(0, 0, 1),)).num_pages == 2  # from the beginning all is there


def test_rows_are_set_back_to_nothing_where_their_window_is_gone_in_any_group() -> None:
    pool, pages = windowed(window=8)
    pages.apply(1, 0, (Row(NEW_ROW, 0, 200), Row(NEW_ROW, 0, 20)))
    pages.apply(2, 2, (Row(0, 200, 1), Row(1, 20, 1)))
    assert pages.restore(2, (100, 20)) == (0, 20)
    assert pages.lengths == (0, 20)
    assert 256 - pool.num_free == pages.num_pages == 2 * 5
    pages.close()
    assert pool.num_free == 256


def test_what_an_uncommitted_table_still_needs_is_not_let_go_of() -> None:
    _, pages = windowed(window=8)
    pages.apply(1, 0, (Row(NEW_ROW, 0, 200),))
    pages.apply(2, 1, (Row(0, 200, 100),))
    assert pages.restore(1, (90,)) == (90,)


def test_pages_of_several_groups_move_together() -> None:
    pool, pages = windowed(window=8)
    pages.apply(1, 0, (Row(NEW_ROW, 0, 150),))
    pages.apply(2, 2, (Row(0, 150, 10),))
    num_pages = pages.num_pages
    host = PagePool(num_pages, PAGE_TOKENS)
    moved = pages.move(host)
    assert len(dict(moved)) == len({target for _, target in moved}) == num_pages
    assert (pool.num_free, host.num_free) == (256, 0)
    pages.move(pool)
    assert pages.restore(2, (155,)) == (155,)
