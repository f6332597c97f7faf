"""The user's steps on their way: cut into parts, sent a few ahead, committed in order. Pure.

It owns step ids, what is committed, and the client's history of committed inputs. It knows no hop and no
epoch: after a repair it is told to `rewind`, and gives out the unanswered steps again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from ...protocol.errors import Code, error
from ...protocol.limits import MAX_ROWS, MAX_STEPS_IN_FLIGHT
from ...protocol.steps import NEW_ROW, PREFIX_STEP, Hop, Reply, Row, check_payload, check_rows
from .history import History
from .parts import cut, max_part_tokens, num_tokens, part_reply, reply_tokens, wanted


class Answer(NamedTuple):
    """A user's step is complete."""

    ticket: int
    payload: bytes


@dataclass(slots=True)
class _Request:
    """A step as the user asked for it. ends: the length of each row after it; answers: of its parts."""

    ticket: int
    payload: bytes
    reply: Reply
    ends: tuple[int, ...]
    num_parts: int = 0
    answers: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Part:
    """One step on the wire. lengths: of every row after it. sent_at: None until it is sent in this wiring."""

    step_id: int
    rows: tuple[Row, ...]
    reply: Reply
    lengths: tuple[int, ...]
    request: _Request
    offset: int  # of its payload in the request's
    size: int
    sent_at: float | None = None
    answered_by: Hop | None = None

    @property
    def payload(self) -> bytes:
        """Its hidden states."""
        whole = self.request.payload
        if self.size == len(whole):
            return whole
        return whole[self.offset : self.offset + self.size]


