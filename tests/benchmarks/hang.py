"""Seconds that a hop which hangs costs a text: its daemon or its worker is stopped, and its connections stay open.

Three daemons share SmolLM2's blocks, a spare covers the middle. Beside each figure stands the longest gap of the same
text with nobody stopped. Last, texts are begun while another program fills the same hops with long prompts: a hop that
is busy should not be left. The model's path comes from COROLLA_TEST_MODEL, as in `repair.py`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import plain
from tests.benchmarks.repair import replicas, start
from tests.benchmarks.report import Measured, Report, arguments, median
from tests.processes import DaemonProcess, local_swarm

NUM_TOKENS = 40
STOP_AFTER = 16  # tokens: by then it is known how long a step takes
TARGET_S = 3.0
LONG_PROMPT = 1500


def daemon_of(hop: DaemonProcess) -> list[int]:
    """The daemon alone: its worker computes on, to nobody."""
    return [hop.pid]


def worker_of(hop: DaemonProcess) -> list[int]:
    """The worker alone: its daemon still answers."""
    return hop.worker_pids()


def both_of(hop: DaemonProcess) -> list[int]:
    """The whole machine, as far as the swarm can see."""
    return [hop.pid, *hop.worker_pids()]


def in_use(client: DaemonProcess, standing: list[DaemonProcess]) -> DaemonProcess:
    """Which of the two serves the next session; each may still keep some whose client could not say goodbye."""

    def sessions() -> list[int]:
        return [sum(worker.sessions for worker in server.status().workers) for server in standing]

    before = sessions()
    with client.connect() as daemon, daemon.model(daemon.models()[0].name).session(max_length=8):
        more = [now - then for now, then in zip(sessions(), before, strict=True)]
    return standing[more.index(max(more))]


def write(
    client: DaemonProcess, name: str, num_prompt: int, then: Callable[[int], None] = lambda count: None
) -> tuple[list[int], float, float, list[str]]:
    """A text: its tokens, seconds to the first, the longest gap between two, events. then: hears of each token."""
    tokens: list[int] = []
    events: list[str] = []
    gaps: list[float] = []
    last = time.perf_counter()
    with client.connect() as daemon:
        for piece in daemon.model(name).generate(
            tokens=[plain.prompt(num_prompt, 30_000)],
            max_new_tokens=NUM_TOKENS,
            ignore_eos=True,
            stream=True,
            events=True,
        ):
            if piece.event is not None:
                events.append(piece.event)
                continue
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
            tokens.append(piece.token)
            then(len(tokens))
    return tokens, gaps[0], max(gaps[1:]), events


def stopped(
    client: DaemonProcess, name: str, standing: list[DaemonProcess], who: Callable[[DaemonProcess], list[int]]
) -> tuple[float, list[int]]:
    """The longest gap of a text amid which a hop is stopped; its tokens."""
    victim = in_use(client, standing)
    pids = who(victim)

    def then(count: int) -> None:
        if count == STOP_AFTER:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)

    try:
        tokens, _, gap_s, _ = write(client, name, 32, then)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    return gap_s, tokens


def begun(
    client: DaemonProcess, name: str, standing: list[DaemonProcess], who: Callable[[DaemonProcess], list[int]]
) -> float:
    """Seconds to the first token of a text that is begun just after a hop was stopped."""
    pids = who(in_use(client, standing))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        return write(client, name, 32)[1]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def repairs_while_busy(client: DaemonProcess, name: str, num_texts: int) -> tuple[int, float]:
    """Repairs of so many texts while another program computes long prompts on the same hops; the longest gap."""
    stopping = threading.Event()

    def fill() -> None:
        while not stopping.is_set():
            write(client, name, LONG_PROMPT)

    other = threading.Thread(target=fill)
    other.start()
    try:
        outcomes = [write(client, name, 32) for _ in range(num_texts)]
    finally:
        stopping.set()
        other.join()
    return sum(event == "repaired" for one in outcomes for event in one[3]), max(one[2] for one in outcomes)


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report()
    model: Path | str = os.environ.get("COROLLA_TEST_MODEL") or plain.random_llama()
    repeats = 1 if options.quick else 3
    with local_swarm(model, "--dtype", "float32") as swarm:
        client, name, spans, standing = start(swarm)
        write(client, name, 32)
        calm, _, calm_gap_s, _ = write(client, name, 32)
        cases = {"worker": worker_of, "daemon": daemon_of, "daemon and worker": both_of}
        for what, who in cases.items():
            gaps, starts, equal = [], [], True
            for _ in range(repeats):
                gap_s, tokens = stopped(client, name, standing, who)
                gaps.append(gap_s)
                equal = equal and tokens == calm
                swarm.wait_covered(client, replicas(spans))
                starts.append(begun(client, name, standing, who))
                swarm.wait_covered(client, replicas(spans))
            report.add(Measured(f"longest gap, {what} stopped", median(gaps), "s", calm_gap_s))
            beyond_s = median(gaps) - calm_gap_s
            report.add(Measured(f"beyond that, {what} stopped", beyond_s, "s", target=TARGET_S, at_most=True))
            report.add(Measured(f"first token, {what} stopped before", median(starts), "s"))
            report.add(Measured(f"tokens equal, {what} stopped", float(equal), "", target=1.0))
        num_repairs, busy_gap_s = repairs_while_busy(client, name, 3 * repeats)
        report.add(Measured("repairs beside long prompts", float(num_repairs), "", target=0.0, at_most=True))
        report.add(Measured("longest gap beside long prompts", busy_gap_s, "s", calm_gap_s))
    report.finish(options.json)


if __name__ == "__main__":
    main()
