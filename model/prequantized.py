"""Checkpoints that were quantized before they got here: what their stored tensors stand for.

Owns the forms that are read exactly: bitsandbytes' int8, NF4 and FP4, FP8 in blocks, and the MXFP4 of GPT-OSS's
experts. Each becomes the plain weights that it stands for, from where they are packed like any others; a scheme of
our own makes them small again, and NF4 in blocks of 64 then finds the very same codes. What is computed is that
model with exact activations; rounding of activations, which some of these formats bring, is left out.

Source: Dettmers et al. 2022 and 2023, bitsandbytes; Rouhani et al. 2023, Microscaling Data Formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..protocol.errors import Code, error
from .quantization import bitsandbytes

Read = Callable[[str], Tensor]

METHODS: Final = ("bitsandbytes", "fp8", "mxfp4")
_BNB_STATES: Final = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_BNB_PARTS: Final = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_INT8_SCALES: Final = ".SCB"  # beside `.weight`
_FP8_SCALES: Final = "_scale_inv"
_BLOCKS: Final = "_blocks"
_SCALES: Final = "_scales"
_FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and the same below zero


def refusal(config: PretrainedConfig) -> str | None:
    """The name of the form that a configuration's weights are in, if it cannot be read; None if it can."""
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return None
    fields: Mapping[str, Any] = given if isinstance(given, Mapping) else given.to_dict()
    method = str(fields.get("quant_method", "an unknown method"))
    if method not in METHODS:
        return method
    if method == "fp8" and len(fields.get("weight_block_size") or ()) != 2:
        return "fp8 without blocks"
    return None


def sources(stored: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Plain tensor → the stored ones that it is made of, for everything that is quantized."""
    found: dict[str, tuple[str, ...]] = {}
    for name in stored:
        base = name.removesuffix(".weight")
        state = next((name + suffix for suffix in _BNB_STATES if name + suffix in stored), None)
        if state is not None:
            parts = (name + suffix for suffix in _BNB_PARTS)
            found[name] = (name, state, *(part for part in parts if part in stored))
        elif base != name and base + _INT8_SCALES in stored:
            found[name] = (name, base + _INT8_SCALES)
        elif name + _FP8_SCALES in stored:
            found[name] = (name, name + _FP8_SCALES)
        elif name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in stored:
            plain = name.removesuffix(_BLOCKS)
            found[plain] = (name, plain + _SCALES)
    return found


def plain(parts: tuple[str, ...], read: Read, config: PretrainedConfig) -> Tensor:
    """The weights that stored tensors stand for: float32, or bfloat16 where that holds them exactly.

    parts: as `sources` names them. Raises `DAMAGED_WEIGHTS`.
    """
    first, second = parts[:2]
    try:
        if second.endswith(_BNB_STATES):
            return _from_bitsandbytes(parts, read)
        if second.endswith(_INT8_SCALES):
            return read(first).float() * (read(second).float() / 127)[:, None]
        if second.endswith(_FP8_SCALES):
            given: Any = getattr(config, "quantization_config", None)
            fields = given if isinstance(given, Mapping) else given.to_dict()
            return _from_fp8(read(first), read(second), tuple(fields["weight_block_size"]))
        return _from_mxfp4(read(first), read(second))
    except (RuntimeError, ValueError, KeyError, TypeError) as problem:
        raise error(
            Code.DAMAGED_WEIGHTS,
            f"{first} is not in the form that it claims: {problem}",
            "fetch the model again",
        ) from problem


def _from_bitsandbytes(parts: tuple[str, ...], read: Read) -> Tensor:
    functional = bitsandbytes().functional
    name = parts[0]
    tensors = {part.removeprefix(f"{name}."): read(part).clone() for part in parts[1:]}
    state = functional.QuantState.from_dict(tensors, device=torch.device("cpu"))
    state.dtype = torch.float32
    weight: Tensor = functional.dequantize_4bit(read(name).clone(), state)
    return weight


def _from_fp8(codes: Tensor, scales: Tensor, block: tuple[int, ...]) -> Tensor:
    rows, columns = codes.shape
    if scales.shape != (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        raise ValueError(f"scales {tuple(scales.shape)} of blocks {block} for {tuple(codes.shape)}")
    wide = scales.float().repeat_interleave(block[0], 0)[:rows]
    return codes.float() * wide.repeat_interleave(block[1], 1)[:, :columns]


def _from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks: (num_experts, out, groups, 16) uint8, two codes a byte, the first in the low bits. scales: the
    groups' powers of two. Returns (num_experts, in, out), as GPT-OSS wants them."""
    values = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.bfloat16)
    stacks = []
    for codes, powers in zip(
        blocks, scales, strict=True
    ):  # one expert at a time: a hundred MB, not gigabytes
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).int()  # (out, groups, 32)
        grouped = torch.ldexp(values[pairs], powers.int()[..., None] - 127)
        stacks.append(grouped.flatten(-2).T.to(torch.bfloat16))
    return torch.stack(stacks)
