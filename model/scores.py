"""Attention with every score written out: what any form of it can be computed by, on any device.

It knows neither pages nor rows: queries and keys are given, with the positions at which they begin.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from .form import Form

# Scores computed at a time: 64 MiB of float32.
MOST_SCORES: Final = 1 << 24


def attend_parts(
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
    hidden = hidden_mask(num_queries, scores.shape[-1], starts, form.window, scores.device)
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


def hidden_mask(
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
