"""A model of blocks whose hidden states are hashes of the whole prefix, so that any wrong token shows at once.

A token is 8 bytes. Each block chains its inputs, as attention over a cache would: what it gives at a position
depends on every input up to there, and on the block. A lost, repeated, stale or swapped token changes all that
follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from corolla.protocol.steps import NEW_ROW, Reply, Row

TOKEN_BYTES = 8
_MASK = (1 << 64) - 1
_K = 0x9E3779B97F4A7C15

Cache = tuple[int, ...]  # a block's chained hash after each position of one row


def mix(a: int, b: int) -> int:
    """A hash of two numbers of 64 bits."""
    x = (a * _K + b * 0xC2B2AE3D27D4EB4F + 0x165667B19E3779F9) & _MASK
    x ^= x >> 29
    return (x * _K) & _MASK


def numbers(payload: bytes) -> list[int]:
    """Tokens of a payload."""
    return [int.from_bytes(payload[i : i + TOKEN_BYTES]) for i in range(0, len(payload), TOKEN_BYTES)]


def payload_of(tokens: Sequence[int]) -> bytes:
    """The payload of tokens."""
    return b"".join(token.to_bytes(TOKEN_BYTES) for token in tokens)


class Blocks:
    """Blocks [start, end) with caches of rows, by the one rule of rows."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.rows: tuple[tuple[Cache, ...], ...] = ()  # row → block → chained hashes

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row."""
        return tuple(len(row[0]) for row in self.rows)

    def gap(self, rows: tuple[Row, ...]) -> Row | None:
        """A row that begins beyond what is cached, or continues a row that is not there."""
        for row in rows:
            if row.parent == NEW_ROW:
                held = 0
            elif row.parent < len(self.rows):
                held = len(self.rows[row.parent][0])
            else:
                return row
            if row.position > held:
                return row
        return None

    def compute(self, rows: tuple[Row, ...], tokens: Sequence[int]) -> list[int]:
        """The outputs of all new tokens; the caches hold them afterwards."""
        empty: tuple[Cache, ...] = ((),) * (self.end - self.start)
        out: list[int] = []
        table = []
        place = 0
        for row in rows:
            kept = empty if row.parent == NEW_ROW else self.rows[row.parent]
            values = list(tokens[place : place + row.n])
            place += row.n
            caches = []
            for block, cache in zip(range(self.start, self.end), kept, strict=True):
                chain = list(cache[: row.position])
                state = chain[-1] if chain else mix(block, 1)
                for index, value in enumerate(values):
                    state = mix(state, value)
                    chain.append(state)
                    values[index] = mix(state, block)
                caches.append(tuple(chain))
            table.append(tuple(caches))
            out += values
        self.rows = tuple(table)
        return out

    def cut(self, lengths: Sequence[int]) -> None:
        """Shorten the rows."""
        self.rows = tuple(
            tuple(cache[:length] for cache in row) for row, length in zip(self.rows, lengths, strict=True)
        )


def reply_of(rows: tuple[Row, ...], reply: Reply, tokens: Sequence[int]) -> list[int]:
    """What of a step's outputs is sent back."""
    if reply is Reply.NONE:
        return []
    if reply is Reply.ALL:
        return list(tokens)
    last = []
    place = 0
    for row in rows:
        place += row.n
        if row.n:
            last.append(tokens[place - 1])
    return last
