"""Weights in fewer bits: the schemes, how a weight is put into each, and the shelf where that is kept.

Owns the stored form of quantized weights, which is the same on every machine; how a device computes with them
is the business of `linear`. Only linear layers of blocks are quantized, those of experts one by one, and the
head, always in eight bits: norms, routers and embeddings stay in the worker's dtype.

Weights are quantized by themselves, without looking at any activation, and nothing that is computed for a row
depends on the values of other rows. How many there are chooses the kernel, and so may change, as without
quantization, the order of a sum; with int8 and int4 on a CPU also the last bit of a bfloat16, to which torch's
kernels round inputs and outputs of these layers, and with int4 each weight. Those of `compiled`, for a few
tokens, round nothing.

Source: Dettmers et al. 2022, LLM.int8(), for one scale a row; Dettmers et al. 2023, QLoRA, for NF4.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..protocol.errors import Code, error
from ..protocol.tensors import Quantization
from .strips import INT4_GROUP

logger = logging.getLogger(__name__)

# Changed whenever the same weights would be stored otherwise, so that older shelves are not read.
VERSION: Final = 1
_NF4_GROUP: Final = 64  # bitsandbytes' own choice: 4.5 bits a weight
_INT8_MULTIPLE: Final = 32  # torch's int8 kernel reads beyond rows that are no multiple of 16
_ALIGNMENT: Final = 16  # bytes; torch's int8 kernel crashes on codes that begin between
# A few MB of intermediates, which stay in the processor's cache; and results are there before them, so that they
# leave no holes in memory behind (measured with NF4: 125 MB of holes for 14 MB of weights).
_ROWS_AT_ONCE: Final = 256


class Stored(NamedTuple):
    """A quantized weight (out_features, in_features).

    tensors: INT8: codes (out, in) int8, scales (out,) bfloat16. INT4: codes (out, in / 2) uint8, the first of
    two in the low bits, scales (in / group, out, 2) bfloat16, a step and the value of code 8. NF4: codes and
    scales as bitsandbytes lays them out.
    """

    scheme: Quantization
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> Stored:
        """The same there."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Stored(self.scheme, self.shape, tensors)

    def outputs(self, first: int, last: int) -> Stored:
        """The weights of outputs [first, last), INT8 or NF4, as views."""
        num_outputs, in_features = self.shape
        tensors = {}
        for name, tensor in self.tensors.items():
            each = tensor.shape[0] // num_outputs  # entries: a row has its own codes and scales
            tensors[name] = tensor[first * each : last * each]
        return Stored(self.scheme, (last - first, in_features), tensors)


def gathered(weights: Iterable[Stored], count: int, device: torch.device) -> Stored:
    """One weight with the outputs of `count` of the same shape, INT8 or NF4, on a device that holds each once."""
    whole: Stored | None = None
    for index, weight in enumerate(weights):
        scheme, (num_outputs, in_features), tensors = weight
        if whole is None:
            room = {
                name: torch.empty((count * part.shape[0], *part.shape[1:]), dtype=part.dtype, device=device)
                for name, part in tensors.items()
            }
            whole = Stored(scheme, (count * num_outputs, in_features), room)
        own = whole.outputs(index * num_outputs, (index + 1) * num_outputs)
        for name, part in tensors.items():
            own.tensors[name].copy_(part)
    if whole is None:
        raise error(Code.INTERNAL, "no weights to gather")
    return whole


def stacked(weights: Sequence[Stored]) -> Stored:
    """One weight with the outputs of these, all in one scheme, and of the same inputs."""
    scheme, in_features = weights[0].scheme, weights[0].shape[1]
    tensors = {
        "codes": torch.cat([weight.tensors["codes"] for weight in weights]),
        "scales": torch.cat(
            [weight.tensors["scales"] for weight in weights], dim=1 if scheme is Quantization.INT4 else 0
        ),
    }
    return Stored(scheme, (sum(weight.shape[0] for weight in weights), in_features), tensors)


def scheme_of(name: str | None) -> Quantization | None:
    """The scheme of this name; None is none. Raises `BAD_CONFIG`."""
    if name is None:
        return None
    try:
        return Quantization(name)
    except ValueError:
        raise error(
            Code.BAD_CONFIG, f"quantization {name!r} is unknown", f"choose one of {', '.join(Quantization)}"
        ) from None


