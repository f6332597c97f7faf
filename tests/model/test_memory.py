"""What a worker plans to take against what it takes: memory is measured, not believed.

Each case loads in a process of its own, which is told how much it may take, and then writes into every page of the
cache, as sessions would in the end. What the process holds then, beyond what it held after loading a model that
weighs nothing, is compared with the plan. Tolerance: a twelfth of the plan and 24 MiB, for the allocator, code and
buffers that no plan counts. While it loads it may hold a part of a block twice, and a file's pages, which the system
takes back when it wants them: a fifth of the plan and 96 MiB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .tiny import save_tiny

MIB = 1 << 20
MEMORY_BYTES = 400 * MIB

PROGRAM = """
import json, sys
from pathlib import Path

import torch

from corolla.model.loading import load
from corolla.protocol.tensors import DType
from corolla.protocol.work import Configure, ModelSource, SourceKind

tiny, folder, cache, dtype, quantization, memory_bytes = sys.argv[1:]
torch.set_num_threads(1)


def held(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def loaded(folder):
    ask = Configure(
        ModelSource(SourceKind.FOLDER, folder),
        cache,
        start=0,
        end=-1,
        ends=True,
        device="cpu",
        dtype=DType(dtype),
        quantization=quantization or None,
        memory_bytes=int(memory_bytes),
    )
    return load(ask, lambda stage, done, total: None)


with torch.inference_mode():
    first = loaded(tiny)
    before = held("VmRSS")
    found = loaded(folder)
    grew_most = held("VmHWM") - before
    store = found.span.cache
    for block in found.span.modules:
        store.keys(block).fill_(1.0)
        store.values(block).fill_(1.0)
        for tensor in store._parked.get(store._places[block], ()):
            tensor.fill_(1.0)
    grew = held("VmRSS") - before
pages = (found.num_pages + found.num_host_pages) * store.page_bytes
weights = found.span.bytes + found.ends.bytes
print(json.dumps({"weights": weights, "planned": weights + pages, "grew": grew, "grew_most": grew_most}))
"""

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 512, "intermediate_size": 4096},
    "gemma3": {"hidden_size": 512, "intermediate_size": 4096},
    "qwen3_moe": {"hidden_size": 512, "moe_intermediate_size": 1024, "intermediate_size": 4096},
    "bloom": {"hidden_size": 768},
}
KINDS = [
    ("llama", "float32", ""),
    ("llama", "bfloat16", ""),
    ("llama", "float32", "int8"),
    ("llama", "float32", "int4"),
    ("llama", "float32", "nf4"),
    ("gemma3", "float32", ""),
    ("gemma3", "bfloat16", "int8"),
    ("qwen3_moe", "float32", ""),
    ("qwen3_moe", "float32", "nf4"),
    ("bloom", "float32", ""),
]


def measured(tiny: Path, folder: Path, cache: Path, dtype: str, quantization: str) -> dict[str, int]:
    root = Path(__file__).parents[2]
    paths = [str(root.parent), os.environ.get("PYTHONPATH", "")]
    words = [str(tiny), str(folder), str(cache), dtype, quantization, str(MEMORY_BYTES)]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        check=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "MALLOC_ARENA_MAX": "1"},
    )
    figures: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    print({name: round(value / MIB, 1) for name, value in figures.items()})
    return figures


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("family", "dtype", "quantization"), KINDS)
def test_a_worker_takes_what_it_planned_and_loads_without_a_second_copy(
    family: str, dtype: str, quantization: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "tiny", "llama")
    save_tiny(tmp_path / "model", family, **SIZES[family])
    for start in ("first", "second") if quantization else ("first",):
        figures = measured(tmp_path / "tiny", tmp_path / "model", tmp_path / "cache", dtype, quantization)
        planned, grew = figures["planned"], figures["grew"]
        assert abs(grew - planned) <= planned / 12 + 24 * MIB, start
        assert grew <= MEMORY_BYTES, start
        assert figures["grew_most"] <= figures["weights"] * 6 / 5 + 96 * MIB, start
