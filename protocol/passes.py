"""What a program asks of its daemon when it trains: passes of micro-batches, and the adapter parts they use.

A pass is a micro-batch that went forward. The daemon keeps what backward needs of it under a handle, until
`model.backward`, `model.release` or the end of the connection. Parts are those of `protocol.training`; the daemon
keeps the latest ones for whoever puts them there, and brings each to the hops that lack it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tensors import Encoding
from .training import Dropout, Sequence


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """`model.forward`: hidden states after blocks [start, end); end -1 is the last block.

    The payload is the inputs, `(num_tokens, hidden_size)`. parts: names of the adapter's parts, one for each
    block, or nothing; those that the daemon does not keep are `ADAPTER_MISSING` with the hex names in `missing`:
    `adapter.put` them and ask again. keep: for a backward later. Answered by `Passed` with the outputs as payload.
    """

    model: str
    sequences: tuple[Sequence, ...]
    start: int = 0
    end: int = -1
    encoding: Encoding = Encoding.FLOAT32
    parts: tuple[bytes, ...] = ()
    dropout: Dropout | None = None
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Passed:
    """A pass that is done. handle: 0 if nothing was kept. num_hops: through how many workers it went."""

    handle: int
    hidden_size: int
    num_hops: int = 0


@dataclass(frozen=True, slots=True)
class BackwardPass:
    """`model.backward`: the payload is the gradients of the outputs; the pass is released.

    Answered by `PassGradients`; its payload is the inputs' gradients, then the parts'.
    """

    handle: int


@dataclass(frozen=True, slots=True)
class PassGradients:
    """part_bytes: length of each part's gradients, one for each block (0 for none); empty without parts."""

    part_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PassHandle:
    """`model.release`: forget a pass."""

    handle: int


@dataclass(frozen=True, slots=True)
class PutAdapterPart:
    """`adapter.put`: the payload is the part's safetensors file, `part` its sha256. adapter: what people call it."""

    part: bytes
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class AdapterName:
    """`adapter.show` and `adapter.remove`."""

    adapter: str


@dataclass(frozen=True, slots=True)
class AdapterView:
    """An adapter whose parts the daemon keeps."""

    adapter: str
    num_parts: int
    size_bytes: int
    parts: tuple[str, ...] = ()  # hex names, in `adapter.show`
