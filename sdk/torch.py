"""A transformers model whose blocks run in the swarm: `DistributedModelForCausalLM`.

The ends (embeddings, final norm, head) are loaded here by transformers itself; the blocks are a session. So it
is a real `PreTrainedModel` of its family, usable with transformers' `generate()` in all its ways. How a cache
becomes rows is `swarm_cache`'s, what stands in for the layers `remote_blocks`'.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..protocol.errors import Code, error
from ..protocol.views import ModelView
from .adapters import RemoteAdapter, RemoteLora, linears_of
from .client import Daemon, connect
from .dropout import DropoutCount
from .journeys import Journeys
from .layers import attach, attached
from .parts import DEEP_PROMPT
from .prompts import RemotePrompts, read_config, take_up
from .remote_blocks import RemoteBlocks, pass_padding
from .swarm_cache import DEFAULT_LENGTH, Sessions, SwarmCache


class DistributedModelForCausalLM:
    """Made by `from_pretrained`, which gives an instance of this and of the family's own class."""

    config: Any
    _sessions: Sessions
    _journeys: Journeys
    _own_daemon: Daemon | None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        ends: str | os.PathLike[str] | None = None,
        daemon: Daemon | None = None,
        encoding: str | None = None,
        wait_s: float = 0.0,
        **options: Any,
    ) -> Any:
        """The swarm's model of this name, with its ends loaded here.

        model: as `Daemon.model` takes it. ends: a Hugging Face folder, GGUF file or hub id to load the ends
            from; None takes what the swarm says. daemon: a connection to use; None makes one.
        encoding, wait_s: as `Model.session` takes them. options: for transformers' `from_pretrained`, such
            as dtype and device_map.
        Raises `CorollaError`: `UNKNOWN_MODEL`, `BAD_SHAPE` when the ends belong to another model.
        """
        own = connect() if daemon is None else None
        asked = own or daemon
        if asked is None:
            raise error(Code.NO_DAEMON, "no connection to a daemon")
        try:
            name = _name(model)
            view = asked.model(name).view()
            where = _ends(model, ends, view, asked)
            config = AutoConfig.from_pretrained(where)
            _check(config, view, where)
            distributed = _load_ends(cls, where, config, options)
            journeys = distributed._journeys = Journeys(asked.model(name), encoding)
            sessions = Sessions(asked.model(name), encoding, wait_s, journeys.worn)
            _attach(distributed, sessions, config.num_hidden_layers)
            distributed._own_daemon = own
        except BaseException:
            if own is not None:
                own.close()
            raise
        return distributed

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: the ends are the family's own, and transformers has to read their checkpoint as the family's."""
        return False

    def new_cache(self, *, rows: int = 1, max_length: int = DEFAULT_LENGTH) -> SwarmCache:
        """A cache to pass as `past_key_values`, for rows of at most so many tokens."""
        return SwarmCache(self._sessions, rows=rows, max_length=max_length)

    @property
    def blocks(self) -> RemoteBlocks:
        """The swarm's blocks; `blocks[a:b](hidden)` runs some of them, with gradients."""
        remote: Any = attached(self.get_decoder())  # type: ignore[attr-defined]  # of the family's class
        blocks: RemoteBlocks = remote
        return blocks

    def add_adapter(self, adapter_config: Any, *_: Any, dropout_seed: int = 0, **__: Any) -> None:
        """Train an adapter over the swarm's blocks; all other parameters are frozen, as PEFT does.

        adapter_config: a `peft.LoraConfig`, a `peft.PromptTuningConfig` (soft prompts), or a
            `prompts.DeepPromptConfig`. dropout_seed: of the masks of LoRA's dropout.
        Raises as `RemoteLora` and `RemotePrompts`, and `UNSUPPORTED` for other configs.
        """
        self._wear(self._adapter_of(adapter_config), dropout_seed)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What an optimizer trains; empty without an adapter."""
        adapter = self._journeys.adapter
        return [] if adapter is None else list(adapter.parameters())

    @property
    def dropout(self) -> DropoutCount:
        """Where in the run the masks of LoRA's dropout are; checkpoints that are given the model keep it."""
        return self._journeys.dropout

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapter's config, as transformers and PEFT look for it.

        Raises `UNSUPPORTED` without an adapter: so does `get_peft_model`, which looks here first.
        """
        if self._journeys.adapter is None:
            raise error(
                Code.UNSUPPORTED,
                "PEFT cannot put an adapter on this model, whose blocks run in the swarm",
                "use model.add_adapter(LoraConfig(…)) in place of get_peft_model",
            )
        return {"default": self._journeys.adapter.config}

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter as PEFT does. Raises `BAD_REQUEST` without one."""
        if self._journeys.adapter is None:
            raise error(Code.BAD_REQUEST, "this model has no adapter", "model.add_adapter(LoraConfig(…))")
        self._journeys.adapter.save(folder)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        """As `save_adapter`, like a `PeftModel`: the blocks are the swarm's, so a whole model cannot be written."""
        self.save_adapter(save_directory)

    def load_adapter(self, folder: str | os.PathLike[str], *_: Any, dropout_seed: int = 0, **__: Any) -> None:
        """Take an adapter from a folder that PEFT or `save_adapter` wrote.

        Raises as `add_adapter` and `RemoteAdapter.load`, and `UNREADABLE`.
        """
        adapter = self._adapter_of(read_config(folder))
        adapter.load(folder)
        self._wear(adapter, dropout_seed)

    def _adapter_of(self, config: Any) -> RemoteAdapter:
        kind = str(getattr(config, "peft_type", "LORA")).rpartition(".")[2]
        if kind == "LORA":
            return RemoteLora(config, linears_of(self.config))
        if kind in ("PROMPT_TUNING", DEEP_PROMPT):
            embeddings: Any = self.get_input_embeddings()  # type: ignore[attr-defined]  # of the family's class
            return RemotePrompts(config, embeddings, len(self.blocks))
        raise error(
            Code.UNSUPPORTED,
            f"an adapter of the type {kind}",
            "use LoraConfig or PromptTuningConfig of peft, or corolla.sdk.prompts.DeepPromptConfig",
        )

    def _wear(self, adapter: RemoteAdapter, dropout_seed: int) -> None:
        for parameter in self.parameters():  # type: ignore[attr-defined]  # of the family's class
            parameter.requires_grad_(False)
        self._journeys.adapter = self.blocks.adapter = adapter
        self._journeys.dropout = DropoutCount(dropout_seed, adapter.version)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own `generate`; its session is closed at the end unless the cache is given out."""
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]  # of the family's class
        finally:
            self._sessions.sweep()

    def close(self) -> None:
        """Close forgotten sessions, and the connection if it was made for this model."""
        self._sessions.sweep()
        if self._own_daemon is not None:
            self._own_daemon.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *rest: Any,
    ) -> None:
        """Where transformers would make its own cache, make ours, as long and as wide as it will get."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = self.new_cache(
                rows=batch_size * copies, max_length=max_cache_length + 1
            )


