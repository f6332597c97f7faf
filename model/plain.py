"""The whole model in one plain transformers process: what `daemonctl demo` compares a swarm with.

Run as a program (`python -m corolla.model.plain MODEL …`), so that it shares no process, thread or allocator
with what it is compared with. Weights come through `checkpoint`, so that a GGUF file is converted once for
everybody; from there on everything is transformers' own. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..protocol.errors import CorollaError, exit_code
from ..protocol.places import user_cache_folder
from ..protocol.work import ModelSource, SourceKind
from .checkpoint import Checkpoint, open_checkpoint


def main() -> None:
    """Say what a model is, or write on after a prompt, greedily, in float32."""
    options = _arguments()
    try:
        checkpoint = open_checkpoint(source_of(options.model), options.cache_folder)
        answer = _facts(checkpoint)
        if options.prompt is not None:
            answer |= _written(checkpoint, options.prompt, options.chat, options.max_new_tokens)
    except CorollaError as problem:
        print(json.dumps({"error": problem.to_wire()}))
        sys.exit(exit_code(problem.code))
    print(json.dumps(answer))


def source_of(model: str) -> ModelSource:
    """Where a model's weights come from: a GGUF file, a folder, or else the hub."""
    path = Path(model)
    if path.is_dir():
        return ModelSource(SourceKind.FOLDER, str(path.resolve()))
    if path.suffix == ".gguf" or path.is_file():
        return ModelSource(SourceKind.GGUF, str(path.resolve()))
    return ModelSource(SourceKind.HUB, model)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder, a GGUF file, or a name on the hub")
    parser.add_argument("--cache-folder", type=Path, default=user_cache_folder())
    parser.add_argument("--prompt", help="the text to continue; without it only the facts are printed")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser.parse_args()


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    tokenizer = checkpoint.tokenizer()
    return {
        "name": checkpoint.name,
        "folder": str(checkpoint.folder),
        "num_blocks": int(checkpoint.config.num_hidden_layers),
        "has_chat_template": bool(getattr(tokenizer, "chat_template", None)),
    }


def _written(checkpoint: Checkpoint, prompt: str, chat: bool, max_new_tokens: int) -> dict[str, Any]:
    """Tokens, text and speed of a plain greedy loop over transformers' own cache."""
    import torch
    from transformers import AutoModelForCausalLM

    where, revision = str(checkpoint.folder), None
    if checkpoint.origin is not None:
        where, revision = checkpoint.origin.hub_id, checkpoint.origin.commit
    model: Any = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=torch.float32)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{where} has no tokenizer")
    ids = _ids(tokenizer, prompt, chat)
    named = model.generation_config.eos_token_id
    ends = set(named if isinstance(named, list) else [] if named is None else [named])
    tokens: list[int] = []
    times_s: list[float] = []
    cache, given = None, torch.tensor([ids])
    with torch.inference_mode():
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
            began = time.perf_counter()
            out = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens.append(int(out.logits[0, -1].argmax()))
            times_s.append(time.perf_counter() - began)
            given = torch.tensor([tokens[-1:]])
    decode_s = sum(times_s[1:])
    return {
        "tokens": tokens,
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "num_prompt_tokens": len(ids),
        "tokens_per_s": (len(tokens) - 1) / decode_s if decode_s else 0.0,
    }


def _ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


if __name__ == "__main__":
    main()
