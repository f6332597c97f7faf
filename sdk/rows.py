"""Which rows a session holds, and which rows its next step names.

The daemon keeps the caches; this keeps their lengths, so that callers can speak of "the next tokens of all
rows". Pure: steps in, rows out. A step that failed has changed nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.errors import Code, error
from ..protocol.limits import MAX_ROWS
from ..protocol.steps import NEW_ROW, Row


@dataclass(frozen=True, slots=True)
class RowTable:
    """lengths: tokens that each row of the next step continues. parents: the cached row behind each."""

    max_rows: int
    max_length: int
    lengths: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def next_rows(
        self, num_rows: int, num_tokens: int, position: int | Sequence[int] | None = None
    ) -> tuple[Row, ...]:
        """The rows of a step that gives each of `num_rows` rows so many tokens.

        position: where they begin, of all rows or of each; None is at the end. A smaller one takes back what
        was there. Before the first step rows are new.
        Raises `BAD_SHAPE` for another number of rows than the session holds, `BAD_REQUEST` for a position
        beyond a row's end, `TOO_LONG`.
        """
        if not self.lengths:
            lengths: tuple[int, ...] = (0,) * num_rows
            parents: tuple[int, ...] = (NEW_ROW,) * num_rows
        else:
            lengths, parents = self.lengths, self.parents
        if num_rows != len(lengths):
            raise error(
                Code.BAD_SHAPE,
                f"{num_rows} rows of hidden states, the session holds {len(lengths)}",
                "give hidden states for all rows; session.reorder(parents) forks and drops rows",
            )
        starts = lengths if position is None else _starts(position, lengths)
        rows = tuple(
            Row(parent if start else NEW_ROW, start, num_tokens)
            for parent, start in zip(parents, starts, strict=True)
        )
        self.check(rows)
        return rows

    def check(self, rows: Sequence[Row]) -> None:
        """Raise `TOO_LONG` or `LIMIT_EXCEEDED` if the session was opened for fewer rows or tokens."""
        if not rows or len(rows) > self.max_rows:
            raise error(
                Code.BAD_SHAPE,
                f"a step of {len(rows)} rows, the session was opened for 1 to {self.max_rows}",
                f"open it with rows={max(len(rows), 1)} (at most {MAX_ROWS})",
            )
        longest = max(row.position + row.n for row in rows)
        if longest > self.max_length:
            raise error(
                Code.TOO_LONG,
                f"a row of {longest} tokens, the session was opened for max_length={self.max_length}",
                f"open it with max_length={longest} or more, or send fewer tokens",
            )

    def after(self, rows: Sequence[Row]) -> RowTable:
        """The table once a step is done."""
        lengths = tuple(row.position + row.n for row in rows)
        return RowTable(self.max_rows, self.max_length, lengths, tuple(range(len(rows))))

    def reordered(self, parents: Sequence[int]) -> RowTable:
        """The table in which row i continues what is row `parents[i]` now: twice forks, never drops.

        Raises `BAD_REQUEST` for a row that is not there and `BAD_SHAPE` for too many.
        """
        for parent in parents:
            if not 0 <= parent < len(self.lengths):
                raise error(
                    Code.BAD_REQUEST, f"row {parent}, the session holds rows 0 to {len(self.lengths) - 1}"
                )
        if not 0 < len(parents) <= self.max_rows:
            raise error(
                Code.BAD_SHAPE,
                f"{len(parents)} rows, the session was opened for 1 to {self.max_rows}",
                f"open it with rows={max(len(parents), 1)} (at most {MAX_ROWS})",
            )
        return RowTable(
            self.max_rows,
            self.max_length,
            tuple(self.lengths[parent] for parent in parents),
            tuple(self.parents[parent] for parent in parents),
        )


def _starts(position: int | Sequence[int], lengths: tuple[int, ...]) -> tuple[int, ...]:
    starts = (position,) * len(lengths) if isinstance(position, int) else tuple(position)
    if len(starts) != len(lengths):
        raise error(
            Code.BAD_REQUEST, f"{len(starts)} positions for {len(lengths)} rows", "give one, or one a row"
        )
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if not 0 <= start <= length:
            raise error(
                Code.BAD_REQUEST,
                f"position {start} of row {row}, which holds {length} tokens",
                f"give a position from 0 to {length}",
            )
    return starts
