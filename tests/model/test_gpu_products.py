"""Products with small weights by kernels for a GPU, in Triton's interpreter, and what is compiled for real devices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from corolla.model.attention import Batch, Segment
from corolla.model.checkpoint import Checkpoint, open_checkpoint
from corolla.model.device import Ways
from corolla.model.experts import STACKED, Experts
from corolla.model.families import GROUPED_MM, Skeleton
from corolla.model.gathered import Gathering
from corolla.model.graphs import Repeater
from corolla.model.linear import (
    DenseLinear,
    FrozenLinear,
    Nf4Linear,
    PlainInt8Linear,
    SmallLinear,
    quantized,
)
from corolla.model.placing import Keeping
from corolla.model.quantization import Shelf, Stored, dequantize, gathered, quantize, weight_bytes
from corolla.model.siblings import PartLinear, whole_of
from corolla.model.span import Span
from corolla.model.weights import load_part
from corolla.protocol.tensors import Quantization
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import NUM_BLOCKS, save_tiny

products: Any = pytest.importorskip("corolla.model.gpu.products")
experts: Any = pytest.importorskip("corolla.model.gpu.experts")
tiles_module: Any = pytest.importorskip("corolla.model.gpu.tiles")

CPU = torch.device("cpu")
SCHEMES = pytest.mark.parametrize("scheme", [Quantization.NF4, Quantization.INT8])
CLOSE = 1e-5  # of the result's norm: both ways sum in float32, in another order
HALF = 2e-3  # likewise, where weights and the result are rounded to float16


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# one weight


@SCHEMES
@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 70])
@pytest.mark.parametrize("num_inputs", [192, 512])  # steps of the loop that are cut short, and whole ones
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # which are cut otherwise
def test_rows_are_multiplied_by_the_weights_that_codes_stand_for(
    scheme: Quantization, num_rows: int, num_inputs: int, dtype: torch.dtype
) -> None:
    weight, bias = quantize(random(70, num_inputs), scheme), random(70, seed=2).to(dtype)
    rows, plain = random(1, num_rows, num_inputs, seed=3).to(dtype), dequantize(weight)
    for added in (bias, None):
        got = products.multiply(rows, weight, added)
        expected = F.linear(rows.float(), plain, None if added is None else added.float())
        assert got.dtype is dtype
        assert distance(got.float(), expected) < (CLOSE if dtype is torch.float32 else HALF)


def test_inputs_of_int8_need_not_fill_a_slice() -> None:
    weight, rows = quantize(random(5, 32), Quantization.INT8), random(2, 32, seed=3)
    assert distance(products.multiply(rows, weight, None), rows @ dequantize(weight).T) < CLOSE


@SCHEMES
def test_no_rows_give_no_rows(scheme: Quantization) -> None:
    assert products.multiply(random(0, 64), quantize(random(8, 64), scheme), None).shape == (0, 8)


@SCHEMES
def test_layers_multiply_few_rows_by_kernels_and_many_by_wide_weights(
    scheme: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = quantize(random(70, 128), scheme), random(70, seed=2)
    layer = quantized(weight, bias, CPU, products)
    assert isinstance(layer, (Nf4Linear, PlainInt8Linear))
    assert products.is_right(CPU, scheme, torch.float32, is_sorted=False)
    taken: list[int] = []
    multiply: Callable[..., Tensor] = products.multiply

    def counting(rows: Tensor, *rest: Any) -> Tensor:
        taken.append(len(rows))
        return multiply(rows, *rest)

    monkeypatch.setattr(products, "multiply", counting)
    for num_rows in (1, products.MOST_ROWS, products.MOST_ROWS + 1):
        rows = random(num_rows, 128, seed=3)
        assert distance(layer(rows), F.linear(rows, dequantize(weight), bias)) < CLOSE
    assert taken == [1, products.MOST_ROWS]


@SCHEMES
def test_gradients_of_the_input_are_those_of_the_plain_weights(scheme: Quantization) -> None:
    weight = quantize(random(600, 128), scheme)  # more than one tile
    layer = quantized(weight, None, CPU, products)
    rows, upstream = random(5, 128, seed=3).requires_grad_(), random(5, 600, seed=4)
    (gradient,) = torch.autograd.grad(layer(rows), rows, upstream)
    assert distance(gradient, upstream @ dequantize(weight)) < CLOSE


def test_a_device_that_multiplies_wrongly_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    products.is_right.cache_clear()
    monkeypatch.setattr(products, "multiply", lambda rows, weight, bias: rows.new_zeros(len(rows), 80))
    assert not products.takes(random(1, 64), Quantization.NF4)
    assert not products.takes(random(1, 64), Quantization.NF4)
    assert len(caplog.records) == 1
    products.is_right.cache_clear()


# the table of values, as a device looks it up


def run(assembler: str, registers: dict[str, int]) -> dict[str, int]:
    """What a few lines of PTX leave in registers, by the PTX manual's words for each of these instructions."""

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def permuted(low: int, high: int, selector: int) -> int:
        parts = (low | high << 32).to_bytes(8, "little")
        chosen = [selector >> 4 * place & 15 for place in range(4)]
        signs = [0xFF if parts[each & 7] & 128 else 0 for each in chosen]
        picked = [sign if each & 8 else parts[each & 7] for each, sign in zip(chosen, signs, strict=True)]
        return int.from_bytes(bytes(picked), "little")

    def chosen(a: int, b: int, c: int, table: int) -> int:
        places = ((a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1 for bit in range(32))
        return sum((table >> place & 1) << bit for bit, place in enumerate(places))

    operations: dict[str, Callable[..., int]] = {
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "prmt.b32": permuted,
        "lop3.b32": chosen,
    }
    for line in assembler.strip("{}\n").splitlines():
        if line.startswith(".reg"):
            continue
        name, _, rest = line.partition(" ")
        target, *operands = (part.strip() for part in rest.rstrip(";").split(","))
        registers[target] = operations[name](*map(value, operands))
    return registers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_looked_up_in_registers(dtype: torch.dtype) -> None:
    words = (products._BFLOAT16_WORDS if dtype is torch.bfloat16 else products._FLOAT16_WORDS).value
    table = {f"${5 + 4 * index}": word & 0xFFFFFFFF for index, word in enumerate((*words, 0xFF00))}
    values = torch.tensor(products._VALUES.value).to(dtype)
    for base in range(16):
        pairs = [((base + 3 * place) % 16, (5 * base + place) % 16) for place in range(4)]
        codes = sum((high << 4 | low) << 8 * place for place, (high, low) in enumerate(pairs))
        found = run(products._LOOKING_UP.value, {**table, "$4": codes})
        bits = b"".join(found[f"${index}"].to_bytes(4, "little") for index in range(4))
        looked_up = torch.frombuffer(bytearray(bits), dtype=dtype)
        expected = [high for high, _ in pairs] + [low for _, low in pairs]
        assert torch.equal(looked_up, values[expected])


# experts


def tiles_in_python(chosen: list[int], rows_each: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Entries in order, and of each tile that has some its expert, its first and the end of its expert's."""
    order = sorted(range(len(chosen)), key=lambda entry: chosen[entry])
    tiles = []
    for expert in sorted(set(chosen)):
        begin = sum(each < expert for each in chosen)
        end = begin + chosen.count(expert)
        tiles += [(expert, first, end) for first in range(begin, end, rows_each)]
    return order, tiles


@given(st.lists(st.integers(0, 5), min_size=1, max_size=150), st.integers(6, 17))
@settings(max_examples=40)
def test_tiles_hold_entries_of_one_expert_each_by_counting_and_by_sorting(
    chosen: list[int], num_experts: int
) -> None:
    entries = torch.tensor(chosen)
    by_counting = tiles_module.tiles_of(entries[:, None], num_experts)
    for way in (tiles_module._counted, tiles_module._sorted):
        parts = way(entries, num_experts, by_counting.num_rows, len(by_counting.firsts))
        order, firsts, ends, owners = (part.tolist() for part in parts)
        full = [each for each in zip(owners, firsts, ends, strict=True) if each[1] < each[2]]
        assert (order, full) == tiles_in_python(chosen, by_counting.num_rows)
        assert all(0 <= owner < num_experts for owner in owners)


def test_many_entries_are_sorted_and_none_have_no_tiles() -> None:
    chosen = torch.randint(0, 4, (1500, 2), generator=torch.Generator().manual_seed(0))
    tiles = tiles_module.tiles_of(chosen, 4)
    assert torch.equal(tiles.order, torch.argsort(chosen.flatten(), stable=True))
    assert len(tiles_module.tiles_of(chosen[:0], 4).firsts) == 0


@SCHEMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "chosen",
    [[[0, 3], [3, 5], [3, 0]], [[2, 2]] * 20, [[0]], [[each, 6 - each] for each in range(7)]],
    ids=["some", "one", "single", "each"],
)
def test_tokens_are_multiplied_by_the_weights_of_their_experts_and_back_in_order(
    scheme: Quantization, dtype: torch.dtype, chosen: list[list[int]]
) -> None:
    weights = [quantize(random(128, 128, seed=expert) / 16, scheme) for expert in range(7)]
    together, biases = gathered(weights, 7, CPU), random(7, 128, seed=8).to(dtype)
    tokens = random(len(chosen), 128, seed=9).to(dtype)
    tiles = tiles_module.tiles_of(torch.tensor(chosen), 7)
    rows = products.gather_multiply(tokens, together, biases, tiles)
    got = products.multiply_scatter(rows, together, None, tiles)
    expected = []
    for token, each in zip(tokens, chosen, strict=True):
        for weight, bias in ((dequantize(weights[expert]), biases[expert]) for expert in each):
            expected.append((token.float() @ weight.T + bias.float()) @ weight.T)
    assert distance(got.float(), torch.stack(expected)) < (CLOSE if dtype is torch.float32 else HALF)


# blocks

FORCED = Keeping(is_joined=True, products=products)
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 128},
    "qwen3_moe": {"moe_intermediate_size": 64, "intermediate_size": 128},
    "gpt_oss": {"intermediate_size": 64},
}


