"""One worker's engine beside plain transformers: decode, prefill, many clients, a prompt beside decodes, memory.

The clients are sessions on the worker's own socket, without daemons, and again through three of them. The model is the
random Llama of 16 × 1024, and what `--model` names (a folder or a GGUF file, such as SmolLM2's), both in float32
unless a part says otherwise. The plain process runs before or after each of ours, since machines drift. *Of what memory
allows* holds a figure against the time in which this machine's memory gives the bytes that it takes to be read once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from corolla.model.checkpoint import open_checkpoint
from corolla.model.plain import source_of
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.tensors import DType
from tests.benchmarks import bandwidth, llamacpp, plain, swarmed
from tests.benchmarks.clients import Client, Crowd, ServedModel, Setup
from tests.benchmarks.report import Measured, Report, arguments, median

CONTEXTS = {128: 1.5, 1024: 1.5, 4096: 3.0}  # tokens → target
CROWDS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Subject:
    """A model under measurement. folder: as transformers reads it. model: as the worker is told.

    table_bytes: of float32 embeddings, of which a token reads one line. token_bytes: of its float32 keys and values.
    memory_bytes_s: what the machine's memory gives a second.
    """

    label: str
    model: str
    folder: Path
    num_blocks: int
    vocab_size: int
    threads: int
    quick: bool
    contexts: tuple[int, ...]
    crowds: tuple[int, ...]
    table_bytes: int
    token_bytes: int
    memory_bytes_s: float

    def allowed(self, served: ServedModel, num_clients: int, context: int) -> float:
        """Tokens a second if weights and contexts were read once a step, and nothing else took time."""
        dtype_size = 4 if served.ready.dtype is DType.FLOAT32 else 2
        cached = num_clients * context * self.token_bytes * dtype_size // 4
        weights = served.ready.weight_bytes - self.table_bytes * dtype_size // 4
        return num_clients * self.memory_bytes_s / (weights + cached)

    def setup(self, dtype: DType = DType.FLOAT32, quantization: str | None = None) -> Setup:
        """What a worker of it is started with."""
        return Setup(self.model, self.threads, dtype, quantization)

    def plain(self, prompt_tokens: int, new_tokens: int, *, is_static: bool = False) -> dict[str, Any]:
        """Plain transformers' times."""
        return plain.measure(
            self.folder,
            threads=self.threads,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            is_static=is_static,
        )


def one_client(served: ServedModel, prompt_tokens: int, new_tokens: int) -> Client:
    """One text from beginning to end."""
    crowd = Crowd(served)
    client = crowd.join(prompt_tokens, new_tokens)
    crowd.run()
    crowd.leave()
    return client


def decode(report: Report, subject: Subject) -> None:
    """One client, at several lengths of context."""
    new_tokens = 16 if subject.quick else 48
    for context in subject.contexts:
        ours, beside, static, equal = [], [], [], True
        for _ in range(1 if subject.quick else 3):
            local = subject.plain(context, new_tokens)
            beside += local["decode_s"]
            static += subject.plain(context, new_tokens, is_static=True)["decode_s"]
            with ServedModel(subject.setup()) as served:
                client = one_client(served, context, new_tokens)
                allowed = subject.allowed(served, 1, context)
            ours += client.gaps_s()
            equal = equal and client.tokens == local["tokens"]
        speed = 1 / median(beside)
        name = f"{subject.label}: decode at {context}"
        report.add(Measured(name, 1 / median(ours), "tokens/s", speed, CONTEXTS[context]))
        report.add(Measured(f"{name}, of what memory allows", 1 / median(ours), "tokens/s", allowed))
        report.add(Measured(f"{name}, StaticCache", 1 / median(static), "tokens/s", speed))
        report.add(Measured(f"{name}, tokens equal", float(equal), "", target=1.0))


def precision(report: Report, subject: Subject) -> None:
    """One client with smaller weights, beside plain float32."""
    new_tokens = 16 if subject.quick else 48
    kinds = [(DType.FLOAT32, None), (DType.BFLOAT16, None), (DType.FLOAT32, "int8"), (DType.FLOAT32, "int4")]
    ours: dict[str, list[float]] = {}
    allowed: dict[str, float] = {}
    beside: list[float] = []
    for _ in range(1 if subject.quick else 3):
        beside += subject.plain(128, new_tokens)["decode_s"]
        for dtype, quantization in kinds:
            with ServedModel(subject.setup(dtype, quantization)) as served:
                gaps = one_client(served, 128, new_tokens).gaps_s()
                allowed[quantization or dtype.value] = subject.allowed(served, 1, 128)
            ours.setdefault(quantization or dtype.value, []).extend(gaps)
    for kind, gaps in ours.items():
        target = None if kind == "float32" else 2.5
        name = f"{subject.label}: decode at 128 in {kind}"
        report.add(Measured(name, 1 / median(gaps), "tokens/s", 1 / median(beside), target))
        report.add(Measured(f"{name}, of what memory allows", 1 / median(gaps), "tokens/s", allowed[kind]))


