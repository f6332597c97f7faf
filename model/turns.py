"""Micro-batches on their way through the blocks, forward or back, one or several side by side, block by block.

Owns a training request from its bytes to its answer. Nothing of it outlives the answer: backward brings the
inputs again and computes forward anew. Each turn computes one block. Requests that travel together share each
product with the base weights; each has its own adapter, its own attention and its own answer, as if it were alone.

Backward first runs forward and keeps the graphs of as many blocks as memory allows; of the others it keeps the
inputs alone, and computes each once more on the way back (Chen et al. 2016, Training Deep Nets with Sublinear
Memory Cost). The gradients are the same either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..protocol.errors import Code, CorollaError, error
from ..protocol.messages import Message
from ..protocol.work import Backward, Done, Forward, Gradients
from .adapters import Noise, Overlay, Part, write_part
from .attention import Batch, Segment
from .encodings import decode, encode


class Blocks(Protocol):
    """What training needs of `span.Span`."""

    start: int
    end: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def modules(self) -> Mapping[int, nn.Module]:
        """Block → its module."""

    def forward(
        self,
        hidden: Tensor,
        batch: Batch,
        blocks: tuple[int, int] | None = None,
        overlays: Sequence[Overlay] = (),
    ) -> Tensor:
        """(num_tokens, hidden_size) after these blocks, with these adapters over some of the tokens."""


class Rider:
    """One request: its tensors, what its tokens are, and its adapter. parts: block → part, as held.

    inputs, gradient: (num_tokens, hidden_size); the latter of a backward. Raises `NOT_FINITE` and `BAD_SHAPE` for
    what came with the request.
    """

    def __init__(self, blocks: Blocks, ask: Forward | Backward, parts: Mapping[int, Part]) -> None:
        self.ask = ask
        self.parts = parts
        self.num_tokens = sum(sequence.n for sequence in ask.sequences)
        self.is_alone = False  # it failed beside others, and runs by itself
        self._blocks = blocks
        self._noise, self._places = _noise_and_places(ask, blocks.device)
        if isinstance(ask, Forward):
            self.inputs, self.gradient = self._read(ask.payload, "the inputs"), None
        else:
            half = len(ask.payload) // 2
            self.inputs = self._read(ask.payload[:half], "the inputs")
            self.gradient = self._read(ask.payload[half:], "the gradients of the outputs")

    def goes_with(self, other: Rider) -> bool:
        """Whether both may travel side by side."""
        ours, theirs = ((type(rider.ask), rider.ask.start, rider.ask.end) for rider in (self, other))
        return ours == theirs and not (self.is_alone or other.is_alone)

    def overlay(self, first: int, block: int, part: Part) -> Overlay:
        """Its adapter on one block, where its tokens begin at `first`."""
        return Overlay(first, first + self.num_tokens, {block: part}, self._places, 0, self._noise)

    def written(self, hidden: Tensor, what: str) -> bytes:
        """Its part of what the blocks made. Raises `INTERNAL` with the detail `not_finite`."""
        try:
            return encode(hidden, self.ask.encoding)
        except CorollaError as problem:
            raise self.damaged(what, problem.message) from problem

    def damaged(self, what: str, message: str) -> CorollaError:
        """The error of numbers that the blocks themselves made: the sender is innocent."""
        return error(
            Code.INTERNAL,
            f"blocks {self.ask.start}:{self.ask.end} made {what} that are not finite or too large for"
            f" {self.ask.encoding}: {message}",
            "use a wider encoding or dtype, or smaller steps; if it stays, this worker's weights are damaged",
            not_finite=what,
        )

    def _read(self, payload: bytes, what: str) -> Tensor:
        """(num_tokens, hidden_size) of the request's payload."""
        span = self._blocks
        expected = self.num_tokens * self.ask.encoding.token_bytes(span.hidden_size)
        if len(payload) != expected:
            raise error(
                Code.BAD_SHAPE,
                f"{len(payload)} bytes of {what}, expected {expected} for {self.num_tokens} tokens of hidden"
                f" size {span.hidden_size} in {self.ask.encoding}",
            )
        try:
            return decode(payload, self.ask.encoding, span.hidden_size, span.dtype, span.device)
        except CorollaError as problem:
            raise error(
                problem.code, f"{what}: {problem.message}", problem.remedy, **problem.details, what=what
            ) from problem


