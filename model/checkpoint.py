"""Where a model's files lie: a Hugging Face folder, the hub, a GGUF file; and the model's fingerprint.

Owns configuration, tokenizer, the list of tensors and the hashes of files; reading tensors is `weights`'
business. Only safetensors are used, never pickles; other formats are converted by `gguf` first, and what
lies on the hub is fetched by `hub`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..protocol.errors import Code, CorollaError, error
from ..protocol.work import ModelFacts, ModelSource, SourceKind
from . import gguf, hub
from .families import architecture

# stage (`fetching`, `converting`, `hashing`), bytes done, bytes in total
Report = Callable[[str, int, int], None]

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_HASHES: Final = "hashes.json"
_HASH_CHUNK_BYTES: Final = 1 << 22
# Fields of config.json that say how a copy was made, not what the model is.
_VOLATILE: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")


def silent(stage: str, done: int, total: int) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as it lies on disk, or partly still on the hub.

    tensors: names as stored → file name. origin: the commit on the hub, if it came from there.
    """

    name: str
    folder: Path
    cache_folder: Path
    config: PretrainedConfig
    tensors: dict[str, str]
    origin: hub.Origin | None = None
    report: Report = field(default=silent, compare=False)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, with its chat template; None if the model has none. Raises `UNREADABLE`."""
        if not any((self.folder / name).exists() for name in _TOKENIZER_FILES):
            return None
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        except Exception as problem:  # the package `tokenizers` raises bare ones
            raise error(
                Code.UNREADABLE, f"the tokenizer in {self.folder} is unreadable: {problem}"
            ) from problem
        return tokenizer

    def facts(self) -> ModelFacts:
        """What everyone who runs a part of this model has to agree on. May hash files for a while."""
        converted = gguf.source_of(self.folder)
        if converted is not None:  # the one file holds everything; how it was converted is no part of it
            files = {converted.name: converted.sha256}
            identity = fingerprint({"gguf": gguf.CONVERSION}, files)
        else:
            files = self._file_hashes()
            identity = fingerprint(_read_json(self.folder / "config.json"), files)
        config = self.config
        return ModelFacts(
            name=self.name,
            fingerprint=identity,
            architecture=architecture(config),
            num_blocks=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            vocab_size=int(config.vocab_size),
            max_position=int(getattr(config, "max_position_embeddings", 0)),
            files=files,
            hub_id=self.origin.hub_id if self.origin else None,
            revision=self.origin.commit if self.origin else None,
            licence=self.origin.licence if self.origin else hub.licence_of_folder(self.folder),
        )

    def _file_hashes(self) -> dict[str, str]:
        if self.origin is not None and self.origin.hashes:
            return {name: self.origin.hashes[name] for name in sorted(set(self.tensors.values()))}
        paths = [self.folder / name for name in sorted(set(self.tensors.values()))]
        hashes = hash_files(paths, self.cache_folder, self.report)
        return {path.name: sha256 for path, sha256 in zip(paths, hashes, strict=True)}


def open_checkpoint(
    source: ModelSource, cache_folder: Path, report: Report = silent, disk_bytes: int = 0
) -> Checkpoint:
    """Find a model; fetch what is needed to know it (configuration, tokenizer, index), convert a GGUF file.

    cache_folder: for conversions and file hashes; made if missing. disk_bytes: what weights may take there.
    Raises `UNKNOWN_MODEL`, `GATED_MODEL`, `UNSUPPORTED_FAMILY`, `UNREADABLE`, `DAMAGED_WEIGHTS`, `DISK_FULL`.
    """
    _make_folder(cache_folder)
    if source.kind is SourceKind.HUB:
        origin = hub.look_up(source.location, source.revision, disk_bytes)
        config = _read_config(origin.folder)
        if not (origin.folder / INDEX).exists():
            hub.fetch_files(origin, [SINGLE], report)  # which tensors it holds stands in the file itself
        tensors = _stored_tensors(origin.folder)
        name = source.location.rpartition("/")[2]
        return Checkpoint(name, origin.folder, cache_folder, config, tensors, origin, report)
    path = Path(source.location)
    if source.kind is SourceKind.GGUF:
        return _open_gguf(path, cache_folder, report, disk_bytes)
    _check_folder(path)
    return Checkpoint(
        path.resolve().name, path, cache_folder, _read_config(path), _stored_tensors(path), None, report
    )


def _open_gguf(path: Path, cache_folder: Path, report: Report, disk_bytes: int) -> Checkpoint:
    if not path.is_file():
        raise error(Code.UNKNOWN_MODEL, f"no file {path}", "give the path of a GGUF file")
    (sha256,) = hash_files([path], cache_folder, report)
    folder = gguf.convert(gguf.Source(path.name, sha256), path, cache_folder, report, disk_bytes)
    name = path.stem.partition(".")[0]
    return Checkpoint(name, folder, cache_folder, _read_config(folder), _stored_tensors(folder), None, report)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise error(
            Code.UNREADABLE, f"cannot make the cache folder {folder}: {problem.strerror}"
        ) from problem


def _check_folder(path: Path) -> None:
    try:
        names = os.listdir(path)
    except FileNotFoundError as problem:
        raise error(
            Code.UNKNOWN_MODEL, f"no folder {path}", "give a model's folder, or its name on the hub"
        ) from problem
    except OSError as problem:
        raise error(
            Code.UNREADABLE,
            f"the folder {path} is unreadable: {problem.strerror}",
            "let the daemon's user read it",
        ) from problem
    if "config.json" not in names:
        raise error(
            Code.UNKNOWN_MODEL, f"{path} holds no config.json", "give the folder of a Hugging Face model"
        )


def _read_config(folder: Path) -> PretrainedConfig:
    """The configuration; code that comes with a model is never run."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except PermissionError as problem:
        raise error(Code.UNREADABLE, f"{folder}/config.json: {problem.strerror}") from problem
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        kind = str(_read_json(folder / "config.json").get("model_type", "of no model_type"))
        raise error(
            Code.UNSUPPORTED_FAMILY,
            f"transformers cannot read {folder}/config.json ({kind}): {str(problem).splitlines()[0]}",
        ) from problem
    architecture(config)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as problem:
        raise error(
            Code.UNREADABLE, f"{path}: {problem.strerror}", "let the daemon's user read it"
        ) from problem
    except ValueError as problem:
        raise error(
            Code.DAMAGED_WEIGHTS, f"{path} is no JSON: {problem}", "fetch the model again"
        ) from problem
    if not isinstance(value, dict):
        raise error(Code.DAMAGED_WEIGHTS, f"{path} holds no map", "fetch the model again")
    return value


