"""A daemon that leaves its swarm, or ends, takes back what it announced; nobody has to wait for that to run out."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from corolla.daemon.network.registry.announcements import Offer
from corolla.daemon.node import Node
from corolla.protocol.records import SpanState
from corolla.protocol.tensors import DType
from corolla.protocol.work import ModelFacts

from .test_node import ask, folder, node, pair  # noqa: F401 - folder is a fixture

FACTS = ModelFacts("m", "f" * 64, "LlamaForCausalLM", 30, 576, 49152, 8192, {})
OFFER = Offer(0, FACTS.fingerprint, 0, 12, SpanState.ONLINE, DType.FLOAT32)


def announce(daemon: Node) -> None:
    registry = daemon.the_belonging().registry
    registry.announce(OFFER)
    registry.announce_model(FACTS)


async def until_seen(daemon: Node, num_spans: int, num_models: int) -> None:
    registry = daemon.the_belonging().registry
    version = registry.version
    with trio.fail_after(30):  # half of a record's lifetime
        while (len(registry.all_spans_now()), len(registry.manifests_now())) != (num_spans, num_models):
            version = await registry.wait_changed(version)


@pytest.mark.anyio
async def test_one_that_leaves_takes_its_records_back(folder: Path) -> None:  # noqa: F811
    async with pair(folder) as (first, second, one, other):
        await other.join((await one.create_swarm("roses")).token)
        announce(second)
        await until_seen(first, 1, 1)
        await other.leave()
        await until_seen(first, 0, 0)


@pytest.mark.anyio
async def test_one_that_ends_takes_its_records_back(folder: Path) -> None:  # noqa: F811
    async with node(folder / "a") as first, await ask(first) as one:
        token = (await one.create_swarm("roses")).token
        async with node(folder / "b") as second, await ask(second) as other:
            await other.join(token)
            announce(second)
            await until_seen(first, 1, 1)
        await until_seen(first, 0, 0)
