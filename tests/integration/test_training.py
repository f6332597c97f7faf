"""Gradients through real daemons against transformers in one process, also when hops die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import corolla
from corolla.protocol.errors import Code, CorollaError
from corolla.sdk.client import Daemon, Model
from corolla.sdk.training import Trip

from ..model.tiny import NUM_BLOCKS, save_tiny
from ..processes import DaemonProcess, LocalSwarm, local_swarm

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
TOLERANCE = 1e-4


class Setting(NamedTuple):
    swarm: LocalSwarm
    client: DaemonProcess
    hops: list[DaemonProcess]
    whole: Any
    folder: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    whole = save_tiny(folder, "llama", seed=4, eos_token_id=None)
    cache = tmp_path_factory.mktemp("cache")
    with local_swarm(folder, *OPTIONS, "--cache-dir", str(cache)) as swarm:
        client = swarm.found()
        hops = [swarm.serve("front", 0, 2), swarm.serve("back", 2, NUM_BLOCKS)]
        hops.append(swarm.serve("spare", 2, NUM_BLOCKS))
        for daemon in hops:
            daemon.wait_online()
        swarm.wait_covered(client, [1] * 2 + [2] * (NUM_BLOCKS - 2))
        yield Setting(swarm, client, hops, whole, folder)


@pytest.fixture
def daemon(setting: Setting) -> Iterator[Daemon]:
    with corolla.connect(setting.client.socket) as daemon:
        yield daemon


@pytest.fixture
def model(daemon: Daemon) -> Model:
    return daemon.model("tiny")


def local(whole: Any, hidden: Tensor, start: int, end: int) -> Tensor:
    """Blocks [start, end) in this process."""
    decoder = whole.model
    positions = torch.arange(hidden.shape[1])[None]
    rotary = decoder.rotary_emb(hidden, positions)
    n = hidden.shape[1]
    mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
    for layer in decoder.layers[start:end]:
        out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check(model: Model, whole: Any, blocks: tuple[int, int], between: Any = None) -> None:
    hidden = states(3, 7, 64, seed=1).requires_grad_()
    gradient = states(3, 7, 64, seed=2)
    expected = local(whole, hidden, *blocks)
    expected.backward(gradient)
    assert hidden.grad is not None
    with model.passing(hidden.detach(), Trip(blocks)) as passed:
        assert distance(passed.output, expected.detach()) < TOLERANCE
        if between is not None:
            between()
        assert distance(model.backward(passed, gradient).inputs, hidden.grad) < TOLERANCE


@pytest.mark.parametrize("blocks", [(0, NUM_BLOCKS), (1, 3), (2, 3)])
def test_gradients_equal_those_of_one_process(
    model: Model, setting: Setting, blocks: tuple[int, int]
) -> None:
    check(model, setting.whole, blocks)


def test_a_forward_keeps_nothing(model: Model, setting: Setting) -> None:
    hidden = states(2, 5, 64)
    found = model.forward(hidden.numpy(), blocks=(0, 2))
    with torch.no_grad():
        assert distance(torch.from_numpy(found), local(setting.whole, hidden, 0, 2)) < TOLERANCE


def test_a_pass_goes_back_once(model: Model) -> None:
    hidden = states(1, 3, 64)
    passed = model.passing(hidden)
    passed.backward(hidden)
    with pytest.raises(CorollaError, match="no pass") as caught:
        passed.backward(hidden)
    assert caught.value.code is Code.UNKNOWN_SESSION


@pytest.mark.parametrize(
    ("hidden", "blocks", "code"),
    [
        (torch.full((1, 2, 64), float("nan")), None, Code.NOT_FINITE),
        (torch.zeros(1, 2, 63), None, Code.BAD_SHAPE),
        (torch.zeros(2, 64), None, Code.BAD_SHAPE),
        (torch.zeros(1, 2, 64), (0, 99), Code.BLOCKS_OUT_OF_RANGE),
    ],
)
def test_what_cannot_be_computed_is_refused(
    model: Model, hidden: Tensor, blocks: tuple[int, int] | None, code: Code
) -> None:
    with pytest.raises(CorollaError) as caught:
        model.forward(hidden, blocks=blocks)
    assert caught.value.code is code


def test_gradients_of_a_wrong_shape_are_refused(model: Model) -> None:
    with model.passing(states(1, 3, 64)) as passed, pytest.raises(CorollaError) as caught:
        passed.backward(states(1, 4, 64))
    assert caught.value.code is Code.BAD_SHAPE


def test_a_hop_killed_before_backward_costs_only_the_rerun(model: Model, setting: Setting) -> None:
    check(model, setting.whole, (0, NUM_BLOCKS), between=setting.hops[1].kill)
    check(model, setting.whole, (0, NUM_BLOCKS))  # and forward without it
