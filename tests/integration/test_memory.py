"""Real daemons with less cache than their sessions may fill: every text is that of the whole model all the same."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from ..model.tiny import save_tiny  # noqa: E402
from ..processes import local_swarm  # noqa: E402
from .fleet import NUM_BLOCKS, OPTIONS, Fleet, generate, prompt_of  # noqa: E402

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
CACHE_TOKENS = 512
NUM_TEXTS = 8
NEW_TOKENS = 120  # with its prompt each takes 192 tokens of cache: three times what there is


def test_texts_that_together_outgrow_the_cache_several_times_are_those_of_the_whole_model(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "tiny"
    whole = save_tiny(
        folder, "llama", seed=4, num_hidden_layers=NUM_BLOCKS, eos_token_id=None, max_position_embeddings=1024
    )
    config = tmp_path / "config.toml"
    config.write_text(f"cache_tokens = {CACHE_TOKENS}\n")
    options = (*OPTIONS, "--cache-dir", str(tmp_path / "cache"), "--config", str(config))
    with local_swarm(folder, *options) as swarm:
        fleet = Fleet(swarm, swarm.found(), whole)
        for span in ((0, 3), (3, NUM_BLOCKS)):
            fleet.add(span)
        fleet.wait()
        prompts = [prompt_of(20 + number) for number in range(NUM_TEXTS)]
        with ThreadPoolExecutor(NUM_TEXTS) as threads:
            outcomes = threads.map(lambda prompt: generate(fleet, prompt, num_tokens=NEW_TOKENS), prompts)
            texts = [outcome.tokens for outcome in outcomes]
        assert texts == [fleet.expected(prompt, NEW_TOKENS) for prompt in prompts]
        assert fleet.charged() == set()