def can_hold(scheme: Quantization, out_features: int, in_features: int) -> bool:
    """Whether weights of this shape can be kept so; others stay as they are."""
    multiple = {
        Quantization.INT8: _INT8_MULTIPLE,
        Quantization.INT4: INT4_GROUP,
        Quantization.NF4: _NF4_GROUP,
    }[scheme]
    return out_features > 0 and in_features > 0 and in_features % multiple == 0


def weight_bytes(scheme: Quantization, out_features: int, in_features: int) -> int:
    """Bytes of such a weight, without its bias."""
    count = out_features * in_features
    if scheme is Quantization.INT8:
        return count + 2 * out_features
    return count // 2 + count // (INT4_GROUP if scheme is Quantization.INT4 else _NF4_GROUP) * 4


def quantize(weight: Tensor, scheme: Quantization) -> Stored:
    """weight: (out_features, in_features) on the CPU, of a shape that `can_hold` allows."""
    shape = (weight.shape[0], weight.shape[1])
    match scheme:
        case Quantization.INT8:
            tensors = _to_int8(weight)
        case Quantization.INT4:
            tensors = _to_int4(weight)
        case Quantization.NF4:
            tensors = _to_nf4(weight)
    return Stored(scheme, shape, tensors)


def dequantize(stored: Stored) -> Tensor:
    """The weights that a stored form stands for, (out_features, in_features) float32: what kernels are held to."""
    codes, scales = stored.tensors["codes"], stored.tensors["scales"]
    match stored.scheme:
        case Quantization.INT8:
            return codes.float() * scales.float()[:, None]
        case Quantization.INT4:
            steps, middles = scales.float().permute(2, 1, 0)[..., None]  # (out, in / group, 1) each
            pairs = torch.stack([codes & 15, codes >> 4], dim=-1).view(stored.shape)
            grouped = pairs.view(stored.shape[0], -1, INT4_GROUP).float() - 8
            weights: Tensor = (grouped * steps).add_(middles)
            return weights.view(stored.shape)
        case Quantization.NF4:
            return from_nf4(codes, scales, stored.shape, torch.float32)


def wide(stored: Stored, dtype: torch.dtype) -> Tensor:
    """`dequantize` in another dtype, INT8 or NF4, on the weights' device."""
    if stored.scheme is Quantization.NF4:
        return from_nf4(stored.tensors["codes"], stored.tensors["scales"], stored.shape, dtype)
    return dequantize(stored).to(dtype)


def _to_int8(weight: Tensor) -> dict[str, Tensor]:
    """Codes are chosen for the scales as kept, so that rounding a scale costs no accuracy but a step's width."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.bfloat16)
    for first in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = weight[first : first + _ROWS_AT_ONCE].float()
        largest = rows.abs().amax(dim=1, keepdim=True)
        own = _at_least((largest / 127).clamp_min(1e-30))
        codes[first : first + len(rows)] = (rows / own.float()).round_().clamp_(-127, 127)
        scales[first : first + len(rows)] = own[:, 0]
    return {"codes": codes, "scales": scales}


def _at_least(values: Tensor) -> Tensor:
    """Positive float32 as bfloat16, rounded up."""
    rounded = values.to(torch.bfloat16)
    return torch.where(rounded.float() < values, rounded * (1 + 2**-7), rounded)


def _to_int4(weight: Tensor) -> dict[str, Tensor]:
    parts = [_int4_rows(rows.float()) for rows in torch.split(weight, _ROWS_AT_ONCE)]
    return {
        "codes": torch.cat([codes for codes, _ in parts]),
        "scales": torch.cat([scales for _, scales in parts]).transpose(0, 1).contiguous(),
    }


def _int4_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (num_rows, in / 2), and steps and middles (num_rows, in / group, 2) of some rows.

    Codes over a group's whole range, then the line through weights over codes with the least squared error,
    and codes for that: a twentieth less error than the range alone.
    """
    groups = weight.view(weight.shape[0], -1, INT4_GROUP)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    step = _rounded((high - low).div_(15).clamp_min_(1e-30))
    middle = _rounded(low + 8 * step)
    codes = _int4_codes(groups, step, middle)
    mean_code, mean = codes.mean(dim=-1, keepdim=True), groups.mean(dim=-1, keepdim=True)
    apart = codes - mean_code
    slope = (apart * (groups - mean)).sum(dim=-1, keepdim=True)
    slope /= apart.square_().sum(dim=-1, keepdim=True).clamp_min_(1e-30)
    step = torch.where(slope > 0, _rounded(slope), step)
    middle = _rounded(mean - step * (mean_code - 8))
    pairs = _int4_codes(groups, step, middle).to(torch.uint8).view(weight.shape[0], -1, 2)
    scales = torch.cat([step, middle], dim=-1).to(torch.bfloat16)
    return pairs[..., 0] | (pairs[..., 1] << 4), scales


