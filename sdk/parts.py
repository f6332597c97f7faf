"""An adapter as the daemon and the hops get it: one part for each block, out of a folder that PEFT wrote.

Owns the reading of PEFT's files for inference, without torch, numpy or PEFT: a config in JSON, weights as a
safetensors file, and the parts, which are such files again (`protocol.training`). An adapter that learns is
`adapters`' business; the daemon is given the parts that it lacks, and how they reach the hops is its own.
Source: the safetensors format; PEFT's `LoraConfig` for what its options mean.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from ..protocol.errors import Code, CorollaError, error
from ..protocol.partfiles import layouts
from ..protocol.passes import PutAdapterPart
from ..protocol.training import NO_PART, missing_parts

if TYPE_CHECKING:
    from .async_wire import AsyncWire
    from .wire import Wire

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
DEEP_PROMPT: Final = "DEEP_PROMPT"  # the type of our own, which PEFT has not
SOFT_PROMPT: Final = "prompt_embeddings"  # as PEFT names it in a file
DEEP_PROMPTS: Final = "block_prompts"
# What changes the mathematics of LoRA and is not computed by the hops.
_UNSUPPORTED: Final = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)
# `layers.3.mlp.up_proj.lora_A.weight` behind whatever stands before the blocks: the first number is the block's.
_KEY: Final = re.compile(r"^((?:[^.\d][^.]*\.)+?(\d+)\.(.+))\.(lora_[AB])\.weight$")
_PROMPTS: Final = ("PROMPT_TUNING", DEEP_PROMPT)
_ROOT: Final = "base_model.model."  # before the names of the model's own modules


class PartFile(NamedTuple):
    """One block's part, named by its sha256; `NO_PART` and no bytes for a block that is left alone."""

    name: bytes
    data: bytes


class Adapter(NamedTuple):
    """An adapter to be used.

    name: what people call it. files: one for each block, from the model's first on. soft: its virtual tokens.
    """

    name: str
    files: tuple[PartFile, ...] = ()
    soft: PartFile = PartFile(NO_PART, b"")

    @property
    def names(self) -> tuple[bytes, ...]:
        """Of the parts, as sessions ask for them."""
        return tuple(file.name for file in self.files)


AdapterLike: TypeAlias = str | os.PathLike[str] | Adapter


def as_adapter(given: AdapterLike | None) -> Adapter | None:
    """What a caller gave as `adapter=`: an adapter, or a folder that PEFT wrote. Raises as `read_adapter`."""
    return given if given is None or isinstance(given, Adapter) else read_adapter(given)


def put_lacking(wire: Wire, adapter: Adapter | None, problem: CorollaError) -> None:
    """Give the daemon the parts that it said it does not keep. Raises `problem` if it is about anything else."""
    for put, data in _lacking(adapter, problem):
        wire.call("adapter.put", put, data)


async def aput_lacking(wire: AsyncWire, adapter: Adapter | None, problem: CorollaError) -> None:
    """As `put_lacking`."""
    for put, data in _lacking(adapter, problem):
        await wire.call("adapter.put", put, data)


def _lacking(adapter: Adapter | None, problem: CorollaError) -> tuple[tuple[PutAdapterPart, bytes], ...]:
    missing = missing_parts(problem)
    files = (*adapter.files, adapter.soft) if adapter is not None else ()
    wanted = [file for file in files if file.name.hex() in missing]
    if adapter is None or not wanted:
        raise problem
    return tuple((PutAdapterPart(file.name, adapter.name), file.data) for file in dict.fromkeys(wanted))


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """The adapter in a folder: LoRA, or prompts.

    Raises `UNREADABLE` for files that are not there or damaged, `UNSUPPORTED` naming what the hops do not compute,
    `BAD_SHAPE` for factors that do not fit each other.
    """
    path = Path(folder)
    config = _read_config(path / CONFIG_FILE)
    tensors = read_tensors(path / WEIGHTS_FILE)
    if config["peft_type"] in _PROMPTS:
        return _prompts(path, tensors)
    return _lora(path, config, tensors)


def _prompts(path: Path, tensors: Mapping[str, Weights]) -> Adapter:
    """Soft prompts, and those of the blocks if they are deep."""
    soft, deep = tensors.get(SOFT_PROMPT), tensors.get(DEEP_PROMPTS)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    is_right = soft is not None and len(soft.shape) == 2 and (deep is None or deep.shape[1:] == soft.shape)
    if soft is None or not is_right or not shapes.keys() <= {SOFT_PROMPT, DEEP_PROMPTS}:
        raise error(
            Code.BAD_SHAPE,
            f"{path} holds {shapes}, expected {SOFT_PROMPT} of two dimensions, and of each block as many",
            "give a folder that PEFT or corolla.sdk.torch wrote",
        )
    files = [part_file({"prompt": Weights(soft.shape, data)}, {}) for data in _each(deep)]
    return Adapter(path.resolve().name, tuple(files), part_file({"soft": soft}, {}))


