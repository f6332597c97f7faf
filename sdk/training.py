"""Passes of micro-batches through a model's blocks: forward, and the gradients back.

Owns the caller's handle of a pass and turns arrays into bytes. Where the blocks are, and that a pass is computed
again when a hop fails, is the daemon's business. `torch` builds autograd upon it.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
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
    from .wire import Wire

DEFAULT_ENCODING: Final = Encoding.FLOAT32  # the one in which every promise of equality holds


@dataclass(frozen=True, slots=True)
class Gradients:
    """inputs: as the inputs were given. parts: a safetensors file for each block, b"" without a part."""

    inputs: Any
    parts: tuple[bytes, ...] = ()


class Pass:
    """A micro-batch that went forward. output: the hidden states after its last block.

    If it was kept, `backward` works once; `release` forgets it. It is a context manager that releases.
    """

    def __init__(self, wire: Wire, passed: Passed, output: Any, kind: Kind, encoding: Encoding) -> None:
        self.output: Final = output
        self.num_hops: Final = passed.num_hops
        self._wire = wire
        self._handle = passed.handle
        self._hidden_size = passed.hidden_size
        self._kind = kind
        self._encoding = encoding

    def backward(self, gradients: Any) -> Gradients:
        """The gradients of the inputs and of the parts, from those of the output, of the same shape.

        Raises `BAD_SHAPE`, `NOT_FINITE`, `UNKNOWN_SESSION` for a pass that is gone or was not kept, and
        `BAD_ANSWER` for what a hop gave that cannot be right.
        """
        shape = tuple(int(size) for size in self.output.shape)
        if tuple(int(size) for size in gradients.shape) != shape:
            raise error(
                Code.BAD_SHAPE,
                f"gradients of shape {tuple(int(size) for size in gradients.shape)}, the output is {shape}",
            )
        data = to_bytes(gradients, kind_of(gradients), self._encoding)
        answer = self._wire.call("model.backward", BackwardPass(self._handle), data)
        self._handle = 0
        sizes = one(PassGradients, answer.value).part_bytes
        at = len(answer.payload) - sum(sizes)
        _check_size(at, len(data))
        inputs = from_bytes(answer.payload[:at], shape, self._kind, self._encoding)
        parts = []
        for size in sizes:
            parts.append(answer.payload[at : at + size])
            at += size
        return Gradients(inputs, tuple(parts))

    def release(self) -> None:
        """Forget what is kept of it. May be called twice."""
        if self._handle:
            handle, self._handle = self._handle, 0
            self._wire.call("model.release", PassHandle(handle))

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class Trip:
    """How a micro-batch travels. blocks: [start, end), None is all. parts, dropout: as `protocol.training`."""

    blocks: tuple[int, int] | None = None
    encoding: Encoding | str | None = None
    parts: tuple[bytes, ...] = ()
    dropout: Dropout | None = None
    keep: bool = False


def forward(wire: Wire, model: str, hidden: Any, sequences: Many[Sequence] | None, trip: Trip) -> Pass:
    """Send a micro-batch through the blocks.

    hidden: (rows, n, hidden_size), each row a sequence from position 0; or with `sequences`
        (num_tokens, hidden_size), one sequence after another.
    Raises `BAD_SHAPE`, `BAD_DTYPE`, `NOT_FINITE`, and what the daemon refuses with.
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
    asked = ForwardPass(
        model, tuple(sequences), start, end, encoding, trip.parts, trip.dropout, keep=trip.keep
    )
    data = to_bytes(hidden, kind, encoding)
    answer: Return = wire.call("model.forward", asked, data)
    _check_size(len(answer.payload), len(data))
    output = from_bytes(answer.payload, shape, kind, encoding)
    return Pass(wire, one(Passed, answer.value), output, kind, encoding)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _check_size(found: int, expected: int) -> None:
    if found != expected:
        raise error(Code.BAD_ANSWER, f"{found} bytes of hidden states came back, expected {expected}")
