"""Experts of a block on a GPU, without the host ever asking which of them tokens were sent to.

The weights of all experts lie in one piece, small or plain, and each product takes tiles of tokens that belong to one
expert. The router, the gate between an expert's two layers, and biases stay transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..experts import emptied
from ..quantization import Stored, wide
from .products import gather_multiply, multiply_scatter
from .tiles import Tiles, tiles_of


class GroupedExperts(nn.Module):
    """What stands in the place of transformers' module.

    inner: that module, without its weights. gate_up, down: of all experts, one after the other, on the device.
    """

    def __init__(self, inner: nn.Module, gate_up: Stored | Tensor, down: Stored | Tensor) -> None:
        super().__init__()
        num_experts: Any = inner.num_experts
        self.inner: Any = emptied(inner)
        self.num_experts = int(num_experts)
        self.bytes = gate_up.nbytes + down.nbytes
        self._gate_up = gate_up
        self._down = down

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(num_tokens, hidden_size) in and out.

        chosen, weights: (num_tokens, k), the experts of each token and what each is worth.
        """
        inner = self.inner
        biases = (inner.gate_up_proj_bias, inner.down_proj_bias) if inner.has_bias else (None, None)
        tiles = tiles_of(chosen, self.num_experts)
        gate_up = _multiplied(hidden, self._gate_up, biases[0], tiles, gathers=True)
        output = _multiplied(inner._apply_gate(gate_up), self._down, biases[1], tiles, gathers=False)
        weighted = output.view(*chosen.shape, -1) * weights[..., None]
        return weighted.sum(dim=1).to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {self.bytes:,} bytes"


def _multiplied(
    rows: Tensor, weights: Stored | Tensor, bias: Tensor | None, tiles: Tiles, *, gathers: bool
) -> Tensor:
    """Tokens into sorted rows, or sorted rows back into the tokens' order; gradients of `rows` flow."""
    if rows.requires_grad and torch.is_grad_enabled():
        product: Tensor = _Product.apply(rows, weights, bias, tiles, gathers)
        return product
    return (gather_multiply if gathers else multiply_scatter)(rows, weights, bias, tiles)


class _Product(torch.autograd.Function):
    """Either product and the gradient of the rows. Backward, the host does ask: nothing records it."""

    @staticmethod
    def forward(
        context: Any, rows: Tensor, weights: Stored | Tensor, bias: Tensor | None, tiles: Tiles, gathers: bool
    ) -> Tensor:
        context.weights, context.tiles, context.gathers = weights, tiles, gathers
        return (gather_multiply if gathers else multiply_scatter)(rows, weights, bias, tiles)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        weights: Stored | Tensor = context.weights
        tiles: Tiles = context.tiles
        gradient = gradients[0] if context.gathers else gradients[0][tiles.order]
        back = gradient.new_zeros((len(tiles.order), weights.shape[1]))
        size = weights.shape[0] // tiles.num_experts
        begin = 0
        for expert, end in zip(tiles.experts.tolist(), tiles.ends.tolist(), strict=True):
            if begin < end:  # an expert's first tile; others, and empty ones, end where one before them did
                back[begin:end] = gradient[begin:end] @ _wide(weights, expert, size, gradient.dtype)
                begin = end
        if context.gathers:  # a token's own are those of all its experts
            back = back[torch.argsort(tiles.order)].view(-1, tiles.num_chosen, weights.shape[1]).sum(dim=1)
        return back, None, None, None, None


def _wide(weights: Stored | Tensor, expert: int, size: int, dtype: torch.dtype) -> Tensor:
    """The plain weights of one expert, (size, num_inputs)."""
    first, last = expert * size, (expert + 1) * size
    if isinstance(weights, Tensor):
        return weights[first:last].to(dtype)
    return wide(weights.outputs(first, last), dtype)
