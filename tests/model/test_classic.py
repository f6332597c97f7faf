"""Which blocks are computed as classic ones. That they compute the same is `test_span`'s business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from corolla.model.checkpoint import open_checkpoint
from corolla.model.classic import classic
from corolla.model.elementwise import Elementwise
from corolla.model.families import Rotary, Skeleton
from corolla.model.quantization import Shelf
from corolla.model.weights import load_part
from corolla.protocol.tensors import Quantization
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import save_tiny

CPU = torch.device("cpu")


def block_of(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, scheme: Quantization | None = None
) -> tuple[nn.Module, Rotary]:
    save_tiny(folder / family, family)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder / family)), folder)
    skeleton = Skeleton(checkpoint.config)
    shelf = Shelf.of(folder, "f" * 32, scheme) if scheme is not None else None
    module = load_part(
        checkpoint, skeleton, skeleton.block_prefix(1), skeleton.take_block(1), dtype, CPU, shelf
    )
    rotary = skeleton.rotary()
    assert rotary is not None
    return module, rotary


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "starcoder2"]
)
def test_blocks_of_the_common_form_are_classic(tmp_path: Path, family: str) -> None:
    module, rotary = block_of(tmp_path, family)
    assert classic(module, 1, None, rotary, Elementwise()) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_hides_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    module, rotary = block_of(tmp_path, "llama", dtype)
    assert classic(module, 1, None, rotary, Elementwise()) is not None


@pytest.mark.parametrize("scheme", list(Quantization))
def test_quantized_blocks_are_classic_too(tmp_path: Path, scheme: Quantization) -> None:
    module, rotary = block_of(tmp_path, "llama", scheme=scheme)
    assert classic(module, 1, None, rotary, Elementwise()) is not None


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt_oss", "phi3", "glm", "olmo"])
def test_blocks_of_other_forms_are_left_to_their_modules(tmp_path: Path, family: str) -> None:
    module, rotary = block_of(tmp_path, family)
    assert classic(module, 1, None, rotary, Elementwise()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_only_looks_like_one_is_found_out(tmp_path: Path, dtype: torch.dtype) -> None:
    module: Any
    module, rotary = block_of(tmp_path, "llama", dtype)
    gated = module.mlp.forward
    module.mlp.forward = lambda states: gated(states) * 1.2
    assert classic(module, 1, None, rotary, Elementwise()) is None
