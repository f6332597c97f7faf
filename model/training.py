"""Forward and backward of whole micro-batches, block by block, so that decodes may run in between.

Owns a training request from its bytes to its answer. Nothing of it outlives the answer: backward brings the
inputs again and computes forward anew. Each turn computes one block; the engine chooses when.

Backward first runs forward and keeps the graphs of as many blocks as memory allows; of the others it keeps the
inputs alone, and computes each once more on the way back (Chen et al. 2016, Training Deep Nets with Sublinear
Memory Cost). The gradients are the same either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..protocol.errors import Code, CorollaError, error
from ..protocol.messages import Message
from ..protocol.work import Backward, Done, Forward, Gradients
from .adapters import Adapters, Noise, Overlay, Part, write_part
from .attention import Batch, Segment
from .encodings import decode, encode

# Tokens of the first measurement of what a block's graph takes; enough that what is per pass vanishes.
_PROBE_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Room:
    """Memory beside weights and cache. adapters: for parts held; activations: of the running micro-batch."""

    adapters: int = 1 << 28
    activations: int = 1 << 30


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
        overlays: tuple[Overlay, ...] = (),
    ) -> Tensor:
        """(num_tokens, hidden_size) after these blocks."""


class Work(ABC):
    """A training request on its way. names: of the parts that it uses."""

    def __init__(self, blocks: Blocks, ask: Forward | Backward, parts: Mapping[int, Part]) -> None:
        self.request = ask.request
        self.names = ask.parts
        self.num_tokens = sum(sequence.n for sequence in ask.sequences)
        self._blocks = blocks
        self._ask = ask
        self._parts = parts
        self._batch = Batch(tuple(Segment((), s.position, s.n) for s in ask.sequences))
        self._scene = _Scene(ask, blocks.device)

    @abstractmethod
    def turn(self) -> Message | None:
        """Compute one block; the answer, once there is one.

        Raises `NOT_FINITE` and `BAD_SHAPE` for what came with the request, `OUT_OF_MEMORY`, and `INTERNAL` with
        the detail `not_finite` for what the blocks made of it.
        """

    def _forward(self, hidden: Tensor, block: int, part: Part | None) -> Tensor:
        overlays = (self._scene.overlay({block: part}),) if part is not None else ()
        return self._blocks.forward(hidden, self._batch, (block, block + 1), overlays)

    def _read(self, payload: bytes, what: str) -> Tensor:
        """(num_tokens, hidden_size) of the request's payload."""
        span = self._blocks
        expected = self.num_tokens * self._ask.encoding.token_bytes(span.hidden_size)
        if len(payload) != expected:
            raise error(
                Code.BAD_SHAPE,
                f"{len(payload)} bytes of {what}, expected {expected} for {self.num_tokens} tokens of hidden"
                f" size {span.hidden_size} in {self._ask.encoding}",
            )
        try:
            return decode(payload, self._ask.encoding, span.hidden_size, span.dtype, span.device)
        except CorollaError as problem:
            raise error(
                problem.code, f"{what}: {problem.message}", problem.remedy, **problem.details, what=what
            ) from problem

    def _written(self, hidden: Tensor, what: str) -> bytes:
        try:
            return encode(hidden, self._ask.encoding)
        except CorollaError as problem:
            raise self._damaged(what, problem.message) from problem

    def _damaged(self, what: str, message: str) -> CorollaError:
        """The error of numbers that the blocks themselves made: the sender is innocent."""
        return error(
            Code.INTERNAL,
            f"blocks {self._ask.start}:{self._ask.end} made {what} that are not finite or too large for"
            f" {self._ask.encoding}: {message}",
            "use a wider encoding or dtype, or smaller steps; if it stays, this worker's weights are damaged",
            not_finite=what,
        )