def _noise_and_places(ask: Forward | Backward, device: torch.device) -> tuple[Noise | None, Tensor]:
    """What each token is to the masks of dropout, and its place in its own sequence."""
    counts = torch.tensor([sequence.n for sequence in ask.sequences])
    starts = torch.tensor([sequence.position for sequence in ask.sequences])
    places = torch.cat([torch.arange(sequence.n) for sequence in ask.sequences]).to(device)
    if ask.dropout is None:
        return None, places
    samples = ask.dropout.sample + torch.arange(len(ask.sequences))
    noise = Noise(
        ask.dropout,
        torch.repeat_interleave(samples, counts).to(device),
        torch.repeat_interleave(starts, counts).to(device) + places,
    )
    return noise, places


class Ended(NamedTuple):
    """A request that is through. answer: or why there is none."""

    request: int
    num_tokens: int
    answer: Message | CorollaError


class Work(ABC):
    """Riders that travel together; all go the same way through the same blocks."""

    def __init__(self, blocks: Blocks, riders: Sequence[Rider]) -> None:
        self.riders = tuple(riders)
        self._blocks = blocks
        self.start, self.end = riders[0].ask.start, riders[0].ask.end
        sequences = [sequence for rider in riders for sequence in rider.ask.sequences]
        self._batch = Batch(tuple(Segment((), s.position, s.n) for s in sequences))
        self._sizes = [rider.num_tokens for rider in riders]

    @abstractmethod
    def turn(self) -> tuple[Ended, ...]:
        """Compute one block; what came of all riders, once they are through.

        Raises `OUT_OF_MEMORY`, and what the blocks raise; then nothing is known of any of them.
        """

    def _forward(self, hidden: Tensor, block: int, parts: Sequence[Part | None]) -> Tensor:
        """parts: of this block, each rider's."""
        overlays, first = [], 0
        for rider, part in zip(self.riders, parts, strict=True):
            if part is not None:
                overlays.append(rider.overlay(first, block, part))
            first += rider.num_tokens
        return self._blocks.forward(hidden, self._batch, (block, block + 1), tuple(overlays))

    def _parts(self, block: int) -> list[Part | None]:
        return [rider.parts.get(block) for rider in self.riders]

    def _ended(self, hidden: Tensor) -> tuple[Ended, ...]:
        """Each rider's answer. hidden: of all tokens, as it left the last block on the way."""
        ended = []
        for place, (rider, mine) in enumerate(
            zip(self.riders, torch.split(hidden, self._sizes), strict=True)
        ):
            try:
                answer: Message | CorollaError = self._answer(place, rider, mine)
            except CorollaError as problem:
                answer = problem
            ended.append(Ended(rider.ask.request, rider.num_tokens, answer))
        return tuple(ended)

    @abstractmethod
    def _answer(self, place: int, rider: Rider, hidden: Tensor) -> Message:
        """Raises as `Rider.written`."""


def work_of(blocks: Blocks, riders: Sequence[Rider], num_kept: int) -> Work:
    """The work of these riders, which go together. num_kept: as in `BackwardWork`."""
    if isinstance(riders[0].ask, Forward):
        return ForwardWork(blocks, riders)
    return BackwardWork(blocks, riders, num_kept)


