"""Hidden states of a session's rows, kept so that they can be sent again. Pure: no I/O, no clock.

A hop keeps what it sent, the client keeps its inputs, both by the one rule of rows (`protocol.steps.Row`).
The bytes lie in chunks that are only ever appended to, and a row is a list of pieces of chunks. So forks and
snapshots share bytes, a snapshot costs nothing while its row grows, and nothing that a snapshot names is
ever overwritten. Whoever does not stand at the very end of its chunk begins a new one.

When the budget is exceeded the oldest positions go first; reading those is `HISTORY_GONE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from ...protocol.errors import Code, error
from ...protocol.steps import NEW_ROW, Row, check_payload
from .parts import cut

CHUNK_BYTES: Final = 256 * 1024  # a row that cannot grow in place copies at most half of it


class Part(NamedTuple):
    """One message's worth of a replay. final: it is the last."""

    rows: tuple[Row, ...]
    payload: bytes
    final: bool


class _Chunk:
    """Bytes that are appended to and never changed."""

    __slots__ = ("data",)

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)


class _Piece(NamedTuple):
    """Bytes [start, end) of a chunk."""

    chunk: _Chunk
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Row:
    """Tokens [first, length) of a row; those before `first` were dropped."""

    pieces: tuple[_Piece, ...] = ()
    first: int = 0
    length: int = 0


