"""Sessions between peers: opening, links, steps, receipts, replays.

Spoken on two protocols. `SESSION_PROTOCOL` is the client's one persistent stream to each hop: links,
receipts, errors and the last hop's results travel on it, and the steps from the client to its first hop.
`PUSH_PROTOCOL` is the stream from each hop to the next one, on which steps travel straight on.

Invariants that both sides keep (DESIGN, section 3):

* After a step each of its rows' caches holds exactly `position + n` tokens.
* `epoch` numbers the client's wiring. A hop takes steps only from its linked upstream and only in the
  current epoch; anything older is answered `STALE_EPOCH` and changes nothing.
* `step_id` grows by one with each step. The last one repeated has its result sent again; lower ones are
  dropped.
* A hop keeps the row table (not the tokens) as it stood after each step that is not yet committed, so that
  `LinkHop` can set it back to `base_step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import ClassVar, Final, NamedTuple

from .errors import Code, CorollaError, error, error_from_wire
from .limits import (
    MAX_BLOCKS,
    MAX_NAME_CHARS,
    MAX_POSITION,
    MAX_PREFIX_PAGES,
    MAX_ROWS,
    PREFIX_NAME_BYTES,
    SESSION_ID_BYTES,
)
from .messages import Message, Plain, Vocabulary, check_length, check_range
from .tensors import Encoding
from .training import check_parts

SESSION_PROTOCOL: Final = "/corolla/session/1"
PUSH_PROTOCOL: Final = "/corolla/push/1"

PREFIX_STEP: Final = 1  # after which the rows of a session stand that begins with a prefix: see `OpenSession`
NEW_ROW: Final = -1  # `Row.parent` of a row that continues nothing


class Row(NamedTuple):
    """One row of a step: continue cached row `parent` at `position` with `n` new tokens.

    Whatever the parent held at and beyond `position` is gone for this row. Naming a parent twice forks it;
    a cached row that no row of the step names is dropped. `parent == NEW_ROW` needs `position == 0`.
    """

    parent: int
    position: int
    n: int


class Reply(StrEnum):
    """What the last hop sends back of a step."""

    NONE = "none"  # only that it is done
    LAST = "last"  # the last new token of each row that has any: (number of rows with n > 0, hidden_size)
    ALL = "all"  # every token: (num_tokens, hidden_size)


class Stage(StrEnum):
    """How far a hop got with a step since it was last linked: a link makes every step unknown again.

    A replay is one step, `base_step`, of several parts: received with its first part, sent with its last.
    """

    UNKNOWN = "unknown"  # never seen
    RECEIVED = "received"
    WORKING = "working"
    SENT = "sent"


def check_rows(rows: tuple[Row, ...]) -> None:
    """Raise ValueError unless these rows may form a step, by themselves."""
    check_range("number of rows", len(rows), 1, MAX_ROWS)
    for row in rows:
        check_range("parent", row.parent, NEW_ROW, MAX_ROWS - 1)
        check_range("n", row.n, 0, MAX_POSITION)
        check_range("position", row.position, 0, MAX_POSITION - row.n)
        if row.parent == NEW_ROW and row.position:
            raise ValueError(f"a new row at position {row.position}, expected 0")


def check_prefix(names: tuple[bytes, ...], rows: tuple[int, ...] = ()) -> None:
    """Raise ValueError unless these may be the names of a prefix's pages, or of several rows' prefixes."""
    check_range("number of rows with a prefix", len(rows), 0, MAX_ROWS)
    if rows and (min(rows) < 0 or sum(rows) != len(names)):
        raise ValueError(f"{len(names)} names of pages for rows of {rows}")
    check_range("number of prefix pages", len(names), 0, MAX_PREFIX_PAGES)
    if any(len(name) != PREFIX_NAME_BYTES for name in names):
        raise ValueError(f"names of a prefix's pages that have not {PREFIX_NAME_BYTES} bytes each")


def prefixes_of(
    names: tuple[bytes, ...], rows: tuple[int, ...], max_rows: int
) -> tuple[tuple[bytes, ...], ...]:
    """The names of each row's prefix; nothing if no row begins with one. names, rows: as in `OpenSession`."""
    if not names or (not rows and max_rows > 1) or len(rows) > max_rows:
        return ()
    ends = accumulate(rows or (len(names),))
    return tuple(names[end - count : end] for count, end in zip(rows or (len(names),), ends, strict=True))


def check_chains(rows: tuple[Chain, ...]) -> None:
    """Raise ValueError unless these may be the names of several rows' pages."""
    check_range("number of rows", len(rows), 0, MAX_ROWS)
    check_range("number of pages", sum(len(row.names) for row in rows), 0, MAX_PREFIX_PAGES)


