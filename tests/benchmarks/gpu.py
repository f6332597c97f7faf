"""A span on a GPU against its memory: time per step beside the time that reading its weights once must take.

Blocks of Llama-3-70B's shape with random weights, in bfloat16 and in NF4, decoding one token a row at batch 1, 8
and 32 behind `--context` tokens. Bandwidth is measured in the same run, by copying a buffer much larger than any
cache. Without a GPU it says so and measures nothing; `--device cpu --tiny` runs all of it small, to try the program.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from corolla.model.attention import Batch, Segment
from corolla.model.families import Skeleton
from corolla.model.placing import Placer, Quantizer
from corolla.model.quantization import Shelf, Stored
from corolla.model.span import Span
from corolla.protocol.tensors import Quantization
from tests.benchmarks.report import Measured, Report, arguments, median

BATCHES = (1, 8, 32)
WITHIN = 1.25  # times the limit, at batch 1 in bfloat16
SPEEDUP = 2.0  # of NF4 over bfloat16, at batch 1
COPIED_BYTES = 1 << 30
PAGE_TOKENS = 64


def shape(num_blocks: int, *, is_tiny: bool) -> LlamaConfig:
    """Llama-3-70B's blocks, or a hundred-thousandth of them."""
    hidden_size, intermediate_size, num_heads = (256, 512, 8) if is_tiny else (8192, 28672, 64)
    return LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_blocks,
        num_attention_heads=num_heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


def random_span(config: LlamaConfig, device: torch.device, scheme: Quantization | None) -> Span:
    """Blocks with weights of the right size, straight on the device."""
    skeleton = Skeleton(config)
    blocks: dict[int, nn.Module] = {}
    shapes = {}
    for block in range(skeleton.num_blocks):
        module = skeleton.take_block(block)
        shapes[block] = skeleton.cache_shape(module)
        placer = Placer(module, torch.bfloat16, device, Drawn(scheme) if scheme is not None else None)
        for name, parameter in tuple(module.named_parameters()):
            placer.place(name, drawn(tuple(parameter.shape), device))
        placer.finish()
        blocks[block] = placer.module
    rotary = skeleton.rotary()
    span = Span(blocks, shapes, rotary.to(device) if rotary is not None else None)
    span.hidden_size, span.dtype, span.device = skeleton.hidden_size, torch.bfloat16, device
    span.recognise()
    span.bytes = sum(skeleton.block_bytes(block, torch.bfloat16, scheme) for block in blocks)
    return span


def drawn(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Random weights, or a norm's."""
    numbers = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return numbers.fill_(1.0) if len(shape) == 1 else numbers.normal_(std=shape[-1] ** -0.5)


class Drawn(Quantizer):
    """Codes that are drawn, not found, straight on the device, and kept nowhere."""

    def __init__(self, scheme: Quantization) -> None:
        super().__init__(Shelf(Path("nowhere"), scheme), "")

    def small(self, name: str, weight: Tensor) -> Stored:
        """NF4 codes for a weight of this shape."""
        out_features, in_features = weight.shape
        count = weight.numel()
        codes = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=weight.device)
        scales = torch.full((count // 64,), in_features**-0.5, device=weight.device)
        return Stored(Quantization.NF4, (out_features, in_features), {"codes": codes, "scales": scales})


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, size_bytes: int) -> float:
    """Bytes a second that the device's memory reads or writes, the best of several copies."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(10):
        wait(device)
        began = time.perf_counter()
        target.copy_(source)
        wait(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size_bytes / fastest


def step_s(span: Span, num_rows: int, context: int, num_steps: int) -> float:
    """The median time of one token for each of so many rows."""
    num_pages = -(-(context + num_steps + 8) // PAGE_TOKENS)
    span.allocate(num_rows * num_pages, PAGE_TOKENS)
    rows = [tuple(range(row * num_pages, (row + 1) * num_pages)) for row in range(num_rows)]
    hidden: Tensor = torch.randn(num_rows, span.hidden_size, dtype=span.dtype, device=span.device)
    times = []
    for step in range(num_steps + 4):
        batch = Batch(tuple(Segment(pages, context + step, 1) for pages in rows))
        wait(span.device)
        began = time.perf_counter()
        span.forward(hidden, batch)
        wait(span.device)
        times.append(time.perf_counter() - began)
    return median(times[4:])  # the first are recorded and warm up


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--blocks", type=int, default=8, help="1.7 GB each in bfloat16")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tiny", action="store_true", help="blocks of a few MB, to try the program")
    options = parser.parse_args()
    report = Report()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        report.finish(options.json)
        return
    bytes_s = bandwidth(device, COPIED_BYTES >> (6 if options.tiny else 0))
    report.add(Measured("memory bandwidth", bytes_s / 1e9, "GB/s"))
    config = shape(options.blocks, is_tiny=options.tiny)
    plain_s: dict[int, float] = {}
    for scheme in (None, Quantization.NF4):
        kind = scheme or "bfloat16"
        span = random_span(config, device, scheme)
        limit_s = span.bytes / bytes_s
        for num_rows in BATCHES:
            took_s = step_s(span, num_rows, options.context, 8 if options.quick else 64)
            name = f"{options.blocks} blocks, {kind}, batch {num_rows}"
            target = WITHIN if scheme is None and num_rows == 1 else None
            report.add(Measured(f"{name}: step", took_s * 1e3, "ms", limit_s * 1e3, target, at_most=True))
            if scheme is None:
                plain_s[num_rows] = took_s
                continue
            target = SPEEDUP if num_rows == 1 else None
            speed, beside = 1 / took_s, 1 / plain_s[num_rows]
            report.add(Measured(f"{name}: against bfloat16", speed, "steps/s", beside, target))
        if device.type == "cuda":
            name = f"{options.blocks} blocks, {kind}: batch {BATCHES[-1]} is recorded"
            report.add(Measured(name, span.num_recordings, "", target=1))
        del span
    report.finish(options.json)


if __name__ == "__main__":
    main()
