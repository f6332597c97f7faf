"""Causal attention of new tokens over the pages of their own rows: one function for every family.

Registered with transformers' `AttentionInterface`, it is called by the unchanged attention modules of all
certified families with a flattened batch `(1, …, total_tokens, …)`; what belongs to which row stands in the
`Placement` that travels through the layers' keyword arguments. It knows nothing of sessions or models.

On a CPU pages are read in place: a row's pages form a few runs of neighbouring slots, each a view of the cache.
Keys are never gathered for a decode there (measured: gathering costs more than attending). Where the cache is
paged, what attends is handed tables that are tensors; see `paged`.

Source: Kwon et al. 2023, PagedAttention; Milakov and Gimelshein 2018, for merging partial softmaxes.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn
from transformers import AttentionInterface

from ..protocol.errors import Code, error
from .form import Form
from .paged import TableAttention
from .pages import Segment
from .placement import Batch, Layout, Placement, Reach
from .scores import MOST_SCORES, attend_parts, hidden_mask

__all__ = ["ATTENTION", "Batch", "Placement", "Segment", "attend", "register"]

ATTENTION: Final = "corolla"

# Up to so many new tokens of a row, one small product per head is faster than the flash kernel's start.
_FEW_TOKENS: Final = 8
# Queries that share a mask under a window, where no cache is: shorter runs are more calls than work.
_RUN_TOKENS: Final = 128

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def register() -> None:
    """Make `attend` known to transformers under the name `ATTENTION`. May be called again."""
    AttentionInterface.register(ATTENTION, attend)


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
    if cache.tabled is not None:
        return _attend_tabled(
            cache.tabled, query.transpose(0, 1), keys, values, layout, form, cache.page_tokens
        )
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


def _attend_ones(query: Tensor, keys: Tensor, values: Tensor, layout: Layout, form: Form) -> Tensor | None:
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


def _attend_tabled(
    tabled: TableAttention,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    form: Form,
    page_tokens: int,
) -> Tensor:
    """(num_tokens, num_heads, value_dim): few new tokens of all rows together, many of one row after the other."""
    if layout.table is not None and layout.lined is None:
        return tabled.attend_lines(query, keys, values, layout.table, form, page_tokens)
    output = query.new_empty((*query.shape[:2], values.shape[-1]))
    if layout.table is not None and layout.lined is not None:
        lines = tabled.attend_lines(query[layout.lined], keys, values, layout.table, form, page_tokens)
        output.index_copy_(0, layout.lined, lines)
    for row in layout.rows:
        tokens = slice(row.offset, row.offset + row.n)
        output[tokens] = tabled.attend_row(query[tokens], keys, values, row, form, page_tokens)
    return output


def _is_windowed(reach: Reach, form: Form) -> bool:
    """Whether the window hides anything from the row's last new token."""
    return form.window is not None and reach.start + reach.n > form.window


def _attend_runs(query: Tensor, keys: Tensor, values: Tensor, reach: Reach, form: Form) -> Tensor:
    """(num_heads, n, value_dim), with every score written out; keys and values are read in place."""
    num_keys = reach.start + reach.n
    step = max(1, MOST_SCORES // (query.shape[0] * num_keys))
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
    return attend_parts(query, row_keys, row_values, (reach.start, first_key), form)


def _attend_flash(
    query: Tensor, fresh: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, reach: Reach, form: Form
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
    step = max(1, MOST_SCORES // (num_heads * num_tokens))
    if form.window is not None:
        step = max(form.window, _RUN_TOKENS)
    outputs = []
    for first in range(0, num_tokens, step):
        last = min(first + step, num_tokens)
        oldest = 0 if form.window is None else max(0, first - form.window + 1)
        run, keys, values = query[:, first:last], key[:, oldest:last], value[:, oldest:last]
        if not form.is_plain:
            outputs.append(attend_parts(run, [keys], [values], (first, oldest), form))
            continue
        hidden = hidden_mask(last - first, last - oldest, (first, oldest), form.window, query.device)
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
