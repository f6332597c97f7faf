"""Causal attention of new tokens over the pages of their own rows: one function for every family.

Registered with transformers' `AttentionInterface`, it is called by the unchanged attention modules of all
certified families with a flattened batch `(1, …, total_tokens, …)`; what belongs to which row stands in the
`Placement` that travels through the layers' keyword arguments. It knows nothing of sessions or models.

On a CPU pages are read in place: a row's pages form a few runs of neighbouring slots, each a view of the cache.
Keys are never gathered for a decode there (measured: gathering costs more than attending). Where the cache is
paged, rows with a few new tokens are attended together over tables that are tensors; see `paged`.

Source: Kwon et al. 2023, PagedAttention; Milakov and Gimelshein 2018, for merging partial softmaxes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn
from transformers import AttentionInterface

from ..protocol.errors import Code, error
from .cache import Cache
from .form import Form
from .paged import FEW_TOKENS, Group, TokenTable, attend_table, groups_of, numbers_of, shape_of
from .pages import Segment
from .pool import GONE
from .transfers import to_device

__all__ = ["ATTENTION", "Batch", "Placement", "Segment", "attend", "register"]

ATTENTION: Final = "corolla"

# Up to so many new tokens of a row, one small product per head is faster than the flash kernel's start.
_FEW_TOKENS: Final = 8
# Scores computed at a time where they have to be written out: 64 MiB of float32.
_MAX_SCORES: Final = 1 << 24
# Queries that share a mask under a window, where no cache is: shorter runs are more calls than work.
_RUN_TOKENS: Final = 128

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def register() -> None:
    """Make `attend` known to transformers under the name `ATTENTION`. May be called again."""
    AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True, slots=True)
class Batch:
    """New tokens of many rows, one segment after the other; segments without pages attend only themselves."""

    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the flattened batch."""
        return sum(segment.n for segment in self.segments)

    @property
    def is_stateless(self) -> bool:
        """Whether nothing is cached: each segment is a whole sequence, and gradients may flow."""
        return not any(segment.pages for segment in self.segments)

    @classmethod
    def stateless(cls, lengths: tuple[int, ...]) -> Batch:
        """Whole sequences of these lengths, side by side, that leave nothing behind."""
        return cls(tuple(Segment((), 0, length) for length in lengths))


class _Run(NamedTuple):
    """Neighbouring slots [slot, slot + num) that hold positions [first, first + num) of a row."""

    slot: int
    first: int
    num: int


class _Reach(NamedTuple):
    """One row in a placement: its tokens [offset, offset + n) of the batch, and where all its tokens lie.

    length: of the text that it is a part of, as far as anybody said.
    """

    offset: int
    n: int
    start: int
    runs: tuple[_Run, ...]
    length: int


class _Layout(NamedTuple):
    """Where a batch lies in one group of blocks. slots: of the new tokens, (num_tokens,), or empty.

    table: of rows with few new tokens, in a paged cache; lined: which tokens it has lines for, None is all.
    """

    reaches: tuple[_Reach, ...]
    slots: Tensor
    table: TokenTable | None = None
    lined: Tensor | None = None


