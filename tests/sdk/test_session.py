"""Sessions of hidden states: arrays in and out, rows, rollback, and what is refused before it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import corolla
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import NEW_ROW, Row
from corolla.protocol.tensors import DType, Encoding
from corolla.sdk.client import Model
from corolla.sdk.rows import RowTable
from corolla.sdk.tensors import Kind, from_bytes, kind_of, to_bytes

from .fake import HIDDEN, FakeDaemon


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "control.sock") as daemon:
        yield daemon


@pytest.fixture
def model(fake: FakeDaemon) -> Iterator[Model]:
    with corolla.connect(fake.path) as daemon:
        yield daemon.model("tiny")


def tokens(*rows: list[int]) -> np.ndarray:
    """(rows, n, HIDDEN) float32: each token is a number, repeated."""
    return np.repeat(np.array(rows, "f4")[:, :, None], HIDDEN, axis=2)


def numbers(hidden: Any) -> list[list[float]]:
    return [[float(token[0]) for token in row] for row in hidden]


def test_steps_continue_each_row(model: Model) -> None:
    with model.session(max_length=8, rows=2) as session:
        assert numbers(session.step(tokens([1, 2], [10, 20]))) == [[1, 3], [10, 30]]
        assert numbers(session.step(tokens([3], [30]))) == [[6], [60]]
        assert session.lengths == (3, 3)


def test_a_position_takes_back_what_was_there(model: Model) -> None:
    with model.session(max_length=8) as session:
        session.step(tokens([1, 2, 3]))
        assert numbers(session.step(tokens([7]), position=1)) == [[8]]
        assert session.lengths == (2,)
        assert numbers(session.step(tokens([5]), position=0)) == [[5]]


def test_reorder_forks_and_drops_rows(model: Model) -> None:
    with model.session(max_length=8, rows=3) as session:
        session.step(tokens([1], [10]))
        session.reorder([1, 1, 0])
        session.reorder([2, 0, 1])
        assert numbers(session.step(tokens([0], [0], [1]))) == [[1], [10], [11]]
        session.fork(1)
        assert session.lengths == (2, 2, 2)


def test_reply_chooses_what_comes_back(model: Model) -> None:
    with model.session(max_length=8, rows=2) as session:
        assert numbers(session.step(tokens([1, 2], [3, 4]), reply="last")) == [[3], [7]]
        assert session.step(tokens([1], [1]), reply="none").shape == (2, 0, HIDDEN)


def test_rows_of_different_lengths_travel_flat(model: Model) -> None:
    with model.session(max_length=8, rows=2) as session:
        flat = tokens([1, 2, 3]).reshape(3, HIDDEN)
        rows = [Row(NEW_ROW, 0, 2), Row(NEW_ROW, 0, 1)]
        assert numbers([session.step_rows(flat, rows)]) == [[1, 3, 3]]
        assert session.lengths == (2, 1)


def test_torch_tensors_come_back_as_they_came(model: Model) -> None:
    torch = pytest.importorskip("torch")
    with model.session(max_length=8, encoding="float32") as session:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            hidden = torch.ones(1, 2, HIDDEN, dtype=dtype)
            out = session.step(hidden, position=0)
            assert out.dtype is dtype
            assert out.tolist() == [[[1.0] * HIDDEN, [2.0] * HIDDEN]]


def test_a_session_is_closed_at_the_end_and_says_so(model: Model, fake: FakeDaemon) -> None:
    with model.session(max_length=4, blocks=(1, 3)) as session:
        assert session.blocks == (1, 3)
        assert session.hidden_size == HIDDEN
    assert not fake.sessions
    session.close()
    with pytest.raises(CorollaError, match="closed") as caught:
        session.step(tokens([1]))
    assert caught.value.code is Code.UNKNOWN_SESSION


@pytest.mark.parametrize(
    ("hidden", "code", "words"),
    [
        (np.zeros((1, 1, 5), "f4"), Code.BAD_SHAPE, "hidden_size 5, expected 8"),
        (np.zeros((1, HIDDEN), "f4"), Code.BAD_SHAPE, "expected 3 dimensions"),
        (np.zeros((1, 0, HIDDEN), "f4"), Code.BAD_SHAPE, "0 tokens"),
        (np.zeros((1, 1, HIDDEN), "f8"), Code.BAD_DTYPE, "float64"),
        (np.zeros((1, 1, HIDDEN), "i8"), Code.BAD_DTYPE, "int64"),
        ([[[0.0] * HIDDEN]], Code.BAD_DTYPE, "list"),
        (np.full((1, 1, HIDDEN), np.nan, "f4"), Code.NOT_FINITE, "8 of 8"),
        (np.full((1, 1, HIDDEN), np.inf, "f2"), Code.NOT_FINITE, "8 of 8"),
        (np.zeros((1, 5, HIDDEN), "f4"), Code.TOO_LONG, "5 tokens.*max_length=4"),
        (np.zeros((2, 1, HIDDEN), "f4"), Code.BAD_SHAPE, "2 rows.*1 to 1"),
    ],
)
def test_bad_hidden_states_are_refused_before_they_are_sent(
    model: Model, fake: FakeDaemon, hidden: Any, code: Code, words: str
) -> None:
    with model.session(max_length=4) as session:
        with pytest.raises(CorollaError, match=words) as caught:
            session.step(hidden)
        assert caught.value.code is code
        assert fake.calls[-1].method == "session.open"
        assert numbers(session.step(tokens([1]))) == [[1]]  # and the session goes on


def test_a_session_ends_with_its_daemon(model: Model, fake: FakeDaemon) -> None:
    session = model.session(max_length=4)
    fake.handlers["session.step"] = lambda connection, call: connection.die()
    with pytest.raises(CorollaError, match="ended with its daemon") as caught:
        session.step(tokens([1]))
    assert caught.value.code is Code.SESSION_LOST
    session.close()


@pytest.mark.parametrize(
    "arguments", [{"blocks": (3, 3)}, {"blocks": (-1, 2)}, {"rows": 0}, {"rows": 257}, {"max_length": 0}]
)
def test_impossible_sessions_are_refused(model: Model, arguments: dict[str, Any]) -> None:
    with pytest.raises(CorollaError):
        model.session(**arguments)


# the row table by itself


def test_a_failed_check_leaves_the_table_as_it_was() -> None:
    table = RowTable(1, 4).after([Row(NEW_ROW, 0, 3)])
    with pytest.raises(CorollaError, match="position 4 of row 0"):
        table.next_rows(1, 1, 4)
    with pytest.raises(CorollaError, match="2 rows of hidden states"):
        table.next_rows(2, 1)
    with pytest.raises(CorollaError, match="row 1"):
        table.reordered([1])
    assert table.next_rows(1, 1) == (Row(0, 3, 1),)


# arrays and bytes


@pytest.mark.parametrize("encoding", list(Encoding))
def test_numpy_and_torch_write_the_same_bytes(encoding: Encoding) -> None:
    torch = pytest.importorskip("torch")
    hidden = np.random.default_rng(1).normal(size=(64, HIDDEN)).astype("f4") * 100
    hidden[0, 0], hidden[0, 1] = 1 + 2**-8, 1 + 3 * 2**-8  # ties of bfloat16, to even on both sides
    data = to_bytes(hidden, kind_of(hidden), encoding)
    assert data == to_bytes(torch.from_numpy(hidden), Kind("torch", DType.FLOAT32), encoding)
    back = from_bytes(data, hidden.shape, kind_of(hidden), encoding)
    assert back.dtype == hidden.dtype
    step = np.abs(hidden).max() / 127 if encoding is Encoding.INT8 else 0.0
    assert np.allclose(back, hidden, rtol=2**-8, atol=step)
    assert len(data) == len(hidden) * encoding.token_bytes(HIDDEN)
    again = from_bytes(data, hidden.shape, Kind("torch", DType.FLOAT32, torch.device("cpu")), encoding)
    assert np.array_equal(again.numpy(), back)


@pytest.mark.parametrize("encoding", [Encoding.FLOAT16, Encoding.BFLOAT16])
def test_numbers_too_large_for_the_wire_are_not_sent_as_infinity(encoding: Encoding) -> None:
    hidden = np.full((1, HIDDEN), np.finfo("f4").max, "f4")
    with pytest.raises(CorollaError, match=f"infinite as {encoding}"):
        to_bytes(hidden, kind_of(hidden), encoding)
