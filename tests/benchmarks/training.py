"""Training through a worker beside training in one process: forward, and forward with backward.

8 × 128 tokens on the random Llama of 16 × 1024, raw float32, base weights frozen on both sides and no adapter, so
that what is compared is the way through the blocks. Plain transformers runs in a process of its own, with
activation checkpointing, which recomputes each block in backward as a worker does. The two take turns, since
machines drift.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from corolla.protocol.messages import Message
from corolla.protocol.tensors import Encoding
from corolla.protocol.training import Sequence
from corolla.protocol.work import Backward, Beat, Done, Failed, Forward, Gradients
from tests.benchmarks import plain
from tests.benchmarks.clients import ServedModel, Setup
from tests.benchmarks.report import Measured, Report, arguments, median

NUM_SEQUENCES, LENGTH = 8, 128
NUM_TOKENS = NUM_SEQUENCES * LENGTH


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


def _inputs() -> bytes:
    import torch

    return torch.randn(NUM_TOKENS, 1024, generator=torch.Generator().manual_seed(1)).numpy().tobytes()


def _local(folder: Path, threads: int, *, checkpointing: bool) -> None:
    """Answer each line of input with the times of one micro-batch; the first is paid for before."""
    import torch
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
    options = parser.parse_args()
    report = Report()
    beside_local(report, plain.random_llama(), options.threads, 1 if options.quick else 6)
    report.finish(options.json)


if __name__ == "__main__":
    main()
