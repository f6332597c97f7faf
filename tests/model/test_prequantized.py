"""Checkpoints that are quantized already: the weights that they stand for, exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, LlamaConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from corolla.model import prequantized
from corolla.model.attention import Batch
from corolla.model.checkpoint import Checkpoint, open_checkpoint
from corolla.model.linear import FrozenLinear
from corolla.model.quantization import Shelf
from corolla.model.span import Span
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.tensors import Quantization
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import NUM_BLOCKS, save_tiny

CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def bnb4(kind: str, nested: bool) -> Callable[[str, Tensor], Tensors]:
    def put(name: str, weight: Tensor) -> Tensors:
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=nested
        )
        parts = state.as_dict(packed=True)
        return {name: codes, **{f"{name}.{part}": tensor for part, tensor in parts.items()}}

    return put


def bnb8(name: str, weight: Tensor) -> Tensors:
    largest = weight.abs().amax(dim=1)
    codes = (weight * (127 / largest)[:, None]).round().to(torch.int8)
    base = name.removesuffix(".weight")
    return {name: codes, f"{base}.SCB": largest, f"{base}.weight_format": torch.zeros((), dtype=torch.uint8)}


def fp8(name: str, weight: Tensor) -> Tensors:
    rows, columns = -(-weight.shape[0] // 32), -(-weight.shape[1] // 32)
    scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) / 100 + 0.005
    wide = scales.repeat_interleave(32, 0)[: weight.shape[0]].repeat_interleave(32, 1)[:, : weight.shape[1]]
    return {name: (weight / wide).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


FORMS: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Tensors]]] = {
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb4("nf4", nested=False)),
    "nf4 nested": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb4("nf4", nested=True)),
    "fp4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, bnb4("fp4", nested=False)),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, fp8),
}


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), folder / "cache")


def save_quantized(folder: Path, form: str) -> None:
    """A tiny Llama whose blocks' linear layers are stored in `form`."""
    save_tiny(folder, intermediate_size=128)
    fields, put = FORMS[form]
    stored: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_linear = name.endswith("proj.weight")
        stored.update(put(name, tensor) if is_linear else {name: tensor})
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))


def expected_weight(stored: Tensors, form: str, name: str) -> Tensor:
    """What the form's own documentation says, written out once more."""
    codes, base = stored[name], name.removesuffix(".weight")
    if form == "int8":
        return codes.float() * stored[f"{base}.SCB"][:, None] / 127
    if form == "fp8":
        scales = stored[f"{name}_scale_inv"]
        return torch.stack(
            [
                torch.stack([codes[i, j].float() * scales[i // 32, j // 32] for j in range(codes.shape[1])])
                for i in range(codes.shape[0])
            ]
        )
    parts = {
        key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")
    }
    state = functional.QuantState.from_dict(dict(parts), device=CPU)
    weight: Tensor = functional.dequantize_4bit(codes, state)
    return weight


@pytest.mark.parametrize("form", FORMS)
def test_layers_compute_with_just_the_weights_that_were_stored(form: str, tmp_path: Path) -> None:
    save_quantized(tmp_path, form)
    stored = load_file(tmp_path / "model.safetensors")
    span = Span.load(open_folder(tmp_path), 0, NUM_BLOCKS, torch.float32, CPU)
    for target in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        layer: Any = span.modules[1].get_submodule(target)
        assert isinstance(layer, FrozenLinear)
        expected = expected_weight(stored, form, f"model.layers.1.{target}.weight")
        assert torch.allclose(layer.dense_weight(), expected, rtol=1e-6, atol=1e-9)
    assert bool(torch.isfinite(span.forward(torch.randn(7, 64), Batch.stateless((7,)))).all())


@pytest.mark.parametrize("form", ["nf4", "nf4 nested"])
def test_nf4_made_small_again_has_the_same_weights(form: str, tmp_path: Path) -> None:
    save_quantized(tmp_path, form)
    exact = Span.load(open_folder(tmp_path), 0, 2, torch.float32, CPU)
    shelf = Shelf(tmp_path / "shelf", Quantization.NF4)
    small = Span.load(open_folder(tmp_path), 0, 2, torch.float32, CPU, shelf=shelf)
    assert small.bytes < exact.bytes / 4
    for target in ("self_attn.q_proj", "mlp.down_proj"):
        layers: list[Any] = [span.modules[1].get_submodule(target) for span in (exact, small)]
        assert torch.allclose(layers[0].dense_weight(), layers[1].dense_weight(), rtol=1e-6)


def test_experts_of_gpt_oss_in_mxfp4_are_those_of_transformers() -> None:
    random = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(110, 135, (3, 8, 2), dtype=torch.uint8, generator=random)
    stored = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}
    ((name, parts),) = prequantized.sources(stored).items()
    assert name == "experts.gate_up_proj"
    got = prequantized.plain(parts, stored.__getitem__, GptOssConfig())
    assert torch.equal(got, convert_moe_packed_tensors(blocks, scales))


def test_a_gpt_oss_in_mxfp4_loads(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gpt_oss", intermediate_size=64)
    stored: Tensors = {}
    random = torch.Generator().manual_seed(3)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, in_features, out_features = tensor.shape
            shape = (num_experts, out_features, in_features // 32, 16)
            stored[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
            stored[f"{name}_scales"] = torch.full(shape[:3], 124, dtype=torch.uint8)
        else:
            stored[name] = tensor
    save_file(stored, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    span = Span.load(open_folder(tmp_path), 1, 3, torch.float32, CPU)
    experts: Any = span.modules[2].get_submodule("mlp.experts")
    name = "model.layers.2.mlp.experts.down_proj"
    expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    assert torch.equal(experts._down[1].dense_weight(), expected[1].T.float())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8 without blocks"),
        ({}, "an unknown method"),
    ],
)
def test_other_forms_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    config = LlamaConfig()
    config.quantization_config = fields
    assert prequantized.refusal(config) == named


def test_a_damaged_form_is_told(tmp_path: Path) -> None:
    save_quantized(tmp_path, "fp8")
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(9, 9)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CorollaError) as caught:
        Span.load(open_folder(tmp_path), 0, 1, torch.float32, CPU)
    assert caught.value.code is Code.DAMAGED_WEIGHTS
