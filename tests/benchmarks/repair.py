"""Seconds from SIGKILL to the next token, at several lengths of context.

Three daemons share SmolLM2's blocks, a spare covers the middle. Beside each repair stands one prefill of the
lost span, which nothing can avoid: the target is 2 s more than that. The model's path comes from
COROLLA_TEST_MODEL; without it the random Llama of 16 × 1024 is used.
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
from tests.processes import DaemonProcess, LocalSwarm, local_swarm

GRACE_S = 2.0


def lost_span_prefill_s(client: DaemonProcess, name: str, span: tuple[int, int], num_tokens: int) -> float:
    """Seconds of one prefill of the lost span alone, through the swarm as it is."""
    import numpy as np

    with (
        client.connect() as daemon,
        daemon.model(name).session(max_length=num_tokens + 1, blocks=span) as session,
    ):
        hidden = np.random.default_rng(0).standard_normal((1, num_tokens, session.hidden_size), np.float32)
        began = time.perf_counter()
        session.step(hidden, reply="none")
        return time.perf_counter() - began


def kill_and_wait(
    client: DaemonProcess, name: str, victim: DaemonProcess, num_tokens: int
) -> tuple[float, list[int]]:
    """Kill a hop in the middle of a text; seconds to the next token, and all tokens."""
    ids = plain.prompt(num_tokens, 30_000)
    tokens: list[int] = []
    killed_at = repaired_s = 0.0
    with client.connect() as daemon:
        for piece in daemon.model(name).generate(
            tokens=[ids], max_new_tokens=24, ignore_eos=True, stream=True
        ):
            if killed_at and not repaired_s:
                repaired_s = time.perf_counter() - killed_at
            tokens.append(piece.token)
            if len(tokens) == 8:
                victim.kill()
                killed_at = time.perf_counter()
    return repaired_s, tokens


def undisturbed(client: DaemonProcess, name: str, num_tokens: int) -> list[int]:
    """The same text with nobody killed."""
    ids = plain.prompt(num_tokens, 30_000)
    with client.connect() as daemon:
        whole: Any = daemon.model(name).generate(tokens=[ids], max_new_tokens=24, ignore_eos=True)
        return list(whole.tokens[0])


def spans_of(num_blocks: int) -> list[tuple[int, int]]:
    """Three nearly equal spans."""
    cuts = [num_blocks * i // 3 for i in range(4)]
    return list(pairwise(cuts))


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report()
    model: Path | str = os.environ.get("COROLLA_TEST_MODEL") or plain.random_llama()
    threads = str(os.cpu_count() or 1)
    repeats = 1 if options.quick else 3
    with local_swarm(model, "--dtype", "float32", "--threads", threads) as swarm:
        client, name, spans, standing = start(swarm)
        undisturbed(client, name, 16)
        for num_tokens in (32, 512, 2048):
            repairs, prefills, equal = [], [], True
            for _ in range(repeats):
                expected = undisturbed(client, name, num_tokens)
                prefills.append(lost_span_prefill_s(client, name, spans[1], num_tokens))
                victim = in_use(client, standing)
                repair_s, tokens = kill_and_wait(client, name, victim, num_tokens)
                repairs.append(repair_s)
                equal = equal and tokens == expected
                standing.remove(victim)
                spare = swarm.serve(f"spare{len(swarm.daemons)}", *spans[1])
                spare.wait_online()
                standing.append(spare)
                swarm.wait_covered(client, replicas(spans))
            report.add(
                Measured(
                    f"repair at {num_tokens} tokens, beyond one prefill of the span",
                    median(repairs) - median(prefills),
                    "s",
                    target=GRACE_S,
                    at_most=True,
                )
            )
            report.add(Measured(f"repair at {num_tokens} tokens", median(repairs), "s", median(prefills)))
            report.add(Measured(f"tokens equal at {num_tokens} tokens", float(equal), "", target=1.0))
    report.finish(options.json)


def start(swarm: LocalSwarm) -> tuple[DaemonProcess, str, list[tuple[int, int]], list[DaemonProcess]]:
    """Three hops and a spare of the middle one: client, model, spans, and the two that serve the middle."""
    client = swarm.found()
    first = swarm.serve("probe", 0, 1)
    first.wait_online()
    with client.connect() as daemon:
        view = daemon.models()[0]
    first.end()
    spans = spans_of(view.num_blocks)
    standing = [swarm.serve("middle", *spans[1]), swarm.serve("spare", *spans[1])]
    for server in (*standing, swarm.serve("front", *spans[0]), swarm.serve("back", *spans[2])):
        server.wait_online()
    swarm.wait_covered(client, replicas(spans))
    return client, view.name, spans, standing


def replicas(spans: list[tuple[int, int]]) -> list[int]:
    """Of each block: two in the middle."""
    return [2 if spans[1][0] <= block < spans[1][1] else 1 for block in range(spans[-1][1])]


def in_use(client: DaemonProcess, standing: list[DaemonProcess]) -> DaemonProcess:
    """Which of the two serves the next session: asked by opening one and looking who has it."""
    with client.connect() as daemon, daemon.model(daemon.models()[0].name).session(max_length=8):
        busy = [server for server in standing if any(w.sessions for w in server.status().workers)]
    return busy[0] if busy else standing[0]


if __name__ == "__main__":
    main()
