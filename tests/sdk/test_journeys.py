"""How a batch is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence as Many
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from corolla.protocol.training import Sequence  # noqa: E402
from corolla.sdk.journeys import Journeys  # noqa: E402
from corolla.sdk.training import Trip  # noqa: E402

ROWS, LENGTH, SIZE = 9, 3, 8
ROW_BYTES = LENGTH * SIZE * 4


class Blocks:
    """A model whose blocks change nothing. sizes: tokens of the micro-batches that it saw."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def passing(self, hidden: Any, trip: Trip, sequences: Many[Sequence]) -> Any:
        self.sizes.append(len(hidden))
        return SimpleNamespace(output=hidden, release=lambda: None)


@pytest.mark.parametrize(
    ("most_bytes", "sizes"),
    [
        (100 * ROW_BYTES, [3, 3, 3]),
        (2 * ROW_BYTES, [2, 2, 2, 2, 1]),
        (1, [1] * ROWS),  # a row is not cut: whether it is too long, the daemon says
    ],
)
def test_a_batch_is_cut_so_that_each_micro_batch_may_travel(most_bytes: int, sizes: list[int]) -> None:
    blocks: Any = Blocks()
    hidden = torch.randn(ROWS, LENGTH, SIZE)
    found = Journeys(blocks, None, most_bytes=most_bytes).run(hidden, None, None, (0, 1))
    assert sorted(blocks.sizes, reverse=True) == [rows * LENGTH for rows in sizes]
    assert found.equal(hidden)
