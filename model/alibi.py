"""ALiBi: instead of rotated keys, scores lean towards near tokens; and BLOOM's blocks, which attend so.

Owns the slopes, and BLOOM's own block: transformers' passes neither an attention function nor our placement
on to its attention, so one of the same parts, under the same names, stands in its place.

A bias is linear in the key's position alone. Softmax does not see what all keys of a query share, so this
equals one that is linear in the distance, and it is how both families compute it.

Source: Press et al. 2022, Train Short, Test Long; BigScience 2022, BLOOM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .attention import Placement, attend


def slopes(num_heads: int) -> Tensor:
    """(num_heads,) float32: how steeply each head's bias grows with the position.

    2^(-8i / n) for head i of n, counted from 1. Where n is no power of two, that for the largest one below n,
    and then every other one for twice as many heads.
    """
    power = 1 << (num_heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    others = [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(first + others, dtype=torch.float32)


class Alibi:
    """The bias of every head, by the position of the key.

    rounded: products are rounded to bfloat16, as Falcon does whatever its dtype. scale: of the products.
    """

    def __init__(self, num_heads: int, *, rounded: bool = False, scale: float = 1.0) -> None:
        self._slopes = slopes(num_heads)
        self._rounded = rounded
        self._scale = scale

    def __call__(self, positions: Tensor) -> Tensor:
        """(num_heads, …) float32, for keys at these positions (…) int64 of a row."""
        if self._slopes.device != positions.device:
            self._slopes = self._slopes.to(positions.device)
        steep = self._slopes.view(-1, *(1 for _ in positions.shape))
        if self._rounded:
            return (steep.bfloat16() * positions).float() * self._scale
        return steep * positions * self._scale


def refusal(config: PretrainedConfig) -> str | None:
    """Why BLOOM's blocks of this configuration cannot be computed; None if they can."""
    if config.slow_but_exact and config.pretraining_tp > 1:
        return "BLOOM with slow_but_exact, where transformers leaves biases out,"
    return None


class BloomAttention(nn.Module):
    """Attention of one block; the parts are those of `inner`, transformers' own."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.layer_idx = int(inner.layer_idx)
        self.head_dim = int(inner.head_dim)
        self.query_key_value: nn.Module = inner.query_key_value
        self.dense: nn.Module = inner.dense
        self._num_heads = int(inner.num_heads)
        self._bias = Alibi(self._num_heads)

    def forward(self, states: Tensor, placement: Placement) -> Tensor:
        """(1, num_tokens, hidden_size), without the residual."""
        fused = self.query_key_value(states)  # (1, num_tokens, 3 * hidden_size)
        by_head = fused.view(*fused.shape[:2], self._num_heads, 3, self.head_dim).transpose(1, 2)
        query, key, value = by_head.unbind(dim=3)  # (1, num_heads, num_tokens, head_dim) each
        attended, _ = attend(self, query, key, value, None, placement=placement, bias=self._bias)
        mixed: Tensor = self.dense(attended.flatten(2))
        return mixed


class BloomBlock(nn.Module):
    """One block; the parts are those of `inner`, transformers' own, under the same names."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.input_layernorm: nn.Module = inner.input_layernorm
        self.self_attention = BloomAttention(inner.self_attention)
        self.post_attention_layernorm: nn.Module = inner.post_attention_layernorm
        self.mlp: nn.Module = inner.mlp
        self._keeps_normed = bool(inner.apply_residual_connection_post_layernorm)

    def forward(self, states: Tensor, *, placement: Placement, **_: Any) -> Tensor:
        """(1, num_tokens, hidden_size) in and out."""
        normed = self.input_layernorm(states)
        states = self.self_attention(normed, placement) + (normed if self._keeps_normed else states)
        normed = self.post_attention_layernorm(states)
        output: Tensor = self.mlp(normed, normed if self._keeps_normed else states)
        return output
