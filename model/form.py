"""How an attention module wants its scores: what families differ in, said once for every way to attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# Positions of keys, (…) int64 → (num_heads, …): added to the scores of the keys there.
Bias = Callable[[Tensor], Tensor]


class Form(NamedTuple):
    """Scores are scaled, limited to a window, capped, with a sink or a bias for each head."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # (num_heads,)
    bias: Bias | None

    @property
    def is_plain(self) -> bool:
        """Whether the kernels of `scaled_dot_product_attention` compute it."""
        return self.softcap is None and self.sinks is None and self.bias is None
