"""What a block computes between two products: pieces, each of which a compiler can make one kernel of.

On a CPU the pieces run as they stand; a few tokens do not even come here, see `compiled`. On a GPU every operation is a
kernel that reads and writes all states again, and takes as long as a small weight; there `torch.compile` makes one of
each piece. A piece knows sizes and numbers, no block: what is compiled for the first block serves all.

Source: Ansel et al. 2024, PyTorch 2, for how pieces become kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from .norms import RootMeanSquareNorm

Fuse = Callable[[Callable[..., Any]], Callable[..., Any]]


def as_it_is(piece: Callable[..., Any]) -> Callable[..., Any]:
    """The piece itself: one operation after the other."""
    return piece


def fused(piece: Callable[..., Any]) -> Callable[..., Any]:
    """The piece as one kernel, compiled when it is first called: once for one token, and once for any number."""
    return torch.compile(piece, fullgraph=True)


class Elementwise:
    """The pieces of a classic block. Sizes: num_tokens, hidden_size, heads and head_dim as in `classic.Classic`."""

    def __init__(self, fuse: Fuse = as_it_is) -> None:
        self._turned = fuse(_turned)
        self._normed_and_turned = fuse(_normed_and_turned)
        self._added_and_normed = fuse(_added_and_normed)
        self._gated = fuse(_gated)

    def turned(
        self, heads: Tensor, cosines: Tensor, sines: Tensor, num_queries: int, norms: tuple[Any, Any]
    ) -> Tensor:
        """Queries, then keys, each by its token's position: (num_tokens, heads, head_dim) in and out.

        cosines, sines: (num_tokens, 1, head_dim), see `classic.Turns`. norms: of the first `num_queries` heads
        and of the others, before they are turned; or None for both.
        """
        query_norm, key_norm = norms
        if query_norm is None or key_norm is None:
            return self._turned(heads, cosines, sines)  # type: ignore[no-any-return]
        if _is_plain(query_norm) and _is_plain(key_norm):
            weights, eps = (query_norm.weight, key_norm.weight), (query_norm.eps, key_norm.eps)
            return self._normed_and_turned(heads, cosines, sines, num_queries, weights, eps)  # type: ignore[no-any-return]
        parts = query_norm(heads[:, :num_queries]), key_norm(heads[:, num_queries:])
        return self._turned(torch.cat(parts, dim=1), cosines, sines)  # type: ignore[no-any-return]

    def added_and_normed(self, states: Tensor, added: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The sum of both, (num_tokens, hidden_size), which may stand where `added` stood; and its norm."""
        if _is_plain(norm):
            return self._added_and_normed(states, added, norm.weight, norm.eps)  # type: ignore[no-any-return]
        states = added.add_(states)
        return states, norm(states)

    def gated(self, together: Tensor, activation: nn.Module) -> Tensor:
        """(num_tokens, 2 * size) → (num_tokens, size).

        together: a gate, which is activated, and as many numbers that it lets through, side by side.
        """
        return self._gated(together, activation)  # type: ignore[no-any-return]


def _is_plain(norm: nn.Module) -> bool:
    return type(norm) is RootMeanSquareNorm


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    rolled = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cosines).addcmul_(rolled, sines)


def _normed_and_turned(
    heads: Tensor,
    cosines: Tensor,
    sines: Tensor,
    num_queries: int,
    weights: tuple[Tensor, Tensor],
    eps: tuple[float, float],
) -> Tensor:
    queries, keys = heads[:, :num_queries], heads[:, num_queries:]
    normed = [
        F.rms_norm(part, weight.shape, weight, small)
        for part, weight, small in zip((queries, keys), weights, eps, strict=True)
    ]
    return _turned(torch.cat(normed, dim=1), cosines, sines)


def _added_and_normed(states: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    states = added.add_(states)
    return states, F.rms_norm(states, weight.shape, weight, eps)


def _gated(together: Tensor, activation: nn.Module) -> Tensor:
    gate, through = together.chunk(2, dim=-1)
    return activation(gate).mul_(through)  # type: ignore[no-any-return]
