"""Gradients of inputs, LoRA and prompts are PEFT's, over one hop or several, also when one dies amid a pass.

Three clients learn at once over the same hops: LoRA without dropout, LoRA with it, and soft and deep prompts. The
default suite has one of the combinations; `long` has all of them, and real weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import corolla
from corolla.sdk.adapters import RemoteLora
from corolla.sdk.client import Daemon
from corolla.sdk.dropout import DropoutCount

from ..model.tiny import NUM_BLOCKS, save_tiny
from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until
from .fleet import Liar, peer_of
from .test_prompts import by_hand, random_deep
from .test_training import (
    OPTIONS,
    TOLERANCE,
    Masked,
    Setting,
    distance,
    distributed,
    gradients_of,
    peft_of,
)

FAMILIES = ("llama", "qwen3", "gemma2", "olmo2", "mixtral")
TARGETS = ("q_proj", "v_proj", "o_proj")
DROPOUT, SEED = 0.3, 11
PROMPTS_SIZE = 0.03  # as training makes them; ten times larger ones in 30 blocks multiply every rounding
PATIENT = ("--replacement-wait-s", "300")  # on a busy machine daemons start slowly
KILLS = (None, "forward", "backward")
IDS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(3))
REAL = os.environ.get("COROLLA_TEST_MODEL", "")

pytestmark = [
    pytest.mark.timeout(1800),
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


def backward_of(model: Any, inputs: Tensor, num_virtual: int = 0) -> tuple[float, Tensor]:
    """The loss, and the gradient of the inputs (rows, n, hidden_size); those of the adapter are left in the model.

    num_virtual: columns before the text's that nothing is learned of.
    """
    leaf = inputs.clone().requires_grad_()
    labels = torch.nn.functional.pad(IDS, (num_virtual, 0), value=-100)
    loss = model(inputs_embeds=leaf, labels=labels).loss
    loss.backward()
    return loss.item(), grad_of(leaf)


def grad_of(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError(f"no gradient reached a tensor of shape {tuple(tensor.shape)}")
    return tensor.grad


class Learned(NamedTuple):
    """One pass forward and back. gradients: of the inputs and of every tensor of the adapter."""

    loss: float
    gradients: dict[str, Tensor]


def learners_of(setting: Setting, daemon: Daemon, folder: Path) -> dict[str, Any]:
    """Three clients' models over the same hops: LoRA without dropout and with it, soft and deep prompts."""
    models = {name: distributed(setting, daemon) for name in ("lora", "dropout", "prompts")}
    models["lora"].load_adapter(folder)
    models["dropout"].load_adapter(folder, dropout_seed=SEED)
    models["dropout"].train()
    random_deep(models["prompts"], PROMPTS_SIZE)
    return models


def learned_of(model: Any, inputs: Tensor) -> Learned:
    """By the swarm."""
    model.zero_grad()
    if model.training:
        model.dropout.step = 0  # the same masks each time
    loss, gradient = backward_of(model, inputs)
    adapter: Any = model.blocks.adapter
    if isinstance(adapter, RemoteLora):
        found = {name: grad_of(tensor) for name, tensor in adapter.named_factors().items()}
    else:
        deep = {f"deep {block}": one for block, one in enumerate(grad_of(adapter.factors[0]))}
        found = {"soft": grad_of(adapter.soft), **deep}
    return Learned(loss, {"inputs": gradient, **found})


def expected_of(setting: Setting, name: str, model: Any, adapted: Any, inputs: Tensor) -> Learned:
    """The same in this process, by PEFT with our masks, or with prompts added by hand."""
    if name == "prompts":
        local, soft, prompts = by_hand(setting.whole, model)
        embeds = torch.cat([soft.expand(len(IDS), -1, -1), inputs], 1)
        loss, gradient = backward_of(local, embeds.detach(), len(soft))
        first, rest = gradient[:, : len(soft)], gradient[:, len(soft) :]  # the soft prompt in every row
        deep = {f"deep {block}": one for block, one in enumerate(grad_of(prompts))}
        return Learned(loss, {"inputs": rest, "soft": first.sum(0), **deep})
    if name == "dropout":
        for block, layer in enumerate(adapted.base_model.model.model.layers):
            for target in TARGETS:
                masked = Masked(DropoutCount(SEED), block, f"self_attn.{target}", DROPOUT)
                layer.self_attn.get_submodule(target).lora_dropout["default"] = masked
    adapted.zero_grad()
    loss, gradient = backward_of(adapted, inputs)
    return Learned(loss, {"inputs": gradient, **gradients_of(adapted)})


