"""The classic block, in as few calls as torch allows: what most families are made of, computed by ourselves.

A norm, queries, keys and values with rotary embeddings, attention, and what comes out added to what went in; then a
norm and the rest of the block, likewise. transformers' modules compute just that in some sixty calls, which take as
long as the weights of a small block take to be read. Here they are twenty, over the same layers: no weight stands
twice. Whether a block is a classic one is found by trying it, not by its name. It is for batches that nobody's
adapter and no gradient touches; all others run through the module itself.

Source: Touvron et al. 2023, Llama, section 2.2; Su et al. 2021, rotary embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from .attention import Batch, Placement, attend_rows
from .elementwise import Elementwise
from .siblings import is_rounding, whole_of

_PARTS: Final = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_LAYERS: Final = {"q_proj", "k_proj", "v_proj", "o_proj"}
_GATED: Final = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_NUM_TRIED: Final = 5  # tokens of the trial
_TRIED_SIZE: Final = 0.02  # of the trial's numbers: so small that what the block adds is not rounded away
_CLOSE: Final = 1e-5  # of the largest number that a block adds; besides, where it rounds, so many roundings
_ROUNDINGS: Final = 4


@dataclass(frozen=True, slots=True)
class Turns:
    """Rotary embeddings of a batch as they are used here: (num_tokens, 1, head_dim) each.

    sines: those of the first half of the dimensions negated, so that x * cosines + rolled(x) * sines turns x.
    """

    cosines: Tensor
    sines: Tensor

    @classmethod
    def of(cls, embeddings: tuple[Tensor, Tensor]) -> Turns:
        """embeddings: cosines and sines (1, num_tokens, head_dim), as transformers has them."""
        cosines, sines = (each[0][:, None] for each in embeddings)
        first, second = sines.chunk(2, dim=-1)
        return cls(cosines, torch.cat([-first, second], dim=-1))


@dataclass(frozen=True, slots=True)
class Gated:
    """A gated unit in three calls. both: gate and up, `size` outputs each. Source: Shazeer 2020, GLU variants."""

    both: Callable[[Tensor], Tensor]
    down: nn.Module
    size: int
    activation: nn.Module
    pieces: Elementwise

    def __call__(self, states: Tensor) -> Tensor:
        """(num_tokens, hidden_size) in and out."""
        gated = self.pieces.gated(self.both(states), self.activation)
        return self.down(gated)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Classic:
    """One block; its layers belong to the module that it was made of."""

    block: int
    first_norm: nn.Module
    second_norm: nn.Module
    queries_keys_values: Callable[[Tensor], Tensor]
    output: nn.Module
    rest: Callable[[Tensor], Tensor]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    pieces: Elementwise

    def forward(self, states: Tensor, turns: Turns, placement: Placement) -> Tensor:
        """(num_tokens, hidden_size) after the block. Without a graph; `states` stay as they are."""
        num_tokens, num_turned = states.shape[0], self.num_heads + self.num_kv_heads
        everything = self.queries_keys_values(self.first_norm(states))
        heads = everything.view(num_tokens, -1, self.head_dim)
        norms = self.query_norm, self.key_norm
        turned = self.pieces.turned(heads[:, :num_turned], turns.cosines, turns.sines, self.num_heads, norms)
        attended = attend_rows(
            self.block,
            turned[:, : self.num_heads],
            turned[:, self.num_heads :],
            heads[:, num_turned:],
            placement,
            scaling=self.scaling,
            window=self.window,
        )  # (num_tokens, num_heads, head_dim)
        output = self.output(attended.reshape(num_tokens, -1))
        states, normed = self.pieces.added_and_normed(states, output, self.second_norm)
        return self.rest(normed).add_(states)


def classic(
    module: nn.Module, block: int, window: int | None, rotary: Any, pieces: Elementwise
) -> Classic | None:
    """`module` as a classic block, if it is one.

    window: how many of the latest tokens it attends; None is all. rotary: `families.Rotary`. pieces: as the
    device computes them best.
    """
    form = _form(module, block, window, pieces)
    if form is None:
        return None
    return form if _is_same(form, module, rotary) else None


def _form(module: nn.Module, block: int, window: int | None, pieces: Elementwise) -> Classic | None:
    """`module` read as a classic block; whether it computes the same is yet to be seen."""
    parts: dict[str, Any] = dict(module.named_children())
    if parts.keys() != _PARTS or module._parameters or not hasattr(parts["input_layernorm"], "weight"):
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    layers: dict[str, Any] = dict(attention.named_children())
    norms = [layers.pop(name, None) for name in ("q_norm", "k_norm")]
    head_dim = getattr(attention, "head_dim", None)
    scaling = getattr(attention, "scaling", None)
    if layers.keys() != _LAYERS or attention._parameters or not isinstance(head_dim, int):
        return None
    if not isinstance(scaling, float) or (norms[0] is None) != (norms[1] is None):
        return None
    if any(norm is not None and tuple(norm.weight.shape) != (head_dim,) for norm in norms):
        return None
    sizes = [layers[name].out_features for name in ("q_proj", "k_proj", "v_proj")]
    if sizes[1] != sizes[2] or any(size % head_dim for size in sizes):
        return None
    return Classic(
        block=block,
        first_norm=parts["input_layernorm"],
        second_norm=parts["post_attention_layernorm"],
        queries_keys_values=whole_of([layers["q_proj"], layers["k_proj"], layers["v_proj"]]),
        output=layers["o_proj"],
        rest=_gated(mlp, pieces) or _as_it_is(mlp),
        num_heads=sizes[0] // head_dim,
        num_kv_heads=sizes[1] // head_dim,
        head_dim=head_dim,
        scaling=scaling,
        window=window,
        query_norm=norms[0],
        key_norm=norms[1],
        pieces=pieces,
    )


def _gated(mlp: nn.Module, pieces: Elementwise) -> Gated | None:
    """`mlp` read as a gated unit, if that is what the rest of the block is made of."""
    parts: dict[str, Any] = dict(mlp.named_children())
    if parts.keys() != _GATED or parts["gate_proj"].out_features != parts["up_proj"].out_features:
        return None
    both = whole_of([parts["gate_proj"], parts["up_proj"]])
    return Gated(both, parts["down_proj"], parts["up_proj"].out_features, parts["act_fn"], pieces)


def _as_it_is(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    """The rest of a block by its own module, such as one with experts."""

    def rest(states: Tensor) -> Tensor:
        """(num_tokens, hidden_size) in and out."""
        return mlp(states[None])[0]  # type: ignore[no-any-return]

    return rest


@torch.inference_mode()
def _is_same(form: Classic, module: nn.Module, rotary: Any) -> bool:
    """Whether both compute the same of a few tokens."""
    weight: Any = form.first_norm.weight
    generator = torch.Generator().manual_seed(form.block)
    states = torch.randn(_NUM_TRIED, weight.shape[0], generator=generator) * _TRIED_SIZE
    states = states.to(weight.device, weight.dtype)
    placement = Placement(Batch.stateless((_NUM_TRIED,)), None, states.device)
    embeddings = rotary(states[None], placement, range(form.block, form.block + 1))[form.block]
    if embeddings[0].shape[-1] != form.head_dim:
        return False
    theirs = module(
        states[None],
        attention_mask=None,
        position_ids=placement.positions[None],
        position_embeddings=embeddings,
        placement=placement,
    )[0]
    try:
        ours = form.forward(states, Turns.of(embeddings), placement)
    except (RuntimeError, TypeError, AttributeError):  # of another form than its parts' names say
        return False
    added = (theirs - states).abs().max().float()
    worst = (theirs - ours).abs().max().float()
    rounded = torch.bfloat16 if is_rounding(module) else weight.dtype
    return bool(worst <= added * (_CLOSE + _ROUNDINGS * torch.finfo(rounded).eps))
