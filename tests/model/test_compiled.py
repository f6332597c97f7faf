"""The compiled walk equals torch: its kernels by themselves, and a span with it beside one without.

That it computes what whole models compute is `test_span`'s business, whose tiny models go through it too.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from corolla.model.attention import Batch, Segment
from corolla.model.checkpoint import open_checkpoint
from corolla.model.compiled import kernels
from corolla.model.compiled import walk as way
from corolla.model.compiled.decoder import MOST_TOKENS, Head
from corolla.model.compiled.team import Team
from corolla.model.device import Ways, quick_product
from corolla.model.linear import FrozenLinear, PackedLinear, quantized
from corolla.model.quantization import Shelf, quantize
from corolla.model.span import Span
from corolla.model.strips import STRIP
from corolla.protocol.tensors import Quantization
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import save_tiny

CPU = torch.device("cpu")
TOLERANCE = 2e-6  # of the largest number; sums are taken in another order
PAGE_TOKENS = 4
CLASSIC = ["llama", "qwen2", "qwen3", "mistral"]


def is_packed_in_strips() -> bool:
    return PackedLinear(torch.randn(STRIP, 16), None).strips is not None


needs_strips = pytest.mark.skipif(
    not is_packed_in_strips(), reason="oneDNN packs float32 otherwise on this processor"
)


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def span_of(
    folder: Path,
    *,
    is_compiled: bool,
    dtype: torch.dtype = torch.float32,
    scheme: Quantization | None = None,
) -> Span:
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), folder)
    shelf = Shelf.of(folder / "shelf", "f" * 32, scheme) if scheme is not None else None
    span = Span.load(checkpoint, 0, 4, dtype, CPU, shelf=shelf)
    span.allocate(200, PAGE_TOKENS, ways=Ways(is_compiled=is_compiled))
    assert span.is_compiled == is_compiled
    return span


def pages_of(row: int, num_tokens: int) -> tuple[int, ...]:
    """Every third page, so that no two are neighbours."""
    return tuple(range(row, row + 3 * -(-num_tokens // PAGE_TOKENS), 3))


def hidden(num_tokens: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(seed))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_exp_is_exact_to_two_units_in_the_last_place_and_ends_in_nothing() -> None:
    arguments = np.concatenate([-np.logspace(-8, np.log10(87), 4000), [0.0]]).astype(np.float32)
    ours = np.array([kernels.exp_negative(number) for number in arguments])
    exact = np.exp(arguments.astype(np.float64))
    assert np.max(np.abs(ours - exact) / exact) < 3 * np.finfo(np.float32).eps
    assert kernels.exp_negative(np.float32(0)) == 1
    assert 0 <= kernels.exp_negative(np.float32(-1e30)) < 2e-38
    assert 0 <= kernels.exp_negative(np.float32(-np.inf)) < 2e-38
    assert np.isnan(kernels.exp_negative(np.float32(np.nan)))


FORMS = ["float32", "bfloat16", "int8", "int4"]


def layer_of(form: str, num_outputs: int, num_inputs: int, *, has_bias: bool = True) -> FrozenLinear:
    generator = torch.Generator().manual_seed(num_outputs)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    bias = torch.randn(num_outputs, generator=generator) if has_bias else None
    if form in ("int8", "int4"):
        return quantized(quantize(weight, Quantization(form)), bias, CPU)
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    return PackedLinear(weight.to(dtype), bias.to(dtype) if bias is not None else None)


@needs_strips
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_inputs", [64, 320])
def test_few_rows_are_multiplied_as_exactly_as_by_whole_weights(form: str, num_inputs: int) -> None:
    """Whatever the form, rows are not rounded."""
    layer = layer_of(form, 3 * STRIP, num_inputs)
    head = Head(layer)
    weight, bias = layer.dense_weight().float(), layer.bias.float() if layer.bias is not None else None
    for num_rows in range(1, 10):
        rows = torch.randn(num_rows, num_inputs)
        assert difference(head.multiply(rows), F.linear(rows, weight, bias)) < 2 * TOLERANCE


def test_bfloat16_is_rounded_to_the_nearest_and_widened_back() -> None:
    numbers_ = torch.cat(
        [torch.randn(200), torch.tensor([0.0, -0.0, 1e-40, 3e38, float("inf"), float("nan")])]
    )
    halves = torch.zeros(len(numbers_), dtype=torch.bfloat16)
    kernels.narrow(numbers_.numpy(), halves.data_ptr())
    assert torch.equal(halves.nan_to_num(7), numbers_.to(torch.bfloat16).nan_to_num(7))
    back = np.zeros(len(numbers_), dtype=np.float32)
    kernels.widen(halves.data_ptr(), back)
    assert torch.equal(torch.from_numpy(back).nan_to_num(7), halves.float().nan_to_num(7))


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_values_are_gathered_for_any_head(dim: int, group: int) -> None:
    weights, values = numbers(group, kernels.KEYS), numbers(37, dim, seed=1)
    parts = numbers(group, dim, seed=2)
    expected = parts + weights[:, :37].astype(np.float64) @ values
    kernels.gather(weights, 37, values.ctypes.data, parts)
    np.testing.assert_allclose(parts, expected, atol=1e-4)


@needs_strips
@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_a_head_equals_the_layer_whoever_computes_it(num_members: int) -> None:
    layer = layer_of("float32", 5 * STRIP, 96, has_bias=False)
    before = torch.get_num_threads()
    torch.set_num_threads(num_members)
    head = Head(layer)
    torch.set_num_threads(before)
    for num_rows in (1, 3, MOST_TOKENS, MOST_TOKENS + 1):
        rows = torch.randn(num_rows, 96)
        assert difference(head.multiply(rows), layer(rows)) < TOLERANCE


def test_only_layers_that_lie_in_strips_get_a_product_of_their_own() -> None:
    plain = nn.Linear(16, STRIP)
    assert quick_product(plain) is plain
    odd = PackedLinear(torch.randn(STRIP + 8, 16), None)
    assert odd.strips is None
    assert quick_product(odd) is odd


@needs_strips
@pytest.mark.parametrize("family", CLASSIC)
def test_a_batch_of_rows_of_all_kinds_equals_torch(tmp_path: Path, family: str) -> None:
    """Short and long rows, in pages far from each other, some of them with several new tokens."""
    save_tiny(tmp_path, family)
    ours, theirs = (span_of(tmp_path, is_compiled=is_compiled) for is_compiled in (True, False))
    lengths, news = (3, 90, 0), (1, 1, 12)
    starts = Batch(
        tuple(Segment(pages_of(row, 100), 0, length) for row, length in enumerate(lengths) if length)
    )
    for span in (ours, theirs):
        span.forward(hidden(starts.num_tokens, 1), starts)
    batch = Batch(tuple(Segment(pages_of(row, 100), lengths[row], new) for row, new in enumerate(news)))
    states = hidden(batch.num_tokens, 2)
    before = states.clone()
    assert difference(ours.forward(states, batch), theirs.forward(states, batch)) < TOLERANCE
    assert torch.equal(states, before)
    part = (1, 3)
    following = Batch((Segment(pages_of(1, 100), 91, 1),))
    step = hidden(1, 3)
    assert difference(ours.forward(step, following, part), theirs.forward(step, following, part)) < TOLERANCE


@needs_strips
@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [
        (torch.bfloat16, None),
        (torch.float32, Quantization.INT8),
        (torch.bfloat16, Quantization.INT8),
        (torch.float32, Quantization.INT4),
    ],
)
def test_lower_precision_differs_from_torch_by_a_few_roundings(
    tmp_path: Path, dtype: torch.dtype, scheme: Quantization | None
) -> None:
    """torch rounds to bfloat16 between any two operations; here only weights, the cache and the output are."""
    save_tiny(tmp_path, "llama")
    outputs = []
    for is_compiled in (True, False):
        span = span_of(tmp_path, is_compiled=is_compiled, dtype=dtype, scheme=scheme)
        span.forward(hidden(40, 1).to(dtype), Batch((Segment(pages_of(0, 60), 0, 40),)))
        output = span.forward(hidden(2, 2).to(dtype), Batch((Segment(pages_of(0, 60), 40, 2),)))
        assert output.dtype is dtype
        outputs.append(output.float())
    assert difference(*outputs) < 4 * 2**-8


@needs_strips
def test_a_token_gets_the_same_bits_whoever_is_beside_it(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    together, alone = (span_of(tmp_path, is_compiled=True) for _ in range(2))
    rows = [pages_of(row, 40) for row in range(3)]
    news = [hidden(1, seed) for seed in range(3)]
    for span in (together, alone):
        for row, pages in enumerate(rows):
            span.forward(hidden(20, 10 + row), Batch((Segment(pages, 0, 20),)))
    batched = together.forward(torch.cat(news), Batch(tuple(Segment(pages, 20, 1) for pages in rows)))
    for row, pages in enumerate(rows):
        assert torch.equal(alone.forward(news[row], Batch((Segment(pages, 20, 1),)))[0], batched[row])


@needs_strips
def test_keys_attended_in_several_parts_equal_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corolla.model.compiled.decoder._FEWEST_KEYS", 8)
    monkeypatch.setattr("corolla.model.compiled.decoder._PIECES_EACH", 16)
    save_tiny(tmp_path, "llama")
    ours, theirs = (span_of(tmp_path, is_compiled=is_compiled) for is_compiled in (True, False))
    for span in (ours, theirs):
        span.forward(hidden(150, 1), Batch((Segment(pages_of(0, 160), 0, 150),)))
    batch = Batch((Segment(pages_of(0, 160), 150, 1),))
    assert difference(ours.forward(hidden(1, 2), batch), theirs.forward(hidden(1, 2), batch)) < TOLERANCE


@needs_strips
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_in_their_row(tmp_path: Path, wrong: float) -> None:
    save_tiny(tmp_path, "llama")
    span = span_of(tmp_path, is_compiled=True)
    states = hidden(2, 1)
    states[0, 5] = wrong
    after = span.forward(states, Batch(tuple(Segment(pages_of(row, 4), 0, 1) for row in range(2))))
    assert not torch.isfinite(after[0]).any()
    assert torch.isfinite(after[1]).all()


@needs_strips
@pytest.mark.parametrize("family", ["mixtral", "gemma2", "phi3"])
def test_blocks_of_other_forms_are_left_to_torch(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path, family)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path)), tmp_path)
    span = Span.load(checkpoint, 0, 4, torch.float32, CPU)
    span.allocate(8, PAGE_TOKENS)
    assert not span.is_compiled


@pytest.mark.parametrize("num_members", [1, 2, 5])
def test_a_team_meets_until_all_are_there(num_members: int) -> None:
    team = Team(num_members)
    meeting = np.zeros((2, way.LINE), dtype=np.int64)
    turns = np.zeros((num_members, way.LINE), dtype=np.int64)
    seen: list[list[int]] = []

    def work(member: int, size: int) -> None:
        for turn in range(1, 20):
            turns[member, 0] = turn
            way.meet(meeting, size)
            if member == 0:
                seen.append([int(each) for each in turns[:, 0]])
            way.meet(meeting, size)

    team.run(work)
    assert seen == [[turn] * num_members for turn in range(1, 20)]


def test_the_threads_of_a_team_end_with_it() -> None:
    team = Team(3)
    members = [thread for thread in threading.enumerate() if thread.name in ("member 1", "member 2")]
    del team
    for thread in members:
        thread.join(timeout=60)
        assert not thread.is_alive()
