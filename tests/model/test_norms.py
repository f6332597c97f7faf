"""Which norms are taken in one kernel: those that compute just that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from corolla.model.norms import RootMeanSquareNorm, quick


def weighted(norm: Any) -> Any:
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(1)))
    return norm.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_the_plain_formula_is_recognised_and_computes_the_same(
    kind: Any, eps: float, dtype: torch.dtype
) -> None:
    norm = weighted(kind(64, eps=eps)).to(dtype)
    ours = quick(norm)
    assert isinstance(ours, RootMeanSquareNorm)
    states = 3 * torch.randn(2, 7, 64).to(dtype)
    close = 4 * torch.finfo(dtype).eps
    assert torch.allclose(ours(states).float(), norm(states).float(), rtol=close, atol=close)
    assert ours(states).dtype is dtype
    assert dict(ours.named_parameters()).keys() == dict(norm.named_parameters()).keys()


def test_other_formulas_stay_as_they_are() -> None:
    shifted = weighted(Gemma2RMSNorm(64))  # it adds one to its weight
    assert quick(shifted) is shifted
    layer = nn.LayerNorm(64)
    assert quick(layer) is layer

    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.001

    odd = weighted(OddRMSNorm(64))
    assert quick(odd) is odd