def _each(deep: Weights | None) -> list[bytes]:
    if deep is None:
        return []
    size = len(deep.data) // max(1, deep.shape[0])
    return [deep.data[at : at + size] for at in range(0, len(deep.data), max(1, size))]


def _lora(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Weights]) -> Adapter:
    blocks: dict[int, dict[str, Weights]] = {}
    scalings: dict[int, dict[str, float]] = {}
    for key, tensor in tensors.items():
        found = _KEY.match(key.removeprefix(_ROOT))
        if found is None:
            raise error(
                Code.UNSUPPORTED,
                f"{path} changes {key}, which is no linear layer of a block",
                "train an adapter whose target_modules are linear layers of the blocks alone",
            )
        name, block, target, factor = found[1], int(found[2]), found[3], found[4]
        blocks.setdefault(block, {})[f"{target}.{factor}"] = tensor
        if factor == "lora_A" and tensor.shape:
            scalings.setdefault(block, {})[target] = scaling_of(
                SimpleNamespace(**config), name, tensor.shape[0]
            )
    files = [PartFile(NO_PART, b"")] * (max(blocks) + 1)
    for block, factors in blocks.items():
        _check_factors(path, block, factors)
        files[block] = part_file(factors, scalings[block])
    return Adapter(path.resolve().name, tuple(files))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as problem:
        raise error(Code.UNREADABLE, f"{path}: {problem}", "give a folder that PEFT wrote") from problem
    if not isinstance(config, dict):
        raise error(Code.UNREADABLE, f"{path} holds no object", "give a folder that PEFT wrote")
    kind = config.get("peft_type")
    if kind not in ("LORA", *_PROMPTS):
        raise error(
            Code.UNSUPPORTED,
            f"{path.parent} is an adapter of the type {kind!r}",
            f"sessions take {', '.join(('LORA', *_PROMPTS))}",
        )
    for option in _UNSUPPORTED:
        if value := config.get(option):
            raise error(Code.UNSUPPORTED, f"{path}: {option}={value!r} is not computed by the hops")
    return config


def _check_factors(path: Path, block: int, factors: Mapping[str, Weights]) -> None:
    for target in sorted({name.rpartition(".")[0] for name in factors}):
        shapes = [
            factors[name].shape if name in factors else None
            for name in (f"{target}.lora_A", f"{target}.lora_B")
        ]
        first, second = shapes
        if first is None or second is None or (len(first), len(second)) != (2, 2) or first[0] != second[1]:
            raise error(
                Code.BAD_SHAPE,
                f"{path}: {target} of block {block} has factors of the shapes {first} and {second},"
                " expected (r, in) and (out, r)",
            )


def scaling_of(config: Any, name: str, rank: int) -> float:
    """alpha / rank, as PEFT has it. name: of the layer in the whole model."""
    alpha = of_pattern(getattr(config, "alpha_pattern", None), name, getattr(config, "lora_alpha", 8))
    root = math.sqrt(rank) if getattr(config, "use_rslora", False) else rank
    return float(alpha) / root


def of_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What the first pattern says that matches the end of a layer's name, as PEFT matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


# safetensors


class Weights(NamedTuple):
    """A tensor of float32. data: its numbers, little endian, row after row."""

    shape: tuple[int, ...]
    data: bytes


def part_file(
    tensors: Mapping[str, Weights], scalings: Mapping[str, float], dropout: float = 0.0
) -> PartFile:
    """The part of these tensors, named as `protocol.training` says; the same ones give the same bytes."""
    metadata = {f"{target}.scaling": repr(float(scalings[target])) for target in sorted(scalings)}
    if dropout:
        metadata["dropout"] = repr(float(dropout))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name in sorted(tensors):
        end = at + len(tensors[name].data)
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    data = (
        len(written).to_bytes(8, "little")
        + written
        + b"".join(tensors[name].data for name in sorted(tensors))
    )
    return PartFile(sha256(data).digest(), data)


def read_tensors(path: Path) -> dict[str, Weights]:
    """Every tensor of a safetensors file, as float32. Raises `UNREADABLE`."""
    try:
        found = layouts(path.read_bytes())
        if not found:
            raise ValueError("it holds no tensors")
        return {
            name: Weights(layout.shape, _as_float32(bytes(layout.data), layout.dtype))
            for name, layout in found.items()
        }
    except (OSError, ValueError, OverflowError) as problem:
        raise error(Code.UNREADABLE, f"{path}: {problem}", "give a folder that PEFT wrote") from problem


def _as_float32(raw: bytes, kind: str) -> bytes:
    if kind == "F32":
        return raw
    if kind == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(raw))
        wide[2::4], wide[3::4] = raw[::2], raw[1::2]
        return bytes(wide)
    num, letter = (len(raw) // 2, "e") if kind == "F16" else (len(raw) // 8, "d")
    return struct.pack(f"<{num}f", *struct.unpack(f"<{num}{letter}", raw))
