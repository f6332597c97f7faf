"""Sessions with adapters on real daemons, against transformers and PEFT in one process, also when a hop dies."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import corolla
from corolla.protocol.errors import Code, CorollaError
from corolla.sdk.client import Daemon, Model
from corolla.sdk.torch import DistributedModelForCausalLM

from ..model.tiny import NUM_BLOCKS, save_tiny
from ..processes import DaemonProcess, LocalSwarm, local_swarm
from .fleet import MOST_TOKENS, generate_rows, peer_of, prompt_of

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
PROMPT = prompt_of(9)
NUM_TOKENS = 48

# PEFT asks transformers for a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Setting(NamedTuple):
    swarm: LocalSwarm
    client: DaemonProcess
    front: DaemonProcess
    whole: Any
    folder: Path
    adapters: tuple[Path, Path]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    base = tmp_path_factory.mktemp("base")
    whole = save_tiny(
        base / "tiny", "llama", seed=4, eos_token_id=None, max_position_embeddings=2 * MOST_TOKENS
    )
    with local_swarm(base / "tiny", *OPTIONS, "--cache-dir", str(base / "cache")) as swarm:
        client = swarm.found()
        front, back = swarm.serve("front", 0, 2), swarm.serve("back", 2, NUM_BLOCKS)
        front.wait_online()
        back.wait_online()
        swarm.wait_covered(client, [1] * NUM_BLOCKS)
        adapters = (
            save_adapter(whole, base / "first", 1, r=3, target_modules=["q_proj", "v_proj", "down_proj"]),
            save_adapter(
                whole, base / "second", 2, r=5, target_modules=["o_proj", "up_proj"], use_rslora=True
            ),
        )
        yield Setting(swarm, client, front, whole, base / "tiny", adapters)


@pytest.fixture
def daemon(setting: Setting) -> Iterator[Daemon]:
    with corolla.connect(setting.client.socket) as daemon:
        yield daemon


@pytest.fixture
def model(daemon: Daemon) -> Model:
    return daemon.model("tiny")


def save_adapter(whole: Any, folder: Path, seed: int, **options: Any) -> Path:
    """A LoRA of random factors, large enough to change most tokens, in PEFT's files."""
    adapted = get_peft_model(deepcopy(whole), LoraConfig(lora_alpha=16, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    adapted.save_pretrained(str(folder))
    return folder


def local(setting: Setting, adapter: Path | None) -> Any:
    """The whole model in this process."""
    whole = deepcopy(setting.whole)
    return whole if adapter is None else PeftModel.from_pretrained(whole, adapter)


def greedy(setting: Setting, adapter: Path | None, num_tokens: int = NUM_TOKENS, **options: Any) -> Tensor:
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        out: Tensor = local(setting, adapter).generate(input_ids=ids, max_new_tokens=num_tokens, **options)
    return out[:, len(PROMPT) :]


def tokens(model: Model, adapter: Path | None, num_tokens: int = NUM_TOKENS) -> list[int]:
    answer = model.generate(tokens=PROMPT, max_new_tokens=num_tokens, adapter=adapter)
    return list(answer.tokens[0])


def distributed(setting: Setting, daemon: Daemon) -> Any:
    return DistributedModelForCausalLM.from_pretrained(
        "tiny", ends=setting.folder, daemon=daemon, dtype=torch.float32
    )


def test_text_with_an_adapter_equals_pefts(setting: Setting, model: Model) -> None:
    expected = [greedy(setting, adapter)[0].tolist() for adapter in (None, *setting.adapters)]
    assert len({tuple(row) for row in expected}) == 3  # or the adapters would change nothing
    assert [tokens(model, adapter) for adapter in (None, *setting.adapters)] == expected


def test_two_adapters_and_none_together_give_what_each_gives_alone(setting: Setting, daemon: Daemon) -> None:
    wanted = (None, *setting.adapters) * 2
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(lambda adapter: tokens(daemon.model("tiny"), adapter), wanted))
    assert found == [greedy(setting, adapter)[0].tolist() for adapter in wanted]


def test_transformers_generates_with_the_adapter_that_was_loaded(setting: Setting, daemon: Daemon) -> None:
    model = distributed(setting, daemon)
    ids = torch.tensor([PROMPT])
    for adapter in setting.adapters:
        model.load_adapter(adapter)
        for options in ({}, {"num_beams": 3}):
            given = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
            found = model.generate(ids, max_new_tokens=12, **given)
            assert found[0, len(PROMPT) :].tolist() == greedy(setting, adapter, 12, **options)[0].tolist()


def test_logits_of_cached_steps_equal_pefts(setting: Setting, daemon: Daemon) -> None:
    model = distributed(setting, daemon)
    model.load_adapter(setting.adapters[0])
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = local(setting, setting.adapters[0])(input_ids=ids).logits
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, rest.logits], 1)
    assert float((found - expected).abs().max()) < 1e-3


