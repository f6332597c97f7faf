"""Tensors into the modules that compute with them: in their final dtype and place, packed, quantized, put together.

Owns the choice of what lies together. Siblings, which a module calls with the same rows, share one product where a
device has one for them, and the weights of experts lie in one tensor where kernels choose among them. A
device never holds two copies of a layer's weights; whatever waits for its siblings waits in the host's memory.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from ..protocol.tensors import Quantization
from .experts import STACKED, Experts, is_stack, weight_of
from .linear import (
    DenseLinear,
    FrozenLinear,
    PackedLinear,
    Products,
    is_packable,
    products_of,
    quantized,
)
from .norms import quick
from .quantization import Shelf, Stored, can_hold, gathered, quantize, stacked
from .siblings import joined

# More than malloc ever keeps for itself, so that the buffer goes back to the system; memory that no weight
# touches is never taken.
_STAGING_BYTES: Final = 1 << 26


# What transformers calls layers that a module calls with the same rows, one after the other.
_SIBLINGS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Keeping(NamedTuple):
    """How a device keeps weights that are used together.

    is_joined: those of siblings lie in one piece, whatever their form. products: kernels for small weights, other than
    a CPU's; with them those of experts lie in one piece too. has_grouped_mm: torch multiplies by plain weights
    of experts without asking the device; else they are multiplied by `products` as well.
    """

    is_joined: bool
    products: Products | None = None
    has_grouped_mm: bool = False


def keeping_of(device: torch.device, dtype: torch.dtype) -> Keeping:
    """What suits the device best.

    Torch's product by experts has a kernel for bfloat16 and compute capabilities 9 and 10; for all others it reads back
    how many rows each expert has, which waits for the device and cannot be recorded.
    """
    if device.type == "cpu":
        return Keeping(is_joined=False)
    has_grouped_mm = (
        device.type == "cuda"
        and dtype is torch.bfloat16
        and torch.cuda.get_device_capability(device)[0] in (9, 10)
    )
    return Keeping(is_joined=True, products=products_of(device), has_grouped_mm=has_grouped_mm)


class Quantizer:
    """The quantized weights of one part of a model: those on the shelf, and those that are new."""

    def __init__(self, shelf: Shelf, part: str) -> None:
        self._shelf = shelf
        self._part = part
        self.kept = shelf.read(part)
        self._new: dict[str, Stored] = {}

    @property
    def scheme(self) -> Quantization:
        """Of the weights on the shelf."""
        return self._shelf.scheme

    def quantized(self, name: str, weight: Tensor) -> Stored | None:
        """The weight in the shelf's scheme; None if its shape does not allow it."""
        fits = can_hold(self._shelf.scheme, weight.shape[0], weight.shape[1])
        return self.small(name, weight) if fits else None

    def small(self, name: str, weight: Tensor) -> Stored:
        """The weight, of a shape that `can_hold` allows, in the shelf's scheme."""
        self._new[name] = quantize(weight, self._shelf.scheme)
        return self._new[name]

    def keep(self) -> None:
        """Put all of the part on the shelf, if anything is new."""
        if self._new:
            self._shelf.write(self._part, {**self.kept, **self._new})


