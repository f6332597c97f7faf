"""Trainable prompts: virtual tokens before the text, and with deep prompts numbers added to them in every block.

Owns the prompts' parameters and files, and where a model takes them up: its own forward meets the virtual tokens as
embeddings before the text's, and gives out what is the text's alone, so that generation and heads of one's own do
not know of them. Soft prompts are PEFT's in name, value and file. For deep prompts PEFT has no file
(its prefix tuning trains keys and values instead); theirs is alike in form.
Source: Lester et al. 2021, prompt tuning; Liu et al. 2021, P-tuning v2; Borzunov et al. 2023, Petals, section 2.2.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..protocol.errors import Code, error
from ..protocol.training import NO_PART
from .adapters import RemoteAdapter, as_weights, checked_gradient, read_gradients
from .parts import CONFIG_FILE, PartFile, part_file
from .swarm_cache import SwarmCache

DEEP_PROMPT: Final = "DEEP_PROMPT"
_SOFT: Final = "prompt_embeddings"  # as PEFT names it in a file
_DEEP: Final = "block_prompts"


@dataclass
class DeepPromptConfig:
    """Virtual tokens before the text, and in each block numbers added to their hidden states.

    A block's prompts begin at zero, so that training begins where soft prompts alone would.
    """

    num_virtual_tokens: int
    peft_type: str = DEEP_PROMPT

    def save_pretrained(self, folder: str) -> None:
        """Write adapter_config.json."""
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2, sort_keys=True))


def read_config(folder: str | os.PathLike[str]) -> Any:
    """The config of an adapter, PEFT's or ours. Raises `UNREADABLE`."""
    path = Path(folder) / CONFIG_FILE
    try:
        told = json.loads(path.read_bytes())
        if isinstance(told, dict) and told.get("peft_type") == DEEP_PROMPT:
            return DeepPromptConfig(told["num_virtual_tokens"])
        from peft import PeftConfig

        return PeftConfig.from_pretrained(os.fspath(folder))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise error(Code.UNREADABLE, f"{path}: {problem}", "give a folder that PEFT wrote") from problem


class RemotePrompts(RemoteAdapter):
    """Prompts that a PEFT `PromptTuningConfig` or a `DeepPromptConfig` describes.

    embeddings: the model's, from which PEFT may begin. Raises `BAD_REQUEST` for no virtual tokens.
    """

    def __init__(self, config: Any, embeddings: nn.Embedding, num_blocks: int) -> None:
        super().__init__()
        self.config = config
        self._num_blocks = num_blocks
        num_tokens, hidden_size = config.num_virtual_tokens, embeddings.embedding_dim
        if not isinstance(num_tokens, int) or num_tokens < 1:
            raise error(
                Code.BAD_REQUEST, f"num_virtual_tokens={num_tokens!r}, expected 1 or more", "such as 16"
            )
        is_deep = config.peft_type == DEEP_PROMPT
        first = torch.randn(num_tokens, hidden_size) if is_deep else _peft_prompt(config, embeddings)
        self.soft = nn.Parameter(first)
        deep = [nn.Parameter(torch.zeros(num_blocks, num_tokens, hidden_size))] if is_deep else []
        self.factors = nn.ParameterList(deep)

    def parts(self) -> tuple[PartFile, ...]:
        if not self.factors:
            return (PartFile(NO_PART, b""),) * self._num_blocks
        return tuple(part_file({"prompt": as_weights(prompt)}, {}) for prompt in self.factors[0])

    def gradients(self, files: Mapping[int, bytes]) -> list[Tensor]:
        if not self.factors:
            return []
        whole = torch.zeros_like(self.factors[0], dtype=torch.float32)
        for block, file in files.items():
            whole[block] = checked_gradient(read_gradients(file), "prompt", block, whole[block].shape)
        return [whole]

    def tensors(self) -> dict[str, nn.Parameter]:
        return {_SOFT: self.soft, **({_DEEP: self.factors[0]} if self.factors else {})}


