"""Gradients of inputs and adapters are PEFT's, over one hop or several, also when one dies amid a pass.

The default suite has a few of the combinations; `long` has all of them, and real weights.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import corolla

from ..model.tiny import NUM_BLOCKS, save_tiny
from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until
from .fleet import Liar, peer_of
from .test_training import OPTIONS, TOLERANCE, Setting, distance, distributed, gradients_of, peft_of

FAMILIES = ("llama", "qwen3", "gemma2", "olmo2", "mixtral")
TARGETS = ("q_proj", "v_proj", "o_proj")
KILLS = (None, "forward", "backward")
IDS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(3))
REAL = os.environ.get("COROLLA_TEST_MODEL", "")

pytestmark = [
    pytest.mark.timeout(900),
    # PEFT asks transformers for a name that it has deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def serve(swarm: LocalSwarm, client: DaemonProcess, num_blocks: int, num_hops: int) -> list[Any]:
    """That many hops, each with its part of the blocks."""
    edges = [num_blocks * hop // num_hops for hop in range(num_hops + 1)]
    hops = [swarm.serve(f"hop{start}", start, end) for start, end in pairwise(edges)]
    for hop in hops:
        hop.wait_online()
    swarm.wait_covered(client, [1] * num_blocks)
    return hops


def backward_of(model: Any) -> tuple[float, Tensor]:
    """The loss, and the gradient of the inputs; those of the adapter are left in the model."""
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model(inputs_embeds=inputs, labels=IDS).loss
    loss.backward()
    if inputs.grad is None:
        raise ValueError("no gradient reached the inputs")
    return loss.item(), inputs.grad


def check(setting: Setting, num_hops: int, kill: str | None, tmp_path: Path) -> None:
    """Ours against PEFT's; `kill` says in which request the last hop dies."""
    adapted = peft_of(setting, tmp_path / "adapter", TARGETS)
    num_blocks = setting.whole.config.num_hidden_layers
    doomed = setting.hops[-1]
    with corolla.connect(setting.client.socket) as daemon, ThreadPoolExecutor(1) as pool:
        model = distributed(setting, daemon)
        model.load_adapter(tmp_path / "adapter")
        guilty = {peer_of(doomed)} if kill else set()
        if kill:
            (doomed.folder / "stall").write_text(kill)
        run = pool.submit(backward_of, model)
        if kill:
            wait_until((doomed.folder / "stalled").exists, f"a {kill} under way")
            start = num_blocks * (num_hops - 1) // num_hops
            setting.swarm.serve("second", start, num_blocks).wait_online()
            assert not run.done()
            doomed.kill()
        loss, inputs = run.result()
        found = model.blocks.adapter.named_factors()
        charged = {event.detail["peer"] for event in daemon.events() if event.kind == "charged"}
    expected_loss, expected_inputs = backward_of(adapted)
    assert abs(loss - expected_loss) < TOLERANCE
    assert distance(inputs, expected_inputs) < TOLERANCE
    expected = gradients_of(adapted)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert distance(found[name].grad, reference) < TOLERANCE, name
    assert charged == guilty


def check_family(tmp_path: Path, family: str, num_hops: int, kill: str | None) -> None:
    folder = tmp_path / "tiny"
    whole = save_tiny(folder, family, seed=4, eos_token_id=None)
    with local_swarm(folder, *OPTIONS, "--cache-dir", str(tmp_path / "cache")) as swarm:
        client = swarm.found()
        swarm.kind = Liar
        hops = serve(swarm, client, NUM_BLOCKS, num_hops)
        check(Setting(swarm, client, hops, whole, folder), num_hops, kill, tmp_path)


@pytest.mark.parametrize(
    ("family", "num_hops", "kill"),
    [("llama", 2, "backward"), ("gemma2", 2, "forward")],
)
def test_gradients_are_pefts_and_only_a_dead_hop_is_charged(
    tmp_path: Path, family: str, num_hops: int, kill: str | None
) -> None:
    check_family(tmp_path, family, num_hops, kill)


@pytest.mark.long
@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("num_hops", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_pefts_in_every_combination(
    tmp_path: Path, family: str, num_hops: int, kill: str | None
) -> None:
    check_family(tmp_path, family, num_hops, kill)


@pytest.mark.long
@pytest.mark.skipif(
    not Path(REAL).is_file(), reason="COROLLA_TEST_MODEL names no file; packaging/check sets it"
)
@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("num_hops", [1, 2, 4])
def test_gradients_of_real_weights_are_pefts(tmp_path: Path, num_hops: int, kill: str | None) -> None:
    from transformers import AutoModelForCausalLM

    with local_swarm(REAL, *OPTIONS) as swarm:
        client = swarm.found()
        with client.connect() as daemon:
            folder = Path(daemon.pull(REAL).folder)
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        swarm.kind = Liar
        hops = serve(swarm, client, whole.config.num_hidden_layers, num_hops)
        check(Setting(swarm, client, hops, whole, folder), num_hops, kill, tmp_path)
