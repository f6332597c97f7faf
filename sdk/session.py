"""A session of hidden states over a run of blocks: what the caller steps, rolls back and forks.

Owns the handle in the daemon and the row table. Where the blocks are, and that some of them move while the
session runs, is the daemon's business; if the daemon itself is restarted the session ends with an error.
`AsyncSession` differs in `await` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from ..protocol.control import Return, SessionHandle, SessionOpened, SessionStep
from ..protocol.errors import Code, CorollaError, error
from ..protocol.steps import Reply, Row
from ..protocol.tensors import Encoding
from .rows import RowTable
from .tensors import Kind, check_shape, from_bytes, kind_of, to_bytes

if TYPE_CHECKING:
    from .async_wire import AsyncWire
    from .wire import Wire


class _Stepper:
    """What both kinds of session share: rows and bytes, no waiting."""

    def __init__(self, opened: SessionOpened, max_rows: int, max_length: int) -> None:
        self._handle: Final = opened.handle
        self.hidden_size: Final[int] = opened.hidden_size
        self.encoding: Final[Encoding] = opened.encoding
        self.blocks: Final[tuple[int, int]] = (opened.start, opened.end)
        self._table = RowTable(max_rows, max_length)
        self._closed = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row holds; empty before the first step."""
        return self._table.lengths

    @property
    def is_closed(self) -> bool:
        """Whether the session is over."""
        return self._closed

    def reorder(self, parents: Sequence[int]) -> None:
        """From the next step on, row i continues what is row `parents[i]` now.

        Naming a row twice forks it, leaving one out drops it (beam search, several samples of one prompt).
        Costs nothing by itself. Raises `BAD_REQUEST` for a row that is not there.
        """
        self._table = self._table.reordered(tuple(int(parent) for parent in parents))

    def fork(self, num_copies: int) -> None:
        """Continue each row `num_copies` times: rows 0, 0, 1, 1, … for 2."""
        self.reorder([row for row in range(len(self._table.lengths)) for _ in range(num_copies)])

    def _request(self, hidden: Any, rows: tuple[Row, ...], reply: Reply) -> tuple[SessionStep, bytes]:
        """hidden: (sum of n, hidden_size)."""
        if self._closed:
            raise error(Code.UNKNOWN_SESSION, "this session is closed", "open another: model.session(…)")
        self._table.check(rows)
        num_tokens = sum(row.n for row in rows)
        if int(hidden.shape[0]) != num_tokens:
            raise error(
                Code.BAD_SHAPE, f"{int(hidden.shape[0])} tokens of hidden states for rows of {num_tokens}"
            )
        return SessionStep(self._handle, rows, reply), to_bytes(hidden, kind_of(hidden), self.encoding)

    def _answer(self, answer: Return, rows: tuple[Row, ...], reply: Reply, kind: Kind) -> Any:
        self._table = self._table.after(rows)
        num_tokens = {Reply.ALL: sum(row.n for row in rows), Reply.LAST: len(rows), Reply.NONE: 0}[reply]
        expected = num_tokens * self.encoding.token_bytes(self.hidden_size)
        if len(answer.payload) != expected:
            raise error(
                Code.BAD_ANSWER,
                f"{len(answer.payload)} bytes for {num_tokens} tokens of hidden size {self.hidden_size}"
                f" as {self.encoding}, expected {expected}",
            )
        return from_bytes(answer.payload, (num_tokens, self.hidden_size), kind, self.encoding)

    def _ended_with_daemon(self, problem: CorollaError) -> CorollaError:
        self._closed = True
        return error(
            Code.SESSION_LOST,
            f"the session of blocks {self.blocks[0]}:{self.blocks[1]} ended with its daemon: {problem.message}",
            "connect again, open another session and send the hidden states from the start",
        )

    def _even(
        self, hidden: Any, position: int | Sequence[int] | None, reply: Reply
    ) -> tuple[Any, tuple[Row, ...], tuple[int, int, int]]:
        """A rectangle of hidden states, flattened; its rows; and the shape of the answer."""
        kind_of(hidden)
        check_shape(hidden, 3, self.hidden_size)
        num_rows, n = int(hidden.shape[0]), int(hidden.shape[1])
        if n < 1:
            raise error(Code.BAD_SHAPE, "a step of 0 tokens a row", "give at least one")
        rows = self._table.next_rows(num_rows, n, position)
        answered = {Reply.ALL: n, Reply.LAST: 1, Reply.NONE: 0}[reply]
        return hidden.reshape(-1, self.hidden_size), rows, (num_rows, answered, self.hidden_size)


