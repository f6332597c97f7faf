"""Choosing tokens: penalties and filters as transformers has them, noise that depends on the place alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from corolla.model.sampling import check, choose, draw, filtered, noise_of, penalized
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.work import Sampling, TokenBias

from .tiny import FAMILIES, random_model

VOCAB_SIZE = 50


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 2


def test_greedy_takes_the_likeliest_token_whatever_the_noise(logits: torch.Tensor) -> None:
    chosen = {choose(logits, Sampling(), (1,), (), noise).token for noise in (0.0, 0.5, 0.999)}
    assert chosen == {int(logits.argmax())}


@pytest.mark.parametrize(
    ("changes", "warpers"),
    [
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [
                TemperatureLogitsWarper(0.7),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_filters_equal_those_of_transformers(
    logits: torch.Tensor, changes: dict[str, Any], warpers: list[Any]
) -> None:
    sampling = Sampling(**{"temperature": 1.0, **changes})
    expected = logits[None]
    for warper in warpers:
        expected = warper(torch.tensor([[0]]), expected)
    ours = filtered(logits / sampling.temperature, sampling)
    assert torch.equal(torch.isfinite(ours), torch.isfinite(expected[0]))
    assert torch.allclose(torch.softmax(ours, 0), torch.softmax(expected[0], 0), atol=1e-6)


def test_the_repetition_penalty_equals_that_of_transformers(logits: torch.Tensor) -> None:
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([[1, 2, 3, 3, 9]]), logits[None].clone())[0]
    ours = penalized(logits, Sampling(repetition_penalty=1.3), (1, 2, 3), (3, 9))
    assert torch.equal(ours, expected)


def test_the_presence_penalty_counts_generated_tokens_once(logits: torch.Tensor) -> None:
    ours = penalized(logits, Sampling(presence_penalty=0.5), (1, 2), (3, 3, 9))
    difference = logits - ours
    assert difference[[3, 9]].tolist() == pytest.approx([0.5, 0.5])
    assert int((difference != 0).sum()) == 2


def test_biases_equal_those_of_transformers_and_come_before_penalties(logits: torch.Tensor) -> None:
    biases = {3: -1.5, 9: 4.0, 11: -100.0}
    ids = torch.tensor([[1, 2, 3, 3, 9]])
    biased = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases.items()])
    expected: Any = biased(ids, logits[None].clone())
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, expected)[0]
    entries = tuple(TokenBias(token, bias) for token, bias in biases.items())
    sampling = Sampling(repetition_penalty=1.3, logit_bias=entries)
    assert torch.equal(penalized(logits, sampling, (1, 2, 3), (3, 9)), expected)
    forced = Sampling(logit_bias=(TokenBias(int(logits.argmin()), 1000.0),))
    assert choose(logits, forced, (), (), 0.0).token == int(logits.argmin())


def test_every_processor_together_is_in_the_order_of_transformers(logits: torch.Tensor) -> None:
    """As transformers itself puts them together for `generate`."""
    model: Any = random_model(FAMILIES["llama"]())
    options = {"repetition_penalty": 1.2, "temperature": 0.6, "top_k": 30, "top_p": 0.95, "min_p": 0.02}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, sequence_bias=[[[5], 2.0], [[7], -3.0]], **options
    )
    ids = torch.tensor([[1, 2, 3, 5, 5, 9]])
    processors = model._get_logits_processor(config, ids.shape[1], ids, None, LogitsProcessorList(), "cpu")
    expected = torch.softmax(processors(ids, logits[None].clone())[0], 0)
    sampling = Sampling(**options, logit_bias=(TokenBias(5, 2.0), TokenBias(7, -3.0)))  # type: ignore[arg-type]
    scores = penalized(logits, sampling, (1, 2, 3), (5, 5, 9)) / sampling.temperature
    assert torch.allclose(torch.softmax(filtered(scores, sampling), 0), expected, atol=1e-6)


def test_penalties_leave_the_logits_given_alone(logits: torch.Tensor) -> None:
    before = logits.clone()
    choose(logits, Sampling(repetition_penalty=2.0, presence_penalty=1.0, temperature=1.0), (1,), (2,), 0.3)
    assert torch.equal(logits, before)


def test_a_filter_always_leaves_a_token(logits: torch.Tensor) -> None:
    for sampling in (Sampling(1.0, top_p=1e-9), Sampling(1.0, min_p=1.0), Sampling(1.0, top_k=1)):
        assert torch.isfinite(filtered(logits, sampling)).nonzero().flatten().tolist() == [
            int(logits.argmax())
        ]


def test_draws_follow_the_distribution(logits: torch.Tensor) -> None:
    num_draws = 20_000
    counts = torch.zeros(VOCAB_SIZE)
    for position in range(num_draws):
        counts[draw(logits, noise_of(1, 0, position))] += 1
    expected = torch.softmax(logits, 0)
    # Each count is binomial; five standard deviations for each of fifty tokens.
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    assert bool(((counts / num_draws - expected).abs() <= 5 * deviation + 1e-9).all())


def test_a_draw_never_gives_a_token_that_was_left_out() -> None:
    scores = torch.tensor([-math.inf, 1.0, -math.inf, 1.0, -math.inf])
    assert {draw(scores, noise) for noise in (0.0, 0.4999999, 0.5, 1 - 2**-53)} == {1, 3}


def test_noise_is_a_function_of_seed_row_and_position() -> None:
    places = [(seed, row, position) for seed in (0, 1, -5) for row in range(4) for position in range(50)]
    values = [noise_of(*place) for place in places]
    assert values == [noise_of(*place) for place in places]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.05)


def test_noise_never_changes_between_versions() -> None:
    assert noise_of(7, 2, 31) == 0.830503862575006


def test_logprobs_are_of_the_models_own_distribution(logits: torch.Tensor) -> None:
    sampling = Sampling(temperature=0.3, top_k=3, repetition_penalty=1.5, top_logprobs=4)
    choice = choose(logits, sampling, (1,), (2,), 0.6)
    expected = torch.log_softmax(logits, 0)
    assert choice.logprob == pytest.approx(float(expected[choice.token]), abs=1e-5)
    values, tokens = expected.topk(4)
    assert [entry.token for entry in choice.top] == tokens.tolist()
    assert [entry.logprob for entry in choice.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5},
        {"repetition_penalty": 0.0}, {"top_logprobs": 65}, {"stop": ("",)}, {"presence_penalty": math.inf},
        {"logit_bias": (TokenBias(VOCAB_SIZE, 1.0),)}, {"logit_bias": (TokenBias(0, 1.0), TokenBias(-1, 1.0))},
        {"logit_bias": (TokenBias(0, math.nan),)}, {"logit_bias": (TokenBias(0, 1.0),) * 1025},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(CorollaError) as caught:
        check(Sampling(**changes), VOCAB_SIZE)
    assert caught.value.code is Code.BAD_REQUEST
    assert next(iter(changes)) in caught.value.message