def _rounded(values: Tensor) -> Tensor:
    """float32 as bfloat16 holds it: codes are chosen for scales as they are kept."""
    return values.to(torch.bfloat16).float()


def _int4_codes(groups: Tensor, step: Tensor, middle: Tensor) -> Tensor:
    return (groups - middle).div_(step).add_(8).round_().clamp_(0, 15)


def bitsandbytes() -> Any:
    """The library, imported when it is first needed: it takes a second.

    It warns on some processors that it found no kernel for products with four bits on a CPU, where we never ask
    it for one; that warning alone is not passed on.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_of_use)
    return import_module("bitsandbytes")


def _is_of_use(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


def _to_nf4(weight: Tensor) -> dict[str, Tensor]:
    functional = bitsandbytes().functional
    in_features = weight.shape[1]
    codes = torch.empty((weight.numel() // 2, 1), dtype=torch.uint8)
    scales = torch.empty(weight.numel() // _NF4_GROUP)
    for first in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = weight[first : first + _ROWS_AT_ONCE].float().contiguous()
        own, state = functional.quantize_4bit(rows, blocksize=_NF4_GROUP, quant_type="nf4")
        at, group = first * in_features // 2, first * in_features // _NF4_GROUP
        codes[at : at + len(own)] = own
        scales[group : group + len(state.absmax)] = state.absmax
    return {"codes": codes, "scales": scales}


def from_nf4(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weights of NF4 codes, on the codes' device."""
    functional = bitsandbytes().functional
    state = functional.QuantState(
        absmax=scales, shape=torch.Size(shape), dtype=dtype, blocksize=_NF4_GROUP, quant_type="nf4"
    )
    weight: Tensor = functional.dequantize_4bit(codes, state)
    return weight


def multiply_nf4(
    rows: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """`rows @ weights.T + bias` of NF4 codes, (…, in_features) → (…, out_features), all on one device."""
    library = bitsandbytes()
    state = library.functional.QuantState(
        absmax=scales, shape=torch.Size(shape), dtype=rows.dtype, blocksize=_NF4_GROUP, quant_type="nf4"
    )
    product: Tensor = library.matmul_4bit(rows, codes, state, bias=bias)
    return product


@dataclass(frozen=True, slots=True)
class Shelf:
    """Quantized weights of one model on disk, so that a restart need not quantize again.

    folder: of this model's fingerprint. One file holds one part of the model, such as a block.
    """

    folder: Path
    scheme: Quantization

    @classmethod
    def of(cls, cache_folder: Path, fingerprint: str, scheme: Quantization) -> Shelf:
        """Where this model's weights in this scheme lie; nothing need be there."""
        return cls(cache_folder / "quantized" / f"{fingerprint[:32]}-{scheme}-{VERSION}", scheme)

    def read(self, part: str) -> dict[str, Stored]:
        """Name → weight of everything kept of a part; empty if nothing is, or if its file is damaged."""
        path = self._path(part)
        if not path.exists():
            return {}
        found: dict[str, dict[str, Tensor]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name, value in file.metadata().items():
                    out_features, in_features = value.split("x")
                    shapes[name] = (int(out_features), int(in_features))
                for key in file.keys():  # noqa: SIM118 - it is no map
                    name, _, leaf = key.rpartition("/")
                    found.setdefault(name, {})[leaf] = _aligned(file.get_tensor(key))
        except (SafetensorError, OSError, ValueError, AttributeError) as problem:
            logger.warning("%s is unreadable, its weights are quantized again: %s", path, problem)
            return {}
        return {name: Stored(self.scheme, shapes[name], tensors) for name, tensors in found.items()}

    def write(self, part: str, weights: Mapping[str, Stored]) -> None:
        """Keep a part's weights. A full disk costs only the next start's time, so it is logged."""
        path = self._path(part)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
        tensors = {
            f"{name}/{leaf}": tensor for name, s in weights.items() for leaf, tensor in s.tensors.items()
        }
        shapes = {name: f"{stored.shape[0]}x{stored.shape[1]}" for name, stored in weights.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, scratch, metadata=shapes)
            scratch.replace(path)
        except (SafetensorError, OSError) as problem:
            logger.warning("cannot keep quantized weights in %s: %s", path, problem)
            scratch.unlink(missing_ok=True)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part.strip('.') or 'model'}.safetensors"


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it begins where no kernel may read it: a file is mapped as its header's length says."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
