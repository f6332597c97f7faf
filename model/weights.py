"""Just these tensors of a checkpoint, into the modules that need them.

Owns how stored tensors become a module's: tensor by tensor, so that memory holds the part that is asked for
and little more. transformers' own weight conversion (experts fused into one tensor, renamed layers) is
applied to the part alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..protocol.errors import Code, error
from ..protocol.tensors import Quantization
from . import hub, prequantized
from .checkpoint import Checkpoint, open_safetensors
from .experts import STACKED, Experts, is_stack, weight_of
from .families import Skeleton
from .linear import PackedLinear, is_packable, joined, quantized
from .norms import quick
from .quantization import Shelf, Stored, can_hold, quantize, stacked

# More than malloc ever keeps for itself, so that the buffer goes back to the system; memory that no weight
# touches is never taken.
_STAGING_BYTES: Final = 1 << 26


# What transformers calls layers that a module calls with the same rows, one after the other.
_SIBLINGS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Recipe(NamedTuple):
    """How a tensor of the model comes from stored ones. keys: (pattern of the converter, stored name)."""

    converter: WeightConverter | None
    keys: list[tuple[str, str]]


def fetch_parts(checkpoint: Checkpoint, skeleton: Skeleton, prefixes: Iterable[str]) -> None:
    """Have the files on disk that hold the tensors of these prefixes; only a hub model lacks any.

    Raises what `hub.fetch_files` raises.
    """
    if checkpoint.origin is None:
        return
    wanted = tuple(prefixes)
    recipes = _recipes(checkpoint, skeleton)
    made_of = prequantized.sources(checkpoint.tensors)
    files = {
        checkpoint.tensors[key]
        for target, recipe in recipes.items()
        if target.startswith(wanted)
        for _, plain in recipe.keys
        for key in made_of.get(plain, (plain,))
    }
    hub.fetch_files(checkpoint.origin, sorted(files), checkpoint.report)


def load_part(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    prefix: str,
    module: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    shelf: Shelf | None = None,
) -> nn.Module:
    """Fill `module`, whose tensors are called `prefix` + … in the model, and pack its linear layers.

    shelf: its linear layers are quantized by the shelf's scheme, or taken from the shelf if they lie there.
    Returns the module, or its packed form if it is a linear layer itself.

    A linear layer is packed straight from its file, or from one buffer that all share.
    Raises `DAMAGED_WEIGHTS` if a tensor is missing or has another shape, `UNREADABLE`.
    """
    recipes = _of_part(checkpoint, skeleton, prefix)
    placer = _Placer(module, dtype, device, _Quantizer(shelf, prefix) if shelf is not None else None)
    with _Reader(checkpoint) as reader:
        for target in sorted(recipes, key=_natural):
            if placer.place_kept(target.removeprefix(prefix)):
                continue
            tensor = _made(target, recipes[target], skeleton, reader.read)
            expected = tuple(skeleton.tensors[target].shape)
            if tuple(tensor.shape) != expected:
                raise error(
                    Code.DAMAGED_WEIGHTS,
                    f"{target} has the shape {tuple(tensor.shape)}, the configuration says {expected}",
                    "fetch the model again",
                )
            placer.place(target.removeprefix(prefix), tensor)
    placer.finish()
    for part in placer.module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    return placer.module


def _of_part(checkpoint: Checkpoint, skeleton: Skeleton, prefix: str) -> dict[str, _Recipe]:
    recipes = {
        target: recipe
        for target, recipe in _recipes(checkpoint, skeleton).items()
        if target.startswith(prefix)
    }
    missing = [name for name in skeleton.tensors if name.startswith(prefix) and name not in recipes]
    if missing:
        raise error(
            Code.DAMAGED_WEIGHTS,
            f"{checkpoint.folder} lacks {len(missing)} tensors, the first is {missing[0]}",
            "fetch the model again",
        )
    return recipes


def _recipes(checkpoint: Checkpoint, skeleton: Skeleton) -> dict[str, _Recipe]:
    """Tensor of the model → its recipe, for every stored tensor that the model knows."""
    mapping = get_model_conversion_mapping(skeleton.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = skeleton.model.base_model_prefix
    recipes: dict[str, _Recipe] = {}
    made_of = prequantized.sources(checkpoint.tensors)
    parts = {part for sources in made_of.values() for part in sources}
    for key in sorted({*made_of, *checkpoint.tensors} - (parts - made_of.keys()), key=_natural):
        if key in skeleton.tensors:
            recipes[key] = _Recipe(None, [("", key)])
            continue
        target, pattern = rename_source_key(key, renamings, converters, prefix, skeleton.tensors)
        if target not in skeleton.tensors:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        recipe = recipes.setdefault(target, _Recipe(converter, []))
        recipe.keys.append((pattern or "", key))
    return recipes


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sorts expert 2 before expert 10: fused experts are stacked in this order. Sorts bias before weight."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _made(target: str, recipe: _Recipe, skeleton: Skeleton, read: Callable[[str], Tensor]) -> Tensor:
    if recipe.converter is None:
        return read(recipe.keys[0][1])
    converter: Any = deepcopy(recipe.converter)
    for pattern, key in recipe.keys:
        converter.add_tensor(target, key, pattern, partial(read, key))
    made: dict[str, Any] = converter.convert(target, model=skeleton.model, config=skeleton.config)
    if target not in made:
        raise error(
            Code.INTERNAL, f"transformers converts {recipe.keys[0][1]} to {sorted(made)}, not {target}"
        )
    tensor: Tensor = made[target][0] if isinstance(made[target], list) else made[target]
    return tensor


class _Reader:
    """Stored tensors, mapped and not copied; the files stay open until the `with` ends."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._made_of = prequantized.sources(checkpoint.tensors)
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, key: str) -> Tensor:
        """A view of the file, or what quantized tensors there stand for. Raises `DAMAGED_WEIGHTS`, `UNREADABLE`."""
        parts = self._made_of.get(key)
        if parts is not None:
            return prequantized.plain(parts, self._stored, self._checkpoint.config)
        return self._stored(key)

    def _stored(self, key: str) -> Tensor:
        name = self._checkpoint.tensors[key]
        if name not in self._files:
            path = self._checkpoint.folder / name
            self._files[name] = self._stack.enter_context(open_safetensors(path))
        try:
            stored: Tensor = self._files[name].get_tensor(key)
        except SafetensorError as problem:
            raise error(
                Code.DAMAGED_WEIGHTS, f"{name} holds no {key}: {problem}", "fetch the model again"
            ) from problem
        return stored


