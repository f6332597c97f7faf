"""BLOOM's blocks.

transformers' own pass neither an attention function nor our placement on to their attention, so ones of the same parts,
under the same names, stand in their place.

Source: BigScience 2022, BLOOM.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from .alibi import Alibi
from .attention import Placement, attend


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
