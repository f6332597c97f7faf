"""Adapter parts: what users' adapters add to single blocks, held under a limit and laid over batches.

Owns the parts' memory (least recently used ones make room, those in use stay), the strict reading of their
bytes, and how their numbers enter a block: LoRA around its linear layers, prompts before it. The base weights
are read alone, so that any number of adapters shares one copy; in one batch each acts on its own tokens.
What a part is, in bytes, stands in `protocol.training`; who may put one here is the daemon's business.

A LoRA term is computed in float32 whatever the dtype of the block, added in it, and the sum is rounded to
the block's dtype: as PEFT does with its default `autocast_adapter_dtype`.

Source: Hu et al. 2021, LoRA; Chen et al. 2023, Punica, for adapters side by side in one batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from ..protocol.errors import Code, error
from ..protocol.training import NO_PART, Dropout
from .dropout import kept
from .linear import FrozenLinear

PROMPT: Final = "prompt"
SOFT: Final = "soft"
_FACTORS: Final = (".lora_A", ".lora_B")


@dataclass(frozen=True, slots=True)
class Part:
    """What an adapter adds to one block.

    tensors: by the names that `protocol.training` gives them, float32. scalings: of each target.
    """

    tensors: Mapping[str, Tensor]
    scalings: Mapping[str, float]
    dropout: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def trainable(self) -> Part:
        """The same numbers as leaves of a graph of their own."""
        return replace(
            self, tensors={name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        )

    def to(self, device: torch.device) -> Part:
        """The part on a device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


def read_part(payload: bytes) -> Part:
    """A part from its safetensors file.

    Raises `BAD_REQUEST` if the bytes are no such file, `BAD_SHAPE` for tensors that cannot belong to any part,
    `NOT_FINITE`.
    """
    tensors = _read_tensors(payload)
    metadata = _read_metadata(payload)
    targets = sorted({name.rpartition(".")[0] for name in tensors if name != PROMPT})
    for name, tensor in tensors.items():
        if name != PROMPT and not name.endswith(_FACTORS):
            raise error(
                Code.BAD_REQUEST,
                f"an adapter part holds a tensor {name!r}",
                "name tensors TARGET.lora_A, TARGET.lora_B and prompt",
            )
        if tensor.dim() != 2 or not tensor.numel():
            raise error(
                Code.BAD_SHAPE, f"{name} has the shape {tuple(tensor.shape)}, expected two dimensions"
            )
        if not torch.isfinite(tensor).all():
            raise error(Code.NOT_FINITE, f"{name} holds numbers that are not finite", tensor=name)
    for target in targets:
        ranks = [tensors[target + factor].shape for factor in _FACTORS if target + factor in tensors]
        if len(ranks) < 2 or ranks[0][0] != ranks[1][1]:
            shapes = ", ".join(str(tuple(shape)) for shape in ranks)
            raise error(
                Code.BAD_SHAPE, f"{target} has factors of the shapes {shapes}, expected (r, in) and (out, r)"
            )
    return Part(
        tensors=tensors,
        scalings={target: _number(metadata, f"{target}.scaling", 1.0) for target in targets},
        dropout=_dropout(metadata, targets),
    )


def read_soft(payload: bytes) -> Tensor:
    """The virtual tokens (num, hidden_size) of a part that holds nothing else, float32.

    Raises `BAD_REQUEST`, `BAD_SHAPE`, `NOT_FINITE`.
    """
    tensors = _read_tensors(payload)
    soft = tensors.get(SOFT)
    if soft is None or len(tensors) > 1:
        raise error(Code.BAD_REQUEST, f"a part of {', '.join(sorted(tensors))}, expected {SOFT} alone")
    if soft.dim() != 2 or not soft.numel():
        raise error(Code.BAD_SHAPE, f"{SOFT} has the shape {tuple(soft.shape)}, expected two dimensions")
    if not torch.isfinite(soft).all():
        raise error(Code.NOT_FINITE, f"{SOFT} holds numbers that are not finite", tensor=SOFT)
    return soft