def _stored_tensors(folder: Path) -> dict[str, str]:
    """Tensor name → file name."""
    index = folder / INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map", {})
        return {str(name): str(file) for name, file in weight_map.items()}
    if not (folder / SINGLE).exists():
        raise error(
            Code.UNREADABLE,
            f"{folder} holds no safetensors weights",
            "convert the model to safetensors; pickled weights are never read",
        )
    with open_safetensors(folder / SINGLE) as file:
        return dict.fromkeys(file.keys(), SINGLE)


def open_safetensors(path: Path) -> Any:
    """A safetensors file, to be used with `with`. Raises `DAMAGED_WEIGHTS`, `UNREADABLE`."""
    try:
        path.open("rb").close()  # safetensors says that a file is not there when it may not be read
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as problem:
        raise error(Code.DAMAGED_WEIGHTS, f"{path} is missing", "fetch the model again") from problem
    except PermissionError as problem:
        raise error(
            Code.UNREADABLE, f"{path}: {problem.strerror}", "let the daemon's user read it"
        ) from problem
    except (SafetensorError, OSError) as problem:
        raise error(
            Code.DAMAGED_WEIGHTS, f"{path} is damaged or cut short: {problem}", "fetch the file again"
        ) from problem


# fingerprints


def fingerprint(config: dict[str, Any], hashes: dict[str, str]) -> str:
    """The identity of a model, hex: of its canonical configuration and its weight files' sha256.

    File names and run-time choices (dtype, quantization) are no part of it.
    """
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
    canonical = {"version": 1, "config": lasting, "files": sorted(hashes.values())}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_files(paths: list[Path], cache_folder: Path, report: Report = silent) -> list[str]:
    """sha256 of each file, hex. Known ones (same path, size and time of change) are not read again."""
    cache = cache_folder / _HASHES
    known: dict[str, Any] = {}
    if cache.exists():
        try:
            known = _read_json(cache)
        except CorollaError:  # a damaged cache costs time only
            known = {}
    stats = [_stat(path) for path in paths]
    total = sum(size for size, _ in stats)
    done = 0
    hashes = []
    for path, (size, changed) in zip(paths, stats, strict=True):
        entry = known.get(str(path.resolve()))
        if isinstance(entry, list) and entry[:2] == [size, changed]:
            hashes.append(str(entry[2]))
        else:
            hashes.append(_hash_file(path, done, total, report))
            known[str(path.resolve())] = [size, changed, hashes[-1]]
            write_atomically(cache, json.dumps(known, indent=0).encode())
        done += size
    return hashes


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError as problem:
        raise error(Code.DAMAGED_WEIGHTS, f"{path} is missing", "fetch the model again") from problem
    except OSError as problem:
        raise error(
            Code.UNREADABLE, f"{path}: {problem.strerror}", "let the daemon's user read it"
        ) from problem
    return stat.st_size, stat.st_mtime_ns


def _hash_file(path: Path, done: int, total: int, report: Report) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                report("hashing", done, total)
    except OSError as problem:
        raise error(
            Code.UNREADABLE, f"{path}: {problem.strerror}", "let the daemon's user read it"
        ) from problem
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file at once, so that a reader finds the old or the new content. Raises `DISK_FULL`."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as problem:
        part.unlink(missing_ok=True)
        raise error(
            Code.DISK_FULL, f"cannot write {path}: {problem.strerror}", "free some disk space"
        ) from problem
