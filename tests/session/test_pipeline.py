"""Steps cut into parts, kept in order, answered whole."""

from __future__ import annotations

import pytest

from corolla.daemon.session.pipeline import Pipeline
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import MAX_STEPS_IN_FLIGHT
from corolla.protocol.steps import NEW_ROW, Hop, Reply, Row

LAST_HOP = Hop("peer", 0)


def pipeline(part_tokens: int = 2) -> Pipeline:
    return Pipeline(1, max_rows=4, max_tokens=20, history_bytes=1 << 20, part_tokens=part_tokens)


def test_a_large_step_is_cut_row_after_row_and_only_a_few_parts_are_under_way() -> None:
    steps = pipeline()
    steps.request(1, (Row(NEW_ROW, 0, 3), Row(NEW_ROW, 0, 8)), b"abcdefghijk", Reply.ALL)
    parts = steps.take(0.0)
    assert len(parts) == MAX_STEPS_IN_FLIGHT
    assert [part.payload for part in parts] == [b"ab", b"cd", b"ef", b"gh"]
    assert [part.rows for part in parts[:2]] == [
        (Row(NEW_ROW, 0, 2), Row(NEW_ROW, 0, 0)),
        (Row(0, 2, 1), Row(1, 0, 1)),
    ]
    assert [part.step_id for part in parts] == [1, 2, 3, 4]
    steps.commit(b"AB", LAST_HOP)
    assert [part.payload for part in steps.take(0.0)] == [b"ij"]


@pytest.mark.parametrize(
    ("reply", "answers", "whole"),
    [
        (Reply.ALL, [b"AB", b"CD", b"E"], b"ABCDE"),
        (Reply.LAST, [b"", b"CD", b"E"], b"CE"),
        (Reply.NONE, [b"", b"", b""], b""),
    ],
)
def test_answers_of_parts_make_the_answer_of_the_step(
    reply: Reply, answers: list[bytes], whole: bytes
) -> None:
    steps = pipeline()
    steps.request(9, (Row(NEW_ROW, 0, 3), Row(NEW_ROW, 0, 2)), b"abcde", reply)
    for part, answer in zip(steps.take(0.0), answers, strict=True):
        assert steps.expected_bytes(part) == len(answer)
        done = steps.commit(answer, LAST_HOP)
    assert done == (9, whole)
    assert steps.lengths == (3, 2)


def test_after_a_rewind_unanswered_parts_are_sent_again_under_their_old_numbers() -> None:
    steps = pipeline()
    steps.request(1, (Row(NEW_ROW, 0, 4),), b"abcd", Reply.NONE)
    steps.take(0.0)
    steps.commit(b"", LAST_HOP)
    steps.rewind()
    assert [(part.step_id, part.payload) for part in steps.take(1.0)] == [(2, b"cd")]


def test_undo_takes_the_whole_last_answer_back() -> None:
    steps = pipeline()
    steps.request(1, (Row(NEW_ROW, 0, 1),), b"a", Reply.ALL)
    steps.request(2, (Row(0, 1, 3),), b"bcd", Reply.ALL)
    steps.take(0.0)
    for answer in (b"A", b"BC", b"X"):
        steps.commit(answer, LAST_HOP)
    assert steps.undo(1) == frozenset()
    assert steps.undo(2) == {LAST_HOP}
    assert (steps.committed, steps.lengths) == (1, (1,))
    assert [part.payload for part in steps.take(0.0)] == [b"bc", b"d"]
    steps.commit(b"BC", LAST_HOP)
    assert steps.commit(b"D", LAST_HOP) == (2, b"BCD")


@pytest.mark.parametrize(
    ("rows", "payload", "code"),
    [
        ((Row(1, 0, 1),), b"x", Code.BAD_REQUEST),
        ((Row(0, 2, 1),), b"x", Code.BAD_REQUEST),
        ((Row(0, 1, 20),), b"x" * 20, Code.TOO_LONG),
        ((Row(0, 1, 1),), b"xy", Code.BAD_SHAPE),
        ((Row(0, 1, 1),) * 5, b"xxxxx", Code.BAD_REQUEST),
        ((), b"", Code.BAD_REQUEST),
    ],
)
def test_a_wrong_step_is_refused_and_changes_nothing(
    rows: tuple[Row, ...], payload: bytes, code: Code
) -> None:
    steps = pipeline()
    steps.request(1, (Row(NEW_ROW, 0, 1),), b"a", Reply.NONE)
    with pytest.raises(CorollaError) as caught:
        steps.request(2, rows, payload, Reply.ALL)
    assert caught.value.code is code
    assert len(steps.take(0.0)) == 1
