"""Training through the swarm beside training in one process: forward, and forward with backward.

8 × 128 tokens on the random Llama of 16 × 1024, raw float32, base weights frozen on both sides and no adapter, so
that what is compared is the way through the blocks: a worker alone on its socket, and two daemons with half the
blocks each. Plain transformers runs in a process of its own, with activation checkpointing, which recomputes each
block in backward as a worker does. The two take turns, since machines drift.

Then what smaller encodings save on the wire and do to the gradient, and what a second replica of each half brings
where devices are slow: their workers are stopped and woken in turns many times a second, so that cores are left over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from corolla.protocol.messages import Message
from corolla.protocol.tensors import Encoding
from corolla.protocol.training import Sequence
from corolla.protocol.work import Backward, Beat, Done, Failed, Forward, Gradients
from corolla.sdk.client import Model
from corolla.sdk.journeys import Journeys
from tests.benchmarks import plain
from tests.benchmarks.clients import ServedModel, Setup
from tests.benchmarks.report import Measured, Report, arguments, median
from tests.processes import DaemonProcess, local_swarm

NUM_SEQUENCES, LENGTH = 8, 128
NUM_TOKENS = NUM_SEQUENCES * LENGTH
NUM_BLOCKS = 16  # of the random Llama
SLICE_S = 0.02  # that a slow device runs at a time
NUM_TURNS = 5  # a slow device runs in one of so many


class Local:
    """Plain transformers in a process of its own: one line in, the times of one micro-batch out."""

    def __init__(self, folder: Path, threads: int, *, checkpointing: bool) -> None:
        command = [sys.executable, __file__, "--local", str(folder), str(threads), str(int(checkpointing))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self) -> dict[str, float]:
        """Seconds of `forward` without a graph, and of `both`: forward with backward."""
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("a process without pipes")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        times: dict[str, float] = json.loads(self._process.stdout.readline())
        return times

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class Worker:
    """The worker's own socket, spoken to as a daemon does."""

    def __init__(self, served: ServedModel, payload: bytes) -> None:
        self._served = served
        self._payload = payload
        self._request = 0

    def forward(self) -> float:
        """Seconds of one micro-batch forward."""
        began = time.perf_counter()
        self._ask(Forward, self._payload)
        return time.perf_counter() - began

    def both(self) -> float:
        """Seconds of one micro-batch forward and then backward, which is the worker's whole part in a step."""
        began = time.perf_counter()
        answer = self._ask(Forward, self._payload)
        if not isinstance(answer, Done):
            raise ValueError(f"forward answered {answer.KIND}")
        answer = self._ask(Backward, self._payload + answer.payload)
        if not isinstance(answer, Gradients):
            raise ValueError(f"backward answered {answer.KIND}")
        return time.perf_counter() - began

    def _ask(self, kind: type[Forward] | type[Backward], payload: bytes) -> Message:
        self._request += 1
        sequences = tuple(Sequence(0, LENGTH) for _ in range(NUM_SEQUENCES))
        end = self._served.ready.end
        self._served.say(kind(self._request, 0, end, Encoding.FLOAT32, sequences, payload=payload))
        while True:
            answer = self._served.hear()
            if isinstance(answer, Failed):
                raise answer.problem()
            if not isinstance(answer, Beat):
                return answer


def beside_local(report: Report, folder: Path, threads: int, rounds: int) -> None:
    """One worker with the whole model, on its own socket."""
    times: dict[str, list[float]] = {}
    locals_ = {
        "with checkpointing": Local(folder, threads, checkpointing=True),
        "without": Local(folder, threads, checkpointing=False),
    }
    with ServedModel(Setup(str(folder), threads, cache_tokens=2048)) as served:
        worker = Worker(served, _inputs())
        worker.both()
        for _ in range(rounds):
            times.setdefault("forward", []).append(worker.forward())
            times.setdefault("both", []).append(worker.both())
            for label, local in locals_.items():
                for name, took in local.measure().items():
                    times.setdefault(f"{name} {label}", []).append(took)
    for local in locals_.values():
        local.close()
    speed = {name: NUM_TOKENS / median(took) for name, took in times.items()}
    unit = "tokens/s"
    beside = "forward with checkpointing"
    report.add(Measured("worker: forward", speed["forward"], unit, speed[beside], 0.85))
    beside = "both with checkpointing"
    report.add(
        Measured("worker: forward and backward, checkpointing", speed["both"], unit, speed[beside], 0.85)
    )
    beside = "both without"
    report.add(Measured("worker: forward and backward, no checkpointing", speed["both"], unit, speed[beside]))


