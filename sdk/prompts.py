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
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..protocol.errors import Code, error
from ..protocol.training import NO_PART
from .adapters import RemoteAdapter, as_weights, checked_gradient, read_gradients
from .parts import CONFIG_FILE, DEEP_PROMPT, DEEP_PROMPTS, SOFT_PROMPT, PartFile, part_file
from .placing import placing
from .swarm_cache import SwarmCache


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
        return {SOFT_PROMPT: self.soft, **({DEEP_PROMPTS: self.factors[0]} if self.factors else {})}


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
        is_cached = cache is not None or bool(given.get("use_cache"))
        return (), _with(
            module, given, adapter.soft, takes_positions="position_ids" in names, is_cached=is_cached
        )

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        mark = getattr(kwargs.get("inputs_embeds"), _MARK, None)
        return _without(output, mark) if mark is not None and mark.owner is module else output

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


_MARK: Final = "corolla_prompt"  # on embeddings that hold prompts


class _Mark(NamedTuple):
    """Who put prompts into embeddings of `total` columns, and where the text's own stand. places: (rows, n)."""

    owner: nn.Module
    total: int
    places: Tensor


def _with(
    module: Any, given: Mapping[str, Any], prompt: Tensor, *, takes_positions: bool, is_cached: bool
) -> dict[str, Any]:
    """A forward's arguments, with the prompt before each text."""
    embeds = given.get("inputs_embeds")
    if embeds is None:
        embeds = module.get_input_embeddings()(given["input_ids"])
    rows, n = embeds.shape[:2]
    mask, positions, labels = (given.get(name) for name in ("attention_mask", "position_ids", "labels"))
    real = torch.ones(rows, n, dtype=torch.bool) if mask is None else _of_batch(mask, rows, n).bool()
    told = None if positions is None else _of_batch(positions, rows, n)
    placed = placing(real, told, len(prompt), in_front=is_cached)
    virtual = prompt.to(embeds.device, embeds.dtype).expand(rows, -1, -1)
    source = placed.source.to(embeds.device)
    table = torch.cat([embeds, virtual, embeds.new_zeros(rows, 1, embeds.shape[2])], 1)
    changed = {**given, "input_ids": None, "inputs_embeds": table[torch.arange(rows)[:, None], source]}
    if mask is not None or placed.has_padding:
        changed["attention_mask"] = placed.real.to(embeds.device, torch.int64)
    if takes_positions and (positions is not None or placed.has_padding):
        changed["position_ids"] = placed.positions.to(embeds.device)
    if labels is not None:
        ignored = labels.new_full((rows, len(prompt) + 1), IGNORED)
        changed["labels"] = torch.cat([labels, ignored], 1).gather(1, placed.source.to(labels.device))
    setattr(changed["inputs_embeds"], _MARK, _Mark(module, source.shape[1], placed.places))
    return changed


IGNORED: Final = -100  # as transformers marks labels that no loss is taken of


def _of_batch(columns: Tensor, rows: int, n: int) -> Tensor:
    """(rows, n) on the CPU, of what may stand for all rows. Raises `BAD_SHAPE`."""
    if columns.dim() != 2 or columns.shape[0] not in (1, rows) or columns.shape[1] != n:
        raise error(
            Code.BAD_SHAPE,
            f"attention_mask or position_ids of shape {tuple(columns.shape)} for {rows} rows of {n} tokens",
            "give one column for each token of the text; the prompt's are added here",
        )
    return columns.expand(rows, n).cpu()


def _without(output: Any, mark: _Mark) -> Any:
    """The same for the text alone: of tensors of all columns (rows, total, …) just the text's."""
    if isinstance(output, Tensor):
        if output.dim() != 3 or output.shape[1] != mark.total:
            return output
        rows = torch.arange(len(output), device=output.device)[:, None]
        return output[rows, mark.places.to(output.device)]
    if isinstance(output, tuple):
        return tuple(_without(value, mark) for value in output)
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = _without(value, mark)
    return output