def _check_session(session: bytes) -> None:
    if len(session) != SESSION_ID_BYTES:
        raise ValueError(f"session id of {len(session)} bytes, expected {SESSION_ID_BYTES}")


class Hop(NamedTuple):
    """A worker of a peer: the address of a link's end."""

    peer: str
    worker: int


# client → hop


@dataclass(frozen=True, slots=True)
class OpenSession(Message):
    """Reserve caches for a session on blocks [start, end) of one worker. Answered by `Opened` or `Failure`.

    Sent again for a session that this worker already has, it resumes the session on a new stream. If the
    blocks are others than it has, what it has is freed first, and the session is as new.

    parts: of an adapter (see `training`), one name for each block, or nothing. A worker that lacks some answers
    `ADAPTER_MISSING` with the hex names in `missing`; the client puts them there (`training.PutPart`) and opens the
    session again, and nobody is charged. Those in use stay for as long as the session does.

    prefix: names for the full pages (`PREFIX_PAGE_TOKENS`) that its one row will begin with, in order; each stands for
    everything before its end, and for whatever else decides what a hop computes. The client chooses them so that
    nobody else can guess them. A hop that still holds pages of this client under these names says how many tokens
    in `Opened`. The client may then link with `base_step = PREFIX_STEP` and as many tokens, or fewer, as if they had
    been that step; or begin with nothing, from step 0.

    prefix_rows: where several rows begin so, how many of these pages each of them has, in order.
    """

    KIND: ClassVar[str] = "open"
    session: bytes
    fingerprint: str
    worker: int
    start: int
    end: int
    encoding: Encoding
    max_rows: int
    max_tokens: int  # of one row
    parts: tuple[bytes, ...] = ()
    prefix: tuple[bytes, ...] = ()
    prefix_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_session(self.session)
        check_prefix(self.prefix, self.prefix_rows)
        check_length("fingerprint", self.fingerprint, MAX_NAME_CHARS)
        check_range("start", self.start, 0, MAX_BLOCKS - 1)
        check_range("end", self.end, self.start + 1, MAX_BLOCKS)
        check_range("max_rows", self.max_rows, 1, MAX_ROWS)
        check_range("max_tokens", self.max_tokens, 1, MAX_POSITION)
        check_parts(self.start, self.end, self.parts)


@dataclass(frozen=True, slots=True)
class LinkHop(Message):
    """Set this hop's place in the wiring `epoch`, and its rows back to how they stood after `base_step`.

    upstream, downstream: None is the client itself.
    relays_from, relays_to: the hop before, or after, cannot be reached, so that the steps between them pass
        through the client, on its streams, unchanged. No push stream is made there; all else is as ever.
    lengths: tokens to keep of each row of `base_step`'s row table, in its order; empty before any step.
    A hop that no longer has `base_step`'s table (or never had) keeps nothing. `Linked` tells what it holds.
    """

    KIND: ClassVar[str] = "link"
    session: bytes
    epoch: int
    upstream: Hop | None
    downstream: Hop | None
    base_step: int
    lengths: tuple[int, ...] = ()
    relays_from: bool = False
    relays_to: bool = False


@dataclass(frozen=True, slots=True)
class Replay(Message):
    """Send history downstream: for each row of `base_step`, positions [starts[i], lengths[i]).

    The replayed tokens travel over `num_hops` hops below this one, the last of which answers `Replayed`.
    Every part names every row: a row that starts at 0 is `NEW_ROW` in the first part, any other continues
    the row of the same index at the position that the receiver holds (with n = 0 if nothing is missing).
    """

    KIND: ClassVar[str] = "replay"
    session: bytes
    epoch: int
    base_step: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    num_hops: int


@dataclass(frozen=True, slots=True)
class Where(Message):
    """Ask how far a hop is with a step. Answered by `At` at once, without the worker.

    It also asks whether the hop is alive, so it is answered whatever the epoch, and while a link is being
    made or a replay is being sent. `At` repeats the question's epoch and step.
    """

    KIND: ClassVar[str] = "where"
    session: bytes
    epoch: int
    step_id: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Names for one row's first full pages, as in `OpenSession.prefix`."""

    names: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        check_prefix(self.names)


@dataclass(frozen=True, slots=True)
class KeepPages(Message):
    """Keep what was computed of these pages for sessions that will begin with them: a text, with its answer.

    rows: of each row of step `step_id`, in its order. A hop whose rows stand elsewhere by now lets it be, and so
    may any other: it is an offer, and nobody answers.
    """

    KIND: ClassVar[str] = "keep"
    session: bytes
    epoch: int
    step_id: int
    rows: tuple[Chain, ...]

    def __post_init__(self) -> None:
        _check_session(self.session)
        check_chains(self.rows)