class _Scene:
    """What each token of a micro-batch is: its place, its position, its sample."""

    def __init__(self, ask: Forward | Backward, device: torch.device) -> None:
        counts = torch.tensor([sequence.n for sequence in ask.sequences])
        starts = torch.tensor([sequence.position for sequence in ask.sequences])
        self._places = torch.cat([torch.arange(sequence.n) for sequence in ask.sequences]).to(device)
        self._noise: Noise | None = None
        if ask.dropout is not None:
            samples = ask.dropout.sample + torch.arange(len(ask.sequences))
            self._noise = Noise(
                ask.dropout,
                torch.repeat_interleave(samples, counts).to(device),
                torch.repeat_interleave(starts, counts).to(device) + self._places,
            )

    def overlay(self, parts: Mapping[int, Part]) -> Overlay:
        """One adapter over the whole micro-batch."""
        return Overlay(0, len(self._places), parts, self._places, 0, self._noise)


class ForwardWork(Work):
    """`Forward`: block after block, without a graph."""

    def __init__(self, blocks: Blocks, ask: Forward, parts: Mapping[int, Part]) -> None:
        super().__init__(blocks, ask, parts)
        self._hidden = self._read(ask.payload, "the inputs")
        self._block = ask.start

    def turn(self) -> Message | None:
        with torch.inference_mode():
            self._hidden = self._forward(self._hidden, self._block, self._parts.get(self._block))
        self._block += 1
        if self._block < self._ask.end:
            return None
        return Done(self.request, self._written(self._hidden, "outputs"))


class _Kept(NamedTuple):
    """What backward needs of a block: its input, a leaf; and what was computed from it, if that is kept."""

    leaf: Tensor
    part: Part | None
    output: Tensor | None


class BackwardWork(Work):
    """`Backward`: forward up to the last block, then all of them in reverse."""

    def __init__(self, blocks: Blocks, ask: Backward, parts: Mapping[int, Part], num_kept: int) -> None:
        """num_kept: blocks whose graphs are kept on the way; the last one's always is."""
        super().__init__(blocks, ask, parts)
        half = len(ask.payload) // 2
        self._hidden = self._read(ask.payload[:half], "the inputs")
        self._gradient = self._read(ask.payload[half:], "the gradients of the outputs")
        self._num_kept = num_kept
        self._kept: list[_Kept] = []
        self._is_returning = False
        self._files: list[bytes] = []  # from the last block to the first

    def turn(self) -> Message | None:
        if not self._is_returning:
            self._go_on()
            return None
        kept = self._kept.pop()
        block = self._ask.start + len(self._kept)
        output = kept.output if kept.output is not None else self._computed(kept, block)
        self._go_back(block, kept, output)
        if self._kept:
            return None
        files = tuple(reversed(self._files))
        payload = self._written(self._gradient, "gradients of the inputs")
        return Gradients(self.request, tuple(len(file) for file in files), payload + b"".join(files))

    def _go_on(self) -> None:
        """One block further, with a graph if it is to be kept or is the last one."""
        block = self._ask.start + len(self._kept)
        part = self._parts.get(block)
        kept = _Kept(
            self._hidden.detach().requires_grad_(), part.trainable() if part is not None else None, None
        )
        is_last = block == self._ask.end - 1
        self._is_returning = is_last
        if is_last or len(self._kept) < self._num_kept:
            output = self._computed(kept, block)
            self._kept.append(kept._replace(output=output))
            self._hidden = output.detach()
            return
        with torch.no_grad():
            self._hidden = self._forward(self._hidden, block, part)
        self._kept.append(kept)

    def _computed(self, kept: _Kept, block: int) -> Tensor:
        with torch.enable_grad():
            return self._forward(kept.leaf, block, kept.part)

    def _go_back(self, block: int, kept: _Kept, output: Tensor) -> None:
        tensors = kept.part.tensors if kept.part is not None else {}
        gradients = torch.autograd.grad(
            output, [kept.leaf, *tensors.values()], self._gradient, allow_unused=True, materialize_grads=True
        )
        self._gradient = gradients[0]
        for name, gradient in zip(tensors, gradients[1:], strict=True):
            if not torch.isfinite(gradient).all():
                raise self._damaged(f"gradients of {name} of block {block}", "it holds NaN or infinity")
        if self._ask.parts:
            made = dict(zip(tensors, gradients[1:], strict=True))
            self._files.append(write_part(made) if made else b"")


