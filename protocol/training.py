"""Training: forward and backward of whole sequences through a span, and the adapters that learn.

Spoken on `TRAINING_PROTOCOL`, one stream a request. The client says `SpanForward`, `SpanBackward` or
`PutPart`, then its tensors in `Chunk`s; the hop says `Working` each second while its worker computes, then
`Computed` with the answer's tensors in `Chunk`s, or `Declined`. Whoever resets the stream gives the request
up. Hops keep nothing of a request: backward brings the span's inputs again and recomputes (DESIGN, section 3).

Tensors travel flattened and without padding, `(num_tokens, hidden_size)`, in the request's encoding, one
sequence after another; adapter weights and their gradients as safetensors files.

An *adapter part* is what an adapter adds to one block: a safetensors file, named by its sha256. A hop that
does not hold a part answers `ADAPTER_MISSING` with the hex names in `missing`; the client puts them there
and asks again, and nobody is charged. Its tensors, float32:

    "TARGET.lora_A"  (rank, in_features)     TARGET: the linear layer's dotted name inside its block, such
    "TARGET.lora_B"  (out_features, rank)            as `self_attn.q_proj`
    "prompt"         (num_prompt_tokens, hidden_size), added to the first tokens of each sequence before
                     the block (deep prompts: Borzunov et al. 2023, section 2.2; Liu et al. 2021)

    "soft"           (num_virtual_tokens, hidden_size), virtual tokens before each row (prompt tuning: Lester et
                     al. 2021), alone in a part of its own that belongs to no block

and its metadata, all strings: "TARGET.scaling" (alpha / rank; 1 if left out) and "dropout" (0 if left out).
Gradients of a part come back as such a file, with the same tensor names. Source: Hu et al. 2021, LoRA.

A hop adds `(drop(x) @ A.T @ B.T) * scaling`, computed in float32, to a layer's output. `drop` needs a `Dropout`
in the request, and is a pure function: of the layer's inputs x it keeps feature i of a token, divided by
1 - dropout, if the top 24 bits of its hash are at least round(dropout * 2^24), and makes the others zero. The
hash starts at 0 and takes in seed, step, block, target, sample, position and i, one after the other, all as
unsigned 64-bit words whose sums and products wrap:

    h = (h ^ word) + 0x9E3779B97F4A7C15
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9
    h = (h ^ h >> 27) * 0x94D049BB133111EB
    h = h ^ h >> 31

block: its number in the model; target: the first 8 bytes, little endian, of the sha256 of TARGET; sample: the
sequence's; position: the token's. Source: Steele et al. 2014, SplitMix, for the mixing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

from .errors import Code, CorollaError, error_from_wire
from .limits import (
    MAX_BLOCKS,
    MAX_NAME_CHARS,
    MAX_PART_BYTES,
    MAX_POSITION,
    MAX_SEQUENCES,
    MAX_TRAINING_BYTES,
)
from .messages import Message, Plain, Vocabulary, check_length, check_range
from .tensors import Encoding

TRAINING_PROTOCOL: Final = "/corolla/training/1"

PART_NAME_BYTES: Final = 32  # sha256
NO_PART: Final = b""  # the name that stands for a block which the adapter leaves alone


class Sequence(NamedTuple):
    """One sequence of a micro-batch: `n` tokens that attend each other causally, from `position` on."""

    position: int
    n: int


class Dropout(NamedTuple):
    """What the masks of LoRA's dropout depend on, besides position, block and target.

    sample: number of the micro-batch's first sequence within the optimizer step; the next ones count up.
    """

    seed: int
    step: int
    sample: int


def check_micro_batch(
    start: int, end: int, sequences: tuple[Sequence, ...], parts: tuple[bytes, ...]
) -> None:
    """Raise ValueError unless these may form a micro-batch on blocks [start, end)."""
    check_range("start", start, 0, MAX_BLOCKS - 1)
    check_range("end", end, start + 1, MAX_BLOCKS)
    check_range("number of sequences", len(sequences), 1, MAX_SEQUENCES)
    for sequence in sequences:
        check_range("n", sequence.n, 1, MAX_POSITION)
        check_range("position", sequence.position, 0, MAX_POSITION - sequence.n)
    check_parts(start, end, parts)


def check_parts(start: int, end: int, parts: tuple[bytes, ...]) -> None:
    """Raise ValueError unless these are names of parts, one for each block of [start, end), or nothing."""
    if parts and len(parts) != end - start:
        raise ValueError(f"{len(parts)} adapter parts for blocks {start}:{end}")
    for part in parts:
        if len(part) not in (0, PART_NAME_BYTES):
            raise ValueError(f"name of an adapter part of {len(part)} bytes, expected {PART_NAME_BYTES}")


def missing_parts(problem: CorollaError) -> frozenset[str]:
    """The hex names in an `ADAPTER_MISSING`, whoever said it; empty for any other error."""
    named = problem.details.get("missing") if problem.code is Code.ADAPTER_MISSING else None
    if not isinstance(named, (list, tuple)):  # a hostile hop may name anything
        return frozenset()
    return frozenset(name for name in named if name and isinstance(name, str))


# client → hop


@dataclass(frozen=True, slots=True)
class SpanForward(Message):
    """Hidden states after blocks [start, end) of one worker, for these inputs.

    parts: of the adapter, one name for each block, or nothing. size_bytes: of the inputs that follow.
    """

    KIND: ClassVar[str] = "forward"
    fingerprint: str
    worker: int
    start: int
    end: int
    encoding: Encoding
    sequences: tuple[Sequence, ...]
    size_bytes: int
    parts: tuple[bytes, ...] = ()
    dropout: Dropout | None = None

    def __post_init__(self) -> None:
        check_length("fingerprint", self.fingerprint, MAX_NAME_CHARS)
        check_micro_batch(self.start, self.end, self.sequences, self.parts)
        check_range("size_bytes", self.size_bytes, 1, MAX_TRAINING_BYTES)


@dataclass(frozen=True, slots=True)
class SpanBackward(Message):
    """Gradients of the inputs and of the adapter's parts; what follows: the inputs, then the outputs' gradients."""

    KIND: ClassVar[str] = "backward"
    fingerprint: str
    worker: int
    start: int
    end: int
    encoding: Encoding
    sequences: tuple[Sequence, ...]
    size_bytes: int  # of both together
    parts: tuple[bytes, ...] = ()
    dropout: Dropout | None = None

    def __post_init__(self) -> None:
        check_length("fingerprint", self.fingerprint, MAX_NAME_CHARS)
        check_micro_batch(self.start, self.end, self.sequences, self.parts)
        check_range("size_bytes", self.size_bytes, 2, 2 * MAX_TRAINING_BYTES)


@dataclass(frozen=True, slots=True)
class PutPart(Message):
    """Keep an adapter part for this client, as long as there is room. Answered by an empty `Computed`.

    Raises through `Declined` `BAD_SHAPE` if it does not fit the block, `BAD_REQUEST` if its bytes are not
    what its name says, `BUSY`.
    """

    KIND: ClassVar[str] = "put"
    fingerprint: str
    worker: int
    block: int
    part: bytes
    size_bytes: int

    def __post_init__(self) -> None:
        check_length("fingerprint", self.fingerprint, MAX_NAME_CHARS)
        check_range("block", self.block, 0, MAX_BLOCKS - 1)
        check_range("part's name", len(self.part), PART_NAME_BYTES, PART_NAME_BYTES)
        check_range("size_bytes", self.size_bytes, 1, MAX_PART_BYTES)


# both ways


@dataclass(frozen=True, slots=True)
class Chunk(Message):
    """The next bytes of what was announced; the last one fills `size_bytes`."""

    KIND: ClassVar[str] = "chunk"
    payload: bytes = b""


# hop → client


@dataclass(frozen=True, slots=True)
class Working(Message):
    """The worker makes progress, or the request waits in its queue. It renews the client's deadline."""

    KIND: ClassVar[str] = "working"
    queue: int = 0


@dataclass(frozen=True, slots=True)
class Computed(Message):
    """The answer follows: outputs, or the inputs' gradients and then each part's.

    part_bytes: length of each part's gradients, one for each block asked with a part (0 for `NO_PART`).
    """

    KIND: ClassVar[str] = "computed"
    size_bytes: int
    part_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_range("number of parts", len(self.part_bytes), 0, MAX_BLOCKS)
        for size in self.part_bytes:
            check_range("part_bytes", size, 0, MAX_PART_BYTES)
        largest = MAX_TRAINING_BYTES + sum(self.part_bytes)
        check_range("size_bytes", self.size_bytes, sum(self.part_bytes), largest)


@dataclass(frozen=True, slots=True)
class Declined(Message):
    """The request failed; the stream is over."""

    KIND: ClassVar[str] = "declined"
    error: Plain  # CorollaError.to_wire

    @classmethod
    def of(cls, problem: CorollaError) -> Declined:
        """The message that reports an error."""
        return cls(problem.to_wire())

    def problem(self) -> CorollaError:
        """The error reported."""
        return error_from_wire(self.error)


TRAINING: Final = Vocabulary(SpanForward, SpanBackward, PutPart, Chunk, Working, Computed, Declined)
