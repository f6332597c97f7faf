"""Weights in fewer bits: what they cost in accuracy, what they promise, and what is kept on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from corolla.model.attention import Batch
from corolla.model.checkpoint import Checkpoint, open_checkpoint
from corolla.model.ends import Ends
from corolla.model.families import Skeleton
from corolla.model.linear import FrozenLinear, quantized
from corolla.model.pages import SessionPages
from corolla.model.pool import PagePool
from corolla.model.quantization import Shelf, can_hold, dequantize, multiply_nf4, quantize, weight_bytes
from corolla.model.span import Span
from corolla.protocol.steps import NEW_ROW, Row
from corolla.protocol.tensors import Quantization
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import NUM_BLOCKS, VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
# Root mean square error of normally distributed weights, as a share of theirs: half a step of 1/127 of the
# largest in a row; of 1/15 of the range of 32.
ERRORS = {Quantization.INT8: 0.01, Quantization.INT4: 0.08, Quantization.NF4: 0.10}
# Rows and products are rounded to bfloat16, and above the crossing point int4's weights.
ROUNDING = 2**-7


def weights(out_features: int = 100, in_features: int = 192, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def layer(scheme: Quantization, *, bias: bool = True) -> tuple[FrozenLinear, Tensor, Tensor | None]:
    """A layer, the weights that it stands for, and its bias."""
    stored = quantize(weights(), scheme)
    added = torch.randn(100, generator=torch.Generator().manual_seed(1)) if bias else None
    return quantized(stored, added, CPU), dequantize(stored), added


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", Quantization)
def test_weights_come_back_nearly_as_they_were(scheme: Quantization) -> None:
    weight = weights()
    assert distance(dequantize(quantize(weight, scheme)), weight) < ERRORS[scheme]


@pytest.mark.parametrize("scheme", Quantization)
def test_a_row_of_zeros_and_one_with_an_outlier_survive(scheme: Quantization) -> None:
    weight = weights()
    weight[3] = 0
    weight[4, 5] = 40.0
    back = dequantize(quantize(weight, scheme))
    assert torch.equal(back[3], torch.zeros(192))
    assert float((back[4, 5] - 40).abs()) < 40 * 0.05
    assert distance(back[5:], weight[5:]) < ERRORS[scheme]


@pytest.mark.parametrize("scheme", Quantization)
@pytest.mark.parametrize("num_rows", [1, 3, 4, 9, 40, 120])
@pytest.mark.parametrize("bias", [True, False])
def test_every_kernel_multiplies_by_the_same_weights(scheme: Quantization, num_rows: int, bias: bool) -> None:
    fast, weight, added = layer(scheme, bias=bias)
    rows = torch.randn(1, num_rows, 192)
    expected = nn.functional.linear(rows, weight, added)
    got = fast(rows)
    assert got.dtype is torch.float32
    assert distance(got, expected) < ROUNDING
    assert torch.equal(fast.dense_weight(), weight)


@pytest.mark.parametrize("scheme", Quantization)
@pytest.mark.parametrize("num_rows", [1, 6, 120])
def test_the_gradient_of_the_input_is_that_of_the_plain_layer(scheme: Quantization, num_rows: int) -> None:
    fast, weight, _ = layer(scheme)
    rows = torch.randn(2, num_rows, 192, requires_grad=True)
    upstream = torch.randn(2, num_rows, 100)
    (gradient,) = torch.autograd.grad(fast(rows), rows, upstream)
    assert torch.allclose(gradient, upstream @ weight, atol=1e-4)
    with torch.no_grad():
        assert not fast(rows).requires_grad


@pytest.mark.parametrize("scheme", Quantization)
def test_a_row_gives_the_same_alone_and_beside_rows_a_thousand_times_larger(scheme: Quantization) -> None:
    fast, _, _ = layer(scheme)
    rows = torch.randn(130, 192)
    alone = torch.cat([fast(row[None]) for row in rows[:5]])
    rows[5:] *= 1000
    for num_rows in (5, 14, 60, 130):
        assert distance(fast(rows[:num_rows])[:5], alone) < ROUNDING


@pytest.mark.parametrize("scheme", Quantization)
def test_a_layer_weighs_what_was_planned(scheme: Quantization) -> None:
    stored = quantize(weights(128, 192), scheme)
    assert sum(tensor.nbytes for tensor in stored.tensors.values()) == weight_bytes(scheme, 128, 192)
    assert quantized(stored, None, CPU).bytes == weight_bytes(scheme, 128, 192)
    assert not list(quantized(stored, None, CPU).parameters())


def test_a_low_rank_term_goes_around_any_layer() -> None:
    fast, weight, added = layer(Quantization.INT8)
    a, b = nn.Linear(192, 4, bias=False), nn.Linear(4, 100, bias=False)
    rows = torch.randn(5, 192, requires_grad=True)
    output = fast(rows) + b(a(rows))
    output.sum().backward()
    assert rows.grad is not None
    assert a.weight.grad is not None
    assert (
        distance(output.detach(), (nn.functional.linear(rows, weight, added) + b(a(rows))).detach())
        < ROUNDING
    )


def test_shapes_that_no_kernel_takes_are_left_alone() -> None:
    assert not can_hold(Quantization.INT8, 64, 33)
    assert not can_hold(Quantization.NF4, 64, 96)
    assert can_hold(Quantization.INT8, 7, 96)


# a span


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), tmp_path_factory.mktemp("cache"))


def load(checkpoint: Checkpoint, shelf: Shelf | None) -> Span:
    return Span.load(checkpoint, 0, NUM_BLOCKS, torch.float32, CPU, shelf=shelf)


def hidden_states(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("scheme", Quantization)
def test_a_quantized_span_is_near_the_exact_one_and_as_light_as_planned(
    checkpoint: Checkpoint, tmp_path: Path, scheme: Quantization
) -> None:
    span = load(checkpoint, Shelf(tmp_path, scheme))
    exact = load(checkpoint, None)
    batch, hidden = Batch.stateless((19,)), hidden_states(19)
    assert distance(span.forward(hidden, batch), exact.forward(hidden, batch)) < 3 * ERRORS[scheme]
    skeleton = Skeleton(checkpoint.config)
    assert span.bytes == sum(skeleton.block_bytes(i, torch.float32, scheme) for i in range(NUM_BLOCKS))
    assert span.bytes < 0.6 * exact.bytes


@pytest.mark.parametrize("scheme", Quantization)
def test_what_lies_on_the_shelf_is_not_quantized_again(
    checkpoint: Checkpoint, tmp_path: Path, scheme: Quantization
) -> None:
    shelf = Shelf(tmp_path, scheme)
    first = load(checkpoint, shelf)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == NUM_BLOCKS
    second = load(checkpoint, shelf)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    batch, hidden = Batch.stateless((19,)), hidden_states(19)
    assert torch.equal(first.forward(hidden, batch), second.forward(hidden, batch))


def test_a_damaged_shelf_is_filled_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, Quantization.INT8)
    first = load(checkpoint, shelf)
    damaged = sorted(tmp_path.iterdir())[1]
    os.truncate(damaged, 100)
    second = load(checkpoint, shelf)
    assert damaged.stat().st_size > 100
    batch, hidden = Batch.stateless((7,)), hidden_states(7)
    assert torch.equal(first.forward(hidden, batch), second.forward(hidden, batch))


def test_what_comes_from_a_shelf_begins_where_kernels_can_read_it(tmp_path: Path) -> None:
    """A file's tensors lie behind a header of any length; torch's int8 kernel crashed on every second one."""
    shelf = Shelf(tmp_path, Quantization.INT8)
    for length in range(1, 17):
        shelf.write("part", {"n" * length: quantize(weights(), Quantization.INT8)})
        (stored,) = shelf.read("part").values()
        assert all(tensor.data_ptr() % 16 == 0 for tensor in stored.tensors.values())
        assert quantized(stored, None, CPU)(torch.randn(4, 192)).shape == (4, 100)


def test_shelves_are_kept_apart_by_model_and_scheme(tmp_path: Path) -> None:
    folders = {Shelf.of(tmp_path, print_, s).folder for print_ in ("a" * 64, "b" * 64) for s in Quantization}
    assert len(folders) == 6


@pytest.mark.parametrize("scheme", Quantization)
def test_batched_equals_alone_in_a_quantized_span(
    checkpoint: Checkpoint, tmp_path: Path, scheme: Quantization
) -> None:
    spans = [load(checkpoint, Shelf(tmp_path, scheme)) for _ in range(2)]
    for span in spans:
        span.allocate(16, 8)
    together, alone = spans
    pool = PagePool(16, 8)
    sessions = [SessionPages(pool, 1, 40) for _ in range(2)]
    segments = [
        s.apply(1, 0, (Row(NEW_ROW, 0, n),)).segments[0] for s, n in zip(sessions, (3, 30), strict=True)
    ]
    inputs = [hidden_states(3), 50 * hidden_states(30)]
    got = together.forward(torch.cat(inputs), Batch(tuple(segments)))
    apart = [alone.forward(x, Batch((s,))) for x, s in zip(inputs, segments, strict=True)]
    assert distance(got[:3], apart[0]) < 2 * ROUNDING
    assert distance(got[3:], apart[1]) < 2 * ROUNDING


# the ends


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_is_kept_in_eight_bits_and_the_embeddings_as_they_are(tmp_path: Path, is_tied: bool) -> None:
    save_tiny(tmp_path / "model", tie_word_embeddings=is_tied)
    source = ModelSource(SourceKind.FOLDER, str(tmp_path / "model"))
    checkpoint = open_checkpoint(source, tmp_path / "cache")
    exact = Ends.load(checkpoint, torch.float32, CPU)
    light = Ends.load(checkpoint, torch.float32, CPU, shelf=Shelf(tmp_path / "shelf", Quantization.INT8))
    hidden = hidden_states(9)
    logits = exact.head(hidden)
    assert not torch.equal(light.head(hidden), logits)
    assert distance(light.head(hidden), logits) < 2 * ERRORS[Quantization.INT8]
    tokens = torch.arange(3, 20)
    assert torch.equal(light.embed(tokens), exact.embed(tokens))
    saved = 64 * VOCAB_SIZE * 4 - weight_bytes(Quantization.INT8, VOCAB_SIZE, 64)
    assert exact.bytes - light.bytes == saved


@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_of_nf4_on_a_gpu_multiplies_by_the_same_weights(num_rows: int, bias: bool) -> None:
    """Run here on a CPU, where it is not chosen."""
    _, weight, added = layer(Quantization.NF4, bias=bias)
    stored = quantize(weight, Quantization.NF4)
    rows = torch.randn(1, num_rows, 192)
    codes, scales = stored.tensors["codes"], stored.tensors["scales"]
    got = multiply_nf4(rows, codes, scales, stored.shape, added)
    assert distance(got, nn.functional.linear(rows, weight, added)) < ROUNDING
