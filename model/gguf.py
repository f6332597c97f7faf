"""A GGUF file as a Hugging Face folder: converted once, tensor by tensor, and kept in the cache folder.

Owns the differences between the two formats: names of tensors, llama.cpp's order of rotary rows,
quantization blocks. Quantized numbers become float16, which holds their scale and offset almost exactly;
plain ones keep their type. Memory holds one block at a time. Reading GGUF through transformers would
dequantize the whole file at every start.

Source: the GGUF specification (ggml, docs/gguf.md); names from the package `gguf`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, dequantize, get_tensor_name_map
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..protocol.errors import Code, CorollaError, error
from .families import Skeleton

CONVERSION: Final = 1  # part of the fingerprint: raised when the same file would become other numbers
_MARK: Final = "corolla.json"
_INDEX: Final = "model.safetensors.index.json"
_LOOK_EVERY_S: Final = 0.2  # whether the one that converts is done: short beside a conversion
# Architectures whose tensors differ in nothing but name and the order of rotary rows.
_CONVERTIBLE: Final = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
)
_ROTARY_REORDERED: Final = ("LlamaForCausalLM", "MistralForCausalLM")
_PLAIN: Final = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Source:
    """The file that a converted folder came from."""

    name: str
    sha256: str


def source_of(folder: Path) -> Source | None:
    """What a folder was converted from; None if it is an ordinary one."""
    mark = folder / _MARK
    if not mark.exists():
        return None
    try:
        fields = json.loads(mark.read_text("utf-8"))
        return Source(str(fields["name"]), str(fields["sha256"]))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise error(
            Code.DAMAGED_WEIGHTS, f"{mark} is unreadable: {problem}", f"delete {folder} and start again"
        ) from problem


def convert(
    source: Source,
    path: Path,
    cache_folder: Path,
    report: Callable[[str, int, int], None],
    disk_bytes: int = 0,
) -> Path:
    """The folder that holds `path` as safetensors, with configuration, tokenizer and chat template.

    disk_bytes: what weights may take on this machine; 0 is anything.

    Of workers that start together one converts and the others wait for it. Raises `UNSUPPORTED_FAMILY`,
    `DAMAGED_WEIGHTS`, `DISK_FULL`, `UNREADABLE`. A conversion that fails leaves nothing behind; one that is
    cut off leaves a `.part` folder, which the next one replaces.
    """
    folder = cache_folder / f"{path.stem}-{source.sha256[:12]}-{CONVERSION}"
    if (folder / _MARK).exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    try:
        with _alone(folder, lambda: report("converting", 0, path.stat().st_size)):
            if (folder / _MARK).exists():  # another worker did it while we waited
                return folder
            try:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                _convert_into(part, source, path, report, disk_bytes)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        raise _explained(problem, folder) from problem
    return folder


@contextmanager
def _alone(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Be the only process that makes `folder`; the system lets go of the lock of one that dies.

    waiting: called at each look while another has it, so that whoever watches this process sees it live. The
    lock's file stays: deleted, two processes could hold locks of two files of one name.
    """
    with folder.with_name(f".{folder.name}.lock").open("ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(_LOOK_EVERY_S)
        yield


def _explained(problem: Exception, folder: Path) -> CorollaError:
    is_full = isinstance(problem, OSError) and problem.errno == errno.ENOSPC
    if is_full or "No space left" in str(problem):  # safetensors wraps the system's error into text
        return error(
            Code.DISK_FULL, f"the disk filled up while converting to {folder}", "free some disk space"
        )
    return error(Code.UNREADABLE, f"converting to {folder} failed: {problem}")


def _convert_into(
    folder: Path, source: Source, path: Path, report: Callable[[str, int, int], None], disk_bytes: int
) -> None:
    reader = _read(path)
    config = _config(path, reader)
    skeleton = Skeleton(config)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(reader, skeleton, set(stored))
    _check_room(folder, sum(tensor.n_elements for tensor in reader.tensors), disk_bytes)
    config.save_pretrained(folder)
    _save_tokenizer(folder, path)
    weight_map: dict[str, str] = {}
    done, total = 0, len(names)
    for shard, targets in _shards(skeleton, names).items():
        tensors = {target: _tensor(target, stored[names[target]], skeleton) for target in targets}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(targets, shard))
        done += len(targets)
        report("converting", done * path.stat().st_size // total, path.stat().st_size)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=0), "utf-8")
    mark = {"name": source.name, "sha256": source.sha256, "conversion": CONVERSION}
    (folder / _MARK).write_text(json.dumps(mark), "utf-8")


def _read(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except PermissionError as problem:
        raise error(
            Code.UNREADABLE, f"{path}: {problem.strerror}", "let the daemon's user read it"
        ) from problem
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as problem:
        raise error(
            Code.DAMAGED_WEIGHTS, f"{path} is no GGUF file, or cut short: {problem}", "fetch the file again"
        ) from problem


def _config(path: Path, reader: GGUFReader) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise error(
            Code.UNSUPPORTED_FAMILY, f"transformers cannot read the configuration of {path.name}: {problem}"
        ) from problem
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    names = {tensor.name for tensor in reader.tensors}
    if name not in _CONVERTIBLE or "rope_freqs.weight" in names:
        reason = " with stored rotary frequencies" if name in _CONVERTIBLE else ""
        raise error(
            Code.UNSUPPORTED_FAMILY,
            f"a GGUF file of {name}{reason} cannot be converted",
            "use the model's safetensors folder, or its name on the hub",
        )
    config.architectures = [str(name)]
    config.tie_word_embeddings = "output.weight" not in names
    config.dtype = torch.float16
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # says how the file was stored, not how the folder is
    return config


def _save_tokenizer(folder: Path, path: Path) -> None:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as problem:  # the package `tokenizers` raises bare ones
        raise error(Code.UNREADABLE, f"the tokenizer in {path.name} is unreadable: {problem}") from problem


def _names(reader: GGUFReader, skeleton: Skeleton, stored: set[str]) -> dict[str, str]:
    """Tensor of the model → its name in the file. Raises `DAMAGED_WEIGHTS` if the two do not match."""
    field = reader.get_field("general.architecture")
    architecture = str(field.contents()) if field is not None else ""
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise error(Code.UNSUPPORTED_FAMILY, f"GGUF architecture {architecture!r} is unknown")
    mapping = get_tensor_name_map(arch, skeleton.num_blocks)
    head = skeleton.end_prefixes["head"]
    names = {
        target: str(mapping.get_name(target, try_suffixes=(".weight", ".bias")))
        for target in skeleton.tensors
        if not (skeleton.is_tied and target.startswith(head))
    }
    missing = sorted(set(names.values()) - stored)
    strange = sorted(stored - set(names.values()))
    if missing or strange:
        raise error(
            Code.DAMAGED_WEIGHTS,
            f"the GGUF file lacks {missing[:3]} and has {strange[:3]} besides what {architecture} needs",
            "fetch the file again, or use the model's safetensors",
        )
    return names


def _shards(skeleton: Skeleton, names: dict[str, str]) -> dict[str, list[str]]:
    """File name → its tensors: one file a block, and one for the ends."""
    shards: dict[str, list[str]] = {}
    for target in names:
        block = next(
            (i for i in range(skeleton.num_blocks) if target.startswith(skeleton.block_prefix(i))), None
        )
        shard = "model-ends.safetensors" if block is None else f"model-block-{block:04}.safetensors"
        shards.setdefault(shard, []).append(target)
    return shards


def _tensor(target: str, stored: Any, skeleton: Skeleton) -> Tensor:
    plain = _PLAIN.get(stored.tensor_type)
    numbers = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
    if skeleton.architecture in _ROTARY_REORDERED:
        numbers = _in_halves(target, numbers, skeleton.config)
    if plain is not None:
        return numbers.to(plain).contiguous()
    half = numbers.to(torch.float16)
    return (half if bool(torch.isfinite(half).all()) else numbers.to(torch.bfloat16)).contiguous()


def _in_halves(target: str, numbers: Tensor, config: PretrainedConfig) -> Tensor:
    """Query and key rows in transformers' order: llama.cpp stores the two halves of a head interleaved."""
    kind = re.search(r"\.(q|k)_proj\.", target)
    if kind is None:
        return numbers
    num_heads = config.num_attention_heads if kind[1] == "q" else config.num_key_value_heads
    pairs = numbers.view(num_heads, -1, 2, *numbers.shape[1:])  # (num_heads, head_dim / 2, 2, …)
    return pairs.transpose(1, 2).reshape(numbers.shape)


def _check_room(folder: Path, num_numbers: int, disk_bytes: int) -> None:
    needed = num_numbers * torch.float16.itemsize
    if 0 < disk_bytes < needed:
        raise error(
            Code.DISK_FULL,
            f"converting needs {needed:,} bytes, and {disk_bytes:,} may be used for weights",
            "choose a smaller model, or allow more: disk_bytes",
        )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise error(
            Code.DISK_FULL,
            f"converting needs {needed:,} bytes in {folder.parent}, {free:,} are free",
            "free some disk space, or set another cache folder",
        )
