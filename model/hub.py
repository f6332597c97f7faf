"""Models of the Hugging Face hub: looking one up, and fetching just the files that are asked for.

The one file that knows `huggingface_hub` and its errors. Files land in its ordinary cache, shared with
every other program of this user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import huggingface_hub
from huggingface_hub import errors as hub_errors

from ..protocol.errors import Code, CorollaError, error

# Everything that is small and no weight: configuration, tokenizer, chat template, index, model card.
_SMALL_FILES: Final = (
    "*.json", "tokenizer*", "*.jinja", "merges.txt", "vocab.txt", "spiece.model", "README.md",
)  # fmt: skip
# The error of the HTTP library below, whichever it is: what the hub itself answered is a child of both.
_HTTP_ERROR: Final = hub_errors.HfHubHTTPError.__bases__[0]
_NO_SPACE: Final = 28  # errno of a full disk


@dataclass(frozen=True, slots=True)
class Origin:
    """One commit of a model on the hub.

    folder: where its files are kept on this machine. hashes, sizes: of its weight files; empty if the hub
    could not be asked. disk_bytes: what weights may take on this machine; 0 is anything.
    """

    hub_id: str
    commit: str
    folder: Path
    hashes: dict[str, str]
    sizes: dict[str, int]
    licence: str | None
    disk_bytes: int = 0


def look_up(hub_id: str, revision: str | None, disk_bytes: int = 0) -> Origin:
    """Find a model and fetch its small files. Without a connection, what is cached here must do.

    Raises `UNKNOWN_MODEL`, `GATED_MODEL`, `NOT_READY` (no connection and nothing cached), `DISK_FULL`.
    """
    try:
        facts = huggingface_hub.HfApi().model_info(hub_id, revision=revision, files_metadata=True)
        commit = str(facts.sha)
        folder = Path(
            huggingface_hub.snapshot_download(hub_id, revision=commit, allow_patterns=list(_SMALL_FILES))
        )
    except Exception as problem:
        if _is_unreachable(problem):
            return _cached(hub_id, revision, problem)
        raise _explained(hub_id, revision, problem) from problem
    files = [file for file in facts.siblings or () if file.rfilename.endswith(".safetensors")]
    card: Any = facts.card_data
    licence = card.get("license") if card is not None else None
    return Origin(
        hub_id,
        commit,
        folder,
        hashes={file.rfilename: str(file.lfs.sha256) for file in files if file.lfs is not None},
        sizes={file.rfilename: int(file.size or 0) for file in files},
        licence=str(licence) if licence else None,
        disk_bytes=disk_bytes,
    )


def _is_unreachable(problem: Exception) -> bool:
    """Whether the hub gave no answer at all."""
    if isinstance(problem, hub_errors.HfHubHTTPError):
        return False
    return isinstance(problem, (ConnectionError, TimeoutError, _HTTP_ERROR))


def _cached(hub_id: str, revision: str | None, reason: Exception) -> Origin:
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=list(_SMALL_FILES), local_files_only=True
            )
        )
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError, OSError) as problem:
        raise error(
            Code.NOT_READY,
            f"the hub cannot be reached for {hub_id} ({reason}), and it is not cached here",
            "connect to the internet once, or give the path of a folder",
        ) from problem
    return Origin(hub_id, folder.name, folder, {}, {}, licence_of_folder(folder))


def fetch_files(origin: Origin, names: Iterable[str], report: Callable[[str, int, int], None]) -> None:
    """Have these files of a commit in its folder; those already there cost nothing.

    Raises as `look_up`. report: called with `fetching`, bytes done and bytes in total, after each file.
    """
    missing = [name for name in names if not (origin.folder / name).exists()]
    total = sum(origin.sizes.get(name, 0) for name in missing)
    if 0 < origin.disk_bytes < total:
        raise error(
            Code.DISK_FULL,
            f"fetching {origin.hub_id} needs {total:,} bytes, and {origin.disk_bytes:,} may be used for weights",
            "choose a smaller model or fewer blocks, or allow more: disk_bytes",
        )
    done = 0
    for name in missing:
        report("fetching", done, total)
        try:
            huggingface_hub.hf_hub_download(origin.hub_id, name, revision=origin.commit)
        except Exception as problem:
            raise _explained(origin.hub_id, origin.commit, problem) from problem
        done += origin.sizes.get(name, 0)
        report("fetching", done, total)


def _explained(hub_id: str, revision: str | None, problem: Exception) -> CorollaError:
    """What a failure of the hub's library means to the user."""
    name = f"{hub_id}@{revision}" if revision else hub_id
    if isinstance(problem, hub_errors.GatedRepoError) or _status(problem) in (401, 403):
        if isinstance(problem, hub_errors.RepositoryNotFoundError) and not isinstance(
            problem, hub_errors.GatedRepoError
        ):
            # The hub answers 401 for models that do not exist too, so as not to tell which are private.
            return error(
                Code.UNKNOWN_MODEL,
                f"the hub has no model {hub_id}, or it is private",
                "check the name; for a private model run `hf auth login` as the daemon's user",
            )
        return error(
            Code.GATED_MODEL,
            f"{hub_id} is gated: its owner wants to know who uses it",
            f"accept its terms on https://huggingface.co/{hub_id}, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(problem, hub_errors.RevisionNotFoundError):
        return error(Code.UNKNOWN_MODEL, f"{hub_id} has no revision {revision}", "leave the revision out")
    if isinstance(problem, (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError)):
        return error(Code.UNKNOWN_MODEL, f"the hub has no model {hub_id}", "check the name")
    if isinstance(problem, hub_errors.EntryNotFoundError):
        return error(Code.DAMAGED_WEIGHTS, f"{name} lacks a file: {problem}", "choose another revision")
    if isinstance(problem, OSError) and problem.errno == _NO_SPACE:
        return error(Code.DISK_FULL, f"the disk filled up while fetching {name}", "free some disk space")
    return error(Code.NOT_READY, f"fetching {name} failed: {problem}", "try again")


def _status(problem: Exception) -> int:
    response = getattr(problem, "response", None)
    return int(getattr(response, "status_code", 0) or 0)


def licence_of_folder(folder: Path) -> str | None:
    """The licence that a model card in a folder names, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        licence: Any = huggingface_hub.ModelCard.load(card).data.to_dict().get("license")
    except (OSError, ValueError):  # a card is prose for people; an odd one names no licence
        return None
    return str(licence) if licence else None
