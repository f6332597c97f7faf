"""Histories: the one rule of rows, snapshots, replays, budgets."""

from __future__ import annotations

import random

import pytest

from corolla.daemon.session.history import CHUNK_BYTES, History
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import NEW_ROW, Row

UNLIMITED = 1 << 40


class Plain:
    """The rule of rows in its plainest form: lists that are copied."""

    def __init__(self) -> None:
        self.rows: list[list[bytes]] = []
        self.tables: dict[int, list[list[bytes]]] = {}

    def apply(self, step_id: int, rows: tuple[Row, ...], tokens: list[bytes]) -> None:
        table = []
        for row in rows:
            kept = [] if row.parent == NEW_ROW else self.rows[row.parent][: row.position]
            table.append(kept + tokens[: row.n])
            tokens = tokens[row.n :]
        self.rows = self.tables[step_id] = table


def read_all(history: History, starts: tuple[int, ...], lengths: tuple[int, ...], most: int) -> list[bytes]:
    """Each row's bytes in a replay, put together from its parts."""
    rows = [b""] * len(starts)
    at = list(starts)
    for part in history.read(starts, lengths, most):
        place = 0
        assert sum(row.n for row in part.rows) <= most
        for index, row in enumerate(part.rows):
            assert row.position == at[index]
            size = row.n * 4
            rows[index] += part.payload[place : place + size]
            place += size
            at[index] += row.n
    assert part.final
    assert at == list(lengths)
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_history_keeps_what_plain_lists_keep(seed: int) -> None:
    rng = random.Random(seed)
    history, plain = History(4, UNLIMITED), Plain()
    for step in range(1, 80):
        if step == 1 or rng.random() < 0.05:
            rows = tuple(Row(NEW_ROW, 0, rng.randint(0, 5)) for _ in range(rng.randint(1, 3)))
        else:
            parents = [rng.randrange(len(plain.rows)) for _ in range(rng.randint(1, 3))]
            rows = tuple(Row(p, rng.randint(0, len(plain.rows[p])), rng.randint(0, 3)) for p in parents)
        tokens = [rng.randbytes(4) for _ in range(sum(row.n for row in rows))]
        committed = max(0, step - 4)
        history.apply(step, committed, rows, b"".join(tokens))
        plain.apply(step, rows, tokens)
        if rng.random() < 0.2 and step > 4:
            base = rng.choice([known for known in plain.tables if known >= committed])
            lengths = tuple(rng.randint(0, len(row)) for row in plain.tables[base])
            assert history.restore(base, lengths) == lengths
            plain.rows = [row[:length] for row, length in zip(plain.tables[base], lengths, strict=True)]
            plain.tables = {known: plain.tables[known] for known in plain.tables if known < base}
            plain.tables[base] = plain.rows
            history.apply(base, committed, tuple(Row(i, n, 0) for i, n in enumerate(lengths)), b"")
        lengths = tuple(map(len, plain.rows))
        starts = tuple(rng.randint(0, length) for length in lengths)
        expected = [b"".join(row[start:]) for row, start in zip(plain.rows, starts, strict=True)]
        assert history.lengths == lengths
        assert read_all(history, starts, lengths, rng.randint(1, 7)) == expected


def test_decoding_and_rolling_back_leave_few_pieces() -> None:
    history = History(1024, UNLIMITED)
    history.apply(1, 0, (Row(NEW_ROW, 0, 8),), bytes(8 * 1024))
    length = 8
    for step in range(2, 2000):
        history.apply(step, step - 1, (Row(0, length - 2, 3),), bytes(3 * 1024))
        length += 1
    assert len(history._live[0].pieces) <= 3 * length * 1024 // CHUNK_BYTES
    assert history.size_bytes <= 3 * length * 1024


def test_a_replay_begins_rows_anew_or_continues_them() -> None:
    history = History(4, UNLIMITED)
    history.apply(1, 0, (Row(NEW_ROW, 0, 3), Row(NEW_ROW, 0, 2)), bytes(range(20)))
    parts = list(history.read((0, 1), (3, 2), 2))
    assert [part.rows for part in parts] == [
        (Row(NEW_ROW, 0, 2), Row(1, 1, 0)),
        (Row(0, 2, 1), Row(1, 1, 1)),
    ]
    assert [part.final for part in parts] == [False, True]
    assert parts[1].payload == bytes([8, 9, 10, 11, 16, 17, 18, 19])


def test_what_is_read_is_what_was_there_when_reading_began() -> None:
    history = History(4, UNLIMITED)
    history.apply(1, 0, (Row(NEW_ROW, 0, 2),), b"aaaabbbb")
    parts = history.read((0,), (2,), 1)
    history.apply(2, 1, (Row(0, 0, 1),), b"cccc")
    assert b"".join(part.payload for part in parts) == b"aaaabbbb"


def test_over_its_budget_it_forgets_the_oldest_and_says_so() -> None:
    history = History(1024, 2 * CHUNK_BYTES)
    for step in range(1, 2000):
        history.apply(step, step - 1, (Row(NEW_ROW if step == 1 else 0, step - 1, 1),), bytes(1024))
        assert history.size_bytes <= 2 * CHUNK_BYTES
    (first,) = history.first_positions()
    assert 0 < first < 1999
    assert len(list(history.read((first,), (1999,), 512))) > 0
    with pytest.raises(CorollaError) as caught:
        history.read((first - 1,), (1999,), 512)
    assert caught.value.code is Code.HISTORY_GONE
    assert caught.value.details["first_position"] == first


def test_without_a_budget_nothing_is_kept_and_lengths_are_still_known() -> None:
    history = History(4, 0)
    history.apply(1, 0, (Row(NEW_ROW, 0, 3),), bytes(12))
    assert (history.size_bytes, history.lengths, history.first_positions()) == (0, (3,), (3,))


def test_an_unknown_base_clears_it() -> None:
    history = History(4, UNLIMITED)
    history.apply(1, 0, (Row(NEW_ROW, 0, 1),), bytes(4))
    history.apply(2, 2, (Row(0, 1, 1),), bytes(4))
    assert history.restore(1, (1,)) == (0,)
    assert history.size_bytes == 0


@pytest.mark.parametrize(
    ("rows", "payload", "code"),
    [
        ((Row(0, 2, 1),), bytes(4), Code.HISTORY_GAP),
        ((Row(1, 0, 1),), bytes(4), Code.BAD_REQUEST),
        ((Row(0, 1, 1),), bytes(5), Code.BAD_SHAPE),
    ],
)
def test_a_step_that_does_not_fit_changes_nothing(rows: tuple[Row, ...], payload: bytes, code: Code) -> None:
    history = History(4, UNLIMITED)
    history.apply(1, 0, (Row(NEW_ROW, 0, 1),), b"aaaa")
    with pytest.raises(CorollaError) as caught:
        history.apply(2, 0, rows, payload)
    assert caught.value.code is code
    assert read_all(history, (0,), (1,), 1) == [b"aaaa"]
