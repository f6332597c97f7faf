"""Falcon's blocks over our pages: both decoder architectures, rotary or ALiBi, any number of key heads.

Owns a block of the same parts as transformers' own, under the same names: that one passes neither an attention
function nor our placement on to its attention. Keys that heads share are kept once here, and linear layers
are plain ones, so that they can be packed and quantized.

Source: Almazrouei et al. 2023, The Falcon Series of Open Language Models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.falcon.modeling_falcon import FalconLinear, apply_rotary_pos_emb

from .alibi import Alibi
from .attention import Placement, attend


def refusal(config: PretrainedConfig) -> str | None:
    """Why blocks of this configuration cannot be computed; None if they can.

    transformers builds these variants too, and fails at their first token.
    """
    is_new, is_parallel = bool(config.new_decoder_architecture), bool(config.parallel_attn)
    num_norms = config.num_ln_in_parallel_attn
    if is_new and not is_parallel:
        return "Falcon's new decoder architecture without parallel attention"
    if is_new and num_norms not in (None, 1, 2):
        return f"Falcon's new decoder architecture with {num_norms} norms a block"
    if not is_new and is_parallel and num_norms == 2:
        return "Falcon's old decoder architecture with 2 norms a block"
    if not is_new and not config.multi_query and config.num_kv_heads != config.num_attention_heads:
        return f"Falcon's old decoder architecture with {config.num_kv_heads} key heads"
    return None


class FalconAttention(nn.Module):
    """Attention of one block; the parts are those of `inner`, transformers' own."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.layer_idx = int(inner.layer_idx)
        self.head_dim = int(inner.head_dim)
        self.num_kv_heads = int(inner.num_kv_heads)
        self.query_key_value = _plain(inner.query_key_value)
        self.dense = _plain(inner.dense)
        self._num_heads = int(inner.num_heads)
        self._are_interleaved = bool(inner.new_decoder_architecture or not inner.multi_query)
        self._bias = None
        if inner.config.alibi:
            self._bias = Alibi(self._num_heads, rounded=True, scale=self.head_dim**-0.5)

    def forward(self, states: Tensor, placement: Placement, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """(1, num_tokens, hidden_size), without the residual."""
        query, key, value = self._split(self.query_key_value(states))
        if self._bias is None:
            query, key = apply_rotary_pos_emb(query, key, *rotation)  # type: ignore[no-untyped-call]
        attended, _ = attend(self, query, key, value, None, placement=placement, bias=self._bias)
        mixed: Tensor = self.dense(attended.flatten(2))
        return mixed

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (1, num_heads, num_tokens, head_dim), key and value (1, num_kv_heads, num_tokens, head_dim).

        fused: a key and a value head stand behind the query heads that share them; one pair for all at the end.
        """
        num_groups = self.num_kv_heads if self._are_interleaved else 1
        grouped = fused.view(*fused.shape[:2], num_groups, -1, self.head_dim)
        query, key, value = torch.split(grouped, [self._num_heads // num_groups, 1, 1], dim=3)
        return (
            query.flatten(2, 3).transpose(1, 2),
            key.squeeze(3).transpose(1, 2),
            value.squeeze(3).transpose(1, 2),
        )


class FalconBlock(nn.Module):
    """One block; the parts are those of `inner`, transformers' own, under the same names.

    Attention and MLP stand side by side, behind one norm or one each; in the sequential form one after the
    other.
    """

    input_layernorm: nn.Module  # the norms that a variant has
    ln_attn: nn.Module
    ln_mlp: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, inner: Any) -> None:
        super().__init__()
        for name, part in inner.named_children():
            self.add_module(name, part)
        self.self_attention = FalconAttention(inner.self_attention)
        self.mlp: nn.Module = inner.mlp
        for name, part in inner.mlp.named_children():
            self.mlp.add_module(name, _plain(part))
        self._has_two_norms = hasattr(inner, "ln_attn")
        self._is_sequential = not inner.config.parallel_attn

    def forward(
        self, states: Tensor, *, placement: Placement, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """(1, num_tokens, hidden_size) in and out."""
        normed = self.ln_attn(states) if self._has_two_norms else self.input_layernorm(states)
        attended = self.self_attention(normed, placement, position_embeddings)
        if self._is_sequential:
            states = attended + states
            behind: Tensor = self.mlp(self.post_attention_layernorm(states)) + states
            return behind
        if self._has_two_norms:
            normed = self.ln_mlp(states)
        beside: Tensor = self.mlp(normed) + attended + states
        return beside


def _plain(part: nn.Module) -> nn.Module:
    """A Falcon linear layer without weights as a plain one; any other part as it is.

    Falcon's rounds once more in half precision, between product and bias; where there is no bias, they are one.
    """
    if not isinstance(part, FalconLinear):
        return part
    return nn.Linear(
        part.in_features, part.out_features, part.bias is not None, device="meta", dtype=part.weight.dtype
    )
