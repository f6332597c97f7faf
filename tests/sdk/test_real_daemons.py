"""The SDK against real daemons: two that share a tiny model, and the one that users' programs ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

import corolla  # noqa: E402
from corolla.protocol.control import Piece  # noqa: E402
from corolla.protocol.errors import Code, CorollaError  # noqa: E402
from corolla.sdk.bench import bench  # noqa: E402
from corolla.sdk.client import Daemon  # noqa: E402
from corolla.sdk.torch import DistributedModelForCausalLM  # noqa: E402

from ..model.tiny import NUM_BLOCKS, VOCAB_SIZE, save_tiny  # noqa: E402
from ..processes import DaemonProcess, local_swarm, wait_until  # noqa: E402

PROMPT = [5, 17, 40, 8, 23]
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")


class Swarm(NamedTuple):
    client: DaemonProcess
    front: DaemonProcess
    whole: Any
    folder: Path


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    whole = save_tiny(folder, "llama", seed=4, eos_token_id=None)
    cache = tmp_path_factory.mktemp("cache")
    with local_swarm(folder, *OPTIONS, "--cache-dir", str(cache)) as daemons:
        client = daemons.found()
        serving = [daemons.serve("front", 0, 2), daemons.serve("back", 2, NUM_BLOCKS)]
        for daemon in serving:
            daemon.wait_online()
        daemons.wait_covered(client, [1] * NUM_BLOCKS)
        yield Swarm(client, serving[0], whole, folder)


@pytest.fixture
def daemon(swarm: Swarm) -> Iterator[Daemon]:
    with corolla.connect(swarm.client.socket) as daemon:
        yield daemon


def greedy(whole: Any, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = whole.generate(ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
    return tuple(out[0, len(prompt) :].tolist())


def test_greedy_tokens_equal_the_whole_models(daemon: Daemon, swarm: Swarm) -> None:
    answer = daemon.model("tiny").generate(tokens=[PROMPT, PROMPT[:3]], max_new_tokens=12)
    assert answer.tokens == (greedy(swarm.whole, PROMPT, 12), greedy(swarm.whole, PROMPT[:3], 12))
    assert answer.finishes == ("length", "length")
    assert answer.num_prompt_tokens == 8


def test_a_seed_gives_the_same_tokens_again(daemon: Daemon) -> None:
    def sampled(seed: int) -> tuple[tuple[int, ...], ...]:
        model = daemon.model("tiny")
        return model.generate(tokens=PROMPT, max_new_tokens=16, temperature=1.5, seed=seed).tokens

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_the_swarms_speed_is_measured(daemon: Daemon) -> None:
    results = bench(daemon.model("tiny"), prompt_tokens=8, new_tokens=4, num_texts=2)
    assert [figure.name for figure in results][2:4] == ["one_text", "2_texts"]
    assert all(figure.value > 0 for figure in results)


def test_a_session_of_some_blocks_steps_rolls_back_and_forks(daemon: Daemon, swarm: Swarm) -> None:
    hidden = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    with daemon.model("tiny").session(max_length=16, blocks=(1, 3), rows=2) as session:
        at_once = session.step(hidden)
        assert torch.allclose(session.step(hidden[:, 4:], position=4), at_once[:, 4:], atol=1e-5)
        session.fork(2)
        twice = session.step(torch.cat([hidden[:, :1], hidden[:, :1]]))
        assert torch.equal(twice[0], twice[1])
        assert session.lengths == (7, 7)


def test_transformers_generate_runs_on_the_swarm(daemon: Daemon, swarm: Swarm) -> None:
    model = DistributedModelForCausalLM.from_pretrained(
        "tiny", ends=swarm.folder, daemon=daemon, dtype=torch.float32
    )
    ids = torch.randint(3, VOCAB_SIZE, (2, 6), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "num_beams": 3, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), swarm.whole.generate(ids, **options))


def test_what_was_opened_is_released(daemon: Daemon, swarm: Swarm) -> None:
    def num_sessions() -> int:
        return sum(worker.sessions for worker in swarm.front.status().workers)

    session = daemon.model("tiny").session(max_length=8)
    wait_until(lambda: num_sessions() == 1, "the hop has the session")
    session.close()
    with daemon.model("tiny").generate(tokens=PROMPT, max_new_tokens=200, stream=True) as pieces:
        next(pieces)
    wait_until(lambda: num_sessions() == 0, "no session is left on the hop")


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (
            lambda model: model._daemon.model("nope").generate(tokens=[1], max_new_tokens=1),
            Code.UNKNOWN_MODEL,
        ),
        (lambda model: model.session(blocks=(2, 9)), Code.BLOCKS_OUT_OF_RANGE),
        (lambda model: model.session(max_length=100_000), Code.TOO_LONG),
        (lambda model: model.generate(tokens=[3] * 256, max_new_tokens=1), Code.TOO_LONG),
        (lambda model: model.generate("text for a model without a tokenizer"), None),
    ],
    ids=["model", "blocks", "session", "prompt", "tokenizer"],
)
def test_bad_requests_are_refused_and_leave_the_daemon_running(
    daemon: Daemon, ask: Any, code: Code | None
) -> None:
    with pytest.raises(CorollaError) as caught:
        ask(daemon.model("tiny"))
    assert code is None or caught.value.code is code
    assert daemon.status().state == "online"


def test_text_goes_on_after_the_clients_daemon_was_killed_and_started_again(swarm: Swarm) -> None:
    seen: list[str | None] = []

    def restart(piece: Piece) -> None:
        seen.append(piece.event)
        if piece.event == "reconnecting":
            swarm.client.start()

    tokens: list[int] = []
    with corolla.connect(swarm.client.socket) as daemon:
        model = daemon.model("tiny")
        for piece in model.generate(tokens=PROMPT, max_new_tokens=60, stream=True, on_event=restart):
            tokens.append(piece.token)
            if len(tokens) == 5:
                swarm.client.kill()
    assert "reconnecting" in seen
    assert tuple(tokens) == greedy(swarm.whole, PROMPT, 60)