class Placer:
    """Puts tensors into a module, in their final dtype and place, and packs its linear layers.

    A packed layer's plain weights are needed for a moment only. They are converted in one buffer that all
    layers share: a buffer for each would leave a hole behind that the allocator cannot use again, since
    packed tensors want more alignment (measured: 24 MB of memory for 13 MB of weights).
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        quantizer: Quantizer | None,
        keeping: Keeping | None = None,
    ) -> None:
        """keeping: other than suits the device best."""
        self.module = module
        self._dtype = dtype
        self._device = device
        self._quantizer = quantizer
        self._keeping = keeping or keeping_of(device, dtype)
        self._staging = torch.empty(0, dtype=dtype)
        # Module → name → weight, until all siblings are there.
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._quantized: dict[str, dict[str, Stored]] = {}  # likewise, of quantized ones
        self._rooms: dict[str, tuple[Tensor, set[str]]] = {}  # module → weights of siblings, whose are there
        self._experts: dict[str, dict[str, list[nn.Module]]] = {}  # path → leaf → each expert's layer
        self._grouped: dict[str, dict[str, Stored | Tensor]] = {}  # path → leaf → all experts' weights

    def place(self, name: str, tensor: Tensor) -> None:
        """Set the parameter or buffer `name` of the module to `tensor`, which may vanish afterwards."""
        path, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(path)
        if type(owner) is nn.Linear and leaf == "weight":
            if self._joins(path):
                self._join(path, tensor)
                return
            stored = self._quantizer.quantized(name, tensor) if self._quantizer is not None else None
            if stored is not None:
                self._put_quantized(path, stored)
                return
            layer = self._layer(name, tensor, owner.bias)
            if layer is not None:
                self._put(path, layer)
                return
        if is_stack(owner, leaf) and (self._takes_apart or self._groups(owner)):
            weights = [weight_of(tensor, expert, owner) for expert in range(tensor.shape[0])]
            if self._groups(owner):
                self._grouped.setdefault(path, {})[leaf] = self._gathered(name, weights)
                return
            self._experts.setdefault(path, {})[leaf] = [
                self._layer(f"{name}.{expert}", weight, None) or self._plain(weight)
                for expert, weight in enumerate(weights)
            ]
            return
        own = tensor.to(device=self._device, dtype=self._dtype, copy=True)
        if leaf in owner._buffers:
            owner._buffers[leaf] = own
        else:
            owner._parameters[leaf] = nn.Parameter(own, requires_grad=False)

    def place_kept(self, name: str) -> bool:
        """Set the weight `name` from the shelf, if it lies there; whether it does."""
        if self._quantizer is None:
            return False
        path, _, leaf = name.rpartition(".")
        kept = self._quantizer.kept
        owner = self.module.get_submodule(path)
        if type(owner) is nn.Linear:
            stored = kept.get(name)
            if stored is None or tuple(owner.weight.shape) != stored.shape:
                return False
            self._put_quantized(path, stored)
            return True
        if not is_stack(owner, leaf):
            return False
        stack = owner._parameters[leaf]
        count = stack.shape[0] if stack is not None else 0
        each = [kept[key] for key in (f"{name}.{expert}" for expert in range(count)) if key in kept]
        if stack is None or any(one.shape != tuple(weight_of(stack, 0, owner).shape) for one in each):
            return False
        if len(each) < count:
            return False
        if self._groups(owner):
            self._grouped.setdefault(path, {})[leaf] = gathered(each, count, self._device)
        else:
            self._experts.setdefault(path, {})[leaf] = [
                quantized(one, None, self._device, self._keeping.products) for one in each
            ]
        return True

    def finish(self) -> None:
        """Put experts together, take quicker norms, and keep what was quantized."""
        for path, part in tuple(self.module.named_modules()):
            norm = quick(part)
            if norm is not part:
                self._put(path, norm)
        for path, layers in self._experts.items():
            owner = self.module.get_submodule(path)
            self._put(path, Experts(owner, *(layers[leaf] for leaf in STACKED)))
        for path, weights in self._grouped.items():
            self._put(path, self._grouped_experts(path, weights))
        if self._quantizer is not None:
            self._quantizer.keep()

    def _joins(self, path: str) -> bool:
        """Whether the plain weights here are kept in one piece with those of siblings that read the same rows."""
        is_better = self._keeping.is_joined or is_packable(self._dtype, self._device)
        return self._quantizer is None and is_better and len(self._siblings(path)) > 1

    def _siblings(self, path: str) -> dict[str, nn.Linear]:
        """Name → layer of those that the layer's module calls with the same rows; empty if there are none."""
        parent, _, name = path.rpartition(".")
        group = next((names for names in _SIBLINGS if name in names), ())
        layers = {sibling: getattr(self.module.get_submodule(parent), sibling, None) for sibling in group}
        found = {sibling: layer for sibling, layer in layers.items() if type(layer) is nn.Linear}
        kinds = {(layer.in_features, layer.bias is None) for layer in found.values()}
        return found if len(found) == len(group) and len(kinds) == 1 else {}

    def _join(self, path: str, weight: Tensor) -> None:
        """Keep a weight until its siblings are there too, and then pack them; or where they are to stay at once."""
        parent, _, name = path.rpartition(".")
        siblings = self._siblings(path)
        if self._keeping.is_joined:
            whole = self._joined_dense(parent, name, weight, siblings)
        else:
            whole = self._joined_packed(parent, name, weight, siblings)
        if whole is not None:
            self._put_parts(parent, siblings, whole)

    def _joined_dense(
        self, parent: str, name: str, weight: Tensor, siblings: dict[str, nn.Linear]
    ) -> FrozenLinear | None:
        if parent not in self._rooms:
            shape = (sum(layer.out_features for layer in siblings.values()), weight.shape[1])
            self._rooms[parent] = (torch.empty(shape, dtype=self._dtype, device=self._device), set())
        room, present = self._rooms[parent]
        own = torch.split(room, [layer.out_features for layer in siblings.values()])
        own[list(siblings).index(name)].copy_(weight)
        present.add(name)
        if len(present) < len(siblings):
            return None
        del self._rooms[parent]
        return DenseLinear(room, _together(siblings))

    def _joined_packed(
        self, parent: str, name: str, weight: Tensor, siblings: dict[str, nn.Linear]
    ) -> FrozenLinear | None:
        waiting = self._waiting.setdefault(parent, {})
        waiting[name] = weight
        if not all(sibling in waiting for sibling in siblings):
            return None
        weights = [waiting.pop(sibling) for sibling in siblings]
        sizes = [weight.shape[0] for weight in weights]
        together = self._buffer((sum(sizes), weight.shape[1]))
        for place, own in zip(torch.split(together, sizes), weights, strict=True):
            place.copy_(own)
        return PackedLinear(together, _together(siblings))

    def _put_quantized(self, path: str, stored: Stored) -> None:
        """Set a quantized layer, in one piece with its siblings, once these are there too."""
        owner: Any = self.module.get_submodule(path)
        is_joined = self._keeping.is_joined or (
            self._device.type == "cpu" and stored.scheme is not Quantization.NF4
        )
        siblings = self._siblings(path) if is_joined else {}
        products = self._keeping.products
        if len(siblings) < 2:
            self._put(path, quantized(stored, owner.bias, self._device, products))
            return
        parent, _, name = path.rpartition(".")
        waiting = self._quantized.setdefault(parent, {})
        waiting[name] = stored
        if not all(sibling in waiting for sibling in siblings):
            return
        weights = [waiting.pop(sibling) for sibling in siblings]
        whole = quantized(stacked(weights), _together(siblings), self._device, products)
        self._put_parts(parent, siblings, whole)

    def _put_parts(self, parent: str, siblings: dict[str, nn.Linear], whole: FrozenLinear) -> None:
        sizes = [layer.out_features for layer in siblings.values()]
        for sibling, part in zip(siblings, joined(whole, sizes), strict=True):
            self._put(f"{parent}.{sibling}" if parent else sibling, part)

    def _groups(self, owner: nn.Module) -> bool:
        """Whether the weights of a module's experts lie in one piece, for kernels of our own."""
        products = self._keeping.products
        schemes = {self._scheme_for(owner, leaf) for leaf in STACKED}
        if products is None or (self._quantizer is None and self._keeping.has_grouped_mm):
            return False
        return all(products.take_experts(self._device, scheme, self._dtype) for scheme in schemes)

    def _scheme_for(self, owner: nn.Module, leaf: str) -> Quantization | None:
        stack = owner._parameters[leaf]
        if self._quantizer is None or stack is None:
            return None
        out_features, in_features = weight_of(stack, 0, owner).shape
        scheme = self._quantizer.scheme
        return scheme if can_hold(scheme, out_features, in_features) else None

    def _gathered(self, name: str, weights: list[Tensor]) -> Stored | Tensor:
        """The weights of all experts in one piece on the device, expert by expert."""
        if self._quantizer is not None and can_hold(self._quantizer.scheme, *weights[0].shape):
            small = (self._quantizer.small(f"{name}.{index}", weight) for index, weight in enumerate(weights))
            return gathered(small, len(weights), self._device)
        out_features, in_features = weights[0].shape
        room = torch.empty((len(weights) * out_features, in_features), dtype=self._dtype, device=self._device)
        for place, weight in zip(torch.split(room, out_features), weights, strict=True):
            place.copy_(weight)
        return room

    def _grouped_experts(self, path: str, weights: dict[str, Stored | Tensor]) -> nn.Module:
        from .gpu.experts import GroupedExperts  # here, because Triton may be missing

        owner = self.module.get_submodule(path)
        return GroupedExperts(owner, *(weights[leaf] for leaf in STACKED))

    @property
    def _takes_apart(self) -> bool:
        """Whether experts are better apart: on a CPU, and where they are quantized."""
        return self._quantizer is not None or self._device.type == "cpu"

    def _layer(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
        """The linear layer of this weight, quantized or packed; None where it is neither."""
        stored = self._quantizer.quantized(name, weight) if self._quantizer is not None else None
        if stored is not None:
            return quantized(stored, bias, self._device, self._keeping.products)
        if is_packable(self._dtype, self._device):
            return PackedLinear(self._staged(weight), bias)
        return None

    def _plain(self, weight: Tensor) -> nn.Module:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        own = weight.to(device=self._device, dtype=self._dtype, copy=True)
        layer.weight = nn.Parameter(own, requires_grad=False)
        return layer

    def _staged(self, tensor: Tensor) -> Tensor:
        if tensor.dtype is self._dtype and tensor.is_contiguous():
            return tensor
        return self._buffer(tuple(tensor.shape)).copy_(tensor)

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        """Room for a weight, which the next one will take again."""
        count = math.prod(shape)
        if self._staging.numel() < count:
            num_numbers = max(count, 3 * self._largest(), _STAGING_BYTES // self._dtype.itemsize)
            self._staging = torch.empty(num_numbers, dtype=self._dtype)
        return self._staging[:count].view(shape)

    def _largest(self) -> int:
        weights = (part.weight for part in self.module.modules() if type(part) is nn.Linear)
        return max((weight.numel() for weight in weights), default=0)

    def _put(self, path: str, layer: nn.Module) -> None:
        if not path:
            self.module = layer
            return
        parent, _, name = path.rpartition(".")
        setattr(self.module.get_submodule(parent), name, layer)


def _together(siblings: dict[str, nn.Linear]) -> Tensor | None:
    """Their biases, one after the other, if they have any."""
    biases: list[Tensor] = [layer.bias for layer in siblings.values() if layer.bias is not None]
    return torch.cat(biases) if biases else None