def _read_tensors(payload: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(payload)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as problem:
        raise error(
            Code.BAD_REQUEST, f"{len(payload)} bytes of an adapter part are no safetensors file: {problem}"
        ) from problem
    if not tensors:
        raise error(Code.BAD_REQUEST, "an adapter part without tensors", "leave the block without a part")
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.float32:
            raise error(
                Code.BAD_REQUEST, f"{name} is {tensor.dtype}, expected torch.float32", "convert it to float32"
            )
    return tensors


def _read_metadata(payload: bytes) -> dict[str, str]:
    """The file's own notes; the rest of it was found to be in order already."""
    length = int.from_bytes(payload[:8], "little")
    metadata = json.loads(payload[8 : 8 + length]).get("__metadata__", {})
    return {str(name): str(value) for name, value in metadata.items()}


def _dropout(metadata: Mapping[str, str], targets: list[str]) -> float:
    known = {"dropout", "format", *(f"{target}.scaling" for target in targets)}
    unknown = sorted(set(metadata) - known)
    if unknown:
        raise error(Code.BAD_REQUEST, f"an adapter part says {unknown[0]!r} of itself, which nobody knows")
    dropout = _number(metadata, "dropout", 0.0)
    if not 0 <= dropout < 1:
        raise error(Code.BAD_REQUEST, f"dropout {dropout} of an adapter part", "choose one in [0, 1)")
    return dropout


def _number(metadata: Mapping[str, str], name: str, default: float) -> float:
    text = metadata.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError as problem:
        raise error(Code.BAD_REQUEST, f"{name} of an adapter part is {text!r}, no number") from problem
    if not math.isfinite(value):
        raise error(Code.BAD_REQUEST, f"{name} of an adapter part is {text}")
    return value


def write_part(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of these tensors, in float32: gradients of a part."""
    return safetensors.torch.save(
        {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    )


def check_fits(part: Part, block: int, module: nn.Module, hidden_size: int) -> None:
    """Raise `BAD_SHAPE` unless the part's targets are linear layers of the block, with these sizes."""
    linears = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (FrozenLinear, nn.Linear)) and name
    }
    for name, tensor in part.tensors.items():
        if name == PROMPT:
            found, expected = tensor.shape[1], hidden_size
        else:
            target, _, factor = name.rpartition(".")
            if target not in linears:
                raise error(
                    Code.BAD_SHAPE,
                    f"block {block} has no linear layer {target!r}",
                    f"choose some of {', '.join(sorted(linears))}",
                )
            layer = linears[target]
            is_first = factor == "lora_A"
            found = tensor.shape[1] if is_first else tensor.shape[0]
            expected = layer.in_features if is_first else layer.out_features
        if found != expected:
            raise error(
                Code.BAD_SHAPE,
                f"{name} has the shape {tuple(tensor.shape)}, block {block} wants {expected} in place of {found}",
                "the adapter is for another model",
            )


class Adapters:
    """Every part that a worker holds, by name, up to `limit_bytes` together."""

    def __init__(
        self, blocks: Mapping[int, nn.Module], hidden_size: int, device: torch.device, limit_bytes: int
    ) -> None:
        self._blocks = blocks
        self._hidden_size = hidden_size
        self._device = device
        self._limit_bytes = limit_bytes
        self._held: dict[bytes, Part] = {}  # least recently used first
        self._fitting: set[tuple[bytes, int]] = set()  # names and blocks that were checked
        self._pins: Counter[bytes] = Counter()

    @property
    def num_bytes(self) -> int:
        """Of all parts held."""
        return sum(part.num_bytes for part in self._held.values())

    def hold(self, name: bytes, block: int, payload: bytes) -> None:
        """Keep a part.

        Raises `BLOCKS_OUT_OF_RANGE`, `BAD_REQUEST` if the bytes are not what their name says, `OUT_OF_MEMORY` if
        those in use leave no room, and what `read_part` and `check_fits` raise.
        """
        if hashlib.sha256(payload).digest() != name:
            raise error(
                Code.BAD_REQUEST,
                f"{len(payload)} bytes came as the adapter part {name.hex()[:8]}, their sha256 is"
                f" {hashlib.sha256(payload).hexdigest()[:8]}",
                "send the part again",
            )
        if name in self._held:
            self._check(name, block, self._held[name])
            self._touch(name)
            return
        part = read_part(payload)
        self._check(name, block, part)
        self._make_room(part.num_bytes)
        self._held[name] = part.to(self._device)
        self._fitting.add((name, block))

    def pin(self, blocks: tuple[int, int], names: Sequence[bytes]) -> dict[int, Part]:
        """Block → part, of one name for each block [start, end), or of none; they stay until `unpin`.

        Raises `ADAPTER_MISSING` with the hex names in `missing`, `BAD_SHAPE` for one that is of other blocks, and
        `BAD_REQUEST`.
        """
        start, end = blocks
        if names and len(names) != end - start:
            raise error(Code.BAD_REQUEST, f"{len(names)} adapter parts for blocks {start}:{end}")
        wanted = {start + i: name for i, name in enumerate(names) if name != NO_PART}
        missing = sorted({name.hex() for name in wanted.values() if name not in self._held})
        if missing:
            raise error(
                Code.ADAPTER_MISSING,
                f"this worker does not hold {len(missing)} of {len(wanted)} adapter parts",
                "put them here and ask again",
                missing=missing,
            )
        for block, name in wanted.items():
            self._check(name, block, self._held[name])
        for name in wanted.values():
            self._touch(name)
            self._pins[name] += 1
        return {block: self._held[name] for block, name in wanted.items()}

    def unpin(self, names: Iterable[bytes]) -> None:
        """Let go of what `pin` gave."""
        for name in names:
            if name != NO_PART:
                self._pins[name] -= 1
                if not self._pins[name]:
                    del self._pins[name]

    def _check(self, name: bytes, block: int, part: Part) -> None:
        if (name, block) in self._fitting:
            return
        if block not in self._blocks:
            served = f"{min(self._blocks, default=0)}:{max(self._blocks, default=-1) + 1}"
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"an adapter part for block {block} of a worker that serves {served}",
            )
        check_fits(part, block, self._blocks[block], self._hidden_size)
        if name in self._held:  # so that it goes when the part does
            self._fitting.add((name, block))

    def _touch(self, name: bytes) -> None:
        self._held[name] = self._held.pop(name)

    def _make_room(self, num_bytes: int) -> None:
        idle = [name for name in self._held if name not in self._pins]
        used, evictable = self.num_bytes, sum(self._held[name].num_bytes for name in idle)
        if used - evictable + num_bytes > self._limit_bytes:
            raise error(
                Code.OUT_OF_MEMORY,
                f"an adapter part of {num_bytes:,} bytes; parts in use take {used - evictable:,} of"
                f" {self._limit_bytes:,} bytes",
                "use a smaller rank or fewer targets, or try again later",
            )
        while used + num_bytes > self._limit_bytes:
            name = idle.pop(0)
            used -= self._held.pop(name).num_bytes
            self._fitting = {known for known in self._fitting if known[0] != name}


