"""What smaller weights and smaller activations on the wire cost: perplexity, tokens and bytes, beside float32.

Real text under a real model, in windows of `--window` tokens. The wire's part runs three hops: hidden states are
encoded and decoded four times, before the first block, between the spans, and after the last. `same first choice`
is the share of positions at which the most probable token is float32's.

The text is one file, plain or compressed (`.dz`, `.gz`). The figures quoted in the README are of the Jargon File:
`apt-get download dict-jargon`, which holds usr/share/dictd/jargon.dict.dz.
"""

from __future__ import annotations

import gzip
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from corolla.model.attention import Batch
from corolla.model.checkpoint import Checkpoint, open_checkpoint
from corolla.model.encodings import decode, encode, torch_dtype
from corolla.model.ends import Ends
from corolla.model.plain import source_of
from corolla.model.quantization import Shelf
from corolla.model.span import Span
from corolla.protocol.tensors import DType, Encoding, Quantization
from tests.benchmarks.clients import Setup
from tests.benchmarks.report import Measured, Report, arguments

CPU = torch.device("cpu")
NUM_HOPS = 3
SKIPPED_CHARACTERS = 200_000  # of the text: front matter and lists


@dataclass(frozen=True)
class Kind:
    """One way to serve: number format, weights, wire."""

    dtype: DType = DType.FLOAT32
    quantization: Quantization | None = None
    wire: Encoding = Encoding.FLOAT32

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.quantization or self.dtype} weights, {self.wire} wire"


KINDS = (
    Kind(),
    Kind(DType.BFLOAT16),
    *(Kind(quantization=quantization) for quantization in Quantization),
    *(Kind(wire=wire) for wire in Encoding if wire is not Encoding.FLOAT32),
    Kind(quantization=Quantization.INT8, wire=Encoding.INT8),
    Kind(quantization=Quantization.INT4, wire=Encoding.INT8),
)


@dataclass
class Score:
    """Of one kind over all windows. best: the most probable token at each position."""

    loss: float
    best: Tensor  # (num_windows, window)
    weight_bytes: int

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return math.exp(self.loss)


def read(path: Path) -> str:
    """The text of a file, compressed or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")


def windows(checkpoint: Checkpoint, text: str, num_windows: int, window: int) -> Tensor:
    """(num_windows, window) token ids, evenly spread over the text."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise SystemExit(f"{checkpoint.name} has no tokenizer")
    room = len(text) - SKIPPED_CHARACTERS
    if room < num_windows * window * 8:
        raise SystemExit(f"the text has {len(text)} characters, which is too few")
    rows = []
    for i in range(num_windows):
        first = SKIPPED_CHARACTERS + i * room // num_windows
        rows.append(tokenizer(text[first : first + 8 * window])["input_ids"][:window])
    return torch.tensor(rows)


def passed(hidden: Tensor, wire: Encoding) -> Tensor:
    """What arrives at the other side of the wire."""
    return decode(encode(hidden, wire), wire, hidden.shape[1], hidden.dtype, hidden.device)


def score(checkpoint: Checkpoint, kind: Kind, rows: Tensor) -> Score:
    """Perplexity of every token but each window's first, given those before it."""
    dtype = torch_dtype(kind.dtype)
    shelf = head = None
    if kind.quantization is not None:
        fingerprint = checkpoint.facts().fingerprint
        shelf = Shelf.of(checkpoint.cache_folder, fingerprint, kind.quantization)
        head = Shelf.of(checkpoint.cache_folder, fingerprint, Quantization.INT8)
    ends = Ends.load(checkpoint, dtype, CPU, shelf=head)
    num_blocks = int(checkpoint.config.num_hidden_layers)
    span = Span.load(checkpoint, 0, num_blocks, dtype, CPU, shelf=shelf)
    cuts = [round(i * num_blocks / NUM_HOPS) for i in range(NUM_HOPS + 1)]
    total, best = 0.0, []
    for row in rows:
        hidden = ends.embed(row)
        with torch.inference_mode():
            for start, end in pairwise(cuts):
                hidden = span.forward(passed(hidden, kind.wire), Batch.stateless((len(row),)), (start, end))
            logits = ends.head(passed(hidden, kind.wire))
            total += float(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
            best.append(logits.argmax(dim=-1))
    return Score(total / (rows.numel() - len(rows)), torch.stack(best), span.bytes)


def scores(checkpoint: Checkpoint, rows: Tensor) -> Iterator[tuple[Kind, Score]]:
    """Each kind's, as they come."""
    for kind in KINDS:
        yield kind, score(checkpoint, kind, rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", required=True, help="a folder or a GGUF file, such as SmolLM2's")
    parser.add_argument("--text", type=Path, required=True, help="English text, plain or compressed")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=0, help="how many; 4 with --quick, else 16")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    checkpoint = open_checkpoint(source_of(options.model), Setup(options.model, 1).cache_folder)
    num_windows = options.windows or (4 if options.quick else 16)
    rows = windows(checkpoint, read(options.text), num_windows, options.window)
    report = Report()
    hidden_size = int(checkpoint.config.hidden_size)
    exact: Score | None = None
    for kind, found in scores(checkpoint, rows):
        exact = exact or found
        same = float((found.best == exact.best).float().mean())
        report.add(Measured(f"perplexity, {kind.name}", found.perplexity, "", exact.perplexity))
        report.add(Measured(f"same first choice, {kind.name}", same, "", 1.0))
        report.add(
            Measured(f"weights, {kind.name}", found.weight_bytes / 2**20, "MiB", exact.weight_bytes / 2**20)
        )
        wire, full = kind.wire.token_bytes(hidden_size), Encoding.FLOAT32.token_bytes(hidden_size)
        report.add(Measured(f"bytes a token and hop, {kind.name}", wire, "bytes", full))
    report.finish(options.json)


if __name__ == "__main__":
    main()
