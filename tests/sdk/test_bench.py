"""`daemonctl bench`: what it measures, and what it says."""

from __future__ import annotations

import pytest

from corolla.sdk.bench import Figure, Writing, figures

from .fake import FakeDaemon
from .test_cli import Ctl, ctl, fake  # noqa: F401 - fixtures


def test_the_figures_are_those_of_the_texts() -> None:
    alone = Writing(0.0, 0.5, 1.5, 11)
    together = [Writing(2.0, 3.0, 5.0, 11), Writing(2.0, 3.5, 5.0, 11)]
    assert figures(100, alone, together) == (
        Figure("first_token", 0.5, "s"),
        Figure("prompt", 200.0, "tokens/s"),
        Figure("one_text", 10.0, "tokens/s"),
        Figure("2_texts", 10.0, "tokens/s", 10.0, 1.0),
        Figure("2_texts_slowest_first_token", 1.5, "s", 0.5, 3.0),
    )


def test_bench_answers_in_words_and_as_json(ctl: Ctl, fake: FakeDaemon) -> None:  # noqa: F811
    words = ("bench", "--prompt-tokens", "3", "-n", "4", "--texts", "2")
    said = ctl(*words)
    assert said.code == 0
    assert "one text" in said.out
    results = ctl(*words, "--json").json["results"]
    assert [result["name"] for result in results][2:4] == ["one_text", "2_texts"]
    assert all(result["value"] > 0 for result in results)


@pytest.mark.parametrize("words", [("--new-tokens", "1"), ("--texts", "0"), ("--prompt-tokens", "0")])
def test_a_measurement_of_nothing_is_refused(ctl: Ctl, fake: FakeDaemon, words: tuple[str, ...]) -> None:  # noqa: F811
    said = ctl("bench", *words)
    assert said.code == 2
    assert "give at least" in said.err