class Placement:
    """A batch laid out on a cache: made once a forward pass, read by every block.

    reaches: in the first group of blocks.
    """

    def __init__(self, batch: Batch, cache: Cache | None, device: torch.device) -> None:
        self.cache = None if batch.is_stateless else cache
        self._places = self.cache.grouping.places if self.cache is not None else {}
        num_groups = self.cache.grouping.num_groups if self.cache is not None else 1
        self._layouts = [self._laid_out(batch, group, device) for group in range(num_groups)]
        if self.cache is not None and self.cache.is_paged:
            self._layouts = _with_tables(self._layouts, batch, self.cache, device)
        self.reaches = self._layouts[0].reaches
        positions = [reach.start + i for reach in self.reaches for i in range(reach.n)]
        self.positions = torch.tensor(positions, dtype=torch.int64, device=device)  # (num_tokens,)

    @classmethod
    def recorded(cls, cache: Cache, positions: Tensor, groups: tuple[Group, ...]) -> Placement:
        """A batch that stands in tensors alone, every token of it in the tables."""
        placement = cls.__new__(cls)
        placement.cache = cache
        placement.positions = positions
        placement.reaches = ()
        placement._places = cache.grouping.places
        placement._layouts = [_Layout((), group.slots, group.table) for group in groups]
        return placement

    @property
    def layouts(self) -> list[_Layout]:
        """Where the batch lies, in each group of blocks."""
        return self._layouts

    @property
    def is_cached(self) -> bool:
        """Whether every row has pages."""
        return all(reach.runs for reach in self.reaches)

    def at(self, block: int, window: int | None) -> _Layout:
        """Where the batch lies in a block that attends so far back. Raises `INTERNAL` if not all of that is kept."""
        group = self._places[block][0] if self.cache is not None else 0
        kept = self.cache.grouping.windows[group] if self.cache is not None else None
        if kept is not None and (window is None or window > kept):
            raise error(Code.INTERNAL, f"block {block} attends {window or 'all'} tokens, {kept} are kept")
        return self._layouts[group]

    def _laid_out(self, batch: Batch, group: int, device: torch.device) -> _Layout:
        page_tokens = self.cache.page_tokens if self.cache is not None else 1
        slots: list[int] = []
        reaches: list[_Reach] = []
        offset = 0
        for segment in batch.segments:
            if not segment.n:
                continue
            end = segment.start + segment.n
            runs: tuple[_Run, ...] = ()
            if self.cache is not None:
                pages = segment.others[group - 1] if group else segment.pages
                runs = _runs(pages, end, page_tokens)
                slots.extend(_slots(pages, segment.start, end, page_tokens))
            reaches.append(_Reach(offset, segment.n, segment.start, runs, segment.limit or end))
            offset += segment.n
        return _Layout(tuple(reaches), torch.tensor(slots, dtype=torch.int64, device=device))


def _with_tables(layouts: list[_Layout], batch: Batch, cache: Cache, device: torch.device) -> list[_Layout]:
    few = [segment for segment in batch.segments if segment.pages and 0 < segment.n <= FEW_TOKENS]
    if not few:
        return layouts
    num_tokens = sum(segment.n for segment in few)
    windows = cache.grouping.windows
    shape = shape_of(few, windows, cache.page_tokens)._replace(num_tokens=num_tokens)
    numbers = numbers_of(few, shape, windows, cache.page_tokens, cache.spare_page)
    _, groups = groups_of(to_device(torch.tensor(numbers), device), shape)
    lined = None
    if num_tokens < batch.num_tokens:
        short = [reach for reach in layouts[0].reaches if reach.n <= FEW_TOKENS]
        places = [reach.offset + i for reach in short for i in range(reach.n)]
        lined = to_device(torch.tensor(places), device)
    return [
        layout._replace(table=group.table, lined=lined) for layout, group in zip(layouts, groups, strict=True)
    ]


def _slots(pages: tuple[int, ...], start: int, end: int, page_tokens: int) -> list[int]:
    slots = []
    for position in range(start, end):
        page, offset = divmod(position, page_tokens)
        slots.append(pages[page] * page_tokens + offset)
    return slots