def _peft_prompt(config: Any, embeddings: nn.Embedding) -> Tensor:
    """(num_virtual_tokens, hidden_size), begun as PEFT begins them."""
    from peft.tuners.prompt_tuning import PromptEmbedding

    config.token_dim, config.num_transformer_submodules = embeddings.embedding_dim, 1
    made: Any = PromptEmbedding(config, embeddings)  # type: ignore[no-untyped-call]
    prompt: Tensor = made.embedding.weight.detach().float().cpu().clone()
    return prompt


def take_up(
    module: nn.Module, worn: Callable[[], RemoteAdapter | None], *, needs_labels: bool = False
) -> None:
    """From now on a model, or its decoder, puts the soft prompt of the adapter, if it has one, before each text.

    What it gives out is the text's alone. needs_labels: only where labels are given. So the loss, which is taken
    inside the model, begins with the text's first token, told by the prompt, as PEFT has it.
    """
    names = list(inspect.signature(module.forward).parameters)

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        adapter, cache = worn(), given.get("past_key_values")
        has_begun = isinstance(cache, SwarmCache) and cache.has_begun
        is_done = hasattr(given.get("inputs_embeds"), _MARK)
        is_wanted = given.get("labels") is not None or not needs_labels
        if adapter is None or adapter.soft is None or has_begun or is_done or not is_wanted:
            return (), given
        if isinstance(cache, SwarmCache):
            cache.begin_after(len(adapter.soft))
        changed = _with(module, given, adapter.soft)
        setattr(changed["inputs_embeds"], _MARK, (module, len(adapter.soft)))
        return (), changed

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        embeds = kwargs.get("inputs_embeds")
        owner, num = getattr(embeds, _MARK, (None, 0))
        return _without(output, embeds.shape[1], num) if embeds is not None and owner is module else output

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


# On embeddings that begin with a prompt: who put it there, and how long it is.
_MARK: Final = "corolla_prompt"


def _with(module: Any, given: Mapping[str, Any], prompt: Tensor) -> dict[str, Any]:
    """A forward's arguments, with the prompt before each row."""
    embeds = given.get("inputs_embeds")
    if embeds is None:
        embeds = module.get_input_embeddings()(given["input_ids"])
    rows, n = embeds.shape[:2]
    mask, positions, labels = (given.get(name) for name in ("attention_mask", "position_ids", "labels"))
    before = prompt.to(embeds.device, embeds.dtype).expand(rows, -1, -1)
    changed = {**given, "input_ids": None, "inputs_embeds": torch.cat([before, embeds], 1)}
    if mask is not None:
        changed["attention_mask"] = torch.cat([mask.new_ones(rows, len(prompt)), mask], 1)
    if positions is not None:
        changed["position_ids"] = _shifted(positions.expand(rows, n), len(prompt), mask)
    if labels is not None:
        changed["labels"] = torch.cat([labels.new_full((rows, len(prompt)), IGNORED), labels], 1)
    return changed


IGNORED: Final = -100  # as transformers marks labels that no loss is taken of


def _shifted(positions: Tensor, num: int, mask: Tensor | None) -> Tensor:
    """Positions of the prompt, then those of the text behind it. Raises `UNSUPPORTED` for packed sequences."""
    is_start = positions[:, 1:] < positions[:, :-1]
    if mask is not None:
        real = mask[:, -positions.shape[1] :].to(positions.device, torch.bool)
        is_start = is_start & real[:, 1:] & real[:, :-1]
    if bool(is_start.any()):
        raise error(
            Code.UNSUPPORTED,
            "packed sequences together with prompts, which stand before a row",
            "give each text a row of its own",
        )
    first = torch.arange(num, device=positions.device).expand(len(positions), num)
    return torch.cat([first, positions + num], 1)


def _without(output: Any, total: int, num: int) -> Any:
    """The same for the text alone: tensors of all tokens (rows, total, …) lose the first `num` of each row."""
    if isinstance(output, Tensor):
        return output[:, num:] if output.dim() == 3 and output.shape[1] == total else output
    if isinstance(output, tuple):
        return tuple(_without(value, total, num) for value in output)
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = _without(value, total, num)
    return output