def _name(model: str) -> str:
    """What the swarm calls a model whose folder or file is named."""
    path = Path(model)
    if path.is_dir():
        return path.resolve().name
    return path.stem.partition(".")[0] if path.is_file() else model


def _ends(model: str, ends: str | os.PathLike[str] | None, view: ModelView, daemon: Daemon) -> str:
    """Where the ends are loaded from: a folder or a hub id. The daemon converts a GGUF file."""
    where = os.fspath(ends) if ends is not None else model
    if Path(where).is_file():
        return daemon.pull(str(Path(where).resolve())).folder
    if ends is not None or Path(where).is_dir():
        return where
    if view.hub_id is not None:
        return view.hub_id
    return daemon.pull(f"{view.name}@{view.fingerprint[:8]}").folder


def _check(config: PretrainedConfig, view: ModelView, where: str) -> None:
    found = (int(config.hidden_size), int(config.num_hidden_layers))
    if found != (view.hidden_size, view.num_blocks):
        raise error(
            Code.BAD_SHAPE,
            f"{where} has hidden_size {found[0]} and {found[1]} blocks,"
            f" the swarm's {view.name} has {view.hidden_size} and {view.num_blocks}",
            "give the folder of the same model as ends=…",
        )


def _load_ends(
    cls: type[DistributedModelForCausalLM], where: str, config: PretrainedConfig, options: dict[str, Any]
) -> Any:
    """An instance of the family's class without layers, and of `cls`."""
    try:
        family: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise error(
            Code.UNSUPPORTED_FAMILY, f"transformers has no causal language model for {config.model_type}"
        ) from None
    ignored = [*(family._keys_to_ignore_on_load_unexpected or []), r"\b(layers|h)\.\d+\."]
    # Of the family's own name, by which transformers knows how a checkpoint's tensors are called now.
    made = type(
        family.__name__,
        (cls, family),
        {"_keys_to_ignore_on_load_unexpected": ignored, "__module__": __name__},
    )
    return super(DistributedModelForCausalLM, made).from_pretrained(  # type: ignore[misc]
        where, num_hidden_layers=0, **options
    )


def _attach(model: Any, sessions: Sessions, num_blocks: int) -> None:
    """Put the swarm where the layers were."""
    reach = getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH

    def make_cache(max_length: int) -> SwarmCache:
        return SwarmCache(sessions, max_length=max_length or min(DEFAULT_LENGTH, reach))

    decoder = model.get_decoder()
    blocks = RemoteBlocks(make_cache, model._journeys, num_blocks).train(decoder.training)
    attach(decoder, blocks)
    take_up(model, lambda: model._journeys.adapter, needs_labels=True)
    take_up(decoder, lambda: model._journeys.adapter)  # before the padding is taken out of its arguments
    decoder.register_forward_pre_hook(pass_padding(make_cache, model._journeys), with_kwargs=True)
    model.config.num_hidden_layers = num_blocks  # what the model is, not what is loaded of it
    model._sessions = sessions