def test_a_cache_gives_no_gradients_to_an_adapter_and_says_so(setting: Setting, daemon: Daemon) -> None:
    model = distributed(setting, daemon)
    model.load_adapter(setting.adapters[0])
    ids = torch.tensor([PROMPT])
    with pytest.raises(CorollaError, match="through a cache") as caught:
        model(ids, use_cache=True, labels=ids).loss.backward()
    assert caught.value.code is Code.UNSUPPORTED


def test_a_session_of_some_blocks_wears_their_parts(setting: Setting, model: Model) -> None:
    hidden = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    adapted = local(setting, setting.adapters[1]).base_model.model.model
    positions = torch.arange(6)[None]
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    expected = hidden
    with torch.no_grad():
        rotary = adapted.rotary_emb(hidden, positions)
        for layer in adapted.layers[1:3]:
            out = layer(expected, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            expected = out[0] if isinstance(out, tuple) else out
    with model.session(max_length=16, rows=2, blocks=(1, 3), adapter=setting.adapters[1]) as session:
        found = torch.cat([session.step(hidden[:, :4]), session.step(hidden[:, 4:])], 1)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_hop_killed_amid_a_text_with_an_adapter_changes_no_token(setting: Setting) -> None:
    doomed = setting.swarm.serve("doomed", 2, NUM_BLOCKS)
    doomed.wait_online()
    setting.swarm.wait_covered(setting.client, [1] * 2 + [2] * (NUM_BLOCKS - 2))
    backs = [setting.swarm.daemons["back"], doomed]
    killed: set[str] = set()

    def kill(count: int) -> None:
        if count == 7:
            used = next(d for d in backs if any(worker.sessions for worker in d.status().workers))
            killed.add(peer_of(used))
            used.kill()

    adapter = setting.adapters[0]
    (found,), _ = generate_rows(
        setting.client, [PROMPT], kill, MOST_TOKENS, until="repaired", adapter=adapter
    )
    with setting.client.connect() as daemon:
        charged = {event.detail["peer"] for event in daemon.events() if event.kind == "charged"}
    assert len(found) < MOST_TOKENS  # or there was no repair
    assert list(found) == greedy(setting, adapter, len(found))[0].tolist()
    assert charged == killed


def test_an_adapter_for_another_model_is_refused_with_the_sizes(
    setting: Setting, model: Model, tmp_path: Path
) -> None:
    wide = save_tiny(tmp_path / "wide", "llama", hidden_size=128)
    deep = save_tiny(tmp_path / "deep", "llama", num_hidden_layers=6)
    cases = {
        save_adapter(
            wide, tmp_path / "a", 1, target_modules=["q_proj"]
        ): r"q_proj.lora_A has the shape \(8, 128\)",
        save_adapter(deep, tmp_path / "b", 1, target_modules=["q_proj"]): "parts for 6 blocks, tiny has 4",
    }
    for folder, message in cases.items():
        with pytest.raises(CorollaError, match=message) as caught:
            model.generate(tokens=PROMPT, adapter=folder)
        assert caught.value.code is Code.BAD_SHAPE
