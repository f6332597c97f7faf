"""Experts of a block, each with linear layers of its own kernel; only those that a token was sent to are computed.

transformers keeps the weights of all experts of a block in one tensor, for kernels that want plain weights. Here
they are cut apart when they are loaded, so that an expert's weights are packed or quantized like those of
any linear layer. The router, the gate between an expert's two layers, and biases stay transformers' own.

Source: Shazeer et al. 2017, Outrageously Large Neural Networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

STACKED: Final = ("gate_up_proj", "down_proj")


def is_stack(owner: nn.Module, leaf: str) -> bool:
    """Whether the parameter `leaf` of a module is the weights of all its experts, in a form known here."""
    return (
        leaf in STACKED
        and hasattr(owner, "is_transposed")
        and bool(getattr(owner, "has_gate", False))
        and not getattr(owner, "has_post_expert_norm", False)
    )


def is_transposed(owner: nn.Module) -> bool:
    """Whether the weights of its experts lie as (in_features, out_features)."""
    return bool(owner.is_transposed)


def weight_of(stack: Tensor, expert: int, owner: nn.Module) -> Tensor:
    """(out_features, in_features) of one expert; a view."""
    return stack[expert].T if is_transposed(owner) else stack[expert]


def emptied(inner: nn.Module) -> nn.Module:
    """A module of experts without their weights, which lie elsewhere; what gates them, and biases, stay."""
    for leaf in STACKED:
        inner._parameters.pop(leaf, None)
    return inner


class Experts(nn.Module):
    """What stands in the place of transformers' module.

    inner: that module, without its weights. gate_up, down: a linear layer for each expert. They are no
    submodules: an adapter's term would see a part of the tokens only.
    """

    def __init__(self, inner: nn.Module, gate_up: Sequence[nn.Module], down: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inner: Any = emptied(inner)
        self._gate_up = tuple(gate_up)
        self._down = tuple(down)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(num_tokens, hidden_size) in and out.

        chosen, weights: (num_tokens, k), the experts of each token and what each is worth.
        """
        num_tokens, k = chosen.shape
        flat = chosen.reshape(-1)
        order = torch.argsort(flat, stable=True)  # by expert, within it by token
        counts = torch.bincount(flat, minlength=len(self._down)).tolist()
        outputs = [
            self._expert(expert, rows)
            for expert, rows in enumerate(torch.split(hidden[order // k], counts))
            if rows.shape[0]
        ]
        by_token = torch.cat(outputs)[torch.argsort(order)]  # (num_tokens * k, hidden_size)
        weighted = by_token.view(num_tokens, k, -1) * weights[..., None]
        return weighted.sum(dim=1).to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"{len(self._down)} experts, {self._gate_up[0]} and {self._down[0]} each"

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        inner = self.inner
        gate_up: Tensor = self._gate_up[expert](rows)
        if inner.has_bias:
            gate_up = gate_up + inner.gate_up_proj_bias[expert]
        output: Tensor = self._down[expert](inner._apply_gate(gate_up))
        return output + inner.down_proj_bias[expert] if inner.has_bias else output
