"""Real daemons with less cache than their sessions may fill, and texts that begin alike: all are the whole model's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from ..model.tiny import save_tiny  # noqa: E402
from ..processes import local_swarm  # noqa: E402
from .fleet import NUM_BLOCKS, OPTIONS, Fleet, generate, prompt_of  # noqa: E402

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
CACHE_TOKENS = 512
SPANS = ((0, 3), (3, NUM_BLOCKS))
NUM_TEXTS = 8
NEW_TOKENS = 120  # with its prompt each takes 192 tokens of cache: three times what there is


PREFIX = prompt_of(200)
NEW_AFTER_PREFIX = 40


@contextmanager
def small_fleet(folder: Path) -> Iterator[Fleet]:
    """A daemon for each half of the blocks, with a small cache."""
    whole = save_tiny(
        folder / "tiny",
        "llama",
        seed=4,
        num_hidden_layers=NUM_BLOCKS,
        eos_token_id=None,
        max_position_embeddings=1024,
    )
    config = folder / "config.toml"
    config.write_text(f"cache_tokens = {CACHE_TOKENS}\n")
    options = (*OPTIONS, "--cache-dir", str(folder / "cache"), "--config", str(config))
    with local_swarm(folder / "tiny", *options) as swarm:
        fleet = Fleet(swarm, swarm.found(), whole)
        for span in SPANS:
            fleet.add(span)
        fleet.wait()
        yield fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with small_fleet(tmp_path_factory.mktemp("m")) as standing:
        yield standing


def test_texts_that_together_outgrow_the_cache_several_times_are_those_of_the_whole_model(
    fleet: Fleet,
) -> None:
    prompts = [prompt_of(20 + number) for number in range(NUM_TEXTS)]
    with ThreadPoolExecutor(NUM_TEXTS) as threads:
        outcomes = threads.map(lambda prompt: generate(fleet, prompt, num_tokens=NEW_TOKENS), prompts)
        texts = [outcome.tokens for outcome in outcomes]
    assert texts == [fleet.expected(prompt, NEW_TOKENS) for prompt in prompts]
    assert fleet.charged() == set()


def test_texts_that_begin_alike_are_right_and_so_they_are_when_a_worker_is_killed(fleet: Fleet) -> None:
    prompts = [[*PREFIX, 7, number] for number in range(4, 7)]
    known = []
    with fleet.client.connect() as daemon:
        for prompt in prompts:
            answer = daemon.model("tiny").generate(tokens=[prompt], max_new_tokens=NEW_AFTER_PREFIX)
            assert answer.tokens == (fleet.expected(prompt, NEW_AFTER_PREFIX),)
            known.append(answer.num_prefix_tokens)
    assert known == [0, 192, 192]

    def kill(count: int) -> None:
        if count == 5:
            (pid,) = fleet.in_use(SPANS[1]).worker_pids()
            os.kill(pid, signal.SIGKILL)

    prompt = [*PREFIX, 9, 9, 9]
    outcome = generate(fleet, prompt, kill, NEW_AFTER_PREFIX)
    assert outcome.tokens == fleet.expected(prompt, NEW_AFTER_PREFIX)
    assert "repaired" in outcome.events
