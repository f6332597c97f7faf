"""Just these tensors of a checkpoint, into the modules that need them.

Owns how stored tensors become a module's: tensor by tensor, so that memory holds the part that is asked for
and little more. transformers' own weight conversion (experts fused into one tensor, renamed layers) is
applied to the part alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..protocol.errors import Code, error
from . import hub, prequantized
from .checkpoint import Checkpoint, open_safetensors
from .families import Skeleton
from .placing import Keeping, Placer, Quantizer
from .quantization import Shelf


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
    keeping: Keeping | None = None,
) -> nn.Module:
    """Fill `module`, whose tensors are called `prefix` + … in the model, and pack its linear layers.

    shelf: its linear layers are quantized by the shelf's scheme, or taken from the shelf if they lie there.
    keeping: other than suits the device best.
    Returns the module, or its packed form if it is a linear layer itself.

    A linear layer is packed straight from its file, or from one buffer that all share.
    Raises `DAMAGED_WEIGHTS` if a tensor is missing or has another shape, `UNREADABLE`.
    """
    recipes = _of_part(checkpoint, skeleton, prefix)
    quantizer = Quantizer(shelf, prefix) if shelf is not None else None
    placer = Placer(module, dtype, device, quantizer, keeping)
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