@dataclass(frozen=True, slots=True)
class Noise:
    """Each token's place in the masks of dropout; see `dropout.kept`. samples, positions: (num_tokens,) int64."""

    dropout: Dropout
    samples: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class Overlay:
    """An adapter over the tokens [first, last) of a batch.

    parts: block → part. places: (last - first,) int64, each token's place in its own sequence, from 0.
    earliest: the least of them. noise: None leaves dropout out.
    """

    first: int
    last: int
    parts: Mapping[int, Part]
    places: Tensor
    earliest: int
    noise: Noise | None = None


@contextmanager
def worn(module: nn.Module, block: int, overlays: Sequence[Overlay], num_tokens: int) -> Iterator[None]:
    """Within it, `module`'s linear layers add the LoRA terms of these overlays; nothing of it stays."""
    by_target: dict[str, list[Overlay]] = {}
    for overlay in overlays:
        for target in overlay.parts[block].scalings if block in overlay.parts else ():
            by_target.setdefault(target, []).append(overlay)
    handles = [
        module.get_submodule(target).register_forward_hook(_Term(block, target, wearers, num_tokens))
        for target, wearers in by_target.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Term:
    """What several adapters add to the output of one linear layer."""

    def __init__(self, block: int, target: str, overlays: Sequence[Overlay], num_tokens: int) -> None:
        self._block = block
        self._target = target
        self._overlays = overlays
        self._num_tokens = num_tokens

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """output: (…, out_features) of all tokens of the batch, one after the other."""
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])  # (num_tokens, in_features)
        if rows.shape[0] != self._num_tokens:
            raise error(
                Code.UNSUPPORTED,
                f"{self._target} of block {self._block} sees {rows.shape[0]} of {self._num_tokens} tokens",
                "leave this layer out of the adapter's targets",
            )
        flat = output.reshape(rows.shape[0], -1)
        pieces, end = [], 0
        for overlay in self._overlays:
            pieces.append(flat[end : overlay.first])
            mine = flat[overlay.first : overlay.last]
            term = self._term(rows[overlay.first : overlay.last], overlay)
            pieces.append((mine.float() + term).to(flat.dtype))
            end = overlay.last
        pieces.append(flat[end:])
        pieces = [piece for piece in pieces if piece.shape[0]]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return joined.view(output.shape)

    def _term(self, rows: Tensor, overlay: Overlay) -> Tensor:
        """(num_tokens, out_features) float32."""
        part = overlay.parts[self._block]
        first, second = (part.tensors[self._target + factor] for factor in _FACTORS)
        inputs = rows.float()
        if overlay.noise is not None and part.dropout:
            inputs = inputs * self._mask(overlay.noise, inputs.shape[1], part.dropout)
        return F.linear(F.linear(inputs, first), second) * part.scalings[self._target]

    def _mask(self, noise: Noise, in_features: int, p: float) -> Tensor:
        """(num_tokens, in_features) of 0 and 1 / (1 - p)."""
        seed, step, _ = noise.dropout
        mask = kept((seed, step), self._block, self._target, noise.samples, noise.positions, (in_features, p))
        return mask.float().div_(1 - p)


def prompted(states: Tensor, block: int, overlays: Sequence[Overlay]) -> Tensor:
    """Hidden states (num_tokens, hidden_size) with the block's prompts added to the first of each sequence."""
    for overlay in overlays:
        part = overlay.parts.get(block)
        prompt = part.tensors.get(PROMPT) if part is not None else None
        if prompt is None or overlay.earliest >= prompt.shape[0]:
            continue
        # One row of zeros stands behind the prompt, for the tokens that it does not reach.
        table = F.pad(prompt, (0, 0, 0, 1))
        added = F.embedding(overlay.places.clamp(max=prompt.shape[0]), table)
        mine = (states[overlay.first : overlay.last].float() + added).to(states.dtype)
        states = torch.cat([states[: overlay.first], mine, states[overlay.last :]])
    return states
