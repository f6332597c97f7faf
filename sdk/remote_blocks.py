"""All blocks of a model as one module that stands where transformers expects its decoder layers.

transformers' own forward does everything before and after; in its loop over layers it meets this one. The
padding mask reaches it as a keyword (`padding`), put there by `pass_padding`, since the causal mask that
layers are given is of no use to the swarm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..protocol.errors import Code, error
from .journeys import Journeys
from .layers import OldStyleLayer, layer_of
from .swarm_cache import SwarmCache, as_swarm_cache

MakeCache = Callable[[int], SwarmCache]  # for rows of so many tokens; 0: nobody knows how many


class RemoteBlocks(nn.Module):
    """Hidden states in, hidden states out, of blocks [start, end). Holds no parameters but an adapter's.

    `blocks[a:b]` is a module of just these, for loops of one's own. Without a cache, what wants gradients or has an
    adapter is a pass of training; all else is a step of a session, which keeps the adapter that it was opened with.
    While learning, no cache is made unasked.
    """

    def __init__(
        self, make_cache: MakeCache, journeys: Journeys, num_blocks: int, span: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.adapter: nn.Module | None = None  # so that the model knows its parameters
        self._make_cache = make_cache
        self._journeys = journeys
        self._num_blocks = num_blocks
        self._span = span or (0, num_blocks)

    def __len__(self) -> int:
        return self._span[1] - self._span[0]

    def __getitem__(self, cut: slice) -> RemoteBlocks:
        start, end, step = cut.indices(self._num_blocks)
        if self._span != (0, self._num_blocks) or step != 1 or end <= start:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks[{cut.start}:{cut.stop}:{cut.step}] of {self._num_blocks}",
                "cut all the model's blocks as blocks[start:end]",
            )
        part = RemoteBlocks(self._make_cache, self._journeys, self._num_blocks, (start, end))
        return part.train(self.training)

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        padding: Tensor | None = None,
        layer_past: Any = None,
        **__: Any,
    ) -> Tensor:
        """hidden_states: (rows, n, hidden_size). Without a cache nothing is kept after this pass.

        layer_past: what GPT-NeoX calls `past_key_values`.
        """
        past_key_values = layer_past if past_key_values is None else past_key_values
        adapter = self._journeys.adapter
        is_partial = len(self) < self._num_blocks
        wants_gradient = torch.is_grad_enabled() and (hidden_states.requires_grad or adapter is not None)
        if past_key_values is not None and is_partial:
            raise error(
                Code.UNSUPPORTED, "a cache together with a part of the blocks", "pass use_cache=False"
            )
        if past_key_values is None and (wants_gradient or is_partial or adapter is not None):
            return self._journeys.run(
                hidden_states, padding, position_ids, self._span, is_training=self.training
            )
        check_positions(position_ids, padding, int(hidden_states.shape[1]))
        if wants_gradient:
            factors = () if adapter is None else tuple(adapter.factors)
            answer: Tensor = _NoGradient.apply(hidden_states, self, past_key_values, padding, *factors)  # type: ignore[no-untyped-call]
            return answer
        return self.run(hidden_states, past_key_values, padding)

    def run(self, hidden: Tensor, cache: Any, padding: Tensor | None) -> Tensor:
        """One step of the cache's session."""
        if cache is not None:
            return as_swarm_cache(cache, lambda: self._make_cache(0)).step(hidden, padding)
        passing = self._make_cache(int(hidden.shape[1]))
        try:
            return passing.step(hidden, padding)
        finally:
            passing.close()


class _NoGradient(torch.autograd.Function):
    """A step of a session; says so when a gradient is wanted, instead of silently giving none."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, blocks: RemoteBlocks, cache: Any, padding: Tensor | None, *_: Tensor
    ) -> Tensor:
        return blocks.run(hidden.detach(), cache, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise error(
            Code.UNSUPPORTED,
            "gradients do not flow through a cache",
            "pass use_cache=False, or call model.train() first",
        )


def pass_padding(make_cache: MakeCache, journeys: Journeys) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A forward pre-hook for the decoder: it takes the padding mask out and gives it on as `padding`.

    It also puts a `SwarmCache` where the decoder would make a cache of its own.
    """

    def hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.pop("attention_mask", None)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise error(
                Code.BAD_REQUEST,
                "an attention_mask that is no (rows, tokens) tensor",
                "give 1 for tokens and 0 for padding; attention is always causal",
            )
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            is_learning = torch.is_grad_enabled() and decoder.training
            wants_none = is_learning or journeys.adapter is not None
            use_cache = bool(getattr(decoder.config, "use_cache", False)) and not wants_none
            kwargs["use_cache"] = use_cache
        if use_cache or kwargs.get("past_key_values") is not None:
            kwargs["past_key_values"] = as_swarm_cache(kwargs.get("past_key_values"), lambda: make_cache(0))
        layer = layer_of(decoder)
        if isinstance(layer, OldStyleLayer):
            layer.padding = mask
            return args, kwargs
        return args, {**kwargs, "padding": mask}

    return hook


def check_positions(position_ids: Tensor | None, padding: Tensor | None, n: int) -> None:
    """Raise `UNSUPPORTED` unless the real tokens of each row stand one behind the other.

    The hops count positions themselves, from the row's first token.
    """
    if position_ids is None or n < 2:
        return
    positions = position_ids.reshape(-1, position_ids.shape[-1])[:, -n:]
    steps = positions[:, 1:] - positions[:, :-1]
    is_right = steps == 1
    if padding is not None:
        real = padding[:, -n:].to(device=positions.device, dtype=torch.bool)
        is_right = is_right | ~(real[:, 1:] & real[:, :-1])
    if not bool(is_right.all()):
        raise error(
            Code.UNSUPPORTED,
            "position_ids that do not count up by one",
            "leave them out; several texts are several rows",
        )