class Session(_Stepper):
    """A session for blocking code. Use it as a context manager; it closes at the end."""

    def __init__(self, wire: Wire, opened: SessionOpened, max_rows: int, max_length: int) -> None:
        super().__init__(opened, max_rows, max_length)
        self._wire = wire

    def step(
        self, hidden: Any, *, position: int | Sequence[int] | None = None, reply: Reply | str = Reply.ALL
    ) -> Any:
        """Run new tokens of all rows through the session's blocks.

        hidden: (rows, n, hidden_size), numpy (float32, float16) or torch (also bfloat16).
        position: where they begin; None is at each row's end. A smaller one rolls back: afterwards a row
            holds exactly position + n tokens.
        reply: "all", or "last" for each row's last token alone, or "none".
        Returns (rows, n, hidden_size), or (rows, 1, hidden_size) for "last", of the same kind and dtype.
        Raises `BAD_SHAPE`, `BAD_DTYPE`, `NOT_FINITE`, `TOO_LONG` before anything is sent.
        """
        reply = Reply(reply)
        flat, rows, shape = self._even(hidden, position, reply)
        return self.step_rows(flat, rows, reply=reply).reshape(shape)

    def step_rows(self, hidden: Any, rows: Sequence[Row], *, reply: Reply | str = Reply.ALL) -> Any:
        """Like `step` for rows of different lengths: hidden (sum of n, hidden_size), one row after another.

        rows: `(parent, position, n)` of each, as in `protocol.steps.Row`; parents are rows of the last step,
        whatever `reorder` said since. Returns (sum of n, hidden_size).
        """
        reply, rows, kind = Reply(reply), tuple(rows), kind_of(hidden)
        check_shape(hidden, 2, self.hidden_size)
        request, payload = self._request(hidden, rows, reply)
        try:
            answer = self._wire.call("session.step", request, payload)
        except CorollaError as problem:
            if problem.code is Code.NO_DAEMON:
                raise self._ended_with_daemon(problem) from problem
            raise
        return self._answer(answer, rows, reply, kind)

    def close(self) -> None:
        """Free the session on all hops. May be called twice, and after the connection ended."""
        if self._closed:
            return
        self._closed = True
        if self._wire.is_open:
            try:
                self._wire.call("session.close", SessionHandle(self._handle))
            except CorollaError as problem:
                if problem.code not in _GONE:
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncSession(_Stepper):
    """A session for asynchronous code. Use it as an asynchronous context manager."""

    def __init__(self, wire: AsyncWire, opened: SessionOpened, max_rows: int, max_length: int) -> None:
        super().__init__(opened, max_rows, max_length)
        self._wire = wire

    async def step(
        self, hidden: Any, *, position: int | Sequence[int] | None = None, reply: Reply | str = Reply.ALL
    ) -> Any:
        """See `Session.step`."""
        reply = Reply(reply)
        flat, rows, shape = self._even(hidden, position, reply)
        return (await self.step_rows(flat, rows, reply=reply)).reshape(shape)

    async def step_rows(self, hidden: Any, rows: Sequence[Row], *, reply: Reply | str = Reply.ALL) -> Any:
        """See `Session.step_rows`."""
        reply, rows, kind = Reply(reply), tuple(rows), kind_of(hidden)
        check_shape(hidden, 2, self.hidden_size)
        request, payload = self._request(hidden, rows, reply)
        try:
            answer = await self._wire.call("session.step", request, payload)
        except CorollaError as problem:
            if problem.code is Code.NO_DAEMON:
                raise self._ended_with_daemon(problem) from problem
            raise
        return self._answer(answer, rows, reply, kind)

    async def close(self) -> None:
        """See `Session.close`."""
        if self._closed:
            return
        self._closed = True
        if self._wire.is_open:
            try:
                await self._wire.call("session.close", SessionHandle(self._handle))
            except CorollaError as problem:
                if problem.code not in _GONE:
                    raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            await self.close()
        elif not self._closed and self._wire.is_open:  # perhaps cancelled: do not wait for the answer
            self._closed = True
            await self._wire.tell("session.close", SessionHandle(self._handle))


# A session that is gone already, alone or with its daemon, is as closed as it can be.
_GONE: Final = (Code.UNKNOWN_SESSION, Code.SESSION_LOST, Code.NO_DAEMON, Code.CANCELLED)
