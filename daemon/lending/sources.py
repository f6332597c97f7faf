"""Where a model's weights are found on this machine, from what a user calls it."""

from __future__ import annotations

import re
from pathlib import Path

from ...protocol.errors import Code, error
from ...protocol.work import ModelFacts, ModelSource, SourceKind

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def source_of(model: str) -> ModelSource:
    """The source that `--model` names: a folder, a GGUF file, or a hub id with an optional `@revision`.

    Raises `UNKNOWN_MODEL` if it is none of these.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSource(SourceKind.FOLDER, str(path.resolve()))
    if path.is_file() and path.suffix.casefold() == ".gguf":
        return ModelSource(SourceKind.GGUF, str(path.resolve()))
    hub_id, _, revision = model.partition("@")
    if _HUB_ID.fullmatch(hub_id) and not path.is_absolute():
        return ModelSource(SourceKind.HUB, hub_id, revision or None)
    raise error(
        Code.UNKNOWN_MODEL,
        f"{model!r} is no folder, no GGUF file and no hub id",
        "give the path of a Hugging Face folder or GGUF file, or a hub id like OWNER/NAME",
    )


def source_of_facts(facts: ModelFacts) -> ModelSource | None:
    """Where a model of the swarm can be fetched, if its manifest says so."""
    if facts.hub_id is None:
        return None
    return ModelSource(SourceKind.HUB, facts.hub_id, facts.revision)
