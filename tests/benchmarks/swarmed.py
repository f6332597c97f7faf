"""Clients whose sessions run through daemons: one process of many texts, each written greedily through the swarm."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import corolla
from tests.benchmarks import plain
from tests.processes import DaemonProcess, local_swarm

_MOST_TOKENS = 1024


@dataclass
class Counted:
    """What a crowd wrote. tokens: of each client between the moment when all had begun and the end."""

    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)


@contextmanager
def served(folder: Path, num_blocks: int, num_daemons: int, threads: int) -> Iterator[DaemonProcess]:
    """The client's daemon, in a swarm of so many others that share the model's blocks."""
    bounds = [num_blocks * i // num_daemons for i in range(num_daemons + 1)]
    with local_swarm(folder, "--dtype", "float32", "--threads", str(threads)) as swarm:
        client = swarm.found()
        servers = [swarm.serve(f"hop{i}", bounds[i], bounds[i + 1]) for i in range(num_daemons)]
        for server in servers:
            server.wait_online()
        swarm.wait_covered(client, [1] * num_blocks)
        yield client


def crowd(
    client: DaemonProcess, vocab_size: int, num_clients: int, prompt_tokens: int, seconds: float
) -> Counted:
    """So many clients write together for so long."""
    return asyncio.run(_crowd(client, vocab_size, num_clients, prompt_tokens, seconds))


async def _crowd(
    client: DaemonProcess, vocab_size: int, num_clients: int, prompt_tokens: int, seconds: float
) -> Counted:
    written = [0] * num_clients
    all_began, over = asyncio.Event(), asyncio.Event()
    fixed, numbers = plain.prompt(prompt_tokens, vocab_size), count()

    async def write() -> None:
        index = next(numbers)
        # No two of them share a prefix, which would be computed once.
        own = [fixed[0] + index, *fixed[1:]]
        async with model.stream(
            tokens=[own],
            max_new_tokens=_MOST_TOKENS,
            ignore_eos=True,
            max_length=prompt_tokens + _MOST_TOKENS,
        ) as pieces:
            async for _ in pieces:
                written[index] += 1
                if all(written):
                    all_began.set()
                if over.is_set():
                    return

    counted = Counted()
    async with await corolla.aconnect(client.socket) as daemon:
        model = daemon.model((await daemon.models())[0].name)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_clients):
                tasks.create_task(write())
            await all_began.wait()
            before, began = list(written), time.perf_counter()
            await asyncio.sleep(seconds)
            counted.seconds = time.perf_counter() - began
            counted.tokens = [after - first for after, first in zip(written, before, strict=True)]
            over.set()
    return counted
