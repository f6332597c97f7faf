"""Autograd through the swarm: rows as micro-batches, several in flight, and the gradients that come back.

Owns the cut of a batch and the order of sums: the adapter's gradients are added in float32 in the order of the
micro-batches, so that any wiring agrees. It knows neither transformers nor what a padding mask is for others.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor

from ..protocol.errors import Code, CorollaError, error
from ..protocol.limits import MAX_TRAINING_BYTES
from ..protocol.training import Dropout, Sequence, missing_parts
from .adapters import RemoteAdapter
from .client import Model
from .dropout import DropoutCount
from .parts import Adapter, PartFile
from .training import Pass, Trip

MICRO_BATCHES: Final = 4  # of one batch, in flight at once: as many as keep a few hops busy
_NUMBER_BYTES: Final = 4  # of the widest encoding


class Journeys:
    """How hidden states of one model travel when gradients may be wanted.

    adapter: used on every block. dropout: where in the run the masks of its dropout are. most_bytes: of hidden
    states in one micro-batch.
    """

    def __init__(self, model: Model, encoding: str | None, *, most_bytes: int = MAX_TRAINING_BYTES) -> None:
        self.adapter: RemoteAdapter | None = None
        self.dropout = DropoutCount()
        self._model = model
        self._encoding = encoding
        self._most_bytes = most_bytes
        self._put: frozenset[bytes] = frozenset()  # names that the daemon has from us

    def run(
        self,
        hidden: Tensor,
        padding: Tensor | None,
        positions: Tensor | None,
        blocks: tuple[int, int],
        *,
        is_training: bool = False,
    ) -> Tensor:
        """hidden: (rows, n, hidden_size). Returns the same after these blocks, zeros where there is padding.

        padding: (rows, at least n), zero where there is none to see. positions: (rows or 1, n); where they
        start anew at 0 amid a row, a new sequence begins. is_training: the adapter's dropout drops.
        """
        real = (
            torch.ones(hidden.shape[:2], dtype=torch.bool)
            if padding is None
            else padding[:, -hidden.shape[1] :]
        )
        real = real.to(device="cpu", dtype=torch.bool)
        if real.shape != hidden.shape[:2]:
            raise error(
                Code.BAD_SHAPE, f"a mask of shape {tuple(real.shape)} for rows {tuple(hidden.shape[:2])}"
            )
        rows = [_sequences(real[row], _row(positions, row)) for row in range(len(real))]
        factors = list(self.adapter.factors) if self.adapter is not None else []
        dropout = self._dropout(rows, blocks) if is_training else None
        batch = _Batch(rows, real, blocks, dropout, self._num_rows(hidden))
        answer: Tensor = _Through.apply(hidden, self, batch, *factors)  # type: ignore[no-untyped-call]
        return answer

    def _num_rows(self, hidden: Tensor) -> int:
        """Of one micro-batch."""
        rows, n, hidden_size = hidden.shape
        fitting = self._most_bytes // max(1, n * hidden_size * _NUMBER_BYTES)
        return max(1, min(fitting, -(-rows // MICRO_BATCHES)))

    def _dropout(self, rows: list[list[Sequence]], blocks: tuple[int, int]) -> Dropout | None:
        if self.adapter is None or not self.adapter.dropout:
            return None
        return self.dropout.take(sum(map(len, rows)), blocks)

    def worn(self) -> Adapter | None:
        """The adapter as it is now, for a session; None without one."""
        files = () if self.adapter is None else self.adapter.parts()
        return Adapter(self._model.name, files) if any(file.name for file in files) else None

    def files(self, blocks: tuple[int, int]) -> tuple[PartFile, ...]:
        """The adapter's parts for these blocks as it is now, each given to the daemon once. Raises `NOT_FINITE`."""
        if self.adapter is None:
            return ()
        self.adapter.check_finite()
        files = self.adapter.parts()
        for file in files:
            if file.name and file.name not in self._put:
                self._model.put_part(file.name, file.data)
        self._put = frozenset(file.name for file in files if file.name)
        here = files[blocks[0] : blocks[1]]
        return here if any(file.name for file in here) else ()

    def passing(
        self, hidden: Tensor, sequences: Many[Sequence], trip: Trip, files: tuple[PartFile, ...]
    ) -> Pass:
        """One micro-batch forward, with these parts; a daemon that no longer keeps them gets them again."""
        trip = replace(trip, encoding=self._encoding, parts=tuple(file.name for file in files))
        try:
            return self._model.passing(hidden, trip, sequences)
        except CorollaError as problem:
            missing = missing_parts(problem)
            if not missing:
                raise
        for file in files:
            if file.name.hex() in missing:
                self._model.put_part(file.name, file.data)
        return self._model.passing(hidden, trip, sequences)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What of a batch needs no gradient.

    real: (rows, n) bool. dropout: of its first sequence. size: rows of one micro-batch.
    """

    rows: list[list[Sequence]]
    real: Tensor
    blocks: tuple[int, int]
    dropout: Dropout | None
    size: int

    def cuts(self) -> list[slice]:
        """The rows of each micro-batch; those of padding alone are left out."""
        cuts = [slice(at, at + self.size) for at in range(0, len(self.rows), self.size)]
        return [cut for cut in cuts if bool(self.real[cut].any())]

    def dropout_of(self, cut: slice) -> Dropout | None:
        """Of a micro-batch's first sequence: the same samples have the same masks, however the batch is cut."""
        if self.dropout is None:
            return None
        before = sum(map(len, self.rows[: cut.start]))
        return self.dropout._replace(sample=self.dropout.sample + before)


