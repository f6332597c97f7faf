"""How a transformers architecture falls into ends and blocks.

Owns the list of certified families and the shape of a model without weights; knows nothing of files or
devices. One generic adapter serves all families: transformers' own classes, built on the meta device as a
whole, so that every block has the place, and with it the layer type, that its index gives it; blocks are
then taken out one by one. Whatever is not on the list is refused by name: a family belongs to it once
`tests/model/test_span.py` shows that it split at every boundary equals the whole.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..protocol.errors import Code, error
from ..protocol.tensors import Quantization
from . import bloom, falcon, prequantized
from .attention import ATTENTION, Placement, register
from .cache import CacheShape
from .experts import STACKED, is_stack, is_transposed
from .quantization import can_hold, weight_bytes


class Layout(NamedTuple):
    """What a family calls the parts of its base model.

    embeddings_norm: behind the embeddings, where a family has one. rotary: "" where it has none. block: what
    stands in the place of transformers' blocks, where those do not follow its attention interface. refusal:
    why a configuration cannot be computed, or None.
    """

    blocks: str = "layers"
    embeddings: str = "embed_tokens"
    norm: str = "norm"
    rotary: str = "rotary_emb"
    embeddings_norm: str = ""
    block: Callable[[Any], nn.Module] | None = None
    refusal: Callable[[PretrainedConfig], str | None] | None = None


CERTIFIED: Final[Mapping[str, Layout]] = {
    "LlamaForCausalLM": Layout(),
    "Qwen2ForCausalLM": Layout(),
    "Qwen3ForCausalLM": Layout(),
    "MistralForCausalLM": Layout(),
    "Phi3ForCausalLM": Layout(),
    "Olmo2ForCausalLM": Layout(),
    "Gemma2ForCausalLM": Layout(),
    "Gemma3ForCausalLM": Layout(),
    "MixtralForCausalLM": Layout(),
    "Qwen3MoeForCausalLM": Layout(),
    "GptOssForCausalLM": Layout(),
    "GPTNeoXForCausalLM": Layout(embeddings="embed_in", norm="final_layer_norm"),
    "ApertusForCausalLM": Layout(),
    "ArceeForCausalLM": Layout(),
    "Ernie4_5ForCausalLM": Layout(),
    "Exaone4ForCausalLM": Layout(),
    "GemmaForCausalLM": Layout(),
    "GlmForCausalLM": Layout(),
    "Glm4ForCausalLM": Layout(),
    "HeliumForCausalLM": Layout(),
    "HunYuanDenseV1ForCausalLM": Layout(),
    "OlmoForCausalLM": Layout(),
    "Olmo3ForCausalLM": Layout(),
    "OlmoeForCausalLM": Layout(),
    "PhiForCausalLM": Layout(norm="final_layernorm"),
    "Qwen2MoeForCausalLM": Layout(),
    "SeedOssForCausalLM": Layout(),
    "SmolLM3ForCausalLM": Layout(),
    "Starcoder2ForCausalLM": Layout(),
    "BloomForCausalLM": Layout(
        blocks="h",
        embeddings="word_embeddings",
        norm="ln_f",
        rotary="",
        embeddings_norm="word_embeddings_layernorm",
        block=bloom.BloomBlock,
        refusal=bloom.refusal,
    ),
    "FalconForCausalLM": Layout(
        blocks="h",
        embeddings="word_embeddings",
        norm="ln_f",
        block=falcon.FalconBlock,
        refusal=falcon.refusal,
    ),
}

# What transformers computes plain experts by: its other ways read back from a GPU which experts tokens were sent to
# (eager), or copy the weights of each token's experts (batched_mm). It matters on a GPU only; on a CPU they are apart.
GROUPED_MM: Final = "grouped_mm"

# Rope types whose frequencies follow the longest position of the batch that they are asked for.
_LENGTH_DEPENDENT: Final = ("dynamic", "longrope")


def architecture(config: PretrainedConfig) -> str:
    """The model's class, such as `LlamaForCausalLM`. Raises `UNSUPPORTED_FAMILY` with the reason."""
    built = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    name = str((config.architectures or [built])[0])
    if name not in CERTIFIED or name != built:
        raise error(
            Code.UNSUPPORTED_FAMILY,
            f"models of the architecture {name} are not supported",
            f"choose one of {', '.join(sorted(CERTIFIED))}",
        )
    method = prequantized.refusal(config)
    if method is not None:
        raise error(
            Code.UNSUPPORTED_FAMILY,
            f"weights stored quantized by {method} are not supported",
            f"use the model's float16 or bfloat16 weights, quantized by --quantization, a GGUF file, or weights in"
            f" {', '.join(prequantized.METHODS)}",
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise error(Code.UNSUPPORTED_FAMILY, f"{name} with bidirectional attention cannot be cached")
    refusal = CERTIFIED[name].refusal
    reason = refusal(config) if refusal is not None else None
    if reason is not None:
        raise error(Code.UNSUPPORTED_FAMILY, f"{reason} is not supported")
    return name


class Skeleton:
    """A model without weights: its blocks and ends are handed out once each, to be filled and owned elsewhere.

    tensors: of the whole model, without numbers, by the names that transformers gives them.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        """Raises `UNSUPPORTED_FAMILY`."""
        self.architecture = architecture(config)
        layout = CERTIFIED[self.architecture]
        register()
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config,
                attn_implementation=ATTENTION if layout.block is None else "eager",
                dtype=torch.float32,
            )
        self.model.eval().requires_grad_(False)
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation(GROUPED_MM)  # a checkpoint may ask for another
        self.config = self.model.config
        self._layout = layout
        self._base: nn.Module = self.model.base_model
        self._prefix = f"{self.model.base_model_prefix}."
        self._blocks: Any = self._base.get_submodule(layout.blocks)  # an nn.ModuleList
        self.num_blocks = len(self._blocks)
        if layout.block is not None:
            for index in range(self.num_blocks):
                self._blocks[index] = layout.block(self._blocks[index])
        self.tensors: dict[str, Tensor] = self.model.state_dict()  # all on the meta device
        self._linear = {
            f"{name}.weight" for name, module in self.model.named_modules() if type(module) is nn.Linear
        }
        self._stacks = {  # those of experts → whether they are transposed
            f"{name}.{leaf}": is_transposed(module)
            for name, module in self.model.named_modules()
            for leaf in STACKED
            if is_stack(module, leaf)
        }

    @property
    def hidden_size(self) -> int:
        """Numbers in a token's hidden state."""
        return int(self.config.hidden_size)

    def block_prefix(self, block: int) -> str:
        """What the names of a block's tensors start with."""
        return f"{self._prefix}{self._layout.blocks}.{block}."

    @property
    def end_prefixes(self) -> dict[str, str]:
        """Part of the ends → what the names of its tensors start with."""
        parts = {
            "embeddings": f"{self._prefix}{self._layout.embeddings}.",
            "norm": f"{self._prefix}{self._layout.norm}.",
            "head": f"{self._head_name()}.",
        }
        if self._layout.embeddings_norm:
            parts["embeddings_norm"] = f"{self._prefix}{self._layout.embeddings_norm}."
        return parts

    def block_bytes(self, block: int, dtype: torch.dtype, scheme: Quantization | None = None) -> int:
        """Bytes of a block's weights in `dtype`, those of linear layers in `scheme`."""
        return self._bytes(self.block_prefix(block), dtype, scheme)

    def ends_bytes(self, dtype: torch.dtype, scheme: Quantization | None = None) -> int:
        """Bytes of the ends' weights in `dtype`, the head in `scheme`; tied ones count twice: it has its own."""
        prefixes = self.end_prefixes
        return sum(
            self._bytes(prefixes[part], dtype, scheme if part == "head" else None) for part in prefixes
        )

    def take_block(self, block: int) -> nn.Module:
        """A block's module, its tensors still on the meta device; an empty module stays in its place."""
        module: nn.Module = self._blocks[block]
        self._blocks[block] = nn.Module()
        return module

    def take_ends(self) -> dict[str, nn.Module]:
        """The modules of `end_prefixes`, by its names, their weights still on the meta device."""
        names = self.end_prefixes
        parts = {part: self.model.get_submodule(name.removesuffix(".")) for part, name in names.items()}
        for module in parts.values():
            self._make_buffers(module)
        return parts

    @property
    def is_tied(self) -> bool:
        """Whether the head's weights are the embeddings'."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def cache_shape(self, module: nn.Module) -> CacheShape:
        """What a block's attention keeps of a token."""
        for part in module.modules():
            head_dim = getattr(part, "head_dim", None) or getattr(part, "head_size", None)
            if head_dim is not None and hasattr(part, "layer_idx"):
                heads = (
                    getattr(part, "num_kv_heads", None)
                    or getattr(self.config, "num_key_value_heads", None)
                    or self.config.num_attention_heads
                )
                return CacheShape(int(heads), int(head_dim), int(head_dim))
        raise error(Code.UNSUPPORTED_FAMILY, f"{self.architecture} has a block without attention")

    def window(self, module: nn.Module) -> int | None:
        """How many of the latest tokens, its own included, a block attends; None is all."""
        for part in module.modules():
            if not (hasattr(part, "layer_idx") and hasattr(part, "head_dim")):
                continue  # not its attention
            if not getattr(part, "is_sliding", True):
                return None
            window = getattr(part, "sliding_window", getattr(self.config, "sliding_window", None))
            return int(window) if window else None  # Qwen2-MoE says 0 where it has none
        return None

    def rotary(self) -> Rotary | None:
        """The model's rotary embeddings, with buffers of their own on the CPU; None if it has none."""
        if not self._layout.rotary:
            return None
        return Rotary(type(self._base.get_submodule(self._layout.rotary))(self.config), self.config)

    def _bytes(self, prefix: str, dtype: torch.dtype, scheme: Quantization | None) -> int:
        total = 0
        for name, tensor in self.tensors.items():
            if not name.startswith(prefix):
                continue
            shape = tuple(tensor.shape) if name in self._linear else None
            if name in self._stacks:
                shape = tuple(tensor.mT.shape[1:] if self._stacks[name] else tensor.shape[1:])
            if scheme is not None and shape is not None and can_hold(scheme, *shape):
                total += weight_bytes(scheme, *shape) * (tensor.numel() // math.prod(shape))
            else:
                total += tensor.numel() * dtype.itemsize
        return total

    def _head_name(self) -> str:
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return next(str(name) for name, module in self.model.named_modules() if module is head)

    def _make_buffers(self, module: nn.Module) -> None:
        """Give buffers that no checkpoint holds, such as an embedding's scale, their computed values."""
        for part in module.modules():
            names = [name for name, buffer in part.named_buffers(recurse=False) if buffer.is_meta]
            for name in names:
                buffer = part.get_buffer(name)
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            if names:
                self.model._init_weights(part)  # type: ignore[no-untyped-call]


class Rotary:
    """Rotary embeddings of a batch, in which each row's depend on that row alone.

    transformers picks the frequencies of dynamic and long RoPE by the longest position in the batch, which
    here holds other people's rows. Such types are computed row by row, each from the model's own start, and
    for the length that the row was opened for. The length that it has would change in mid-text, with keys
    turned by the old frequencies beside new ones, and a replay in other chunks would give another text.
    """

    def __init__(self, module: nn.Module, config: PretrainedConfig) -> None:
        self._module = module.eval()
        self._layer_types: tuple[str, ...] | None = None
        types = getattr(module, "rope_type", "default")
        if "layer_type" in inspect.signature(type(module).forward).parameters:
            self._layer_types = tuple(config.layer_types)
        names = types.values() if isinstance(types, dict) else (types,)
        self.is_length_dependent = any(kind in name for name in names for kind in _LENGTH_DEPENDENT)
        self._pristine = {
            name: value
            for name, value in {**module._buffers, **vars(module)}.items()
            if name.endswith(("inv_freq", "max_seq_len_cached", "attention_scaling"))
        }

    def to(self, device: torch.device) -> Rotary:
        """Move the buffers; returns self."""
        self._module.to(device)
        self._pristine = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self._pristine.items()
        }
        return self

    def __call__(self, hidden: Tensor, placement: Placement, blocks: range) -> dict[int, Any]:
        """Block → its position embeddings for hidden (1, num_tokens, hidden_size)."""
        if self._layer_types is None:
            embeddings = self._embed(hidden, placement, {})
            return dict.fromkeys(blocks, embeddings)
        by_type = {
            kind: self._embed(hidden, placement, {"layer_type": kind})
            for kind in {self._layer_types[block] for block in blocks}
        }
        return {block: by_type[self._layer_types[block]] for block in blocks}

    def _embed(self, hidden: Tensor, placement: Placement, options: dict[str, str]) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (1, num_tokens, rotary_dim) each."""
        positions = placement.positions[None]
        if not self.is_length_dependent:
            cosines, sines = self._module(hidden, positions, **options)
            return cosines, sines
        parts = []
        for reach in placement.reaches:
            self._reset()
            own = positions[:, reach.offset : reach.offset + reach.n]
            with_last = F.pad(own, (0, 1), value=reach.length - 1)  # says how long the text is
            cosines, sines = self._module(hidden, with_last, **options)
            parts.append((cosines[:, :-1], sines[:, :-1]))
        return torch.cat([cos for cos, _ in parts], dim=1), torch.cat([sin for _, sin in parts], dim=1)

    def _reset(self) -> None:
        for name, value in self._pristine.items():
            if isinstance(value, Tensor):
                self._module.register_buffer(name, value.clone(), persistent=False)
            else:
                setattr(self._module, name, value)
