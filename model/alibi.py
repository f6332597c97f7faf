"""ALiBi: instead of rotated keys, scores lean towards near tokens.

Owns the slopes. A bias is linear in the key's position alone. Softmax does not see what all keys of a query share,
so this equals one that is linear in the distance, and it is how both families that have it compute it.

Source: Press et al. 2022, Train Short, Test Long.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        own = slopes(num_heads)
        self.is_rounded = rounded
        self.scale = scale
        self._slopes = own.bfloat16().float() if rounded else own

    def slopes_on(self, device: torch.device) -> Tensor:
        """(num_heads,) float32, before the scale; copied there once."""
        if self._slopes.device != device:
            self._slopes = self._slopes.to(device)
        return self._slopes

    def __call__(self, positions: Tensor) -> Tensor:
        """(num_heads, …) float32, for keys at these positions (…) int64 of a row."""
        steep = self.slopes_on(positions.device).view(-1, *(1 for _ in positions.shape))
        if self.is_rounded:
            return (steep.bfloat16() * positions).float() * self.scale
        return steep * positions * self.scale
