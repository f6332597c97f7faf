"""A span on a real GPU equals the whole model on the CPU: recordings, kernels of our own and fused pieces, all at once.

Skipped where torch sees no GPU; run with TRITON_INTERPRET=0, or kernels are interpreted there too. In float32 products
may differ in their last bits, so the tolerance is wider than on a CPU; in bfloat16 what is compared is the direction of
the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corolla.model.attention import Batch, Segment
from corolla.model.checkpoint import open_checkpoint
from corolla.model.groups import grouped
from corolla.model.quantization import Shelf
from corolla.model.span import Span
from corolla.protocol.tensors import Quantization
from corolla.protocol.work import ModelSource, SourceKind

from .test_paged import STEPS
from .test_span import NUM_PAGES, PAGE_TOKENS, Session, Tiny, tiny
from .tiny import FAMILIES, NUM_BLOCKS

__all__ = ["tiny"]  # the fixture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

TOLERANCE = 1e-3
# Cosine of most hidden states in bfloat16: where a router's two best experts are nearly tied, some go another way.
ALIKE = 0.99


def span_on_gpu(model: Tiny, dtype: torch.dtype, shelf: Shelf | None = None) -> Span:
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(model.folder)), model.folder)
    span = Span.load(checkpoint, 0, NUM_BLOCKS, dtype, torch.device("cuda", 0), shelf=shelf)
    grouping = grouped(span.windows, span.cache_shapes)
    span.allocate(8 * NUM_PAGES * grouping.num_groups, PAGE_TOKENS, num_host_pages=8, grouping=grouping)
    return span


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_whole_model(tiny: Callable[[str], Tiny], family: str) -> None:
    model = tiny(family)
    span = span_on_gpu(model, torch.float32)
    session = Session(model, [span])
    for rows in STEPS:
        assert session.step(*rows) < TOLERANCE
    assert span.num_recordings or span.depends_on_length


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "gemma2"])
@pytest.mark.parametrize("scheme", [None, Quantization.INT8, Quantization.NF4])
def test_lower_precision_points_the_same_way(
    tiny: Callable[[str], Tiny], family: str, scheme: Quantization | None, tmp_path: Path
) -> None:
    """Beside the same weights, rounded alike, on the CPU."""
    model = tiny(family)
    shelf = Shelf.of(tmp_path, "f" * 32, scheme) if scheme is not None else None
    span = span_on_gpu(model, torch.bfloat16, shelf)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(model.folder)), model.folder)
    beside = Span.load(checkpoint, 0, NUM_BLOCKS, torch.float32, torch.device("cpu"), shelf=shelf)
    beside.allocate(8 * NUM_PAGES, PAGE_TOKENS)
    generator = torch.Generator().manual_seed(3)
    alike, start = [], 0
    for n in (20, 1, 1, 1, 1, 30, 1, 1):
        hidden = torch.randn(n, span.hidden_size, generator=generator)
        own, of_windows = tuple(range(NUM_PAGES)), tuple(range(NUM_PAGES, 2 * NUM_PAGES))
        batch = Batch((Segment(own, start, n, others=(of_windows,)),))
        ours = span.forward(hidden.to(span.device, span.dtype), batch).float().cpu()
        theirs = beside.forward(hidden, Batch((Segment(own, start, n),)))
        alike.append(torch.cosine_similarity(ours, theirs, dim=-1))
        start += n
    assert torch.cat(alike).median() > ALIKE
    assert torch.cat(alike[1:5]).max() > ALIKE  # of those whose pass was recorded