def _runs(pages: tuple[int, ...], end: int, page_tokens: int) -> tuple[_Run, ...]:
    """What is kept of positions [0, end) of a row, as few runs of neighbouring slots as its pages allow."""
    runs: list[_Run] = []
    index = next((index for index, page in enumerate(pages) if page != GONE), len(pages))
    num_pages = -(-end // page_tokens)
    while index < num_pages:
        last = index + 1
        while last < num_pages and pages[last] == pages[last - 1] + 1:
            last += 1
        first = index * page_tokens
        runs.append(_Run(pages[index] * page_tokens, first, min(last * page_tokens, end) - first))
        index = last
    return tuple(runs)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    placement: Placement,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of new tokens over the pages of their own rows, which then hold them too.

    query: (1, num_heads, num_tokens, head_dim), already rotated; key and value likewise with their heads.
    options: as transformers' modules pass them: scaling, sliding_window, softcap, s_aux; bias, from modules of
    our own; others are ignored.
    Returns (1, num_tokens, num_heads, value_dim), and no weights.
    """
    scaling = options.get("scaling")
    form = Form(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        bias=options.get("bias"),
    )
    if placement.cache is None:
        return _attend_alone(query[0], key[0], value[0], placement, form), None
    block: int = module.layer_idx  # type: ignore[assignment]
    return _attend_cached(block, query[0], key[0], value[0], placement, form)[None], None


def attend_rows(
    block: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    placement: Placement,
    *,
    scaling: float,
    window: int | None,
) -> Tensor:
    """As `attend`, for blocks of our own in the plainest form: (num_tokens, heads, dim) in and out."""
    form = Form(scaling, window, softcap=None, sinks=None, bias=None)
    heads = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    if placement.cache is None:
        return _attend_alone(*heads, placement, form)[0]
    return _attend_cached(block, *heads, placement, form)


def _attend_cached(
    block: int, query: Tensor, key: Tensor, value: Tensor, placement: Placement, form: Form
) -> Tensor:
    """(num_tokens, num_heads, value_dim); query, key and value: (heads, num_tokens, dim)."""
    cache = placement.cache
    if cache is None:
        raise error(Code.INTERNAL, "rows without a cache have nothing to attend there")
    layout = placement.at(block, form.window)
    cache.write(block, layout.slots, key, value)
    keys, values = cache.keys(block), cache.values(block)
    if cache.is_paged:
        return _attend_paged(query, keys, values, layout, form, cache.page_tokens).transpose(0, 1)
    ones = _attend_ones(query, keys, values, layout, form) if form.is_plain else None
    if ones is not None:
        return ones
    outputs = []
    for reach in layout.reaches:
        tokens = slice(reach.offset, reach.offset + reach.n)
        row_query = query[:, tokens]  # (num_heads, n, head_dim)
        if reach.n <= _FEW_TOKENS or not form.is_plain or _is_windowed(reach, form):
            outputs.append(_attend_runs(row_query, keys, values, reach, form))
        else:
            fresh = key[:, tokens], value[:, tokens]
            outputs.append(_attend_flash(row_query, fresh, keys, values, reach, form))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output.transpose(0, 1)


def _attend_ones(query: Tensor, keys: Tensor, values: Tensor, layout: _Layout, form: Form) -> Tensor | None:
    """(num_tokens, num_heads, value_dim): one new token of each of many rows on a CPU, in as few calls as can be.

    Query heads that share a key head are folded into queries of it, so that its keys are read once. None where
    some row is of another kind, or not in one run.
    """
    places = []
    for reach in layout.reaches:
        oldest = 0 if form.window is None else max(0, reach.start - form.window + 1)
        runs = [run for run in reach.runs if run.first + run.num > oldest]
        if reach.n != 1 or len(runs) != 1:
            return None
        hidden = max(0, oldest - runs[0].first)
        places.append((runs[0].slot + hidden, runs[0].num - hidden))
    num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = keys.shape[0]
    folded = query.transpose(0, 1).reshape(num_tokens, 1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    keys, values = keys[None], values[None]
    outputs = [
        _flash(own, keys.narrow(2, *place), values.narrow(2, *place), 0.0, False, scale=form.scaling)[0]
        for own, place in zip(folded.unbind(), places, strict=True)
    ]  # (1, num_kv_heads, heads of each, value_dim) each
    output = outputs[0] if num_tokens == 1 else torch.cat(outputs)
    return output.reshape(num_tokens, num_heads, -1)


def _attend_paged(
    query: Tensor, keys: Tensor, values: Tensor, layout: _Layout, form: Form, page_tokens: int
) -> Tensor:
    """(num_heads, num_tokens, value_dim): few new tokens of all rows together, many of one row after the other."""
    rows, table = query.transpose(0, 1), layout.table
    if table is not None and layout.lined is None:
        return attend_table(rows, keys, values, table, form, page_tokens).transpose(0, 1)
    output = query.new_empty((*query.shape[:2], values.shape[-1]))
    if table is not None and layout.lined is not None:
        lines = attend_table(rows[layout.lined], keys, values, table, form, page_tokens)
        output.index_copy_(1, layout.lined, lines.transpose(0, 1))
    for reach in layout.reaches:
        if reach.n <= FEW_TOKENS:
            continue
        tokens = slice(reach.offset, reach.offset + reach.n)
        is_joined = form.is_plain and not _is_windowed(reach, form)
        attend_row = _attend_gathered if is_joined else _attend_runs
        output[:, tokens] = attend_row(query[:, tokens], keys, values, reach, form)
    return output


def _is_windowed(reach: _Reach, form: Form) -> bool:
    """Whether the window hides anything from the row's last new token."""
    return form.window is not None and reach.start + reach.n > form.window


def _attend_runs(query: Tensor, keys: Tensor, values: Tensor, reach: _Reach, form: Form) -> Tensor:
    """(num_heads, n, value_dim), with every score written out; keys and values are read in place."""
    num_keys = reach.start + reach.n
    step = max(1, _MAX_SCORES // (query.shape[0] * num_keys))
    if step < reach.n:
        parts = [
            _attend_runs(
                query[:, first : first + step],
                keys,
                values,
                reach._replace(start=reach.start + first, n=min(step, reach.n - first)),
                form,
            )
            for first in range(0, reach.n, step)
        ]
        return torch.cat(parts, dim=1)
    first_key = 0 if form.window is None else max(0, reach.start - form.window + 1)
    spans = [
        (run.slot + max(first_key - run.first, 0), run.slot + min(num_keys - run.first, run.num))
        for run in reach.runs
        if run.first < num_keys and run.first + run.num > first_key
    ]
    row_keys = [keys[:, first:last] for first, last in spans]
    row_values = [values[:, first:last] for first, last in spans]
    return _attend_parts(query, row_keys, row_values, (reach.start, first_key), form)


def _attend_parts(
    query: Tensor, keys: list[Tensor], values: list[Tensor], starts: tuple[int, int], form: Form
) -> Tensor:
    """Softmax attention over keys given in parts, (num_kv_heads, some, dim) each, without joining them.

    starts: the position of the first query and of the first key. Query heads that share a key head are
    folded into its rows, so that no key is repeated.
    """
    num_heads, num_queries, _ = query.shape
    num_kv_heads = keys[0].shape[0]
    group = num_heads // num_kv_heads
    folded = (query * form.scaling).reshape(num_kv_heads, group * num_queries, -1)
    parts = [torch.bmm(folded, part.transpose(1, 2)) for part in keys]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # (kv heads, group * n, num_keys)
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    if form.bias is not None:
        places = torch.arange(starts[1], starts[1] + scores.shape[-1], device=scores.device)
        biases = form.bias(places)
        by_head = scores.view(num_heads, num_queries, -1) + biases[:, None]
        scores = by_head.view(num_kv_heads, group * num_queries, -1)
    hidden = _hidden_mask(num_queries, scores.shape[-1], starts, form.window, scores.device)
    if hidden is not None:
        by_query = scores.view(num_kv_heads, group, num_queries, -1)
        scores = by_query.masked_fill(hidden, -math.inf).flatten(1, 2)
    if form.sinks is not None:
        sinks = form.sinks.to(scores.dtype).reshape(num_kv_heads, group, 1, 1)
        sinks = sinks.expand(-1, -1, num_queries, 1).flatten(1, 2)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    output: Tensor | None = None
    first = 0
    for part in values:
        last = first + part.shape[1]
        attended = torch.bmm(weights[..., first:last], part)
        output = attended if output is None else output + attended
        first = last
    if output is None:
        return query.new_zeros((num_heads, num_queries, 0))
    return output.reshape(num_heads, num_queries, -1)


def _hidden_mask(
    num_queries: int, num_keys: int, starts: tuple[int, int], window: int | None, device: torch.device
) -> Tensor | None:
    """(num_queries, num_keys) True where a query must not look; None if each may look everywhere."""
    query_start, key_start = starts
    if num_queries == 1:  # the caller gave it just the keys of its window
        return None
    queries = torch.arange(query_start, query_start + num_queries, device=device)[:, None]
    keys = torch.arange(key_start, key_start + num_keys, device=device)[None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return hidden


def _attend_flash(
    query: Tensor, fresh: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, reach: _Reach, form: Form
) -> Tensor:
    """Many new tokens on a CPU: unmasked flash attention over each run of the past, causal over themselves.

    fresh: the new tokens' own keys and values. The parts are merged by their log-sum-exps.
    """
    fresh_keys, fresh_values = fresh
    parts = [_flash(query[None], fresh_keys[None], fresh_values[None], 0.0, True, scale=form.scaling)]
    for run in reach.runs:
        num = min(run.num, reach.start - run.first)
        if num > 0:
            run_keys = keys[None, :, run.slot : run.slot + num]
            run_values = values[None, :, run.slot : run.slot + num]
            parts.append(_flash(query[None], run_keys, run_values, 0.0, False, scale=form.scaling))
    return _merged(parts)


def _merged(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(num_heads, n, value_dim): attention over all keys, of what it is over parts of them.

    parts: outputs (1, num_heads, n, value_dim), and log-sum-exps of the scores (1, num_heads, n).
    """
    if len(parts) == 1:
        return parts[0][0][0]
    sums = torch.stack([lse for _, lse in parts])  # (num_parts, 1, num_heads, n)
    shares = torch.exp(sums - torch.logsumexp(sums, dim=0))[..., None]
    merged = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for share, (output, _) in zip(shares, parts, strict=True):
        merged = torch.addcmul(merged, share, output.float())
    return merged[0].to(parts[0][0].dtype)


def _attend_gathered(query: Tensor, keys: Tensor, values: Tensor, reach: _Reach, form: Form) -> Tensor:
    """Many new tokens in a paged cache: the row's keys joined, and torch's fused kernel with a mask."""
    row_keys = torch.cat([keys[:, run.slot : run.slot + run.num] for run in reach.runs], dim=1)
    row_values = torch.cat([values[:, run.slot : run.slot + run.num] for run in reach.runs], dim=1)
    hidden = _hidden_mask(reach.n, row_keys.shape[1], (reach.start, 0), None, query.device)
    mask = None if hidden is None else ~hidden
    output = F.scaled_dot_product_attention(
        query[None], row_keys[None], row_values[None], attn_mask=mask, scale=form.scaling, enable_gqa=True
    )
    return output[0]


def _attend_alone(query: Tensor, key: Tensor, value: Tensor, placement: Placement, form: Form) -> Tensor:
    """(1, num_tokens, num_heads, value_dim): causal attention within each segment, differentiable."""
    lengths = [reach.n for reach in placement.reaches]
    if len(set(lengths)) == 1 and form.is_plain and not _hides(lengths[0], form):
        queries, keys, values = (
            tensor.reshape(tensor.shape[0], len(lengths), lengths[0], -1).transpose(0, 1)
            for tensor in (query, key, value)
        )
        output = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=form.scaling, enable_gqa=True
        )
        return output.transpose(1, 2).flatten(0, 1)[None]
    parts = (torch.split(tensor, lengths, dim=1) for tensor in (query, key, value))
    outputs = [_attend_own(q, k, v, form) for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


def _hides(num_tokens: int, form: Form) -> bool:
    """Whether the window hides the first of so many tokens from the last."""
    return form.window is not None and num_tokens > form.window


def _attend_own(query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
    """(num_heads, n, value_dim): one whole sequence, in runs of queries that see just the keys in their reach."""
    num_heads, num_tokens, _ = query.shape
    if form.is_plain and not _hides(num_tokens, form):
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=form.scaling, enable_gqa=True
        )[0]
    step = max(1, _MAX_SCORES // (num_heads * num_tokens))
    if form.window is not None:
        step = max(form.window, _RUN_TOKENS)
    outputs = []
    for first in range(0, num_tokens, step):
        last = min(first + step, num_tokens)
        oldest = 0 if form.window is None else max(0, first - form.window + 1)
        run, keys, values = query[:, first:last], key[:, oldest:last], value[:, oldest:last]
        if not form.is_plain:
            outputs.append(_attend_parts(run, [keys], [values], (first, oldest), form))
            continue
        hidden = _hidden_mask(last - first, last - oldest, (first, oldest), form.window, query.device)
        output = F.scaled_dot_product_attention(
            run[None],
            keys[None],
            values[None],
            attn_mask=None if hidden is None else ~hidden,
            scale=form.scaling,
            enable_gqa=True,
        )
        outputs.append(output[0])
    return torch.cat(outputs, dim=1)