class Pipeline:
    """Steps of one session.

    token_bytes: of one token. max_rows, max_tokens: what hops were asked for. part_tokens: of one message.
    """

    def __init__(
        self, token_bytes: int, max_rows: int, max_tokens: int, history_bytes: int, part_tokens: int
    ) -> None:
        self._token_bytes = token_bytes
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._part_tokens = max_part_tokens(token_bytes, part_tokens)
        self._next_id = 1
        self._queue: deque[Part] = deque()
        self._in_flight: deque[Part] = deque()
        self._done: list[Part] = []  # committed parts of the request that was answered last
        self.history = History(token_bytes, history_bytes)
        self.committed = 0
        self.lengths: tuple[int, ...] = ()  # of each row after `committed`

    @property
    def oldest(self) -> Part | None:
        """The part whose result comes next, if any is on its way."""
        return self._in_flight[0] if self._in_flight else None

    @property
    def in_flight_bytes(self) -> int:
        """Of all parts that are on their way."""
        return sum(part.size for part in self._in_flight)

    @property
    def last_sent_id(self) -> int:
        """The youngest step that is or was on its way."""
        return self._in_flight[-1].step_id if self._in_flight else self.committed

    @property
    def is_idle(self) -> bool:
        """Nothing to do for the user."""
        return not self._in_flight and not self._queue

    def request(self, ticket: int, rows: tuple[Row, ...], payload: bytes, reply: Reply) -> None:
        """Take a step of the user.

        Raises `BAD_REQUEST`, `BAD_SHAPE`, `TOO_LONG`: the user's fault, and nothing has changed.
        """
        self._check(rows, payload)
        ends = tuple(row.position + row.n for row in rows)
        request = _Request(ticket, payload, reply, ends)
        offset = 0
        for part in cut(rows, self._part_tokens):
            size = num_tokens(part) * self._token_bytes
            lengths = tuple(row.position + row.n for row in part)
            wish = part_reply(part, ends, reply)
            self._queue.append(Part(self._next_id, part, wish, lengths, request, offset, size))
            self._next_id += 1
            offset += size
            request.num_parts += 1

    def begin_with(self, lengths: tuple[int, ...], inputs: bytes) -> None:
        """Before the first step: rows of tokens that every hop holds already, as if they had been step 1."""
        if self._next_id != PREFIX_STEP:
            return
        self.history.apply(PREFIX_STEP, 0, tuple(Row(NEW_ROW, 0, num) for num in lengths), inputs)
        self.committed = PREFIX_STEP
        self.lengths = lengths
        self._next_id = PREFIX_STEP + 1

    def take(self, now_s: float) -> list[Part]:
        """The parts to send now. They count as sent."""
        while self._queue and len(self._in_flight) < MAX_STEPS_IN_FLIGHT:
            self._in_flight.append(self._queue.popleft())
        taken = [part for part in self._in_flight if part.sent_at is None]
        for part in taken:
            part.sent_at = now_s
        return taken

    def rewind(self) -> None:
        """The wiring has changed: everything on its way has to be sent again."""
        for part in self._in_flight:
            part.sent_at = None

    def cut_back(self) -> None:
        """A hop let go of what the oldest step goes back over: the committed rows are cut to where it begins."""
        part = self.oldest
        if part is None:
            return
        reached = dict.fromkeys(range(len(self.lengths)), 0)
        for row in part.rows:
            if row.parent != NEW_ROW:
                reached[row.parent] = max(reached[row.parent], row.position)
        self.lengths = tuple(reached.values())
        self.history.restore(self.committed, self.lengths)

    def expected_bytes(self, part: Part) -> int:
        """Length of the answer to a part."""
        return reply_tokens(part.rows, part.reply) * self._token_bytes

    def commit(self, payload: bytes, by: Hop) -> Answer | None:
        """The oldest part is answered; gives the user's answer if that completes it. by: who answered."""
        part = self._in_flight.popleft()
        request = part.request
        part.answered_by = by
        if self._done and self._done[-1].request is not request:
            self._done.clear()
        self._done.append(part)
        self.history.apply(part.step_id, self._done[0].step_id - 1, part.rows, part.payload)
        self.committed = part.step_id
        self.lengths = part.lengths
        request.answers[part.step_id] = wanted(
            part.rows, request.ends, request.reply, payload, self._token_bytes
        )
        if len(request.answers) < request.num_parts:
            return None
        return Answer(request.ticket, b"".join(answer for _, answer in sorted(request.answers.items())))

    def undo(self, ticket: int) -> frozenset[Hop]:
        """Take back the last answer, which was to `ticket`: all its parts are on their way again.

        Gives those who answered them; nobody if that was not the last answer, and nothing has changed.
        """
        if not self._done or self._done[-1].request.ticket != ticket:
            return frozenset()
        answered_by = frozenset(part.answered_by for part in self._done if part.answered_by is not None)
        self.committed = self._done[0].step_id - 1
        self.lengths = self.history.lengths_after(self.committed) if self.committed else ()
        self.history.restore(self.committed, self.lengths)
        while self._done:
            part = self._done.pop()
            part.request.answers.pop(part.step_id)
            part.sent_at = None
            self._in_flight.appendleft(part)
        return answered_by

    def close(self) -> None:
        """Forget everything."""
        self._queue.clear()
        self._in_flight.clear()
        self._done.clear()
        self.history.clear()

    def _check(self, rows: tuple[Row, ...], payload: bytes) -> None:
        try:
            check_rows(rows)
        except ValueError as problem:
            raise error(Code.BAD_REQUEST, str(problem)) from problem
        if len(rows) > self._max_rows:
            raise error(
                Code.BAD_REQUEST,
                f"{len(rows)} rows, the session was opened for {self._max_rows}",
                f"open it with more rows, at most {MAX_ROWS}",
            )
        last = self._queue or self._in_flight
        lengths = last[-1].lengths if last else self.lengths
        for index, row in enumerate(rows):
            if row.parent != NEW_ROW and row.parent >= len(lengths):
                raise error(
                    Code.BAD_REQUEST, f"row {index} continues row {row.parent}, there are {len(lengths)} rows"
                )
            held = 0 if row.parent == NEW_ROW else lengths[row.parent]
            if row.position > held:
                raise error(
                    Code.BAD_REQUEST,
                    f"row {index} begins at position {row.position}, row {row.parent} holds {held} tokens",
                )
            if row.position + row.n > self._max_tokens:
                raise error(
                    Code.TOO_LONG,
                    f"row {index} would hold {row.position + row.n} tokens,"
                    f" the session was opened for {self._max_tokens}",
                    "open the session with a larger max_length",
                )
        check_payload(rows, payload, self._token_bytes)