class Trainer:
    """Training on one span: the parts held for it, and every request that is on its way."""

    def __init__(self, blocks: Blocks, room: Room) -> None:
        self.adapters = Adapters(blocks.modules, blocks.hidden_size, blocks.device, room.adapters)
        self._blocks = blocks
        self._room = room
        self._works: dict[int, Work] = {}  # by request
        self._bytes_per_token = 0  # of one block's graph; 0 until it was measured

    def begin(self, ask: Forward | Backward) -> None:
        """Take a request, to be computed by `turn`.

        Raises `BAD_SHAPE`, `NOT_FINITE`, `BLOCKS_OUT_OF_RANGE`, `ADAPTER_MISSING`, `OUT_OF_MEMORY`.
        """
        span = self._blocks
        if not span.start <= ask.start < ask.end <= span.end:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks {ask.start}:{ask.end} asked of a worker that serves {span.start}:{span.end}",
                "choose a range within the worker's span",
            )
        parts = self.adapters.pin((ask.start, ask.end), ask.parts)
        try:
            self._works[ask.request] = self._work(ask, parts)
        except Exception:
            self.adapters.unpin(ask.parts)
            raise

    def turn(self, request: int) -> tuple[int, Message | None]:
        """Compute one block of a request; its tokens, and the answer once there is one.

        Raises what `Work.turn` raises; the request is then over.
        """
        work = self._works[request]
        try:
            answer = work.turn()
        except Exception:
            self._finish(work)
            raise
        if answer is not None:
            self._finish(work)
        return work.num_tokens, answer

    def _finish(self, work: Work) -> None:
        del self._works[work.request]
        self.adapters.unpin(work.names)

    def _work(self, ask: Forward | Backward, parts: Mapping[int, Part]) -> Work:
        span = self._blocks
        num_tokens = sum(sequence.n for sequence in ask.sequences)
        graph = self._graph_bytes(ask.start, num_tokens)
        if isinstance(ask, Forward):
            self._check_room(graph, num_tokens)
            return ForwardWork(span, ask, parts)
        inputs = (ask.end - ask.start + 2) * num_tokens * span.hidden_size * span.dtype.itemsize
        self._check_room(inputs + graph, num_tokens)
        return BackwardWork(span, ask, parts, (self._room.activations - inputs - graph) // graph)

    def _check_room(self, num_bytes: int, num_tokens: int) -> None:
        if num_bytes > self._room.activations:
            raise error(
                Code.OUT_OF_MEMORY,
                f"a micro-batch of {num_tokens} tokens takes about {num_bytes:,} bytes of activations,"
                f" {self._room.activations:,} are there",
                "send fewer or shorter sequences in a micro-batch",
                max_tokens=num_tokens * self._room.activations // num_bytes,
            )

    def _graph_bytes(self, block: int, num_tokens: int) -> int:
        """About what backward keeps of one block."""
        if not self._bytes_per_token:
            self._bytes_per_token = max(1, _graph_bytes(self._blocks, block) // _PROBE_TOKENS)
        return self._bytes_per_token * num_tokens


def _graph_bytes(blocks: Blocks, block: int) -> int:
    """Bytes that autograd saves in one block for a sequence of `_PROBE_TOKENS`, its weights aside."""
    sizes: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in blocks.modules[block].parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    shape = (_PROBE_TOKENS, blocks.hidden_size)
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(shape, generator=generator).to(blocks.device, blocks.dtype).requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, _same):
        output = blocks.forward(leaf, Batch.stateless((_PROBE_TOKENS,)), (block, block + 1))
        # While the graph is alive, so that no address comes twice.
        return sum(sizes.values()) + output.nbytes


def _same(tensor: Tensor) -> Tensor:
    return tensor