def prefill(report: Report, subject: Subject) -> None:
    """A prompt of 1024 tokens."""
    ours, beside = [], []
    with ServedModel(subject.setup()) as served:
        one_client(served, 64, 2)
        for _ in range(2 if subject.quick else 5):
            beside.append(subject.plain(1024, 1)["prefill_s"])
            ours.append(one_client(served, 1024, 1).first_s)
    name = f"{subject.label}: prefill of 1024"
    report.add(Measured(name, 1024 / median(ours), "tokens/s", 1024 / median(beside), 1.0))


def clients(report: Report, subject: Subject) -> None:
    """Many clients decoding together, and the share of the slowest."""
    seconds = 3.0 if subject.quick else 10.0
    beside = 1 / median(subject.plain(128, 16 if subject.quick else 48)["decode_s"])
    with ServedModel(subject.setup()) as served:
        one_client(served, 128, 4)
        for num_clients in subject.crowds:
            crowd = Crowd(served, seed_prompts=True)
            for _ in range(num_clients):
                crowd.join(128, 1024)
            crowd.prefill()
            began = time.perf_counter()
            crowd.release()
            while time.perf_counter() - began < seconds:
                crowd.turn()
            took = time.perf_counter() - began
            counts = [len(client.tokens) - 1 for client in crowd.clients]
            crowd.leave()
            name = f"{subject.label}: {num_clients} clients"
            target = 8.0 if num_clients == 8 else None
            report.add(Measured(name, sum(counts) / took, "tokens/s", beside, target))
            allowed = subject.allowed(served, num_clients, 128)
            report.add(Measured(f"{name}, of what memory allows", sum(counts) / took, "tokens/s", allowed))
            fair = min(counts) / (sum(counts) / num_clients)
            report.add(Measured(f"{name}, slowest to mean", fair, "", target=0.75))


def daemons(report: Report, subject: Subject) -> None:
    """The same clients, as sessions through three daemons."""
    seconds = 4.0 if subject.quick else 10.0
    beside = 1 / median(subject.plain(128, 16 if subject.quick else 48)["decode_s"])
    with swarmed.served(subject.folder, subject.num_blocks, 3, subject.threads) as client:
        swarmed.crowd(client, subject.vocab_size, 1, 16, 0.1)  # loads the ends
        for num_clients in subject.crowds:
            counted = swarmed.crowd(client, subject.vocab_size, num_clients, 128, seconds)
            name = f"{subject.label}: {num_clients} clients through 3 daemons"
            tokens = counted.tokens
            report.add(Measured(name, sum(tokens) / counted.seconds, "tokens/s", beside))
            fair = min(tokens) * num_clients / max(sum(tokens), 1)
            report.add(Measured(f"{name}, slowest to mean", fair, "", target=0.75))


def llama_cpp(report: Report, subject: Subject) -> None:
    """One client beside llama.cpp: float32 there and here; and the file as it is there, eight and four bits here."""
    name = f"{subject.label}: decode at 128 beside llama.cpp"
    reason = llamacpp.reason_missing(subject.model)
    if reason is not None:
        print(f"{name}: left out, {reason}")
        return
    with tempfile.TemporaryDirectory() as folder:
        wide = llamacpp.widened(subject.model, Path(folder))
        pairs: tuple[tuple[str, tuple[str | None, ...]], ...] = (
            (wide, (None,)),
            (subject.model, ("int8", "int4")),
        )
        for file, quantizations in pairs:
            _beside_llama_cpp(report, subject, name, file, quantizations)


def _beside_llama_cpp(
    report: Report, subject: Subject, name: str, file: str, quantizations: tuple[str | None, ...]
) -> None:
    new_tokens = 16 if subject.quick else 48
    clients: dict[str, list[Client]] = {}
    beside: list[float] = []
    first_beside_s: list[float] = []
    for _ in range(1 if subject.quick else 3):
        found = llamacpp.measure(file, threads=subject.threads, prompt_tokens=128, new_tokens=new_tokens)
        beside += found["decode_s"]
        first_beside_s.append(found["prefill_s"])
        for quantization in quantizations:
            with ServedModel(subject.setup(quantization=quantization)) as served:
                one_client(served, 64, 2)
                clients.setdefault(quantization or "float32", []).append(one_client(served, 128, new_tokens))
    for kind, ours in clients.items():
        gaps = [gap for client in ours for gap in client.gaps_s()]
        report.add(Measured(f"{name}, {kind}", 1 / median(gaps), "tokens/s", 1 / median(beside)))
        first_s = median([client.first_s for client in ours])
        speed = 128 / median(first_beside_s)
        report.add(Measured(f"{name}, {kind}, its prompt", 128 / first_s, "tokens/s", speed))


