"""The sessions that a worker admitted, where their pages are, and how a step begins, ends and is taken back.

Owns admission: a session is let in if what it and all others are expected to come to hold fits into the pages of
the device and of host memory together. Pages are given as rows grow; when they run out, `parking` decides who
makes room, and a step may have to wait. No tensors, no torch, no clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from ..protocol.errors import Code, CorollaError, error
from ..protocol.limits import MAX_STEP_TOKENS
from ..protocol.steps import NEW_ROW, PREFIX_STEP, Row, prefixes_of
from ..protocol.tensors import Encoding
from ..protocol.work import Compute, NamePages, OpenCache, Restore
from .groups import Grouping
from .pages import Applied, SessionPages
from .parking import EVICTION_PATIENCE_S, PATIENCE_S, Expectation, Parked, Resident, Room, View, make_room
from .pool import Memory, PageMove, PagePool
from .prefixes import Prefixes
from .tables import ROLLBACK_TOKENS


@dataclass(slots=True)
class Session:
    """One session on this worker. max_tokens: of a row. last_step: the step after which the live rows stand; 0 is none.

    num_most: pages that it may come to hold; num_peak: that it held at most. opened_at, used_at: seconds.
    place: where its pages are; since: when it came there. is_gone: it was evicted, and its client does not know yet
    that nothing is left. waits_since: for pages. is_amid: a step of it has begun, and not ended. names: of the
    pages that each row begins with, while rows keep their places; the first num_named of a row's are known by these.
    """

    id: bytes
    blocks: tuple[int, int]
    encoding: Encoding
    pages: SessionPages
    num_most: int
    max_tokens: int
    opened_at: float
    last_step: int = 0
    place: Memory = Memory.DEVICE
    is_gone: bool = False
    num_peak: int = 0
    used_at: float = 0.0
    since: float = 0.0
    waits_since: float | None = None
    is_amid: bool = False
    names: tuple[tuple[bytes, ...], ...] = ()
    num_named: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Begun:
    """A step whose rows have been given their pages, and what it takes to undo that."""

    session: Session
    ask: Compute
    applied: Applied
    step_before: int
    lengths_before: tuple[int, ...]


class Capacity(NamedTuple):
    """What a worker's cache holds: pages on the device and in host memory, and how blocks share them.

    grouping: of the blocks; None is one group. depends_on_length: what the blocks compute of a token follows the
    length that its session was opened for.
    """

    num_pages: int
    num_host_pages: int = 0
    grouping: Grouping | None = None
    depends_on_length: bool = False


class Sessions:
    """Every session of one worker, over one pool of pages on the device and one in host memory."""

    def __init__(
        self,
        blocks: tuple[int, int],
        capacity: Capacity,
        carry: Callable[[tuple[PageMove, ...]], None] = lambda moves: None,
    ) -> None:
        """blocks: the worker's span; with no blocks or no pages nothing can be opened.

        carry: copies pages between device and host memory, at once, before they are written again.
        """
        self._grouping = capacity.grouping or Grouping.whole(tuple(range(*blocks)))
        self._carry = carry
        self._depends_on_length = capacity.depends_on_length
        self._blocks = blocks
        self._num_pages, self._num_host_pages = capacity.num_pages, capacity.num_host_pages
        self._pool = PagePool(max(self._num_pages, 1))
        self._host = PagePool(max(self._num_host_pages, 1))
        self._between = PagePool(max(self._num_pages, 1))
        self._expected = Expectation()
        self._prefixes = Prefixes(self._pool)
        self._open: dict[bytes, Session] = {}

    @property
    def free_tokens(self) -> int:
        """Token slots of the device that hold nothing."""
        return self._tokens(self._pool.num_free if self._num_pages else 0)

    def open(self, ask: OpenCache, now_s: float) -> Session:
        """Admit a session, instead of any of the same id, with what is kept of its prefix.

        Raises `BLOCKS_OUT_OF_RANGE`, `TOO_LONG` if the device alone could never hold it, and `BUSY`.
        """
        start, end = self._blocks
        if not start <= ask.start < ask.end <= end:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks {ask.start}:{ask.end} asked of a worker that serves {start}:{end}",
                "choose a range within the worker's span",
            )
        self.close(ask.session, now_s)
        num_most = self._num_most(ask.max_rows, ask.max_tokens)
        self._check_room(ask, num_most)
        pages = SessionPages(self._pool, ask.max_rows, ask.max_tokens, self._grouping.windows)
        session = Session(
            ask.session, (ask.start, ask.end), ask.encoding, pages, num_most, ask.max_tokens, now_s
        )
        self._open[ask.session] = session
        self._begin_with_prefix(session, ask)
        return session

    def get(self, session: bytes) -> Session:
        """Raises `UNKNOWN_SESSION`."""
        found = self._open.get(session)
        if found is None:
            raise error(
                Code.UNKNOWN_SESSION,
                f"this worker has no session {session.hex()[:8]}",
                "open it again; a worker that was restarted has forgotten its sessions",
            )
        return found

    def close(self, session: bytes, now_s: float) -> None:
        """Free a session's pages; one that is unknown is closed already."""
        found = self._open.pop(session, None)
        if found is not None:
            found.pages.close()
            if found.num_peak:
                share = found.num_peak / found.num_most
                self._expected = self._expected.after(min(1.0, share), now_s - found.opened_at)

    def begin(self, ask: Compute, now_s: float, working: Collection[bytes] = ()) -> Begun | None:
        """Give a step's rows their pages; None if it has to wait for them.

        working: sessions of which steps wait. Raises as `SessionPages.apply`, and `HISTORY_GAP` with the detail
        `evicted` if the session had to make room; the rows then stand as before.
        """
        session = self.get(ask.session)
        try:
            return self._begun(session, ask, now_s, working)
        except CorollaError:
            session.waits_since = None
            raise

    def end(self, step: Begun, now_s: float) -> None:
        """A step is through: its session may be parked again."""
        step.session.is_amid = False
        step.session.used_at = now_s
        self._name_pages(step.session)

    def name_pages(self, ask: NamePages) -> None:
        """Keep pages for later sessions, if the rows stand after the step that is meant, and on the device."""
        session = self._open.get(ask.session)
        if session is None or session.last_step != ask.step_id or session.is_amid:
            return
        if session.place is Memory.DEVICE:
            for row, chain in enumerate(ask.rows):
                self._keep(session, row, self._own_names(chain.names, session.max_tokens))

    def restore(self, ask: Restore) -> tuple[int, ...]:
        """Set the rows back as asked; the tokens that each row of the base still has."""
        session = self.get(ask.session)
        session.waits_since = None
        held = session.pages.restore(ask.base_step, ask.lengths)
        session.last_step = ask.base_step if session.pages.lengths else 0
        session.is_gone = False
        if not session.pages.num_pages:
            self._come_to_nothing(session)
        return held

    def _begun(
        self, session: Session, ask: Compute, now_s: float, working: Collection[bytes]
    ) -> Begun | None:
        if session.is_gone:
            _check_begins_anew(ask)
            session.is_gone = False
        pages = session.pages
        num_wanted = pages.plan(ask.rows).num_pages
        pages.forget(ask.step_id, ask.committed)
        if session.place is not Memory.DEVICE:
            num_wanted += pages.num_pages
        if not self._finds_room(session, num_wanted, now_s, working):
            return None
        if session.place is not Memory.DEVICE:
            self._move(session, Memory.DEVICE, self._pool, now_s)
        step_before, lengths_before = session.last_step, pages.lengths
        had_pages = pages.num_pages > 0
        applied = pages.apply(ask.step_id, ask.committed, ask.rows)
        if not keeps_order(ask.rows, len(session.names)):
            session.names = ()  # the rows that have pages to be named are not where they were
        if not had_pages:
            session.since = now_s
        session.waits_since = None
        session.last_step = ask.step_id
        session.used_at = now_s
        session.is_amid = True
        session.num_peak = max(session.num_peak, pages.num_pages)
        return Begun(session, ask, applied, step_before, lengths_before)

    def _begin_with_prefix(self, session: Session, ask: OpenCache) -> None:
        chains = prefixes_of(ask.prefix, ask.prefix_rows, ask.max_rows)
        session.names = tuple(self._own_names(names, ask.max_tokens) for names in chains)
        most = ask.max_tokens // self._pool.page_tokens
        nothing = ((),) * self._grouping.num_groups
        found = tuple(self._prefixes.longest(names, most) or nothing for names in session.names)
        session.num_named = [len(row[0]) for row in found]
        if any(session.num_named):
            session.pages.adopt(PREFIX_STEP, found)
            session.last_step = PREFIX_STEP
            session.used_at = session.since = session.opened_at

    def _own_names(self, names: tuple[bytes, ...], max_tokens: int) -> tuple[bytes, ...]:
        if not self._depends_on_length:
            return names
        return tuple(name + max_tokens.to_bytes(8) for name in names)

    def _name_pages(self, session: Session) -> None:
        """Keep the pages of a session's prefixes that are full now under their names."""
        for row, names in enumerate(session.names):
            first = session.num_named[row]
            if first < len(names):
                session.num_named[row] += self._keep(session, row, names, first)

    def _keep(self, session: Session, row: int, names: tuple[bytes, ...], first: int = 0) -> int:
        """Keep a row's full pages from a place on, under their names; how many there are."""
        fresh: dict[bytes, tuple[int, ...]] = {}
        for place in range(first, len(names)):
            pages = session.pages.full_page(place, row)
            if pages is None:
                break
            fresh[names[place]] = pages
        if fresh:
            self._prefixes.keep(names[: first + len(fresh)], fresh)
        return len(fresh)

    def _finds_room(
        self, session: Session, num_wanted: int, now_s: float, working: Collection[bytes]
    ) -> bool:
        """Whether so many pages are free now, perhaps because others made room."""
        if not num_wanted:
            return True
        num_own = session.pages.num_pages if session.place is Memory.DEVICE else 0
        if num_own + num_wanted > self._num_pages:
            raise error(
                Code.BUSY,
                f"the session holds {num_own} pages and wants {num_wanted} more, of {self._num_pages} in all",
                "use another peer",
            )
        since = session.waits_since = now_s if session.waits_since is None else session.waits_since
        patience_s = PATIENCE_S if self._num_host_pages else EVICTION_PATIENCE_S
        waiting = [other.waits_since for other in self._open.values() if other.waits_since is not None]
        if any(other < since and now_s - other >= patience_s for other in waiting):
            return False  # behind whoever waits too long already
        self._give_back(num_wanted)
        room = make_room(self._view(session, now_s, working), session.id, num_wanted, now_s - since)
        if room is None or not self._carry_out(room, session, now_s):
            return False
        self._give_back(num_wanted)  # pages that those who left shared with what is kept of prefixes
        return num_wanted <= self._pool.num_free

    def _give_back(self, num_wanted: int) -> None:
        if num_wanted > self._pool.num_free:
            self._prefixes.give_back(num_wanted - self._pool.num_free)

    def _carry_out(self, room: Room, asker: Session, now_s: float) -> bool:
        """Let these make room; False if the asker would have to change places with them, and cannot now."""
        leaving = [self._open[session] for session in room.park]
        for evicted in (self._open[session] for session in room.evict):
            evicted.pages.close()
            self._come_to_nothing(evicted)
            evicted.is_gone = True
        if sum(session.pages.num_pages for session in leaving) > self._host.num_free:
            if asker.pages.num_pages > self._between.num_free:
                return False
            self._move(asker, Memory.BETWEEN, self._between, now_s)
        for session in leaving:
            self._move(session, Memory.HOST, self._host, now_s)
        return True

    def _move(self, session: Session, to: Memory, pool: PagePool, now_s: float) -> None:
        of, moved = session.place, session.pages.move(pool)
        session.place, session.since = to, now_s
        self._carry(tuple(PageMove(of, source, to, target) for source, target in moved))

    def _come_to_nothing(self, session: Session) -> None:
        """A session without pages; what it grows by is on the device."""
        session.pages.move(self._pool)
        session.place = Memory.DEVICE

    def _view(self, asker: Session, now_s: float, working: Collection[bytes]) -> View:
        residents, parked = [], []
        for session in self._open.values():
            num_pages, has_work = session.pages.num_pages, session.id in working
            if session.place is Memory.HOST:
                parked.append(Parked(session.id, num_pages, session.used_at, has_work))
            elif num_pages and session.place is Memory.DEVICE:
                residents.append(
                    Resident(session.id, num_pages, session.used_at, session.since, has_work, session.is_amid)
                )
        num_host_free = self._host.num_free if self._num_host_pages else 0
        if asker.place is Memory.HOST:
            num_host_free += asker.pages.num_pages  # it leaves
        return View(now_s, self._pool.num_free, num_host_free, tuple(residents), tuple(parked))

    def _num_most(self, max_rows: int, max_tokens: int) -> int:
        """Pages for all rows at full length. Rows that are forked each copy a page while the step before
        still holds the old one; a single row never does."""
        grouping, page_tokens = self._grouping, self._pool.page_tokens
        per_row = grouping.num_most(max_tokens, page_tokens, ROLLBACK_TOKENS + MAX_STEP_TOKENS)
        return max_rows * (per_row + (grouping.num_groups if max_rows > 1 else 0))

    def _tokens(self, num_pages: int) -> int:
        """Of rows that hold so many pages, before any is let go of."""
        return num_pages * self._pool.page_tokens // self._grouping.num_groups

    def _check_room(self, ask: OpenCache, num_most: int) -> None:
        asked = f"{ask.max_rows} rows of {ask.max_tokens} tokens"
        if num_most > self._num_pages:
            raise error(
                Code.TOO_LONG,
                f"{asked} take {self._tokens(num_most)} cache tokens,"
                f" this worker has {self._tokens(self._num_pages)} in all",
                "ask for fewer or shorter rows, or give the worker a larger cache",
                wanted_tokens=self._tokens(num_most),
                free_tokens=self.free_tokens,
            )
        sizes = [self._expected.pages(s.num_most, s.pages.num_pages) for s in self._open.values()]
        num_wanted = self._expected.pages(num_most)
        num_left = self._num_pages + self._num_host_pages - sum(sizes)
        if num_wanted > num_left:
            wait_s = self._expected.wait_s(sizes, num_wanted - num_left)
            raise error(
                Code.BUSY,
                f"{asked} are expected to take {self._tokens(num_wanted)} cache tokens, and"
                f" {len(sizes)} sessions here leave {self._tokens(max(0, num_left))} of"
                f" {self._tokens(self._num_pages + self._num_host_pages)}",
                f"use another peer, or try again in {wait_s:.0f} s",
                wanted_tokens=self._tokens(num_wanted),
                free_tokens=self._tokens(max(0, num_left)),
                wait_s=round(wait_s, 1),
            )


def keeps_order(rows: tuple[Row, ...], count: int) -> bool:
    """Whether each of so many rows goes on, or begins, at its own place."""
    return len(rows) == count and all(row.parent in (NEW_ROW, index) for index, row in enumerate(rows))


def undo(step: Begun) -> None:
    """Set the rows back to before a step that failed.

    Parts of a replay share one step id, so that the table before it is forgotten; then its rows are cut to
    where the step found them.
    """
    session, ask = step.session, step.ask
    session.is_amid = False
    if step.step_before < ask.step_id:
        session.pages.restore(step.step_before, step.lengths_before)
        session.last_step = step.step_before
    else:
        session.pages.restore(ask.step_id, tuple(row.position for row in ask.rows))


def _check_begins_anew(ask: Compute) -> None:
    """Raise `HISTORY_GAP` for a step that goes on where nothing is left."""
    for index, row in enumerate(ask.rows):
        if row.parent != NEW_ROW:
            raise error(
                Code.HISTORY_GAP,
                f"row {index} begins at position {row.position}; the session had to make room for others",
                "send its hidden states again",
                first_position=0,
                row=index,
                evicted=True,
            )
