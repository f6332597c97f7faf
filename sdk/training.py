"""Passes of micro-batches through a model's blocks: forward, and the gradients back.

Owns the caller's handle of a pass and turns arrays into bytes. Where the blocks are, and that a pass is computed
again when a hop fails, is the daemon's business. `torch` builds autograd upon it. `AsyncPass` differs in `await`
alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from ..protocol.control import Return
from ..protocol.errors import Code, error
from ..protocol.passes import BackwardPass, ForwardPass, Passed, PassGradients, PassHandle
from ..protocol.tensors import Encoding
from ..protocol.training import Dropout, Sequence
from .answers import one
from .generation import as_encoding
from .tensors import Kind, check_shape, from_bytes, kind_of, to_bytes

if TYPE_CHECKING:
    from .async_wire import AsyncWire
    from .wire import Wire

DEFAULT_ENCODING: Final = Encoding.FLOAT32  # the one in which every promise of equality holds


@dataclass(frozen=True, slots=True)
class Gradients:
    """inputs: as the inputs were given. parts: a safetensors file for each block, b"" without a part."""

    inputs: Any
    parts: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Trip:
    """How a micro-batch travels. blocks: [start, end), None is all. parts, dropout: as `protocol.training`."""

    blocks: tuple[int, int] | None = None
    encoding: Encoding | str | None = None
    parts: tuple[bytes, ...] = ()
    dropout: Dropout | None = None
    keep: bool = False


class _Kept:
    """What both kinds of pass share: the handle and bytes, no waiting."""

    def __init__(self, asked: Asked, answer: Return) -> None:
        passed = one(Passed, answer.value)
        _check_size(len(answer.payload), len(asked.payload))
        self.output: Final[Any] = from_bytes(answer.payload, asked.shape, asked.kind, asked.call.encoding)
        self.num_hops: Final = passed.num_hops
        self._handle = passed.handle
        self._shape = asked.shape
        self._kind = asked.kind
        self._encoding = asked.call.encoding

    def _back(self, gradients: Any) -> tuple[BackwardPass, bytes]:
        shape = tuple(int(size) for size in gradients.shape)
        if shape != self._shape:
            raise error(Code.BAD_SHAPE, f"gradients of shape {shape}, the output is {self._shape}")
        return BackwardPass(self._handle), to_bytes(gradients, kind_of(gradients), self._encoding)

    def _gradients(self, answer: Return, num_bytes: int) -> Gradients:
        self._handle = 0
        sizes = one(PassGradients, answer.value).part_bytes
        at = len(answer.payload) - sum(sizes)
        _check_size(at, num_bytes)
        inputs = from_bytes(answer.payload[:at], self._shape, self._kind, self._encoding)
        parts = []
        for size in sizes:
            parts.append(answer.payload[at : at + size])
            at += size
        return Gradients(inputs, tuple(parts))

    def _released(self) -> PassHandle | None:
        """What to tell the daemon; None if there is nothing to release."""
        handle, self._handle = self._handle, 0
        return PassHandle(handle) if handle else None


class Pass(_Kept):
    """A micro-batch that went forward. output: the hidden states after its last block.

    If it was kept, `backward` works once; `release` forgets it. It is a context manager that releases.
    """

    def __init__(self, wire: Wire, asked: Asked, answer: Return) -> None:
        super().__init__(asked, answer)
        self._wire = wire

    def backward(self, gradients: Any) -> Gradients:
        """The gradients of the inputs and of the parts, from those of the output, of the same shape.

        Raises `BAD_SHAPE`, `NOT_FINITE`, `UNKNOWN_SESSION` for a pass that is gone or was not kept, and
        `BAD_ANSWER` for what a hop gave that cannot be right.
        """
        request, data = self._back(gradients)
        return self._gradients(self._wire.call("model.backward", request, data), len(data))

    def release(self) -> None:
        """Forget what is kept of it. May be called twice."""
        if (handle := self._released()) is not None:
            self._wire.call("model.release", handle)

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AsyncPass(_Kept):
    """As `Pass`, for asynchronous code; an asynchronous context manager."""

    def __init__(self, wire: AsyncWire, asked: Asked, answer: Return) -> None:
        super().__init__(asked, answer)
        self._wire = wire

    async def backward(self, gradients: Any) -> Gradients:
        """See `Pass.backward`."""
        request, data = self._back(gradients)
        return self._gradients(await self._wire.call("model.backward", request, data), len(data))

    async def release(self) -> None:
        """See `Pass.release`."""
        if (handle := self._released()) is not None:
            await self._wire.call("model.release", handle)

    async def __aenter__(self) -> AsyncPass:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            await self.release()
        elif (
            handle := self._released()
        ) is not None and self._wire.is_open:  # perhaps cancelled: do not wait
            await self._wire.tell("model.release", handle)


@dataclass(frozen=True, slots=True)
class Asked:
    """A micro-batch to be sent forward. payload: the hidden states, which have this shape and kind."""

    call: ForwardPass
    payload: bytes
    shape: tuple[int, ...]
    kind: Kind


def ask(model: str, hidden: Any, sequences: Many[Sequence] | None, trip: Trip) -> Asked:
    """What to send for a micro-batch.

    hidden: (rows, n, hidden_size), each row a sequence from position 0; or with `sequences`
        (num_tokens, hidden_size), one sequence after another.
    Raises `BAD_SHAPE`, `BAD_DTYPE`, `NOT_FINITE`.
    """
    kind = kind_of(hidden)
    shape = tuple(int(size) for size in hidden.shape)
    check_shape(hidden, 3 if sequences is None else 2, shape[-1] if shape else 0)
    if sequences is None:
        sequences = [Sequence(0, shape[1])] * shape[0]
    if not sequences or sum(s.n for s in sequences) * shape[-1] != _size(shape) or not _size(shape):
        raise error(
            Code.BAD_SHAPE,
            f"hidden states of shape {shape} for {len(sequences)} sequences of"
            f" {sum(s.n for s in sequences)} tokens",
            "give (rows, n, hidden_size) of at least one token, or each sequence's length",
        )
    start, end = trip.blocks or (0, -1)
    encoding = as_encoding(trip.encoding) or DEFAULT_ENCODING
    call = ForwardPass(
        model, tuple(sequences), start, end, encoding, trip.parts, trip.dropout, keep=trip.keep
    )
    return Asked(call, to_bytes(hidden, kind, encoding), shape, kind)


def forward(wire: Wire, asked: Asked) -> Pass:
    """Send a micro-batch through the blocks. Raises what the daemon refuses with."""
    return Pass(wire, asked, wire.call("model.forward", asked.call, asked.payload))


async def aforward(wire: AsyncWire, asked: Asked) -> AsyncPass:
    """As `forward`."""
    return AsyncPass(wire, asked, await wire.call("model.forward", asked.call, asked.payload))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _check_size(found: int, expected: int) -> None:
    if found != expected:
        raise error(Code.BAD_ANSWER, f"{found} bytes of hidden states came back, expected {expected}")
