"""What a user trains over blocks that run elsewhere: its parameters, the parts that hops get, and PEFT's files.

Owns the parameters of LoRA; those of prompts are in `prompts`. It knows the layers only by name and size; the weights
that they adapt lie in the swarm. Names, initial values and files are PEFT's, so that an adapter works here and
anywhere.
Source: Hu et al. 2021, LoRA.
"""

from __future__ import annotations

import math
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Final, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..protocol.errors import Code, error
from ..protocol.training import NO_PART
from .layers import layers_name
from .parts import WEIGHTS_FILE, PartFile, Weights, of_pattern, part_file, scaling_of

_FACTORS: Final = ("lora_A", "lora_B")
# What changes the mathematics of LoRA and is not computed by the hops.
_UNSUPPORTED: Final = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)


class Linear(NamedTuple):
    """A linear layer of one block. target: its name inside the block; name: in the whole model."""

    block: int
    target: str
    name: str
    in_features: int
    out_features: int


def linears_of(config: Any) -> tuple[Linear, ...]:
    """The linear layers of all blocks of a transformers model, from its config alone."""
    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(deepcopy(config))  # type: ignore[no-untyped-call]
    found = []
    names = {module: name for name, module in whole.named_modules()}
    decoder = whole.get_decoder()
    for block, layer in enumerate(getattr(decoder, layers_name(decoder))):
        for target, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                full = f"{names[layer]}.{target}"
                found.append(Linear(block, target, full, module.in_features, module.out_features))
    return tuple(found)


class RemoteAdapter(nn.Module):
    """What a user trains over blocks that run elsewhere.

    factors: the parameters that hops get in parts. soft: virtual tokens before the text, (num, hidden_size), which
    only the user's process knows. dropout: the share of a LoRA layer's inputs dropped while training.
    """

    config: Any
    factors: nn.ParameterList
    soft: nn.Parameter | None
    dropout: float = 0.0

    @abstractmethod
    def parts(self) -> tuple[PartFile, ...]:
        """One for each block of the model, of the parameters as they are now."""

    @abstractmethod
    def gradients(self, files: Mapping[int, bytes]) -> list[Tensor]:
        """Block → file of gradients, in the order of `factors`; zeros for blocks that are not given.

        Raises `BAD_ANSWER` for a file that has not the tensors of its part, or numbers that are not finite.
        """

    @abstractmethod
    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in a file."""

    def check_finite(self) -> None:
        """Raise `NOT_FINITE` naming the parameter if training went astray."""
        for name, parameter in self.tensors().items():
            if not bool(parameter.isfinite().all()):
                raise error(
                    Code.NOT_FINITE,
                    f"{name} of the adapter holds numbers that are not finite",
                    "go back to the last checkpoint, and take smaller steps",
                )

    def version(self) -> int:
        """It grows whenever a parameter is changed in place, as optimizers do."""
        return sum(parameter._version for parameter in self.parameters())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as PEFT does."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(os.fspath(folder))
        tensors = {key: parameter.detach().cpu().contiguous() for key, parameter in self.tensors().items()}
        safetensors.torch.save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Take the weights of a folder. Raises `UNREADABLE`, `NOT_FINITE`, `BAD_SHAPE` for another model's."""
        path = Path(folder) / WEIGHTS_FILE
        tensors, expected = read_weights(path), self.tensors()
        if tensors.keys() != expected.keys():
            odd = sorted(tensors.keys() ^ expected.keys())
            raise error(
                Code.BAD_SHAPE,
                f"{path} and its config name other layers of this model: {odd[0]}, {len(odd)} in all",
                "the adapter is for another model",
            )
        for key, parameter in expected.items():
            if tensors[key].shape != parameter.shape:
                raise error(
                    Code.BAD_SHAPE,
                    f"{key} has the shape {tuple(tensors[key].shape)}, expected {tuple(parameter.shape)}",
                    "the adapter is for another model",
                )
            if not bool(tensors[key].isfinite().all()):
                raise error(Code.NOT_FINITE, f"{key} of {path} holds numbers that are not finite")
        with torch.no_grad():
            for key, parameter in expected.items():
                parameter.copy_(tensors[key])