@dataclass(frozen=True, slots=True)
class CloseSession(Message):
    """The session is over; the hop frees everything of it."""

    KIND: ClassVar[str] = "close"
    session: bytes


# client → first hop, hop → next hop, and hop → client → next hop where they do not reach each other


@dataclass(frozen=True, slots=True)
class Step(Message):
    """New tokens for a session's rows, as hidden states `(sum of n, hidden_size)` in the wire encoding.

    committed: the highest step whose result the client has: older row tables need not be kept.
    replay_hops: 0 for an ordinary step. In a replay, how many hops the step still has to pass, counting the
        receiver; the hop that receives 1 does not send it on. Replayed steps carry `step_id = base_step`.
    final: the last part of a replay.
    """

    KIND: ClassVar[str] = "step"
    session: bytes
    epoch: int
    step_id: int
    rows: tuple[Row, ...]
    committed: int = 0
    reply: Reply = Reply.NONE
    replay_hops: int = 0
    final: bool = True
    payload: bytes = b""

    def __post_init__(self) -> None:
        _check_session(self.session)
        check_rows(self.rows)


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """First message of a push stream, and again after a re-link: what this stream carries.

    The receiver answers `Attached` once its own link of this epoch names the sender as upstream, or
    `Failure`. client: the peer that opened the session.
    """

    KIND: ClassVar[str] = "attach"
    session: bytes
    client: str
    epoch: int
    from_worker: int
    to_worker: int


@dataclass(frozen=True, slots=True)
class Attached(Message):
    """The push stream may be used in this epoch."""

    KIND: ClassVar[str] = "attached"
    session: bytes
    epoch: int


# hop → client


@dataclass(frozen=True, slots=True)
class Opened(Message):
    """The session exists on this hop.

    epoch: of the last link, when a session is resumed. queue: requests waiting in this worker. prefix_tokens: how
    much of `OpenSession.prefix` the hop holds, in its cache and in its history. row_tokens: the same of each of several
    rows.
    """

    KIND: ClassVar[str] = "opened"
    session: bytes
    epoch: int = 0
    queue: int = 0
    prefix_tokens: int = 0
    row_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Linked(Message):
    """The link stands, its push stream too.

    held: tokens in the cache of each row of `base_step`; all zeros if the hop does not have that table.
    history_from: for each row, the first position that this hop can replay; equals `held` if none.
    """

    KIND: ClassVar[str] = "linked"
    session: bytes
    epoch: int
    held: tuple[int, ...] = ()
    history_from: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Receipt(Message):
    """A step was received, is being worked on (every second), or was sent on. Nothing is told of quick ones."""

    KIND: ClassVar[str] = "receipt"
    session: bytes
    epoch: int
    step_id: int
    stage: Stage


@dataclass(frozen=True, slots=True)
class At(Message):
    """Answer to `Where`."""

    KIND: ClassVar[str] = "at"
    session: bytes
    epoch: int
    step_id: int
    stage: Stage


@dataclass(frozen=True, slots=True)
class Result(Message):
    """The last hop's answer to a step: what `Step.reply` asked for."""

    KIND: ClassVar[str] = "result"
    session: bytes
    epoch: int
    step_id: int
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Replayed(Message):
    """The last of a replay's hops holds everything up to the base."""

    KIND: ClassVar[str] = "replayed"
    session: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """Something went wrong with a session on this hop. The session stays open unless the error says so.

    about: the peer that this hop accuses (a link that failed, values that were wrong), if any.
    """

    KIND: ClassVar[str] = "failure"
    session: bytes
    epoch: int
    error: Plain  # CorollaError.to_wire
    step_id: int = 0
    about: Hop | None = None

    @classmethod
    def of(
        cls, session: bytes, epoch: int, problem: CorollaError, step_id: int = 0, about: Hop | None = None
    ) -> Failure:
        """The message that reports an error."""
        return cls(session, epoch, problem.to_wire(), step_id, about)

    def problem(self) -> CorollaError:
        """The error reported."""
        return error_from_wire(self.error)


def check_payload(rows: tuple[Row, ...], payload: bytes, token_bytes: int) -> None:
    """Raise `BAD_SHAPE` unless the payload holds just the rows' tokens."""
    num_tokens = sum(row.n for row in rows)
    if len(payload) != num_tokens * token_bytes:
        raise error(
            Code.BAD_SHAPE,
            f"{len(payload)} bytes of hidden states for {num_tokens} tokens,"
            f" expected {num_tokens * token_bytes}",
        )


SESSION: Final = Vocabulary(
    OpenSession, LinkHop, Replay, Where, KeepPages, CloseSession, Step,
    Opened, Linked, Receipt, At, Result, Replayed, Failure,
)  # fmt: skip
PUSH: Final = Vocabulary(Attach, Attached, Step, Failure)
