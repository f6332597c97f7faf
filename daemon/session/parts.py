"""Steps cut into parts that one message may carry, and their answers put together again. Pure.

Every part names every row of the step, since a row left out is dropped: rows that have nothing in a part
take no tokens in it. Parts are filled row after row, so that each part's payload is one slice of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...protocol.limits import MAX_PAYLOAD_BYTES, MAX_STEP_TOKENS
from ...protocol.steps import Reply, Row


def max_part_tokens(token_bytes: int, wish: int = MAX_STEP_TOKENS) -> int:
    """Tokens that one message may carry, at most `wish`."""
    return max(1, min(wish, MAX_STEP_TOKENS, MAX_PAYLOAD_BYTES // token_bytes))


def cut(rows: tuple[Row, ...], max_tokens: int) -> Iterator[tuple[Row, ...]]:
    """The rows of each part: the first forks and rolls back as asked, the others continue row by row."""
    parents = [row.parent for row in rows]
    positions = [row.position for row in rows]
    missing = [row.n for row in rows]
    while True:
        part = []
        room = max_tokens
        for index in range(len(rows)):
            n = min(missing[index], room)
            part.append(Row(parents[index], positions[index], n))
            parents[index] = index
            positions[index] += n
            missing[index] -= n
            room -= n
        yield tuple(part)
        if not any(missing):
            return


def num_tokens(rows: tuple[Row, ...]) -> int:
    """New tokens of all rows together."""
    return sum(row.n for row in rows)


def reply_tokens(rows: tuple[Row, ...], reply: Reply) -> int:
    """How many tokens' hidden states the answer to a step of these rows holds."""
    if reply is Reply.NONE:
        return 0
    if reply is Reply.LAST:
        return sum(row.n > 0 for row in rows)
    return num_tokens(rows)


def part_reply(part: tuple[Row, ...], ends: tuple[int, ...], reply: Reply) -> Reply:
    """What to ask of a part: with `LAST`, nothing unless a row of the step ends in it.

    ends: for each row, the length at which the whole step leaves it.
    """
    if reply is Reply.LAST and not any(_ends_here(row, end) for row, end in zip(part, ends, strict=True)):
        return Reply.NONE
    return reply


def wanted(part: tuple[Row, ...], ends: tuple[int, ...], reply: Reply, payload: bytes, size: int) -> bytes:
    """What of a part's answer belongs to the whole step's answer. size: bytes of one token."""
    if reply is not Reply.LAST:
        return payload
    kept = []
    place = 0
    for row, end in zip(part, ends, strict=True):
        if row.n:
            if _ends_here(row, end):
                kept.append(payload[place : place + size])
            place += size
    return payload if len(kept) * size == len(payload) else b"".join(kept)


def _ends_here(row: Row, end: int) -> bool:
    return row.n > 0 and row.position + row.n == end
