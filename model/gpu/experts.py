"""Experts of a block on a GPU, without the host ever asking which of them tokens were sent to.

Tokens are sorted by expert on the device and multiplied in tiles that each belong to one expert. How many tiles there
are follows from shapes alone, so passes can be recorded and played again. The weights of all experts lie in one piece,
small or plain. The router, the gate between an expert's two layers, and biases stay transformers' own.

Source: Gale et al. 2022, MegaBlocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..experts import emptied
from ..quantization import Stored, wide
from .products import Tiles, multiply_sorted, tiles_of


class GroupedExperts(nn.Module):
    """What stands in the place of transformers' module.

    inner: that module, without its weights. gate_up, down: of all experts, one after the other, on the device.
    """

    def __init__(self, inner: nn.Module, gate_up: Stored | Tensor, down: Stored | Tensor) -> None:
        super().__init__()
        num_experts: Any = inner.num_experts
        self.inner: Any = emptied(inner)
        self.num_experts = int(num_experts)
        self.bytes = sum(weights.nbytes for weights in (gate_up, down))
        self._gate_up = gate_up
        self._down = down

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(num_tokens, hidden_size) in and out.

        chosen, weights: (num_tokens, k), the experts of each token and what each is worth.
        """
        num_tokens, k = chosen.shape
        experts, order = torch.sort(chosen.reshape(-1), stable=True)  # by expert, within it by token
        tiles = tiles_of(experts, self.num_experts)
        inner = self.inner
        gate_up = self._product(hidden[order // k], self._gate_up, experts, tiles)
        if inner.has_bias:
            gate_up = gate_up + inner.gate_up_proj_bias[experts]
        output = self._product(inner._apply_gate(gate_up), self._down, experts, tiles)
        if inner.has_bias:
            output = output + inner.down_proj_bias[experts]
        by_token = output[torch.argsort(order)]  # (num_tokens * k, hidden_size)
        weighted = by_token.view(num_tokens, k, -1) * weights[..., None]
        return weighted.sum(dim=1).to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {self.bytes:,} bytes"

    def _product(self, rows: Tensor, weights: Stored | Tensor, experts: Tensor, tiles: Tiles) -> Tensor:
        if rows.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Product.apply(rows, weights, self.num_experts, experts, tiles)
            return product
        return multiply_sorted(rows, weights, self.num_experts, tiles)


class _Product(torch.autograd.Function):
    """The product of sorted rows and the gradient of the rows. Backward, the host does ask: nothing records it."""

    @staticmethod
    def forward(
        context: Any, rows: Tensor, weights: Stored | Tensor, num_experts: int, experts: Tensor, tiles: Tiles
    ) -> Tensor:
        context.weights, context.num_experts = weights, num_experts
        context.save_for_backward(experts)
        return multiply_sorted(rows, weights, num_experts, tiles)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (experts,) = context.saved_tensors
        weights: Stored | Tensor = context.weights
        size = weights.shape[0] // context.num_experts
        counts = torch.bincount(experts, minlength=context.num_experts).tolist()
        parts = [
            part @ _wide(weights, expert * size, (expert + 1) * size, part.dtype)
            for expert, part in enumerate(torch.split(gradients[0], counts))
            if part.shape[0]
        ]
        return torch.cat(parts), None, None, None, None


def _wide(weights: Stored | Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    if isinstance(weights, Tensor):
        return weights[first:last].to(dtype)
    return wide(weights.outputs(first, last), dtype)