class History:
    """The hidden states of one session's rows. token_bytes: of one token, in the session's encoding."""

    def __init__(self, token_bytes: int, budget_bytes: int) -> None:
        if token_bytes < 1:
            raise error(Code.BAD_REQUEST, f"tokens of {token_bytes} bytes, expected 1 or more")
        self._token_bytes = token_bytes
        self._budget_bytes = budget_bytes
        self._live: tuple[_Row, ...] = ()
        self._snapshots: dict[int, tuple[_Row, ...]] = {}
        self._size_bytes = 0  # at least what the chunks hold; exact after `_measure`

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each live row, dropped ones included."""
        return tuple(row.length for row in self._live)

    def lengths_after(self, step_id: int) -> tuple[int, ...]:
        """Tokens of each row after a step whose table is remembered. Raises KeyError for any other."""
        return tuple(row.length for row in self._snapshots[step_id])

    @property
    def size_bytes(self) -> int:
        """Bytes of memory that the rows and their snapshots hold."""
        self._measure()
        return self._size_bytes

    def first_positions(self) -> tuple[int, ...]:
        """For each live row, the first position that can still be read; its length if none."""
        return tuple(row.first for row in self._live)

    def apply(self, step_id: int, committed: int, rows: tuple[Row, ...], payload: bytes) -> None:
        """Take a step's hidden states, and remember the table of rows under `step_id`.

        Tables of steps below `committed` are forgotten. Raises `BAD_SHAPE` (a payload of another length),
        `BAD_REQUEST` (no such parent) and `HISTORY_GAP` (a row would begin beyond what is there), each of
        which leaves everything as it was.
        """
        check_payload(rows, payload, self._token_bytes)
        parents = [self._parent(index, row) for index, row in enumerate(rows)]
        for step in [step for step in self._snapshots if step < committed or step > step_id]:
            del self._snapshots[step]
        table = []
        place = 0
        for row, parent in zip(rows, parents, strict=True):
            end = place + row.n * self._token_bytes
            kept = self._cut(parent, row.position)
            table.append(self._grown(kept, payload[place:end], row.n) if row.n else kept)
            place = end
        self._live = self._snapshots[step_id] = tuple(table)
        if self._size_bytes > self._budget_bytes:
            self._shrink()

    def restore(self, base_step: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Set the rows back to how they stood after `base_step`, cut to `lengths`; forget later tables.

        Returns each row's length; zeros, and nothing is kept, if the table is not known (or is step 0).
        Raises `BAD_REQUEST` if the table has not that many rows.
        """
        base = self._snapshots.get(base_step) if base_step else None
        if base is None:
            self.clear()
            return (0,) * len(lengths)
        if len(base) != len(lengths) or min(lengths, default=0) < 0:
            raise error(
                Code.BAD_REQUEST, f"lengths {lengths} for the {len(base)} rows after step {base_step}"
            )
        table = tuple(
            self._cut(row, min(row.length, length)) for row, length in zip(base, lengths, strict=True)
        )
        for step in [step for step in self._snapshots if step >= base_step]:
            del self._snapshots[step]
        self._live = self._snapshots[base_step] = table
        return self.lengths

    def read(self, starts: tuple[int, ...], lengths: tuple[int, ...], max_tokens: int) -> Iterator[Part]:
        """Positions [starts[i], lengths[i]) of each live row i, in parts of at most `max_tokens`.

        The rows of the parts are as `steps.Replay` says. What is read is what is there now, whatever
        happens to the rows before the last part is taken. Raises at once `HISTORY_GONE` if some of it was
        dropped or never was there, and `BAD_REQUEST` for another number of rows.
        """
        if not len(starts) == len(lengths) == len(self._live):
            raise error(
                Code.BAD_REQUEST, f"{len(starts)} starts, {len(lengths)} lengths, {len(self._live)} rows"
            )
        rows = []
        for index, (row, start, length) in enumerate(zip(self._live, starts, lengths, strict=True)):
            if start < length and not row.first <= start <= length <= row.length:
                raise error(
                    Code.HISTORY_GONE,
                    f"row {index}: positions {start} to {length} wanted, {row.first} to {row.length} kept",
                    first_position=row.first,
                    row=index,
                )
            rows.append(Row(index if start else NEW_ROW, start, max(0, length - start)))
        return self._parts(self._live, tuple(rows), max_tokens)

    def clear(self) -> None:
        """Forget everything."""
        self._live = ()
        self._snapshots.clear()
        self._size_bytes = 0

    def _parts(self, table: tuple[_Row, ...], rows: tuple[Row, ...], max_tokens: int) -> Iterator[Part]:
        ends = tuple(row.position + row.n for row in rows)
        for part in cut(rows, max_tokens):
            data = [self._bytes(kept, row) for kept, row in zip(table, part, strict=True) if row.n]
            final = all(row.position + row.n == end for row, end in zip(part, ends, strict=True))
            yield Part(part, data[0] if len(data) == 1 else b"".join(data), final)

    def _bytes(self, row: _Row, wanted: Row) -> bytes:
        """The hidden states of a row's positions [position, position + n)."""
        skip = (wanted.position - row.first) * self._token_bytes
        left = wanted.n * self._token_bytes
        found = []
        for piece in row.pieces:
            size = piece.end - piece.start
            if skip >= size:
                skip -= size
                continue
            taken = min(size - skip, left)
            with memoryview(piece.chunk.data) as view:
                found.append(bytes(view[piece.start + skip : piece.start + skip + taken]))
            skip = 0
            left -= taken
            if not left:
                break
        return found[0] if len(found) == 1 else b"".join(found)

    def _parent(self, index: int, row: Row) -> _Row:
        if row.parent != NEW_ROW and not 0 <= row.parent < len(self._live):
            raise error(
                Code.BAD_REQUEST, f"row {index} continues row {row.parent}, there are {len(self._live)} rows"
            )
        parent = _Row() if row.parent == NEW_ROW else self._live[row.parent]
        if row.position > parent.length:
            raise error(
                Code.HISTORY_GAP,
                f"row {index} begins at position {row.position}, row {row.parent} holds {parent.length}",
                first_position=parent.length,
                row=index,
            )
        return parent

    def _cut(self, row: _Row, length: int) -> _Row:
        if length >= row.length:
            return row
        if length <= row.first:
            return _Row((), length, length)
        left = (length - row.first) * self._token_bytes
        pieces = []
        for piece in row.pieces:
            size = piece.end - piece.start
            pieces.append(piece if size <= left else _Piece(piece.chunk, piece.start, piece.start + left))
            left -= size
            if left <= 0:
                break
        return _Row(tuple(pieces), row.first, length)

    def _grown(self, row: _Row, data: bytes, n: int) -> _Row:
        """The row with `n` more tokens, in its last chunk if it stands at that chunk's end and has room."""
        pieces = row.pieces
        self._size_bytes += len(data)
        if pieces:
            chunk, start, end = pieces[-1]
            if end == len(chunk.data) and end + len(data) <= CHUNK_BYTES:
                chunk.data += data
                return _Row((*pieces[:-1], _Piece(chunk, start, len(chunk.data))), row.first, row.length + n)
            if end - start < CHUNK_BYTES // 2:  # else many rollbacks or forks would leave many small pieces
                fresh = _Chunk()
                with memoryview(chunk.data) as view:
                    fresh.data += view[start:end]
                fresh.data += data
                self._size_bytes += end - start
                return _Row((*pieces[:-1], _Piece(fresh, 0, len(fresh.data))), row.first, row.length + n)
        return _Row((*pieces, _Piece(_Chunk(data), 0, len(data))), row.first, row.length + n)

    def _measure(self) -> None:
        chunks = {
            id(piece.chunk): len(piece.chunk.data)
            for table in (self._live, *self._snapshots.values())
            for row in table
            for piece in row.pieces
        }
        self._size_bytes = sum(chunks.values())

    def _shrink(self) -> None:
        """Drop the older half of every row until the budget holds."""
        self._measure()
        while self._size_bytes > self._budget_bytes:
            self._live = tuple(self._without_older_half(row) for row in self._live)
            for step, table in self._snapshots.items():
                self._snapshots[step] = tuple(self._without_older_half(row) for row in table)
            self._measure()

    def _without_older_half(self, row: _Row) -> _Row:
        """The row without the older half of its pieces, or of its only piece's chunk altogether."""
        dropped = max(1, len(row.pieces) // 2)
        size = sum(piece.end - piece.start for piece in row.pieces[:dropped])
        return _Row(row.pieces[dropped:], row.first + size // self._token_bytes, row.length)