class Tiny:
    """A tiny model's checkpoint, and its blocks as a GPU would keep them."""

    def __init__(self, folder: Path, family: str, **changes: Any) -> None:
        self.whole = save_tiny(folder / "model", family, **changes)
        source = ModelSource(SourceKind.FOLDER, str(folder / "model"))
        self.checkpoint: Checkpoint = open_checkpoint(source, folder / "cache")
        self.folder = folder

    def span(
        self, scheme: Quantization | None, keeping: Keeping | None, num_blocks: int = NUM_BLOCKS
    ) -> Span:
        skeleton = Skeleton(self.checkpoint.config)
        shelf = Shelf(self.folder / scheme, scheme) if scheme is not None else None
        blocks, shapes, windows = {}, {}, {}
        for block in range(num_blocks):
            module = skeleton.take_block(block)
            shapes[block], windows[block] = skeleton.cache_shape(module), skeleton.window(module)
            prefix = skeleton.block_prefix(block)
            blocks[block] = load_part(
                self.checkpoint, skeleton, prefix, module, torch.float32, CPU, shelf, keeping
            )
        span = Span(blocks, shapes, skeleton.rotary())
        span.windows, span.hidden_size = windows, skeleton.hidden_size
        return span


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("mixture"), request.param, **MIXTURES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("llama"), "qwen2")  # which has biases


