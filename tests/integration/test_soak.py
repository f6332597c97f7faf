"""Machines are killed, stopped, paused, drained, replaced and moved while programs write: every text stays right.

The default suite strikes a tiny model a few times; the long test strikes SmolLM2 for ten minutes and prints what
it saw.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from ..model.tiny import save_tiny  # noqa: E402
from ..processes import local_swarm  # noqa: E402
from .fleet import OPTIONS, prompt_of  # noqa: E402
from .soak import Disturber, Figures, Text, Writer, soak  # noqa: E402

REAL = os.environ.get("COROLLA_TEST_MODEL", "")
INTERVAL_S = 20.0
SOAK_S = 600.0
REPLICAS = (
    3  # so that there is always one to strike, though it takes longer to come back than the next strike
)
MAX_GROWTH = 1.25  # of a client's daemon: what it knows of the swarm may vary, texts leave nothing behind


def texts_of(whole: Any, prompts: list[list[int]], num_tokens: int) -> list[Text]:
    whole.generation_config.eos_token_id = None
    texts = []
    for prompt in prompts:
        with torch.inference_mode():
            out = whole.generate(
                torch.tensor([prompt]),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        texts.append(Text(tuple(prompt), tuple(out[0, len(prompt) :].tolist())))
    return texts


def run(
    model: Path,
    whole: Any,
    texts: list[Text],
    cache: Path | None,
    replicas: int,
    num_strikes: int,
    interval_s: float,
    tell: Callable[[str], None],
) -> Figures:
    num_blocks = whole.config.num_hidden_layers
    options = (*OPTIONS, "--cache-dir", str(cache)) if cache is not None else OPTIONS
    with local_swarm(model, *options) as swarm:
        client = swarm.found()
        disturber = Disturber(swarm, client, num_blocks, Random(7), interval_s)
        third = num_blocks // 3
        for start in range(0, num_blocks, third):
            for _ in range(replicas):
                disturber.serve(start, min(start + third, num_blocks))
        disturber.wait_whole()
        with client.connect() as daemon:
            name = daemon.models()[0].name
        stopping = threading.Event()
        writers = [Writer(client, name, texts[n:] + texts[:n], stopping) for n in range(4)]
        return soak(disturber, writers, stopping, num_strikes, interval_s, tell)


def check(figures: Figures, tell: Callable[[str], None]) -> None:
    tell(str(figures))
    assert figures.problems == ()
    assert figures.num_texts >= 4
    assert figures.num_repairs > 0
    assert figures.growth["client's daemon"] < MAX_GROWTH


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line at once."""

    def tell(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end="", flush=True)

    return tell


@pytest.mark.timeout(900)
def test_texts_stay_right_while_a_tiny_swarm_is_struck(tmp_path: Path, tell: Callable[[str], None]) -> None:
    whole = save_tiny(
        tmp_path / "tiny",
        "llama",
        seed=4,
        num_hidden_layers=6,
        eos_token_id=None,
        max_position_embeddings=1024,
    )
    texts = texts_of(whole, [prompt_of(n) for n in (5, 9, 14, 23)], 200)
    check(run(tmp_path / "tiny", whole, texts, tmp_path / "cache", 2, 3, 1.0, tell), tell)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not Path(REAL).is_file(), reason="COROLLA_TEST_MODEL names no file; packaging/check sets it"
)
def test_texts_stay_right_while_a_real_swarm_is_struck_for_ten_minutes(
    tell: Callable[[str], None],
) -> None:
    from transformers import AutoModelForCausalLM

    with local_swarm(REAL, *OPTIONS) as swarm, swarm.found().connect() as daemon:
        folder = Path(daemon.pull(REAL).folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [
        [1, *range(start, start + length)] for start, length in ((300, 5), (900, 17), (2000, 40), (50, 9))
    ]
    texts = texts_of(whole, prompts, 48)
    num_strikes = round(SOAK_S / INTERVAL_S)
    check(run(folder, whole, texts, None, REPLICAS, num_strikes, INTERVAL_S, tell), tell)