class _Quantizer:
    """The quantized weights of one part of a model: those on the shelf, and those that are new."""

    def __init__(self, shelf: Shelf, part: str) -> None:
        self._shelf = shelf
        self._part = part
        self.kept = shelf.read(part)
        self._new: dict[str, Stored] = {}

    def quantized(self, name: str, weight: Tensor) -> Stored | None:
        """The weight in the shelf's scheme; None if its shape does not allow it."""
        if not can_hold(self._shelf.scheme, weight.shape[0], weight.shape[1]):
            return None
        self._new[name] = quantize(weight, self._shelf.scheme)
        return self._new[name]

    def keep(self) -> None:
        """Put all of the part on the shelf, if anything is new."""
        if self._new:
            self._shelf.write(self._part, {**self.kept, **self._new})


class _Placer:
    """Puts tensors into a module, in their final dtype and place, and packs its linear layers.

    A packed layer's plain weights are needed for a moment only. They are converted in one buffer that all
    layers share: a buffer for each would leave a hole behind that the allocator cannot use again, since
    packed tensors want more alignment (measured: 24 MB of memory for 13 MB of weights).
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, quantizer: _Quantizer | None
    ) -> None:
        self.module = module
        self._dtype = dtype
        self._device = device
        self._quantizer = quantizer
        self._staging = torch.empty(0, dtype=dtype)
        self._waiting: dict[
            str, dict[str, Tensor]
        ] = {}  # module → name → weight, until all siblings are there
        self._quantized: dict[str, dict[str, Stored]] = {}  # likewise, of quantized ones
        self._experts: dict[str, dict[str, list[nn.Module]]] = {}  # path → leaf → each expert's layer

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
        if is_stack(owner, leaf) and self._takes_apart:
            weights = [weight_of(tensor, expert, owner) for expert in range(tensor.shape[0])]
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
        self._experts.setdefault(path, {})[leaf] = [quantized(one, None, self._device) for one in each]
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
        if self._quantizer is not None:
            self._quantizer.keep()

    def _joins(self, path: str) -> bool:
        """Whether the linear layer here is packed in one piece with siblings that read the same rows."""
        return (
            self._quantizer is None
            and is_packable(self._dtype, self._device)
            and len(self._siblings(path)) > 1
        )

    def _siblings(self, path: str) -> dict[str, nn.Linear]:
        """Name → layer of those that the layer's module calls with the same rows; empty if there are none."""
        parent, _, name = path.rpartition(".")
        group = next((names for names in _SIBLINGS if name in names), ())
        layers = {sibling: getattr(self.module.get_submodule(parent), sibling, None) for sibling in group}
        found = {sibling: layer for sibling, layer in layers.items() if type(layer) is nn.Linear}
        kinds = {(layer.in_features, layer.bias is None) for layer in found.values()}
        return found if len(found) == len(group) and len(kinds) == 1 else {}

    def _join(self, path: str, weight: Tensor) -> None:
        """Keep a weight until its siblings are there too, and then pack them."""
        parent, _, name = path.rpartition(".")
        waiting = self._waiting.setdefault(path.removesuffix(name), {})
        waiting[name] = weight
        siblings = self._siblings(path)
        if not all(sibling in waiting for sibling in siblings):
            return
        weights = [waiting.pop(sibling) for sibling in siblings]
        sizes = [weight.shape[0] for weight in weights]
        biases: list[Tensor] = [layer.bias for layer in siblings.values() if layer.bias is not None]
        together = self._buffer((sum(sizes), weight.shape[1]))
        for place, own in zip(torch.split(together, sizes), weights, strict=True):
            place.copy_(own)
        whole = PackedLinear(together, torch.cat(biases) if biases else None)
        for sibling, part in zip(siblings, joined(whole, sizes), strict=True):
            self._put(f"{parent}.{sibling}" if parent else sibling, part)

    def _put_quantized(self, path: str, stored: Stored) -> None:
        """Set a quantized layer, on a CPU in one piece with its siblings, once these are there too."""
        owner: Any = self.module.get_submodule(path)
        siblings = self._siblings(path) if self._device.type == "cpu" else {}
        if stored.scheme is Quantization.NF4 or len(siblings) < 2:
            self._put(path, quantized(stored, owner.bias, self._device))
            return
        parent, _, name = path.rpartition(".")
        waiting = self._quantized.setdefault(parent, {})
        waiting[name] = stored
        if not all(sibling in waiting for sibling in siblings):
            return
        weights = [waiting.pop(sibling) for sibling in siblings]
        biases: list[Tensor] = [layer.bias for layer in siblings.values() if layer.bias is not None]
        whole = quantized(stacked(weights), torch.cat(biases) if biases else None, self._device)
        sizes = [weight.shape[0] for weight in weights]
        for sibling, part in zip(siblings, joined(whole, sizes), strict=True):
            self._put(f"{parent}.{sibling}" if parent else sibling, part)

    @property
    def _takes_apart(self) -> bool:
        """Whether experts are better apart: on a CPU, and where they are quantized."""
        return self._quantizer is not None or self._device.type == "cpu"

    def _layer(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
        """The linear layer of this weight, quantized or packed; None where it is neither."""
        stored = self._quantizer.quantized(name, weight) if self._quantizer is not None else None
        if stored is not None:
            return quantized(stored, bias, self._device)
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
