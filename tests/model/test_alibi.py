"""ALiBi's biases against those that transformers computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon

from corolla.model.alibi import Alibi

LENGTH = 3000


def of_transformers(build: Callable[..., Tensor], num_heads: int) -> Tensor:
    mask = torch.ones(1, LENGTH, dtype=torch.int64)
    return build(mask, num_heads, dtype=torch.float32)[:, 0]


@pytest.mark.parametrize("num_heads", [1, 4, 6, 12, 16, 32, 71, 112])
def test_biases_are_those_of_transformers_at_any_number_of_heads(num_heads: int) -> None:
    bloom = of_transformers(modeling_bloom.build_alibi_tensor, num_heads)
    assert torch.allclose(Alibi(num_heads)(torch.arange(LENGTH)), bloom, rtol=5e-6)
    falcon = of_transformers(modeling_falcon.build_alibi_tensor, num_heads)
    assert torch.equal(Alibi(num_heads, rounded=True)(torch.arange(LENGTH)), falcon)


def test_a_part_of_the_positions_has_the_biases_that_it_has_among_all() -> None:
    alibi = Alibi(6, rounded=True, scale=0.25)
    assert torch.equal(alibi(torch.arange(1000, 1500)), alibi(torch.arange(LENGTH))[:, 1000:1500])