class _Through(torch.autograd.Function):
    """A batch through blocks of the swarm."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, journeys: Journeys, batch: _Batch, *factors: Tensor) -> Tensor:
        files = journeys.files(batch.blocks)
        states, real, cuts = hidden.detach(), batch.real, batch.cuts()

        def go(cut: slice) -> Pass:
            trip = Trip(batch.blocks, dropout=batch.dropout_of(cut))
            return journeys.passing(states[cut][real[cut]], list(chain(*batch.rows[cut])), trip, files)

        with ThreadPoolExecutor(MICRO_BATCHES) as pool:
            passes = list(pool.map(go, cuts))
        output = torch.zeros_like(states)
        for cut, passed in zip(cuts, passes, strict=True):
            output[cut] = output[cut].masked_scatter(_over(real[cut], states[cut]), passed.output)
        if not any(ctx.needs_input_grad):
            for passed in passes:
                passed.release()
        ctx.journey = (journeys.adapter, batch, cuts, passes, factors)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        adapter, batch, cuts, passes, factors = ctx.journey
        gradient, real = gradients[0], batch.real

        def go(place: int) -> Any:
            return passes[place].backward(gradient[cuts[place]][real[cuts[place]]])

        with ThreadPoolExecutor(MICRO_BATCHES) as pool:
            answers = list(pool.map(go, range(len(passes))))
        inputs = torch.zeros_like(gradient)
        sums: list[Tensor | None] = [None] * len(factors)
        for cut, answer in zip(cuts, answers, strict=True):
            inputs[cut] = inputs[cut].masked_scatter(_over(real[cut], inputs[cut]), answer.inputs)
            if factors:
                files = {block: file for block, file in enumerate(answer.parts, batch.blocks[0]) if file}
                for place, new in enumerate(adapter.gradients(files)):
                    old = sums[place]
                    sums[place] = new if old is None else old + new
        return (inputs, None, None, *sums)


def _over(real: Tensor, states: Tensor) -> Tensor:
    return real[..., None].expand(states.shape).to(states.device)


def _row(positions: Tensor | None, row: int) -> Tensor | None:
    return None if positions is None else positions.reshape(-1, positions.shape[-1])[row % len(positions)]


def _sequences(real: Tensor, positions: Tensor | None) -> list[Sequence]:
    """The sequences of one row. Raises `UNSUPPORTED` for positions that neither count up nor start anew."""
    num_tokens = int(real.sum())
    if positions is None or num_tokens < 2:
        return [Sequence(0, num_tokens)] if num_tokens else []
    told = positions.cpu()[real].tolist()
    starts = [0, *(at for at in range(1, num_tokens) if told[at] == 0)]
    for at in range(1, num_tokens):
        if told[at] not in (told[at - 1] + 1, 0):
            raise error(
                Code.UNSUPPORTED,
                f"position_ids that go from {told[at - 1]} to {told[at]}",
                "let them count up by one, and start anew at 0 with each packed sequence",
            )
    return [Sequence(0, end - start) for start, end in zip(starts, [*starts[1:], num_tokens], strict=True)]
