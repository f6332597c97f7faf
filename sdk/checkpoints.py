"""A training run kept on disk, so that it goes on where it was after an interruption.

Owns a folder of checkpoints, each whole or absent: parameters, optimizer, schedule, torch's random state, where the
masks of LoRA's dropout are, and the step. Tensors are safetensors, the rest is JSON; nothing is pickled. It knows
neither the swarm nor the loop.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..protocol.errors import Code, error
from .dropout import DropoutCount

VERSION: Final = 1
_TENSORS: Final = "run.safetensors"
_REST: Final = "run.json"
_NAME: Final = re.compile(r"step-(\d{8,})")
_TENSOR: Final = "__tensor__"  # in the JSON, where a tensor stood: its name


class Savable(Protocol):
    """A model that writes its adapter as PEFT does."""

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write adapter_config.json and adapter_model.safetensors."""


class Restored(NamedTuple):
    """Where a run goes on: after so many steps, with the notes that were saved."""

    step: int
    notes: Any


class Scheduler(Protocol):
    """Any of torch.optim.lr_scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""


class Checkpoints:
    """Checkpoints of one run in a folder. keep: how many of the last ones stay."""

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2) -> None:
        if keep < 1:
            raise error(Code.BAD_REQUEST, f"keep={keep}", "keep 1 checkpoint or more")
        self.folder: Final = Path(folder)
        self._keep = keep

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        names = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(name[1]) for name in names if name is not None)

    def save(
        self,
        step: int,
        optimizer: Optimizer,
        scheduler: Scheduler | None = None,
        model: Savable | None = None,
        *,
        notes: Any = None,
    ) -> Path:
        """Keep the run as it is after so many steps; the folder of the checkpoint.

        The parameters are those of the optimizer, whatever they belong to. model: its adapter is written
        beside them, for PEFT, and the step of its dropout is kept. notes: whatever else belongs to the run and
        JSON can hold, such as its losses.
        Raises `DISK_FULL` and leaves the earlier checkpoints as they were.
        """
        tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
        for number, parameter in enumerate(_parameters(optimizer)):
            tensors[f"parameter.{number}"] = parameter.detach()
        rest = {
            "version": VERSION,
            "step": step,
            "notes": notes,
            "optimizer": _lift(optimizer.state_dict(), "optimizer", tensors),
            "scheduler": None if scheduler is None else _lift(scheduler.state_dict(), "scheduler", tensors),
            "dropout": _dropout_of(model),
        }
        target = self.folder / f"step-{step:08d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".part-") as scratch:
                made = Path(scratch) / "made"
                made.mkdir()
                if model is not None:
                    model.save_adapter(made)
                # Parameters may share memory (tied ones); a file of its own copies does not mind.
                copies = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
                safetensors.torch.save_file(copies, made / _TENSORS)
                (made / _REST).write_text(json.dumps(rest))
                if target.exists():
                    shutil.rmtree(target)
                made.rename(target)
        except OSError as problem:
            raise error(
                Code.DISK_FULL,
                f"{target} cannot be written: {problem}",
                "free some space, or choose another folder",
            ) from problem
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        return target

    def restore(
        self, optimizer: Optimizer, scheduler: Scheduler | None = None, model: Savable | None = None
    ) -> Restored:
        """Set parameters, optimizer and schedule to the last checkpoint; step 0 and no notes if there is none.

        optimizer: made as for the run that was saved, over the same parameters; their values are replaced in
        place. model: as it was given to `save`; the masks of its LoRA's dropout go on where they were. Raises
        `UNREADABLE`, `BAD_SHAPE` for another run's parameters, and `BAD_REQUEST` for a schedule or a model with
        dropout that was not saved, or is not given; then nothing was changed.
        """
        steps = self.steps()
        if not steps:
            return Restored(0, None)
        folder = self.folder / f"step-{steps[-1]:08d}"
        tensors, rest = _read(folder)
        parameters = _parameters(optimizer)
        kept = [tensors[name] for name in sorted(_of_parameters(tensors), key=_number)]
        found, expected = [tuple(t.shape) for t in kept], [tuple(p.shape) for p in parameters]
        if found != expected:
            odd = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), None)
            told = "" if odd is None else f"; one is {odd[0]}, expected {odd[1]}"
            raise error(
                Code.BAD_SHAPE,
                f"{folder} holds {len(found)} parameters, the optimizer has {len(expected)}{told}",
                "make the model and the optimizer as in the run that was saved, or choose another folder",
            )
        if (scheduler is None) != (rest["scheduler"] is None):
            raise error(
                Code.BAD_REQUEST,
                f"{folder} was saved {'without' if rest['scheduler'] is None else 'with'} a scheduler",
                "restore it as it was saved",
            )
        kept_dropout = rest.get("dropout")
        count = getattr(model, "dropout", None)
        if kept_dropout is not None and not isinstance(count, DropoutCount):
            raise error(
                Code.BAD_REQUEST,
                f"{folder} was saved amid a run with dropout, at step {kept_dropout['step']} of its masks",
                "give the model too: restore(optimizer, scheduler, model)",
            )
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        state = _settle(rest["optimizer"], tensors)
        state["state"] = {int(key): value for key, value in state["state"].items()}  # JSON's keys are texts
        optimizer.load_state_dict(state)
        if scheduler is not None:
            scheduler.load_state_dict(_settle(rest["scheduler"], tensors))
        torch.set_rng_state(tensors["random"])
        if kept_dropout is not None and isinstance(count, DropoutCount):
            count.seed, count.step = int(kept_dropout["seed"]), int(kept_dropout["step"])
        return Restored(int(rest["step"]), rest["notes"])


def _dropout_of(model: Savable | None) -> dict[str, int] | None:
    """Where the masks of a model's dropout are; None if it has none."""
    count = getattr(model, "dropout", None)
    if not isinstance(count, DropoutCount) or not count.has_begun:
        return None
    return {"seed": count.seed, "step": count.next_step}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _of_parameters(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.startswith("parameter.")]


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = safetensors.torch.load_file(folder / _TENSORS)
        rest = json.loads((folder / _REST).read_text())
        known = {"version", "step", "notes", "optimizer", "scheduler"}
        if not isinstance(rest, dict) or not known <= rest.keys() or "random" not in tensors:
            raise ValueError("something is missing in it")
        if rest["version"] != VERSION:
            raise ValueError(f"it is of version {rest['version']}, this program reads {VERSION}")
    except (OSError, ValueError, safetensors.SafetensorError) as problem:
        raise error(
            Code.UNREADABLE, f"{folder}: {problem}", "remove it; the checkpoint before it is used then"
        ) from problem
    return tensors, rest


def _lift(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value with names in place of its tensors, which go to `tensors`. Raises `UNSUPPORTED`."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {str(key): _lift(entry, f"{path}.{key}", tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_lift(entry, f"{path}.{place}", tensors) for place, entry in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise error(
        Code.UNSUPPORTED,
        f"{path} is a {type(value).__name__}, which no checkpoint holds",
        "use an optimizer and a schedule whose state is tensors, numbers and texts",
    )


def _settle(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`_lift` undone."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _settle(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list):
        return [_settle(entry, tensors) for entry in value]
    return value
