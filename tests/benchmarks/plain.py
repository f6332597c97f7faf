"""What the benchmarks measure beside Corolla: the same model in one plain transformers process.

Run as a program (`plain.py FOLDER --threads 2 …`) it prints one JSON object of times, so that it never shares
a process, its threads or its allocator with what it is compared with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import platformdirs

PROMPT_SEED = 7


def random_llama(num_blocks: int = 16, hidden_size: int = 1024) -> Path:
    """The folder of a random Llama with a fixed seed (MLP 2816, 16 heads, vocabulary 32,000), float32."""
    folder = Path(platformdirs.user_cache_dir("corolla")) / "benchmarks" / f"llama-{num_blocks}x{hidden_size}"
    if not (folder / "model.safetensors").exists():
        subprocess.run(
            [sys.executable, __file__, "--make", str(folder), str(num_blocks), str(hidden_size)], check=True
        )
    return folder


def measure(
    folder: Path, *, threads: int, prompt_tokens: int, new_tokens: int, is_static: bool = False
) -> dict[str, Any]:
    """Prefill and decode times of a plain loop in a process of its own: see `main`.

    is_static: with transformers' StaticCache, which reserves all its length at the start.
    """
    command = [
        sys.executable,
        __file__,
        "--measure",
        str(folder),
        str(threads),
        str(prompt_tokens),
        str(new_tokens),
    ] + ["--static"] * is_static
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def prompt(num_tokens: int, vocab_size: int) -> list[int]:
    """A fixed prompt of token ids, away from the special ones."""
    return [10 + (PROMPT_SEED + i * 7919) % (vocab_size - 20) for i in range(num_tokens)]


def _make(folder: Path, num_blocks: int, hidden_size: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=num_blocks,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32_000,
        max_position_embeddings=8192,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _measure(
    folder: Path, threads: int, prompt_tokens: int, new_tokens: int, *, is_static: bool
) -> dict[str, Any]:
    """Greedy tokens and times in seconds: `prefill_s`, and `decode_s` for each token after the first."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    ids = torch.tensor([prompt(prompt_tokens, model.config.vocab_size)])
    with torch.inference_mode():
        model(ids[:, :8])  # the first pass pays for lazy set-up
        cache = StaticCache(model.config, prompt_tokens + new_tokens) if is_static else None
        began = time.perf_counter()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = [int(out.logits[0, -1].argmax())]
        prefill_s = time.perf_counter() - began
        decode_s = []
        for _ in range(new_tokens - 1):
            began = time.perf_counter()
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
            decode_s.append(time.perf_counter() - began)
    return {"tokens": tokens, "prefill_s": prefill_s, "decode_s": decode_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", nargs=3, metavar=("FOLDER", "BLOCKS", "HIDDEN"))
    parser.add_argument("--measure", nargs=4, metavar=("FOLDER", "THREADS", "PROMPT", "NEW"))
    parser.add_argument("--static", action="store_true", help="with transformers' StaticCache")
    options = parser.parse_args()
    if options.make:
        folder, num_blocks, hidden_size = options.make
        _make(Path(folder), int(num_blocks), int(hidden_size))
    elif options.measure:
        folder, *numbers = options.measure
        print(json.dumps(_measure(Path(folder), *map(int, numbers), is_static=options.static)))


if __name__ == "__main__":
    main()
