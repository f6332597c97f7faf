"""A hop that dies amid a backward: PEFT's gradients all the same, and only the dead one is charged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import corolla

from ..model.tiny import NUM_BLOCKS, save_tiny
from ..processes import local_swarm, wait_until
from .fleet import peer_of
from .test_liars import Liar
from .test_training import IDS, OPTIONS, TOLERANCE, Setting, distance, distributed, gradients_of, peft_of

# PEFT asks transformers for a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_a_hop_killed_amid_backward_costs_only_the_rerun_and_is_charged(tmp_path: Path) -> None:
    whole = save_tiny(tmp_path / "tiny", "llama", seed=4, eos_token_id=None)
    with local_swarm(tmp_path / "tiny", *OPTIONS, "--cache-dir", str(tmp_path / "cache")) as swarm:
        client = swarm.found()
        swarm.kind = Liar
        front, back = swarm.serve("front", 0, 2), swarm.serve("back", 2, NUM_BLOCKS)
        front.wait_online()
        back.wait_online()
        swarm.wait_covered(client, [1] * NUM_BLOCKS)
        setting = Setting(swarm, client, [front, back], whole, tmp_path / "tiny")
        adapted = peft_of(setting, tmp_path / "adapter")
        with corolla.connect(client.socket) as daemon, ThreadPoolExecutor(1) as pool:
            model = distributed(setting, daemon)
            model.load_adapter(tmp_path / "adapter")
            loss = model(IDS, labels=IDS).loss
            doomed = peer_of(back)
            (back.folder / "stall").touch()
            returned = pool.submit(loss.backward)
            wait_until((back.folder / "stalled").exists, "a backward under way")
            swarm.serve("second", 2, NUM_BLOCKS).wait_online()
            swarm.wait_covered(client, [1] * 2 + [2] * (NUM_BLOCKS - 2))
            assert not returned.done()
            back.kill()
            returned.result()
            found = model.blocks.adapter.named_factors()
            charged = {event.detail["peer"] for event in daemon.events() if event.kind == "charged"}
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    expected = gradients_of(adapted)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert distance(found[name].grad, reference) < TOLERANCE, name
    assert charged == {doomed}
