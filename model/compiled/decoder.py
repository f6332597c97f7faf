"""What a span's blocks are to the compiled walk: which of them it can take, their tables, and the room it needs.

Owns that room; the weights belong to the blocks' layers, keys and values to the cache. Not every batch is its
business: many tokens are faster by oneDNN's products, and adapters and gradients run through the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from ..attention import Placement
from ..cache import Cache
from ..classic import Classic, Gated, Turns
from ..linear import FrozenLinear
from ..norms import RootMeanSquareNorm
from ..strips import STRIP, Form, Strips
from . import walk as way
from .kernels import KEYS
from .team import Team
from .tiles import LANES

MOST_TOKENS: Final = 32  # of a pass; beyond, oneDNN's products are as fast, and calls are few beside them

_FEWEST_KEYS: Final = 256  # in a part of a row's keys that is attended by itself
_PIECES_EACH: Final = 4  # of attention for each member, so that all end at about the same time
_MOST_BUNCHED: Final = 8  # tokens of a row that read its keys together
_EVERYTHING: Final = 1 << 40  # tokens: the window of a block without one


class Decoder:
    """The blocks of one span with its cache, as the walk takes them."""

    def __init__(self, forms: Mapping[int, Classic], cache: Cache) -> None:
        """forms: all `are_walkable`; cache: not paged, in float32 or bfloat16."""
        self._team = Team(torch.get_num_threads())
        self._start = min(forms)
        self._forms = [forms[block] for block in sorted(forms)]
        first = self._forms[0]
        _, output, _, down = _layers(first)
        keys = cache.keys(self._start)
        self._addresses = _Addresses()
        self._blocks = way.Blocks(
            parts=np.array([self._addresses.block(form, cache) for form in self._forms], dtype=np.int64),
            eps=np.array([_eps(form) for form in self._forms], dtype=np.float32),
            scalings=np.array([form.scaling for form in self._forms], dtype=np.float32),
            windows=np.array([form.window or _EVERYTHING for form in self._forms], dtype=np.int64),
            groups=np.array([cache.grouping.places[form.block][0] for form in self._forms], dtype=np.int64),
            num_heads=first.num_heads,
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_dim,
            inner_size=down.in_features,
            num_slots=keys.shape[1],
            number_bytes=keys.element_size(),
        )
        self._cache = cache
        self._room = self._make_room(output.out_features)

    def takes(self, placement: Placement) -> bool:
        """Whether this is a batch for it."""
        num_tokens = placement.positions.shape[0]
        return 0 < num_tokens <= MOST_TOKENS and placement.cache is self._cache and placement.is_cached

    def forward(self, hidden: Tensor, turns: Turns, placement: Placement, blocks: range) -> Tensor:
        """(num_tokens, hidden_size) after `blocks`, of a batch that it `takes`."""
        states = hidden.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        tokens = self._tokens(states, turns, placement)
        room = self._room_for(len(states), tokens.num_splits)
        room.counters.fill(0)
        first = blocks.start - self._start
        self._team.run(way.walk, first, first + len(blocks), self._blocks, tokens, room)
        return states.to(hidden.dtype)

    def _tokens(self, states: Tensor, turns: Turns, placement: Placement) -> way.Tokens:
        runs: list[tuple[int, int, int]] = []
        reaches: list[list[tuple[int, int]]] = []
        longest = 0
        for layout in placement.layouts:
            own: list[tuple[int, int]] = []
            for reach in layout.reaches:
                first = len(runs)
                runs.extend(reach.runs)
                own.extend([(first, len(runs))] * reach.n)
                longest = max(longest, reach.start + reach.n)
            reaches.append(own)
        bunches = [
            (first, min(first + _MOST_BUNCHED, reach.offset + reach.n))
            for reach in placement.reaches
            for first in range(reach.offset, reach.offset + reach.n, _MOST_BUNCHED)
        ]
        pieces = len(bunches) * self._blocks.num_kv_heads
        wanted = -(-_PIECES_EACH * self._team.num_members // pieces)
        return way.Tokens(
            states=states.numpy(),
            cosines=_lines(turns.cosines),
            sines=_lines(turns.sines),
            positions=placement.positions.numpy(),
            slots=np.stack([layout.slots.numpy() for layout in placement.layouts]),
            reaches=np.array(reaches, dtype=np.int64),
            runs=np.array(runs, dtype=np.int64),
            bunches=np.array(bunches, dtype=np.int64),
            num_splits=max(1, min(wanted, longest // _FEWEST_KEYS, len(self._room.parts) // len(states))),
        )

    def _room_for(self, num_tokens: int, num_splits: int) -> way.Room:
        """Of its parts so many as these tokens take."""
        num_parts = num_tokens * num_splits
        parts, marks = (
            each[:num_parts].reshape(num_tokens, num_splits, *each.shape[2:])
            for each in (self._room.parts, self._room.marks)
        )
        return self._room._replace(parts=parts, marks=marks)

    def _make_room(self, hidden_size: int) -> way.Room:
        blocks, members = self._blocks, self._team.num_members
        num_heads, dim = blocks.num_heads, blocks.head_dim
        num_parts = MOST_TOKENS + _PIECES_EACH * members
        largest = max(hidden_size, num_heads * dim)

        def zeros(*shape: int) -> Any:
            return np.zeros(shape, dtype=np.float32)

        return way.Room(
            heads=zeros(MOST_TOKENS, num_heads + 2 * blocks.num_kv_heads, dim),
            gated=zeros(MOST_TOKENS, blocks.inner_size),
            parts=zeros(num_parts, 1, num_heads, dim),
            marks=zeros(num_parts, 1, num_heads, 2),
            normed=zeros(members, MOST_TOKENS, largest),
            sums=zeros(members, 3, MOST_TOKENS, STRIP),
            scores=zeros(members, _MOST_BUNCHED, num_heads // blocks.num_kv_heads, KEYS),
            wide=zeros(members, KEYS, dim),
            counters=np.zeros((len(self._forms), way.NUM_STAGES, way.LINE), dtype=np.int64),
            meeting=np.zeros((2, way.LINE), dtype=np.int64),
        )


class Head:
    """One layer with `strips`, for a few rows at a time."""

    def __init__(self, layer: FrozenLinear) -> None:
        self._layer = layer
        self._addresses = _Addresses()
        self._words = np.array(self._addresses.layer(layer), dtype=np.int64)
        self._team = team = Team(torch.get_num_threads())
        self._sums = np.zeros((team.num_members, 3, MOST_TOKENS, STRIP), dtype=np.float32)
        self._counter = np.zeros(way.LINE, dtype=np.int64)
        self._meeting = np.zeros((2, way.LINE), dtype=np.int64)
        self.multiply(torch.zeros(1, layer.in_features))  # it is compiled now, not amid a text

    def multiply(self, rows: Tensor) -> Tensor:
        """(num_rows, in_features) → (num_rows, out_features), of a few rows in float32."""
        if rows.shape[0] > MOST_TOKENS:
            return self._layer(rows)  # type: ignore[no-any-return]
        product = torch.empty((rows.shape[0], self._layer.out_features))
        self._counter.fill(0)
        numbers = rows.float().contiguous().numpy()
        self._team.run(
            way.multiply, numbers, self._words, product.numpy(), self._sums, self._counter, self._meeting
        )
        return product


def are_walkable(forms: Sequence[Classic]) -> bool:
    """Whether the walk computes what these blocks compute, all of one shape."""
    if not all(_is_walkable(form) for form in forms):
        return False
    shapes = {
        (form.num_heads, form.num_kv_heads, form.head_dim, *(layer.out_features for layer in _layers(form)))
        for form in forms
    }
    return len(shapes) == 1


def _is_walkable(form: Classic) -> bool:
    rest = form.rest
    if not isinstance(rest, Gated) or not _is_silu(rest.activation):
        return False
    norms = (form.first_norm, form.second_norm, form.query_norm, form.key_norm)
    if any(norm is not None and not isinstance(norm, RootMeanSquareNorm) for norm in norms):
        return False
    if any(getattr(layer, "strips", None) is None for layer in _layers(form)):
        return False
    return form.head_dim % LANES == 0 and rest.size % STRIP == 0


def _is_silu(activation: nn.Module) -> bool:
    tried = torch.linspace(-8, 8, 33)
    return torch.allclose(activation(tried), F.silu(tried), rtol=1e-6, atol=1e-7)


def _layers(form: Classic) -> tuple[Any, Any, Any, Any]:
    rest: Any = form.rest
    return form.queries_keys_values, form.output, rest.both, rest.down


class _Addresses:
    """Of tensors, which it keeps; float32 copies of those that are something else."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def of(self, tensor: Tensor | None) -> int:
        """0 for what is not there."""
        return 0 if tensor is None else self.as_it_is(tensor.detach().float().contiguous())

    def as_it_is(self, tensor: Tensor) -> int:
        """Of `tensor` itself, whatever it is made of."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def layer(self, layer: FrozenLinear) -> list[int]:
        """The words of a layer with `strips`, in the order of `layers`."""
        form, weights, scales, num_scaled = layer.strips or Strips(Form.FLOAT32, 0)
        return [
            weights,
            self.of(layer.bias),
            0 if scales is None else self.as_it_is(scales),
            form,
            num_scaled,
        ]

    def block(self, form: Classic, cache: Cache) -> list[int]:
        """In the order of `walk`'s names for them."""
        norms: list[Any] = [form.first_norm, form.second_norm, form.query_norm, form.key_norm]
        return [
            *(0 if norm is None else self.of(norm.weight) for norm in norms),
            *(word for layer in _layers(form) for word in self.layer(layer)),
            self.as_it_is(cache.keys(form.block)),
            self.as_it_is(cache.values(form.block)),
        ]


def _eps(form: Classic) -> list[float]:
    norms: list[Any] = [form.first_norm, form.second_norm, form.query_norm, form.key_norm]
    return [0.0 if norm is None else norm.eps for norm in norms]


def _lines(turned: Tensor) -> Any:
    """(num_tokens, 1, head_dim) as (num_tokens, head_dim) float32."""
    return turned.reshape(turned.shape[0], -1).float().contiguous().numpy()