def check(setting: Setting, kills: Sequence[str | None], tmp_path: Path) -> None:
    """Ours against PEFT's, once for each of `kills`: in which request the last hop dies, which has no replica."""
    adapted = peft_of(setting, tmp_path / "adapter", TARGETS, DROPOUT).eval()
    inputs = setting.whole.get_input_embeddings()(IDS).detach()
    guilty: set[str] = set()
    with corolla.connect(setting.client.socket) as daemon:
        models = learners_of(setting, daemon, tmp_path / "adapter")
        expected = {
            name: expected_of(setting, name, model, adapted, inputs) for name, model in models.items()
        }
        for kill in kills:
            doomed = setting.hops[-1]
            with ThreadPoolExecutor(len(models)) as pool:
                if kill:
                    (doomed.folder / "stall").write_text(kill)
                runs = {name: pool.submit(learned_of, model, inputs) for name, model in models.items()}
                if kill:
                    wait_until((doomed.folder / "stalled").exists, f"a {kill} under way")
                    guilty.add(peer_of(doomed))
                    doomed.kill()
                    setting.hops[-1] = setting.swarm.serve(f"after-{kill}", *served_by(doomed))
                    setting.hops[-1].wait_online()
                learned = {name: run.result() for name, run in runs.items()}
            for name, found in learned.items():
                compare(found, expected[name], f"{name}, {kill}")
            assert abs(learned["lora"].loss - learned["dropout"].loss) > TOLERANCE  # or nothing was dropped
            assert {event.detail["peer"] for event in daemon.events() if event.kind == "charged"} == guilty


def compare(found: Learned, expected: Learned, where: str) -> None:
    assert abs(found.loss - expected.loss) < TOLERANCE, where
    assert found.gradients.keys() == expected.gradients.keys()
    for tensor, reference in expected.gradients.items():
        assert distance(found.gradients[tensor], reference) < TOLERANCE, (where, tensor)


def served_by(hop: DaemonProcess) -> tuple[int, int]:
    """The blocks that it was started with."""
    start, end = hop.arguments[hop.arguments.index("--blocks") + 1].split(":")
    return int(start), int(end)


def check_family(tmp_path: Path, family: str, num_hops: int, kills: Sequence[str | None]) -> None:
    folder = tmp_path / "tiny"
    whole = save_tiny(folder, family, seed=4, eos_token_id=None)
    with local_swarm(folder, *OPTIONS, "--cache-dir", str(tmp_path / "cache")) as swarm:
        client = swarm.found(*PATIENT)
        swarm.kind = Liar
        hops = serve(swarm, client, NUM_BLOCKS, num_hops)
        check(Setting(swarm, client, hops, whole, folder), kills, tmp_path)


def test_gradients_are_pefts_and_only_dead_hops_are_charged(tmp_path: Path) -> None:
    check_family(tmp_path, "gemma2", 2, KILLS[1:])


@pytest.mark.long
@pytest.mark.parametrize("num_hops", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_pefts_in_every_combination(tmp_path: Path, family: str, num_hops: int) -> None:
    check_family(tmp_path, family, num_hops, KILLS)


@pytest.mark.long
@pytest.mark.skipif(
    not Path(REAL).is_file(), reason="COROLLA_TEST_MODEL names no file; packaging/check sets it"
)
@pytest.mark.parametrize("num_hops", [1, 2, 4])
def test_gradients_of_real_weights_are_pefts(tmp_path: Path, num_hops: int) -> None:
    from transformers import AutoModelForCausalLM

    with local_swarm(REAL, *OPTIONS) as swarm:
        client = swarm.found(*PATIENT)
        with client.connect() as daemon:
            folder = Path(daemon.pull(REAL).folder)
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        swarm.kind = Liar
        hops = serve(swarm, client, whole.config.num_hidden_layers, num_hops)
        check(Setting(swarm, client, hops, whole, folder), KILLS, tmp_path)
