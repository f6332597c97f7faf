"""Decode and prefill of one session, split over daemons, beside one plain transformers process.

The model is the random Llama of 16 × 1024 in float32. Hops take turns, so every worker may use all cores, as the
plain process does.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import plain
from tests.benchmarks.report import Measured, Report, arguments, median
from tests.processes import LocalSwarm, local_swarm

NUM_BLOCKS = 16


def start(swarm: LocalSwarm, num_daemons: int) -> Any:
    """Serve the model's blocks by so many daemons; gives the client's daemon."""
    client = swarm.found()
    share = NUM_BLOCKS // num_daemons
    servers = [
        swarm.serve(f"hop{i}", i * share, NUM_BLOCKS if i == num_daemons - 1 else (i + 1) * share)
        for i in range(num_daemons)
    ]
    for server in servers:
        server.wait_online()
    swarm.wait_covered(client, [1] * NUM_BLOCKS)
    return client


def generate(
    daemon: Any, name: str, prompt_tokens: int, new_tokens: int
) -> tuple[list[int], float, list[float]]:
    """Tokens, seconds to the first, and seconds between the others."""
    ids = plain.prompt(prompt_tokens, 32_000)
    began = time.perf_counter()
    times, tokens = [], []
    for piece in daemon.model(name).generate(
        tokens=[ids], max_new_tokens=new_tokens, ignore_eos=True, stream=True
    ):
        times.append(time.perf_counter())
        tokens.append(piece.token)
    return tokens, times[0] - began, [after - before for before, after in pairwise(times)]


def measure(report: Report, folder: Path, num_daemons: int, quick: bool) -> None:
    """One number of daemons, and the plain process before and after it, since machines drift."""
    threads = os.cpu_count() or 1
    new_tokens = 24 if quick else 64
    targets = {1: None, 2: 1.0, 4: 0.95}
    with local_swarm(folder, "--dtype", "float32", "--threads", str(threads)) as swarm:
        client = start(swarm, num_daemons)
        with client.connect() as daemon:
            name = daemon.models()[0].name
            generate(daemon, name, 16, 4)  # loads the ends, and the first pass pays for lazy set-up
            ours, beside, first, plain_first = [], [], [], []
            equal = True
            for _ in range(2 if quick else 4):
                local = plain.measure(folder, threads=threads, prompt_tokens=128, new_tokens=new_tokens)
                tokens, _, times = generate(daemon, name, 128, new_tokens)
                equal = equal and tokens == local["tokens"]
                ours += times
                beside += local["decode_s"]
            for _ in range(1 if quick else 3):
                local = plain.measure(folder, threads=threads, prompt_tokens=1024, new_tokens=2)
                _, first_s, _ = generate(daemon, name, 1024, 2)
                first.append(first_s)
                plain_first.append(local["prefill_s"])
    report.add(
        Measured(
            f"decode, {num_daemons} daemons",
            1 / median(ours),
            "tokens/s",
            1 / median(beside),
            targets.get(num_daemons),
        )
    )
    report.add(
        Measured(
            f"prefill of 1024, {num_daemons} daemons",
            1024 / median(first),
            "tokens/s",
            1024 / median(plain_first),
            0.9,
        )
    )
    report.add(Measured(f"tokens equal, {num_daemons} daemons", float(equal), "", target=1.0))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--daemons", type=int, nargs="*", default=[2, 4])
    options = parser.parse_args()
    report = Report()
    folder = plain.random_llama()
    for num_daemons in options.daemons:
        measure(report, folder, num_daemons, options.quick)
    report.finish(options.json)


if __name__ == "__main__":
    main()