class ForwardWork(Work):
    """`Forward`: block after block, without a graph."""

    def __init__(self, blocks: Blocks, riders: Sequence[Rider]) -> None:
        super().__init__(blocks, riders)
        self._hidden = _joined([rider.inputs for rider in riders])
        self._block = self.start

    def turn(self) -> tuple[Ended, ...]:
        with torch.inference_mode():
            self._hidden = self._forward(self._hidden, self._block, self._parts(self._block))
        self._block += 1
        return () if self._block < self.end else self._ended(self._hidden)

    def _answer(self, place: int, rider: Rider, hidden: Tensor) -> Message:
        return Done(rider.ask.request, rider.written(hidden, "outputs"))


class _Kept(NamedTuple):
    """What backward needs of a block: its input, a leaf; each rider's part; what was computed, if that is kept."""

    leaf: Tensor
    parts: tuple[Part | None, ...]
    output: Tensor | None


@dataclass(slots=True)
class _Files:
    """A rider's gradients of its parts, from the last block to the first; and what was wrong with one of them."""

    files: list[bytes] = field(default_factory=list)
    problem: CorollaError | None = None


class BackwardWork(Work):
    """`Backward`: forward up to the last block, then all of them in reverse."""

    def __init__(self, blocks: Blocks, riders: Sequence[Rider], num_kept: int) -> None:
        """num_kept: blocks whose graphs are kept on the way; the last one's always is."""
        super().__init__(blocks, riders)
        self._hidden = _joined([rider.inputs for rider in riders])
        self._gradient = _joined([rider.gradient for rider in riders if rider.gradient is not None])
        self._num_kept = num_kept
        self._kept: list[_Kept] = []
        self._is_returning = False
        self._files = [_Files() for _ in riders]

    def turn(self) -> tuple[Ended, ...]:
        if not self._is_returning:
            self._go_on()
            return ()
        kept = self._kept.pop()
        block = self.start + len(self._kept)
        output = kept.output if kept.output is not None else self._computed(kept, block)
        self._go_back(block, kept, output)
        return () if self._kept else self._ended(self._gradient)

    def _go_on(self) -> None:
        """One block further, with a graph if it is to be kept or is the last one."""
        block = self.start + len(self._kept)
        parts = tuple(part.trainable() if part is not None else None for part in self._parts(block))
        kept = _Kept(self._hidden.detach().requires_grad_(), parts, None)
        is_last = block == self.end - 1
        self._is_returning = is_last
        if is_last or len(self._kept) < self._num_kept:
            output = self._computed(kept, block)
            self._kept.append(kept._replace(output=output))
            self._hidden = output.detach()
            return
        with torch.no_grad():
            self._hidden = self._forward(self._hidden, block, parts)
        self._kept.append(kept)

    def _computed(self, kept: _Kept, block: int) -> Tensor:
        with torch.enable_grad():
            return self._forward(kept.leaf, block, kept.parts)

    def _go_back(self, block: int, kept: _Kept, output: Tensor) -> None:
        tensors = [part.tensors if part is not None else {} for part in kept.parts]
        wanted = [tensor for mine in tensors for tensor in mine.values()]
        gradients = torch.autograd.grad(
            output, [kept.leaf, *wanted], self._gradient, allow_unused=True, materialize_grads=True
        )
        self._gradient = gradients[0]
        found = iter(gradients[1:])
        for rider, mine, files in zip(self.riders, tensors, self._files, strict=True):
            made = {name: next(found) for name in mine}
            for name, gradient in made.items():
                if files.problem is None and not torch.isfinite(gradient).all():
                    what = f"gradients of {name} of block {block}"
                    files.problem = rider.damaged(what, "it holds NaN or infinity")
            if rider.ask.parts:
                files.files.append(write_part(made) if made else b"")

    def _answer(self, place: int, rider: Rider, hidden: Tensor) -> Message:
        if (problem := self._files[place].problem) is not None:
            raise problem
        files = tuple(reversed(self._files[place].files))
        payload = rider.written(hidden, "gradients of the inputs")
        return Gradients(rider.ask.request, tuple(len(file) for file in files), payload + b"".join(files))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