class RemoteLora(RemoteAdapter):
    """LoRA on the linear layers that a PEFT `LoraConfig` names.

    Raises `BAD_REQUEST` for targets that are no linear layers and ranks below 1, `UNSUPPORTED` naming an option
    that the hops do not compute.
    """

    def __init__(self, config: Any, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.config = config
        self.register_parameter("soft", None)
        _check(config)
        self.dropout = float(getattr(config, "lora_dropout", 0.0))
        self.num_blocks = 1 + max(linear.block for linear in linears)
        self._linears = tuple(linear for linear in linears if _is_target(config, linear))
        if not self._linears:
            known = ", ".join(sorted({linear.target for linear in linears}))
            raise error(
                Code.BAD_REQUEST,
                f"target_modules={config.target_modules!r} are no linear layers of the blocks",
                f"choose some of {known}",
            )
        ranks = [_rank(config, linear) for linear in self._linears]
        self._scalings = [
            scaling_of(config, linear.name, rank) for linear, rank in zip(self._linears, ranks, strict=True)
        ]
        # In the order of `_linears`, A before B.
        self.factors = nn.ParameterList()
        for linear, rank in zip(self._linears, ranks, strict=True):
            first = torch.empty(rank, linear.in_features)
            nn.init.kaiming_uniform_(first, a=math.sqrt(5))
            self.factors.append(nn.Parameter(first))
            self.factors.append(nn.Parameter(torch.zeros(linear.out_features, rank)))

    def parts(self) -> tuple[PartFile, ...]:
        scalings: list[dict[str, float]] = [{} for _ in range(self.num_blocks)]
        for linear, scaling in zip(self._linears, self._scalings, strict=True):
            scalings[linear.block][linear.target] = scaling
        by_block = self._by_block(list(self.factors))
        return tuple(self._part(*part) for part in zip(by_block, scalings, strict=True))

    def gradients(self, files: Mapping[int, bytes]) -> list[Tensor]:
        read = {block: read_gradients(file) for block, file in files.items()}
        gradients = []
        for linear, factor, parameter in self._places():
            if linear.block not in read:
                gradients.append(torch.zeros_like(parameter, dtype=torch.float32))
                continue
            name = f"{linear.target}.{factor}"
            gradient = checked_gradient(read[linear.block], name, linear.block, parameter.shape)
            gradients.append(gradient.to(parameter.device))
        return gradients

    def named_factors(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that PEFT gives them in a file, in the order of `factors`."""
        return {
            f"base_model.model.{linear.name}.{factor}.weight": parameter
            for linear, factor, parameter in self._places()
        }

    def tensors(self) -> dict[str, nn.Parameter]:
        return self.named_factors()

    def _places(self) -> list[tuple[Linear, str, nn.Parameter]]:
        wanted = [(linear, factor) for linear in self._linears for factor in _FACTORS]
        return [(*place, factor) for place, factor in zip(wanted, self.factors, strict=True)]

    def _by_block(self, tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        blocks: list[dict[str, Tensor]] = [{} for _ in range(self.num_blocks)]
        for (linear, factor, _), tensor in zip(self._places(), tensors, strict=True):
            blocks[linear.block][f"{linear.target}.{factor}"] = tensor
        return blocks

    def _part(self, tensors: Mapping[str, Tensor], scalings: Mapping[str, float]) -> PartFile:
        if not tensors:
            return PartFile(NO_PART, b"")
        weights = {name: as_weights(tensor) for name, tensor in tensors.items()}
        return part_file(weights, scalings, self.dropout)


def as_weights(tensor: Tensor) -> Weights:
    """A tensor as parts hold it."""
    numbers = tensor.detach().to("cpu", torch.float32).contiguous()
    return Weights(tuple(numbers.shape), numbers.numpy().tobytes())


def _check(config: Any) -> None:
    """Raise as `RemoteLora`."""
    for rank in (getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()):
        if not isinstance(rank, int) or rank < 1:
            raise error(
                Code.BAD_REQUEST, f"r={rank!r}, expected a rank of 1 or more", "give a peft.LoraConfig"
            )
    if getattr(config, "bias", "none") != "none":
        raise error(Code.UNSUPPORTED, f"bias={config.bias!r} in a LoraConfig", "use bias='none'")
    dropout = getattr(config, "lora_dropout", 0.0)
    if not 0 <= dropout < 1:
        raise error(Code.BAD_REQUEST, f"lora_dropout={dropout!r}", "choose one in [0, 1)")
    for option in _UNSUPPORTED:
        if value := getattr(config, option, None):
            raise error(Code.UNSUPPORTED, f"{option}={value!r} in a LoraConfig", "leave it out")


def _rank(config: Any, linear: Linear) -> int:
    rank: int = of_pattern(getattr(config, "rank_pattern", None), linear.name, config.r)
    return rank


def _is_target(config: Any, linear: Linear) -> bool:
    """Whether a config means this layer, as PEFT reads it."""
    blocks = getattr(config, "layers_to_transform", None)
    if blocks is not None and linear.block not in ([blocks] if isinstance(blocks, int) else blocks):
        return False
    is_excluded = _is_named(getattr(config, "exclude_modules", None), linear)
    return not is_excluded and (
        config.target_modules == "all-linear" or _is_named(config.target_modules, linear)
    )


def _is_named(wanted: Any, linear: Linear) -> bool:
    """As PEFT matches: a string is a pattern of whole names, a list holds last parts of them."""
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, linear.name) is not None
    return any(linear.name == name or linear.name.endswith(f".{name}") for name in wanted)


def read_gradients(file: bytes) -> dict[str, Tensor]:
    """The gradients of a part, by name. Raises `BAD_ANSWER`."""
    try:
        return safetensors.torch.load(file)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as problem:
        raise error(Code.BAD_ANSWER, f"{len(file)} bytes of gradients are unreadable: {problem}") from problem


def checked_gradient(read: Mapping[str, Tensor], name: str, block: int, shape: torch.Size) -> Tensor:
    """One of them, in float32. Raises `BAD_ANSWER` unless it is there, of this shape, and finite."""
    tensor = read.get(name)
    if tensor is None or tensor.shape != shape or not bool(tensor.isfinite().all()):
        found = None if tensor is None else tuple(tensor.shape)
        raise error(
            Code.BAD_ANSWER,
            f"the gradient of {name} of block {block} has the shape {found}, expected finite numbers of {tuple(shape)}",
        )
    return tensor.float()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `UNREADABLE`."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as problem:
        raise error(Code.UNREADABLE, f"{path}: {problem}", "give a folder that PEFT wrote") from problem