def stall(report: Report, subject: Subject) -> None:
    """The time between tokens of seven decoding clients while an eighth brings a long prompt."""
    num_tokens = 60 if subject.quick else 200
    with ServedModel(subject.setup()) as served:
        one_client(served, 128, 4)
        crowd = Crowd(served, seed_prompts=True)
        for _ in range(7):
            crowd.join(128, 4096)
        crowd.prefill()
        began = time.perf_counter()
        crowd.release()
        while len(crowd.clients[0].tokens) < num_tokens:
            crowd.turn()
        arrived = time.perf_counter()
        eighth = crowd.join(4096, 2)
        while not eighth.tokens:
            crowd.turn()
        gaps = [gap for client in crowd.clients[:7] for gap in client.gaps_s(arrived, eighth.times[0])]
        calm = [gap for client in crowd.clients[:7] for gap in client.gaps_s(began, arrived)]
        crowd.leave()
    name = f"{subject.label}: p99 between tokens beside a prefill of 4096"
    report.add(Measured(name, high(gaps) * 1000, "ms", high(calm) * 1000, 3.0, at_most=True))
    report.add(Measured(f"{subject.label}: median, likewise", median(gaps) * 1000, "ms", median(calm) * 1000))
    report.add(Measured(f"{subject.label}: that prefill", 4096 / eighth.first_s, "tokens/s"))


def high(values: list[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def memory(report: Report, subject: Subject) -> None:
    """Sessions of up to 4096 tokens that hold 512, in memory for 16384: all of it the device's, and half of it.

    All of them then write on, so that those that were parked have to come back.
    """
    memory_tokens, max_tokens, used_tokens, more_tokens = 16384, 4096, 512, 4
    for parked_tokens in (0, memory_tokens // 2):
        cache_tokens = memory_tokens - parked_tokens
        setup = Setup(subject.model, subject.threads, cache_tokens=cache_tokens, parked_tokens=parked_tokens)
        with ServedModel(setup) as served:
            crowd = Crowd(served)
            try:
                while len(crowd.clients) < memory_tokens // used_tokens:
                    crowd.join(used_tokens, max_tokens - used_tokens)
                    crowd.prefill()
            except CorollaError as problem:
                if problem.code is not Code.BUSY:
                    raise
                crowd.clients.pop()
            num_held = len(crowd.clients)
            crowd.release()
            while any(len(client.tokens) <= more_tokens for client in crowd.clients):
                crowd.turn()
        where = f", {parked_tokens} of it in host memory" if parked_tokens else ""
        name = f"{subject.label}: sessions of ≤ {max_tokens} holding {used_tokens}{where}"
        report.add(Measured(name, num_held, "sessions", memory_tokens // max_tokens, 2.0))


def start(report: Report, subject: Subject) -> None:
    """A worker's start with quantized weights, the first time and the second."""
    with tempfile.TemporaryDirectory() as folder:
        for quantization in ("int8", "int4"):
            setup = Setup(
                subject.model, subject.threads, quantization=quantization, cache_folder=Path(folder)
            )
            times = []
            for _ in range(2):
                with ServedModel(setup) as served:
                    times.append(served.start_s)
            name = f"{subject.label}: second start with {quantization}"
            report.add(Measured(name, times[1], "s", times[0], 1.0, at_most=True))


PARTS: dict[str, Callable[[Report, Subject], None]] = {
    part.__name__: part
    for part in (decode, precision, prefill, clients, daemons, llama_cpp, stall, memory, start)
}


def sizes(config: Any) -> tuple[int, int]:
    """Bytes in float32 of the table of embeddings, and of the keys and values of one token."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * num_heads * head_dim
    return config.vocab_size * config.hidden_size * 4, cached * 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="some parts alone")
    parser.add_argument("--model", action="append", default=[], help="measure this model too")
    parser.add_argument("--no-random", action="store_true", help="leave the random Llama out")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--contexts", type=int, nargs="*", choices=CONTEXTS, default=list(CONTEXTS))
    parser.add_argument("--crowds", type=int, nargs="*", default=list(CROWDS))
    options = parser.parse_args()
    report = Report()
    memory_bytes_s = bandwidth.measure(options.threads)
    report.add(Measured("memory", memory_bytes_s / 1e9, "GB/s"))
    models = [] if options.no_random else [str(plain.random_llama())]
    for model in models + options.model:
        checkpoint = open_checkpoint(source_of(model), Setup(model, 1).cache_folder)
        subject = Subject(
            checkpoint.name,
            model,
            checkpoint.folder,
            int(checkpoint.config.num_hidden_layers),
            int(checkpoint.config.vocab_size),
            options.threads,
            options.quick,
            tuple(options.contexts),
            tuple(options.crowds),
            *sizes(checkpoint.config),
            memory_bytes_s,
        )
        for part in options.only:
            PARTS[part](report, subject)
    report.finish(options.json)


if __name__ == "__main__":
    main()