def experts_in(span: Span) -> list[nn.Module]:
    return [
        part
        for block in span.modules.values()
        for name, part in block.named_modules()
        if name.endswith("mlp.experts")
    ]


class NoProducts:
    """A device without kernels for small weights, whose int8 rounds nothing."""

    def takes(self, rows: Tensor, scheme: Quantization) -> bool:
        return False

    def take_experts(self, device: torch.device, scheme: Quantization | None, dtype: torch.dtype) -> bool:
        return False

    def multiply(self, rows: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
        raise RuntimeError("not asked for")


APART = Keeping(is_joined=False, products=NoProducts())


@pytest.mark.parametrize("scheme", [Quantization.NF4, Quantization.INT8, None])
def test_a_mixture_with_grouped_experts_computes_what_experts_apart_do(
    mixture: Tiny, scheme: Quantization | None
) -> None:
    grouped, apart = mixture.span(scheme, FORCED), mixture.span(scheme, APART)
    assert all(isinstance(each, experts.GroupedExperts) for each in experts_in(grouped))
    assert all(isinstance(each, Experts) for each in experts_in(apart))
    upstream, batch = random(23, 64, seed=5), Batch.stateless((23,))
    results = []
    for span in (grouped, apart):
        hidden = random(23, 64).requires_grad_()
        output = span.forward(hidden, batch)
        results.append((output.detach(), *torch.autograd.grad(output, hidden, upstream)))
    for got, expected in zip(*results, strict=True):
        assert distance(got, expected) < CLOSE


def test_weights_that_a_scheme_cannot_hold_are_grouped_as_they_are(tmp_path: Path) -> None:
    model = Tiny(
        tmp_path, "mixtral", intermediate_size=96
    )  # 64 inputs, and 96, which are no whole groups of NF4
    grouped, apart = model.span(Quantization.NF4, FORCED), model.span(Quantization.NF4, APART)
    layer = experts_in(grouped)[0]
    assert isinstance(layer, experts.GroupedExperts)
    assert layer.bytes == 4 * (weight_bytes(Quantization.NF4, 192, 64) + 4 * 64 * 96)
    hidden, batch = random(5, 64), Batch.stateless((5,))
    assert distance(grouped.forward(hidden, batch), apart.forward(hidden, batch)) < CLOSE


@SCHEMES
def test_grouped_experts_are_as_light_as_planned_and_come_from_the_shelf(
    mixture: Tiny, scheme: Quantization
) -> None:
    skeleton = Skeleton(mixture.checkpoint.config)
    first, second = (mixture.span(scheme, FORCED).modules[2].get_submodule("mlp.experts") for _ in range(2))
    assert isinstance(first, experts.GroupedExperts)
    prefix = f"{skeleton.block_prefix(2)}mlp.experts."
    biases = sum(
        4 * each.numel()
        for name, each in skeleton.tensors.items()
        if name.startswith(prefix) and "bias" in name
    )
    assert first.bytes == skeleton._bytes(prefix, torch.float32, scheme) - biases
    assert not first.inner._parameters.keys() & set(STACKED)
    rows = random(2, 64), torch.tensor([[0, 3], [1, 0]]), torch.ones(2, 2)
    assert torch.equal(first(*rows), second(*rows))


def test_grouped_experts_never_ask_the_device(mixture: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlaunched(rows: Tensor, weights: Stored, bias: Tensor | None, tiles: Any) -> Tensor:
        return rows.new_empty(len(tiles.order), weights.shape[0] // tiles.num_experts)

    layer = experts_in(mixture.span(Quantization.NF4, FORCED))[0]
    monkeypatch.setattr(experts, "gather_multiply", unlaunched)
    monkeypatch.setattr(experts, "multiply_scatter", unlaunched)
    monkeypatch.setattr(tiles_module, "_counted", tiles_module._sorted)
    with FakeTensorMode(allow_non_fake_inputs=True):  # it has shapes and no numbers: asking for one raises
        chosen = torch.zeros(9, 2, dtype=torch.int64)
        assert layer(torch.empty(9, 64), chosen, torch.empty(9, 2)).shape == (9, 64)
        with pytest.raises(DataDependentOutputException):
            chosen.sum().item()


@pytest.mark.parametrize("mixture", ["gpt_oss"], indirect=True)
def test_recorded_passes_through_grouped_experts_equal_those_computed_anew(mixture: Tiny) -> None:
    outputs = []
    for recorder in (Repeater(), None):
        span = mixture.span(Quantization.INT8, FORCED, num_blocks=1)
        span.allocate(4, ways=Ways(tabled=Gathering(), recorder=recorder))
        steps = [random(2, 64, seed=step) for step in range(3)]
        batches = [Batch((Segment((0,), step, 1), Segment((1,), step, 1))) for step in range(3)]
        outputs.append(torch.stack([span.forward(*each) for each in zip(steps, batches, strict=True)]))
    assert distance(*outputs) < CLOSE


@pytest.mark.parametrize("scheme", [None, Quantization.NF4, Quantization.INT8])
def test_siblings_share_one_product(llama: Tiny, scheme: Quantization | None) -> None:
    together, apart = llama.span(scheme, FORCED), llama.span(scheme, APART)
    kind = DenseLinear if scheme is None else SmallLinear
    attention: Any = together.modules[1].get_submodule("self_attn")
    mlp: Any = together.modules[1].get_submodule("mlp")
    for siblings in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
        assert all(isinstance(layer, PartLinear) for layer in siblings)
        whole = whole_of(siblings)
        assert isinstance(whole, kind)
        assert whole.bytes == sum(layer.bytes for layer in siblings)
    planned = Skeleton(llama.checkpoint.config).block_bytes(1, torch.float32, scheme)
    norms = 4 * sum(part.numel() for part in together.modules[1].parameters() if part.dim() == 1)
    layers = [part for part in together.modules[1].modules() if isinstance(part, FrozenLinear)]
    plain = sum(4 * part.numel() for part in together.modules[1].parameters() if part.dim() == 2)
    assert sum(layer.bytes for layer in layers) + norms + plain == planned
    upstream, batch = random(7, 64, seed=5), Batch.stateless((7,))
    results = []
    for span in (together, apart):
        hidden = random(7, 64).requires_grad_()
        output = span.forward(hidden, batch)
        results.append((output.detach(), *torch.autograd.grad(output, hidden, upstream)))
    for got, expected in zip(*results, strict=True):
        assert distance(got, expected) < CLOSE


def test_plain_experts_on_a_gpu_are_those_that_ask_nothing(mixture: Tiny) -> None:
    skeleton = Skeleton(mixture.checkpoint.config)
    block: Any = skeleton.take_block(2)
    assert block.mlp.experts.config._experts_implementation == GROUPED_MM
    plain: Any = mixture.whole.base_model.get_submodule("layers.2.mlp.experts")
    hidden, weights = random(9, 64), torch.rand(9, 2)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    outputs = []
    for implementation in (GROUPED_MM, "eager"):
        mixture.whole.set_experts_implementation(implementation)
        outputs.append(plain(hidden, chosen, weights).detach())
    assert distance(*outputs) < CLOSE


# what comes out for real devices

COMPILE = r"""
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from corolla.model.gpu import products, tiles

tools = Path(triton.__file__).parent / "backends/nvidia/bin"

def tell(kernel, arguments, constants, num_warps):
    aligned = [at for at, (name, kind) in enumerate(arguments.items()) if kind[0] == "*" or name in ALIGNED]
    source = ASTSource(
        kernel,
        {**arguments, **dict.fromkeys(constants, "constexpr")},
        constants,
        attrs={(at,): [["tt.divisibility", 16]] for at in aligned},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        asked = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        used = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", used)
    print("mma.sync" in compiled.asm["ptx"] or "wgmma" in compiled.asm["ptx"], stack, compiled.metadata.shared)

ALIGNED = ("num_outputs", "num_inputs")
plain = {"bias": "*bf16", "output": "*bf16", **dict.fromkeys(("order", "firsts", "ends", "experts"), "*i32")}
plain |= dict.fromkeys(("num_rows", *ALIGNED, "num_chosen"), "i32")
for form, codes, scales in ((0, "*u8", "*fp32"), (1, "*i8", "*bf16"), (2, "*bf16", "*bf16")):
    for num_rows in (1, 32, 64) if form == 0 else (1,):
        cut = products.cut_of(num_rows, is_plain=form == 2)
        constants = {"form": form, "is_even": True, "is_quick": True, "has_bias": num_rows == 64}
        constants |= {"is_sorted": num_rows > 1, "gathers": num_rows == 32, "scatters": num_rows == 64}
        constants |= {"tile_rows": cut.rows, "tile_outputs": cut.outputs}
        constants |= {"num_slices": cut.slices, "stages": cut.stages}
        tell(products._multiply, {"rows": "*bf16", "codes": codes, "scales": scales, **plain}, constants, cut.warps)
counted = {"entries": "*i64", "order": "*i32", "tiles": "*i32"}
counted |= dict.fromkeys(("count", "num_experts", "num_tiles"), "i32")
tell(tiles._count, counted, {"size": 8, "at_once": 64, "filled_experts": 128}, 8)
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.long), 90])
def test_kernels_compile_for_real_devices_and_keep_their_numbers_in_registers(
    capability: int, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert [uses_tensor_cores for uses_tensor_cores, *_ in compiled] == ["True"] * 5 + ["False"]
    for _, stack_bytes, shared_bytes in compiled:
        assert int(stack_bytes) <= 8  # at most a number that is only needed after the loop
        assert int(shared_bytes) <= 99 * 1024  # what the smallest of these devices gives a program
