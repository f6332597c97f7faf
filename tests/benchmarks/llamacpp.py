"""llama.cpp beside us, where its Python package is installed: the same weights, one client.

Run as a program it prints one JSON object of times, in a process of its own. `pip install llama-cpp-python` builds
it, which needs a C++ compiler and minutes; nothing else here needs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf

from tests.benchmarks import plain


def reason_missing(model: str) -> str | None:
    """Why it cannot be measured on this model; None if it can."""
    if not model.endswith(".gguf"):
        return "llama.cpp reads GGUF files alone"
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed"
    return None


def measure(model: str, *, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """`decode_s` for each token after the first, `prefill_s`."""
    command = [sys.executable, "-m", "tests.benchmarks.llamacpp", model]
    numbers = [str(threads), str(prompt_tokens), str(new_tokens)]
    done = subprocess.run([*command, *numbers], check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def widened(model: str, folder: Path) -> str:
    """A GGUF file in `folder` that says what `model` says, with every weight in float32."""
    reader = gguf.GGUFReader(model)
    target = folder / "float32.gguf"
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        elif not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            each = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, each)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)


def _measure(model: str, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    from llama_cpp import Llama  # type: ignore[import-not-found]

    llama: Any = Llama(
        model, n_ctx=prompt_tokens + new_tokens + 1, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = plain.prompt(prompt_tokens, llama.n_vocab())
    llama.eval(ids[:8])
    llama.reset()
    began = time.perf_counter()
    llama.eval(ids)
    prefill_s = time.perf_counter() - began
    decode_s = []
    for _ in range(new_tokens):
        began = time.perf_counter()
        token = llama.sample(temp=0.0, repeat_penalty=1.0)
        llama.eval([token])
        decode_s.append(time.perf_counter() - began)
    return {"prefill_s": prefill_s, "decode_s": decode_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("numbers", nargs=3, type=int, metavar=("THREADS", "PROMPT", "NEW"))
    options = parser.parse_args()
    print(json.dumps(_measure(options.model, *options.numbers)))


if __name__ == "__main__":
    main()
