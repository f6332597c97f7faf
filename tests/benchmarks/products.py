"""Products with small weights on a GPU, each way beside the time that reading the weights once must take.

The shapes are Llama-3-70B's, joined as a worker joins them, for one row up to hundreds, recorded as they are in use,
with caches emptied before each run. It shows what `gpu.products` has only worked out: how near few rows come to the
limit, and above how many rows weights are better made wide (`MOST_ROWS`). Without a GPU it says so and measures
nothing; `TRITON_INTERPRET=1 … --device cpu --tiny` runs all of it small, to try the program.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from corolla.model.graphs import CudaRecorder, Recorder, Repeater
from corolla.model.linear import Nf4Linear, PlainInt8Linear, SmallLinear
from corolla.model.quantization import Stored, multiply_nf4
from corolla.protocol.tensors import Quantization
from tests.benchmarks.gpu import COPIED_BYTES, bandwidth, drawn, wait
from tests.benchmarks.report import Measured, Report, arguments, median

SHAPES = {
    "queries, keys, values": (10240, 8192),
    "attention's output": (8192, 8192),
    "gate and up": (57344, 8192),
    "down": (8192, 28672),
}
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
QUICK_ROWS = (1, 8, 32, 256)
MOST_FOR_BITSANDBYTES = 64
CACHE_BYTES = 1 << 28  # more than any device's

Way = Callable[[Tensor], Tensor]


def small(scheme: Quantization, shape: tuple[int, int], device: torch.device) -> Stored:
    """Codes of this shape, drawn on the device."""
    out_features, in_features = shape
    count = out_features * in_features
    if scheme is Quantization.INT8:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scales = torch.full((out_features,), in_features**-0.5 / 127, dtype=torch.bfloat16, device=device)
    else:
        codes = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=device)
        scales = torch.full((count // 64,), in_features**-0.5, device=device)
    return Stored(scheme, shape, {"codes": codes, "scales": scales})


def ways_of(shape: tuple[int, int], rows: Tensor) -> dict[str, tuple[int, Way]]:
    """What is measured with such rows → bytes of its weights, and how it multiplies."""
    from corolla.model.gpu import products  # here, because Triton may be missing

    device = rows.device
    plain = drawn(shape, device).to(rows.dtype)
    nf4, int8 = small(Quantization.NF4, shape, device), small(Quantization.INT8, shape, device)
    layers: list[SmallLinear] = [Nf4Linear(nf4, None, device), PlainInt8Linear(int8, None, device)]
    codes, scales = nf4.tensors["codes"], nf4.tensors["scales"]
    ways: dict[str, tuple[int, Way]] = {
        "bfloat16, torch": (plain.nbytes, lambda rows: F.linear(rows, plain)),
        "bfloat16, kernel": (plain.nbytes, lambda rows: products.multiply(rows, plain, None)),
        "nf4, kernel": (nf4.nbytes, lambda rows: products.multiply(rows, nf4, None)),
        "nf4, made wide": (nf4.nbytes, lambda rows: SmallLinear._multiply_wide(layers[0], rows)),
        "int8, kernel": (int8.nbytes, lambda rows: products.multiply(rows, int8, None)),
        "int8, made wide": (int8.nbytes, lambda rows: SmallLinear._multiply_wide(layers[1], rows)),
    }
    if len(rows) <= MOST_FOR_BITSANDBYTES and device.type == "cuda":
        ways["nf4, bitsandbytes"] = (nf4.nbytes, lambda rows: multiply_nf4(rows, codes, scales, shape, None))
    return ways


def time_s(way: Way, rows: Tensor, recorder: Recorder, num_runs: int, emptying: Tensor) -> float:
    """The median time of a recorded product whose weights are in no cache."""
    play, _ = recorder.record(lambda: way(rows))
    times = []
    for _ in range(num_runs):
        emptying.zero_()
        wait(rows.device)
        began = time.perf_counter()
        play()
        wait(rows.device)
        times.append(time.perf_counter() - began)
    return median(times)


def nothing_s(recorder: Recorder, device: torch.device, num_runs: int, emptying: Tensor) -> float:
    """What asking for a recorded pass and waiting for it takes by itself, which is taken off."""
    return time_s(lambda rows: rows.add(1), torch.ones(1, device=device), recorder, num_runs, emptying)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the program")
    options = parser.parse_args()
    report = Report()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        report.finish(options.json)
        return
    recorder: Recorder = CudaRecorder() if device.type == "cuda" else Repeater()
    scale = 64 if options.tiny else 1
    bytes_s = bandwidth(device, COPIED_BYTES // scale)
    report.add(Measured("memory bandwidth", bytes_s / 1e9, "GB/s"))
    emptying = torch.empty(CACHE_BYTES // scale, dtype=torch.uint8, device=device)
    num_runs = 5 if options.quick else 20
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # which the interpreter knows
    with torch.inference_mode():
        asked_s = nothing_s(recorder, device, num_runs, emptying)
        for name, (out_features, in_features) in SHAPES.items():
            shape = out_features // scale, in_features // scale
            for num_rows in QUICK_ROWS if options.quick else ROWS:
                rows = torch.randn(num_rows, shape[1], device=device).to(dtype)
                for kind, (num_bytes, way) in ways_of(shape, rows).items():
                    took_s = max(time_s(way, rows, recorder, num_runs, emptying) - asked_s, 1e-9)
                    label = f"{name}, {num_rows} rows, {kind}"
                    report.add(Measured(label, took_s * 1e6, "µs", num_bytes / bytes_s * 1e6))
    report.finish(options.json)


if __name__ == "__main__":
    main()
