"""The sessions that a worker admitted, and the cache that it promised each of them.

Owns admission: a session is let in only if every one of its rows can grow to its full length, so that no
session is turned away in mid-sentence. Owns each session's rows too, and how a step begins, fails and is
taken back. No tensors, no torch, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.errors import Code, error
from ..protocol.tensors import Encoding
from ..protocol.work import Compute, OpenCache, Restore
from .pages import Applied, PagePool, SessionPages


@dataclass(slots=True)
class Session:
    """One session on this worker. last_step: the step after which the live rows stand; 0 is none."""

    id: bytes
    blocks: tuple[int, int]
    encoding: Encoding
    pages: SessionPages
    num_promised: int  # pages
    last_step: int = 0


@dataclass(frozen=True, slots=True)
class Begun:
    """A step whose rows have been given their pages, and what it takes to undo that."""

    session: Session
    ask: Compute
    applied: Applied
    step_before: int
    lengths_before: tuple[int, ...]


class Sessions:
    """Every session of one worker, over one pool of pages."""

    def __init__(self, blocks: tuple[int, int], num_pages: int) -> None:
        """blocks: the worker's span; with no blocks or no pages nothing can be opened."""
        self._blocks = blocks
        self._pool = PagePool(max(num_pages, 1))
        self._num_pages = num_pages
        self._num_promised = 0
        self._open: dict[bytes, Session] = {}

    @property
    def free_tokens(self) -> int:
        """Token slots that are promised to nobody."""
        return (self._num_pages - self._num_promised) * self._pool.page_tokens

    def open(self, ask: OpenCache) -> Session:
        """Admit a session, instead of any of the same id.

        Raises `BLOCKS_OUT_OF_RANGE`, `TOO_LONG` if the whole cache could not hold it, and `BUSY`.
        """
        start, end = self._blocks
        if not start <= ask.start < ask.end <= end:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks {ask.start}:{ask.end} asked of a worker that serves {start}:{end}",
                "choose a range within the worker's span",
            )
        self.close(ask.session)
        num_wanted = self._num_wanted(ask.max_rows, ask.max_tokens)
        self._check_room(ask, num_wanted)
        pages = SessionPages(self._pool, ask.max_rows, ask.max_tokens)
        session = Session(ask.session, (ask.start, ask.end), ask.encoding, pages, num_wanted)
        self._num_promised += num_wanted
        self._open[ask.session] = session
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

    def close(self, session: bytes) -> None:
        """Free a session's pages and promise; one that is unknown is closed already."""
        found = self._open.pop(session, None)
        if found is not None:
            found.pages.close()
            self._num_promised -= found.num_promised

    def _num_wanted(self, max_rows: int, max_tokens: int) -> int:
        """Pages for all rows at full length. Rows that are forked each copy a page while the step before
        still holds the old one; a single row never does."""
        per_row = -(-max_tokens // self._pool.page_tokens)
        return max_rows * (per_row + (1 if max_rows > 1 else 0))

    def _check_room(self, ask: OpenCache, num_wanted: int) -> None:
        page_tokens = self._pool.page_tokens
        asked = f"{ask.max_rows} rows of {ask.max_tokens} tokens"
        details = {"wanted_tokens": num_wanted * page_tokens, "free_tokens": self.free_tokens}
        if num_wanted > self._num_pages:
            raise error(
                Code.TOO_LONG,
                f"{asked} take {num_wanted * page_tokens} cache tokens,"
                f" this worker has {self._num_pages * page_tokens} in all",
                "ask for fewer or shorter rows, or give the worker a larger cache",
                **details,
            )
        if num_wanted + self._num_promised > self._num_pages:
            raise error(
                Code.BUSY,
                f"{asked} take {num_wanted * page_tokens} cache tokens, {self.free_tokens} of"
                f" {self._num_pages * page_tokens} are free beside {len(self._open)} sessions",
                "try again when one of them has ended, or ask for shorter rows",
                **details,
            )


def begin(session: Session, ask: Compute) -> Begun:
    """Give a step's rows their pages. Raises as `SessionPages.apply`; the rows then stand as before."""
    step_before, lengths_before = session.last_step, session.pages.lengths
    applied = session.pages.apply(ask.step_id, ask.committed, ask.rows)
    session.last_step = ask.step_id
    return Begun(session, ask, applied, step_before, lengths_before)


def undo(step: Begun) -> None:
    """Set the rows back to before a step that failed.

    Parts of a replay share one step id, so that the table before it is forgotten; then its rows are cut to
    where the step found them.
    """
    session, ask = step.session, step.ask
    if step.step_before < ask.step_id:
        session.pages.restore(step.step_before, step.lengths_before)
        session.last_step = step.step_before
    else:
        session.pages.restore(ask.step_id, tuple(row.position for row in ask.rows))


def restore(session: Session, ask: Restore) -> tuple[int, ...]:
    """Set the rows back as asked; the tokens that each row of the base still has."""
    held = session.pages.restore(ask.base_step, ask.lengths)
    session.last_step = ask.base_step if session.pages.lengths else 0
    return held
