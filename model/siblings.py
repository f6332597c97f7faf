"""Linear layers that a module calls with the same rows, such as those of queries, keys and values: one product for all.

Owns how a joint product is handed out in parts. Whose weights lie together is decided where they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .linear import FrozenLinear, RoundedLinear


class _Joint:
    """One product for several layers that a module calls one after the other with the same rows.

    The first call computes it all, and the last one lets go of it. A call of the kernel costs 15 µs beside its
    work, and three times that when the weights that came before have emptied the processor's caches.
    """

    def __init__(self, layer: FrozenLinear, num_parts: int) -> None:
        self.layer = layer
        self._num_parts = num_parts
        self._num_left = 0
        self._rows: Tensor | None = None
        self._output: Tensor | None = None

    def part(self, rows: Tensor, first: int, last: int) -> Tensor:
        """Outputs [first, last) of all; `rows` are known again by being the same object."""
        output = self._output
        if rows is not self._rows or output is None or self._num_left == 0:
            output = self.layer(rows)
            self._rows, self._output, self._num_left = rows, output, self._num_parts
        self._num_left -= 1
        if self._num_left == 0:
            self._rows = self._output = None
        part: Tensor = output[..., first:last]
        # Some families clamp it in place, which a graph of views of one output does not survive.
        return part.clone() if part.requires_grad else part


class PartLinear(FrozenLinear):
    """A layer whose weights lie in one piece with its siblings'; see `joined`."""

    def __init__(self, joint: _Joint, first: int, last: int) -> None:
        whole = joint.layer
        bias = whole.bias[first:last] if whole.bias is not None else None
        weight_bytes = whole.bytes - (whole.bias.nbytes if whole.bias is not None else 0)
        share = weight_bytes * (last - first) // whole.out_features
        super().__init__(whole.in_features, last - first, bias, share)
        self._joint = joint
        self._range = (first, last)

    def forward(self, rows: Tensor) -> Tensor:
        return self._joint.part(rows, *self._range)

    @property
    def whole(self) -> FrozenLinear:
        """The layer that it is a part of."""
        return self._joint.layer

    def whole_with(self, layers: Sequence[nn.Module]) -> FrozenLinear | None:
        """The layer that these, in this order, are all parts of, if they are."""
        end = 0
        for layer in layers:
            if not isinstance(layer, PartLinear) or layer._joint is not self._joint or layer._range[0] != end:
                return None
            end = layer._range[1]
        return self._joint.layer if end == self._joint.layer.out_features else None

    def multiply(self, rows: Tensor) -> Tensor:
        return self._joint.layer.multiply(rows)[..., slice(*self._range)]

    def multiply_back(self, gradient: Tensor) -> Tensor:
        return gradient @ self.dense_weight().to(gradient.dtype)

    def dense_weight(self) -> Tensor:
        return self._joint.layer.dense_weight()[slice(*self._range)]


def joined(layer: FrozenLinear, sizes: list[int]) -> list[PartLinear]:
    """Layers of these many outputs of `layer`, one after the other, that share its product.

    For siblings that are called in any order, each once, with the same rows.
    """
    joint, parts, first = _Joint(layer, len(sizes)), [], 0
    for size in sizes:
        parts.append(PartLinear(joint, first, first + size))
        first += size
    return parts


def whole_of(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The outputs of these layers for the same rows, one after the other: in one product where they share it."""
    first = layers[0]
    if isinstance(first, PartLinear):
        whole = first.whole_with(layers)
        if whole is not None:
            return whole
    return lambda rows: torch.cat([layer(rows) for layer in layers], dim=-1)


def is_rounding(module: nn.Module) -> bool:
    """Whether some layer of it rounds its rows to bfloat16, whatever their dtype."""
    layers = (part.whole if isinstance(part, PartLinear) else part for part in module.modules())
    return any(isinstance(layer, RoundedLinear) for layer in layers)