@contextmanager
def two_daemons(folder: Path, threads: int, replicas: int = 1) -> Iterator[tuple[Model, list[DaemonProcess]]]:
    """The model over daemons with half the blocks each, as a program of the client's daemon sees it."""
    options = ("--device", "cpu", "--dtype", "float32", "--threads", str(threads))
    with local_swarm(folder, *options) as swarm:
        client = swarm.found()
        halves = ((0, NUM_BLOCKS // 2), (NUM_BLOCKS // 2, NUM_BLOCKS))
        hops = [swarm.serve(f"d{start}-{n}", start, end) for start, end in halves for n in range(replicas)]
        for hop in hops:
            hop.wait_online()
        swarm.wait_covered(client, [replicas] * NUM_BLOCKS)
        with client.connect() as daemon:
            yield daemon.model(folder.name), hops


class Journey:
    """Passes of the whole batch, by autograd, as `loss.backward()` makes them."""

    def __init__(self, model: Model, encoding: str = "float32") -> None:
        self._journeys = Journeys(model, encoding)
        inputs = torch.frombuffer(bytearray(_inputs()), dtype=torch.float32)
        self._inputs = inputs.view(NUM_SEQUENCES, LENGTH, -1)

    def forward(self) -> float:
        """Seconds of one batch forward."""
        began = time.perf_counter()
        with torch.no_grad():
            self._go(self._inputs)
        return time.perf_counter() - began

    def both(self) -> tuple[float, torch.Tensor]:
        """Seconds of one batch forward and backward, and the gradient of its inputs."""
        began = time.perf_counter()
        inputs = self._inputs.clone().requires_grad_()
        output = self._go(inputs)
        (gradient,) = torch.autograd.grad(output, inputs, torch.ones_like(output))
        return time.perf_counter() - began, gradient

    def _go(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._journeys.run(inputs, None, None, (0, NUM_BLOCKS))


def through_daemons(report: Report, folder: Path, threads: int, rounds: int) -> None:
    """Two daemons, each with half the blocks, beside one process."""
    times: dict[str, list[float]] = {}
    local = Local(folder, threads, checkpointing=True)
    with two_daemons(folder, threads) as (model, _):
        journey = Journey(model)
        journey.both()
        for _ in range(rounds):
            times.setdefault("forward", []).append(journey.forward())
            times.setdefault("both", []).append(journey.both()[0])
            for name, took in local.measure().items():
                times.setdefault(f"{name} local", []).append(took)
        local.close()
        speed = {name: NUM_TOKENS / median(took) for name, took in times.items()}
        for name, label in (("forward", "forward"), ("both", "forward and backward")):
            report.add(Measured(f"2 daemons: {label}", speed[name], "tokens/s", speed[f"{name} local"], 0.85))
        encodings(report, model, rounds)


def encodings(report: Report, model: Model, rounds: int) -> None:
    """Bytes on loopback for each token of forward and backward, and how far the gradient is from float32's."""
    exact: torch.Tensor | None = None
    raw_bytes = 0.0
    for encoding in ("float32", "bfloat16", "int8"):
        journey = Journey(model, encoding)
        journey.both()
        before = _loopback_bytes()
        took = [journey.both() for _ in range(rounds)]
        per_token = (_loopback_bytes() - before) / rounds / NUM_TOKENS
        gradient = took[0][1]
        exact = gradient if exact is None else exact
        raw_bytes = raw_bytes or per_token
        report.add(Measured(f"2 daemons: wire, {encoding}", per_token, "bytes/token", raw_bytes))
        far = float((gradient - exact).norm() / exact.norm())
        report.add(Measured(f"2 daemons: gradient, {encoding}, distance to float32's", far, ""))
        speed = NUM_TOKENS / median([seconds for seconds, _ in took])
        report.add(Measured(f"2 daemons: forward and backward, {encoding}", speed, "tokens/s"))


def replicas(report: Report, folder: Path, rounds: int) -> None:
    """Two replicas of each half against one, on devices that rest most of the time."""
    speed = []
    for num_replicas in (1, 2):
        with two_daemons(folder, 1, num_replicas) as (model, hops):
            journey = Journey(model)
            journey.both()
            pids = [pid for hop in hops for pid in hop.worker_pids()]
            with slowed(pids):
                took = [journey.both()[0] for _ in range(rounds)]
        speed.append(NUM_TOKENS / median(took))
    report.add(Measured("slow devices: 2 replicas of each half beside 1", speed[1], "tokens/s", speed[0]))


@contextmanager
def slowed(pids: list[int]) -> Iterator[None]:
    """Let each of these processes run for a fifth of the time only, one after the other: none takes another's core."""
    done = threading.Event()

    def rest() -> None:
        _signal(pids, signal.SIGSTOP)
        for turn in itertools.count():
            awake = [pid for place, pid in enumerate(pids) if place % NUM_TURNS == turn % NUM_TURNS]
            _signal(awake, signal.SIGCONT)
            if done.wait(SLICE_S):
                return
            _signal(awake, signal.SIGSTOP)

    thread = threading.Thread(target=rest)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _signal(pids, signal.SIGCONT)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def _loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise ValueError("this machine has no loopback interface")


def _inputs() -> bytes:
    return torch.randn(NUM_TOKENS, 1024, generator=torch.Generator().manual_seed(1)).numpy().tobytes()


def _local(folder: Path, threads: int, *, checkpointing: bool) -> None:
    """Answer each line of input with the times of one micro-batch; the first is paid for before."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()  # checkpointing works in this mode alone; there is no dropout
    inputs = torch.frombuffer(bytearray(_inputs()), dtype=torch.float32)
    inputs = inputs.view(NUM_SEQUENCES, LENGTH, -1).requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            model.base_model(inputs_embeds=inputs, use_cache=False)

    def both() -> None:
        output = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    both()
    for _ in sys.stdin:
        times = {}
        for part in (forward, both):
            began = time.perf_counter()
            part()
            times[part.__name__] = time.perf_counter() - began
        print(json.dumps(times), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--local"]:
        parser = argparse.ArgumentParser(description="One of the processes that are measured.")
        parser.add_argument("--local", nargs=3, metavar=("FOLDER", "THREADS", "CHECKPOINTING"))
        folder, threads, checkpointing = parser.parse_args().local
        _local(Path(folder), int(threads), checkpointing=bool(int(checkpointing)))
        return
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", choices=("worker", "daemons", "replicas"), default=None)
    options = parser.parse_args()
    report = Report()
    folder, rounds = plain.random_llama(), 1 if options.quick else 6
    wanted = options.only or ("worker", "daemons", "replicas")
    if "worker" in wanted:
        beside_local(report, folder, options.threads, rounds)
    if "daemons" in wanted:
        through_daemons(report, folder, options.threads, rounds)
    if "replicas" in wanted:
        replicas(report, folder, rounds)
    report.finish(options.json)


if __name__ == "__main__":
    main()
