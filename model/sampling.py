"""How the next token is chosen from logits.

Pure: logits, the tokens so far and a few numbers in, a token out. The only randomness is a number that is
a function of (seed, row, position), so that a row that is resumed elsewhere goes on as it would have, and
rows do not change each other's choice.

Penalties and filters, and their order, are those of transformers' `generate`: bias, repetition, presence,
temperature, top-k, top-p, min-p. Sources: Keskar et al. 2019, CTRL (repetition); Holtzman et al. 2020
(top-p); Nguyen et al. 2024 (min-p).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..protocol.errors import Code, error
from ..protocol.work import Logprob, Sampling

MAX_TOP_LOGPROBS: Final = 64  # each is a pair in the header of every token's message
MAX_BIASES: Final = 1024  # they are kept for each generation, and added for each token
_NOISE: Final = struct.Struct(">qqq")


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and how likely the model itself thought it (before penalties, temperature and filters)."""

    token: int
    logprob: float
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """What every choice asks of a row's logits, computed for many rows at once.

    best: the likeliest token, the first of several. norm: the logarithm of the sum of their exponentials.
    is_finite: all of them are.
    """

    best: int
    norm: float
    is_finite: bool


def summaries(logits: Tensor) -> list[Summary]:
    """Of each of the rows (num_rows, vocab_size), float32 on the CPU."""
    with np.errstate(invalid="ignore"):  # numbers that are not finite are what is looked for
        return [_summary(row) for row in logits.numpy()]


def _summary(logits: NDArray[np.float32]) -> Summary:
    """Of one row, which the processor's caches hold meanwhile: 92 µs for 49,152 numbers, 248 by torch."""
    best = int(logits.argmax())
    top = logits[best]
    norm = float(np.log(np.exp(logits - top).sum())) + float(top)
    return Summary(best, norm, math.isfinite(norm) and math.isfinite(logits.min()))


def check(sampling: Sampling, vocab_size: int) -> None:
    """Raise `BAD_REQUEST` naming the value that is out of range."""
    biases = sampling.logit_bias
    strange = next((entry for entry in biases if not 0 <= entry.token < vocab_size), None)
    problems = (
        ("temperature", sampling.temperature, sampling.temperature >= 0, "0 or more"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (all tokens) or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "more than 0, at most 1"),
        ("min_p", sampling.min_p, 0 <= sampling.min_p <= 1, "0 to 1"),
        ("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0, "more than 0"),
        ("presence_penalty", sampling.presence_penalty, math.isfinite(sampling.presence_penalty), "a number"),
        ("logit_bias for token", strange and strange.token, strange is None, f"0 to {vocab_size - 1}"),
        ("logit_bias", biases, all(math.isfinite(entry.bias) for entry in biases), "numbers"),
        ("logit_bias of", len(biases), len(biases) <= MAX_BIASES, f"at most {MAX_BIASES} tokens"),
        (
            "top_logprobs",
            sampling.top_logprobs,
            0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS,
            f"0 to {MAX_TOP_LOGPROBS}",
        ),
        ("stop", "''", all(sampling.stop), "texts that are not empty"),
    )
    for name, value, holds, expected in problems:
        if not holds:
            raise error(Code.BAD_REQUEST, f"{name} {value}, expected {expected}")


def choose(
    logits: Tensor,
    sampling: Sampling,
    prompt: Collection[int],
    generated: Collection[int],
    noise: float,
    summary: Summary | None = None,
) -> Choice:
    """The next token of one row.

    logits: (vocab_size,) float32 on the CPU, finite; not changed. prompt, generated: tokens of the row.
    noise: `noise_of` the place; greedy choice does not look at it. summary: of the logits, if it is known.
    Repetition counts tokens of prompt and generated, presence those generated alone.
    """
    known = summary or summaries(logits[None])[0]
    scores = penalized(logits, sampling, prompt, generated)
    if sampling.temperature == 0:
        token = known.best if scores is logits else int(scores.argmax())
    else:
        token = draw(filtered(scores / sampling.temperature, sampling), noise)
    top: tuple[Logprob, ...] = ()
    if sampling.top_logprobs:
        values, tokens = logits.topk(min(sampling.top_logprobs, logits.numel()))
        top = tuple(
            Logprob(index, value - known.norm)
            for index, value in zip(tokens.tolist(), values.tolist(), strict=True)
        )
    return Choice(token, float(logits[token]) - known.norm, top)


def penalized(
    logits: Tensor, sampling: Sampling, prompt: Collection[int], generated: Collection[int]
) -> Tensor:
    """Logits with biases, repetition and presence penalties; the same tensor if there are none."""
    if sampling.repetition_penalty == 1 and sampling.presence_penalty == 0 and not sampling.logit_bias:
        return logits
    scores = logits.clone()
    for entry in sampling.logit_bias:
        scores[entry.token] += entry.bias
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *generated}), dtype=torch.int64)
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if sampling.presence_penalty != 0:
        scores[torch.tensor(sorted(set(generated)), dtype=torch.int64)] -= sampling.presence_penalty
    return scores


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores after temperature, with -inf for tokens that top-k, top-p and min-p leave out; one is left."""
    if sampling.top_k and sampling.top_k < scores.numel():
        least = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1:
        ordered, tokens = scores.sort(descending=True, stable=True)
        probabilities = torch.softmax(ordered, dim=0, dtype=torch.float64)
        before = probabilities.cumsum(0) - probabilities  # the mass of all likelier tokens
        scores = scores.masked_fill(_at(tokens[before >= sampling.top_p], scores.numel()), -math.inf)
    if sampling.min_p > 0:
        least = scores.max() + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


def _at(tokens: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[tokens] = True
    return mask


def draw(scores: Tensor, noise: float) -> int:
    """The token at which the distribution softmax(scores), summed in the order of tokens, passes `noise`.

    One number for a draw, not one for each token: it costs nothing, and is the same on every device and
    in every version of torch. Sums are in float64, so that small tails are not lost.
    """
    sums = torch.softmax(scores, dim=0, dtype=torch.float64).cumsum(0)
    token = int(torch.searchsorted(sums, noise * float(sums[-1]), right=True))
    return min(token, int(torch.isfinite(scores).nonzero()[-1]))


def noise_of(seed: int, row: int, position: int) -> float:
    """A number in [0, 1), uniform over places: the same for the same seed, row and position, for ever."""
    digest = hashlib.blake2b(
        _NOISE.pack(seed, row, position), digest_size=8, person=b"corolla sampling"
    ).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53
