"""Where virtual tokens stand in a batch: right before each text, whether it is padded or packed with others in a row.

Owns columns alone, as tensors of indices; what stands in them is the caller's. A text is told by its prompt as if it
had a row of its own, whatever stands beside it. PEFT puts prompts before a row's padding and counts the padding's
positions, so that what it computes of rows padded on the left depends on how long the others are; of all other rows
it computes the same.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Placing(NamedTuple):
    """Columns of a batch with virtual tokens, (rows, total).

    source: int64, the column of the batch that stands here, or n + k for virtual token k, or n + num for padding.
    real: bool, no padding. positions: int64, within each text and its prompt; of padding they mean nothing.
    places: (rows, n) int64, where each column of the batch stands now.
    """

    source: Tensor
    real: Tensor
    positions: Tensor
    places: Tensor

    @property
    def has_padding(self) -> bool:
        """Whether any column is padding."""
        return not bool(self.real.all())


def placing(real: Tensor, positions: Tensor | None, num: int, *, in_front: bool) -> Placing:
    """`num` virtual tokens before each text of a batch.

    real: (rows, n) bool, on the CPU. positions: (rows, n); where they are 0 amid a row, another text begins.
    in_front: the first prompt of a row stands before its padding, where a cache expects it.
    """
    n = real.shape[1]
    rows = [
        _row(real[row], None if positions is None else positions[row], num, in_front=in_front)
        for row in range(len(real))
    ]
    total = max(map(len, rows))
    source = torch.stack([torch.cat([row, row.new_full((total - len(row),), n + num)]) for row in rows])
    known = torch.cat([real, real.new_ones(len(real), num), real.new_zeros(len(real), 1)], 1)
    stands = known.gather(1, source)
    count = stands.long().cumsum(1) - 1
    begun = torch.where(source == n, count, 0).cummax(1).values  # of the text that a column belongs to
    places = torch.zeros(len(real), n, dtype=torch.int64)
    at, column = (source < n).nonzero(as_tuple=True)
    places[at, source[at, column]] = column
    return Placing(source, stands, count - begun, places)


def _row(real: Tensor, positions: Tensor | None, num: int, *, in_front: bool) -> Tensor:
    """The columns of one row, with no padding behind them that was not there."""
    n = len(real)
    columns = real.nonzero().flatten()
    starts = columns[:1].tolist()
    if positions is not None:
        starts += columns[1:][positions[columns[1:]] == 0].tolist()
    if in_front:
        starts = [0, *starts[1:]]
    cuts = [0, *starts, n]
    pieces = [torch.arange(*cuts[:2])]
    for start, end in pairwise(cuts[1:]):
        pieces += [torch.arange(n, n + num), torch.arange(start, end)]
    return torch.cat(pieces)
