"""Attention over pages against the same sums written out plainly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corolla.model import attention
from corolla.model.attention import Batch, Placement, Segment, attend
from corolla.model.cache import Cache, CacheShape
from corolla.model.gathered import Gathering

PAGE_TOKENS = 4
HEADS, KV_HEADS, DIM = 6, 2, 8
CPU = torch.device("cpu")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scaling": 0.5},
    "window": {"sliding_window": 5},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": torch.linspace(-1, 1, HEADS)},
    "all": {"sliding_window": 7, "softcap": 2.0, "s_aux": torch.linspace(1, -1, HEADS), "scaling": 0.3},
}


class Module(nn.Module):
    layer_idx = 3


def plainly(query: Tensor, key: Tensor, value: Tensor, form: dict[str, Any]) -> Tensor:
    """(heads, n, dim) queries, the last n positions of (kv heads, length, dim) keys; one score at a time."""
    length, n = key.shape[1], query.shape[1]
    output = torch.zeros(n, HEADS, DIM)
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        for i in range(n):
            position = length - n + i
            first = max(0, position + 1 - form.get("sliding_window", length))
            scores = key[kv_head, first : position + 1] @ query[head, i] * form.get("scaling", DIM**-0.5)
            if "softcap" in form:
                scores = form["softcap"] * torch.tanh(scores / form["softcap"])
            weights = scores.exp()
            total = weights.sum()
            if "s_aux" in form:
                total = total + form["s_aux"][head].exp()
            output[i, head] = (weights / total) @ value[kv_head, first : position + 1]
    return output


def filled_cache(*, is_paged: bool = False) -> Cache:
    shapes = {3: CacheShape(KV_HEADS, DIM, DIM)}
    cache = Cache(shapes, 16, torch.float32, CPU, PAGE_TOKENS, tabled=Gathering() if is_paged else None)
    cache.keys(3).fill_(math.nan)  # whatever is read without having been written shows
    cache.values(3).fill_(math.nan)
    return cache


def states(num_tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(1, HEADS, num_tokens, DIM, generator=random),
        torch.randn(1, KV_HEADS, num_tokens, DIM, generator=random),
        torch.randn(1, KV_HEADS, num_tokens, DIM, generator=random),
    )


def run(
    cache: Cache | None, segments: list[Segment], states: tuple[Tensor, ...], form: dict[str, Any]
) -> Tensor:
    placement = Placement(Batch(tuple(segments)), cache, CPU)
    query, key, value = states
    output, _ = attend(Module(), query, key, value, None, placement=placement, dropout=0.0, **form)
    return output[0]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (19,), (9, 1, 1, 8), (3, 16), (12, 2, 5)], ids=str)
@pytest.mark.parametrize("pages", [(4, 5, 6, 7, 8), (9, 2, 3, 0, 12)], ids=["neighbours", "scattered"])
@pytest.mark.parametrize("is_paged", [False, True], ids=["in place", "paged"])
def test_chunks_over_pages_equal_the_plain_sums(
    name: str, chunks: tuple[int, ...], pages: tuple[int, ...], is_paged: bool
) -> None:
    cache, form = filled_cache(is_paged=is_paged), FORMS[name]
    query, key, value = states(sum(chunks), seed=1)
    start = 0
    for n in chunks:
        new = slice(start, start + n)
        got = run(
            cache, [Segment(pages, start, n)], (query[:, :, new], key[:, :, new], value[:, :, new]), form
        )
        expected = plainly(query[0, :, new], key[0, :, : start + n], value[0, :, : start + n], form)
        assert torch.allclose(got, expected, atol=1e-5)
        start += n


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("is_paged", [False, True], ids=["in place", "paged"])
def test_rows_of_one_batch_do_not_see_each_other(name: str, is_paged: bool) -> None:
    form = FORMS[name]
    segments = [Segment((1, 2, 3), 0, 11), Segment((5,), 0, 1), Segment((8, 7), 3, 0), Segment((4, 10), 0, 6)]
    query, key, value = states(18, seed=2)
    together = run(filled_cache(is_paged=is_paged), segments, (query, key, value), form)
    offset = 0
    for segment in segments:
        tokens = slice(offset, offset + segment.n)
        offset += segment.n
        if segment.n:
            own = (query[:, :, tokens], key[:, :, tokens], value[:, :, tokens])
            alone = run(filled_cache(is_paged=is_paged), [segment], own, form)
            assert torch.allclose(together[tokens], alone, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_stateless_segments_equal_the_plain_sums(name: str) -> None:
    query, key, value = states(15, seed=3)
    got = run(None, list(Batch.stateless((9, 1, 5)).segments), (query, key, value), FORMS[name])
    for first, last in ((0, 9), (9, 10), (10, 15)):
        own = slice(first, last)
        expected = plainly(query[0, :, own], key[0, :, own], value[0, :, own], FORMS[name])
        assert torch.allclose(got[own], expected, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_stateless_attention_has_the_right_gradient(name: str) -> None:
    inputs = tuple(tensor.double().requires_grad_() for tensor in states(7, seed=4))
    segments = list(Batch.stateless((4, 3)).segments)
    # Scores are weighted in float32 whatever the inputs are, which bounds the agreement.
    assert torch.autograd.gradcheck(
        lambda *tensors: run(None, segments, tensors, FORMS[name]), inputs, eps=1e-3, atol=1e-3, rtol=1e-2
    )


def test_long_scores_are_written_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS["all"]
    whole = run(filled_cache(), [Segment((0, 1, 2, 3, 4), 0, 20)], states(20, seed=5), form)
    monkeypatch.setattr(attention, "MOST_SCORES", HEADS * 20 * 3)
    parts = run(filled_cache(), [Segment((0, 1, 2, 3, 4), 0, 20)], states(20, seed=5), form)
    assert torch.allclose(whole, parts, atol=1e-6)
