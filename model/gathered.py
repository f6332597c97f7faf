"""Attention by tables in torch alone: pages are gathered into tensors of their own, and attended there.

It runs on any device, and serves where `gpu.attention` cannot. Gathering costs about what attending does.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor

from .form import Form
from .paged import RowTable, TokenTable
from .scores import MOST_SCORES, attend_parts, hidden_mask

# Numbers of keys and values gathered at a time: 256 MiB in bfloat16.
_MOST_GATHERED: Final = 1 << 27


class Gathering:
    """See `paged.TableAttention`."""

    growth = 2  # whatever a table names is gathered

    def write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """A call for each of both."""
        keys.index_copy_(1, slots, key)
        values.index_copy_(1, slots, value)

    def attend_lines(
        self, query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, page_tokens: int
    ) -> Tensor:
        """(num_tokens, num_heads, value_dim); as many tokens at a time as may be gathered."""
        num_tokens = query.shape[0]
        numbers = table.pages.shape[1] * page_tokens * keys.shape[0] * (keys.shape[2] + values.shape[2])
        step = max(1, _MOST_GATHERED // numbers)
        parts = [
            _attend_some(
                query[first : first + step], keys, values, table.part(first, first + step), form, page_tokens
            )
            for first in range(0, num_tokens, step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attend_row(
        self, query: Tensor, keys: Tensor, values: Tensor, row: RowTable, form: Form, page_tokens: int
    ) -> Tensor:
        """(n, num_heads, value_dim): by torch's fused kernel with a mask, where that knows the form."""
        by_head = query.transpose(0, 1)
        oldest = row.first if form.window is None else max(row.first, row.start - form.window + 1)
        own_keys, own_values = (
            _gathered(of, row.table.pages, page_tokens)[
                0, :, oldest - row.first : row.start + row.n - row.first
            ]
            for of in (keys, values)
        )  # (num_kv_heads, num_keys, dim)
        if form.is_plain:
            hidden = hidden_mask(row.n, own_keys.shape[1], (row.start, oldest), form.window, query.device)
            output = F.scaled_dot_product_attention(
                by_head[None],
                own_keys[None],
                own_values[None],
                attn_mask=None if hidden is None else ~hidden,
                scale=form.scaling,
                enable_gqa=True,
            )
            return output[0].transpose(0, 1)
        step = max(1, MOST_SCORES // (query.shape[1] * own_keys.shape[1]))
        parts = []
        for start in range(row.start, row.start + row.n, step):
            end = min(start + step, row.start + row.n)
            begin = oldest if form.window is None else max(oldest, start - form.window + 1)
            some = by_head[:, start - row.start : end - row.start]
            seen = slice(begin - oldest, end - oldest)
            parts.append(attend_parts(some, [own_keys[:, seen]], [own_values[:, seen]], (start, begin), form))
        return torch.cat(parts, dim=1).transpose(0, 1)


def _attend_some(
    query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, page_tokens: int
) -> Tensor:
    num_tokens, num_heads, _ = query.shape
    num_kv_heads = keys.shape[0]
    own_keys = _gathered(keys, table.pages, page_tokens)  # (num_tokens, kv heads, num_keys, dim)
    own_values = _gathered(values, table.pages, page_tokens)
    places = table.firsts[:, None] + torch.arange(own_keys.shape[2], device=query.device)
    hidden = places > table.positions[:, None]  # (num_tokens, num_keys)
    if form.window is not None:
        hidden |= places <= table.positions[:, None] - form.window
    # Neither a mask that is added to scores nor a weight of 0 hides a number that is not finite, and whoever had
    # the page before may have left one.
    for own in (own_keys, own_values):
        own.masked_fill_(hidden[:, None, :, None], 0)
    folded = query.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, -1)
    if form.is_plain:
        seen = ~hidden[:, None, None].expand(-1, -1, folded.shape[2], -1)
        output = F.scaled_dot_product_attention(
            folded, own_keys, own_values, attn_mask=seen, scale=form.scaling
        )
        return output.reshape(num_tokens, num_heads, -1)
    scores = folded @ own_keys.transpose(2, 3) * form.scaling  # (num_tokens, kv heads, group, num_keys)
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    if form.bias is not None:
        scores = scores + form.bias(places).transpose(0, 1).view(scores.shape)
    scores = scores.masked_fill(hidden[:, None, None], -math.inf)
    if form.sinks is not None:
        sinks = form.sinks.to(scores.dtype).view(1, num_kv_heads, -1, 1)
        scores = torch.cat([scores, sinks.expand(num_tokens, -1, -1, -1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : places.shape[1]]
    output = weights.to(query.dtype) @ own_values
    return output.reshape(num_tokens, num_heads, -1)


def _gathered(slots: Tensor, pages: Tensor, page_tokens: int) -> Tensor:
    """(num_heads, num_slots, dim) → (num_tokens, num_heads, num_pages * page_tokens, dim), a copy."""
    num_heads, _, dim = slots.shape
    by_page = slots.transpose(0, 1).view(-1, page_tokens, num_heads, dim)
    found = by_page.index_select(0, pages.flatten())
    return found.view(pages.shape[0], -1, num_heads, dim).transpose(1, 2)
