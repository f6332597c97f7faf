"""A run that is interrupted and restored goes on exactly as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from corolla.protocol.errors import Code, CorollaError
from corolla.sdk.checkpoints import Checkpoints

STEPS = 10


class Run:
    """A small model with an optimizer, a schedule, and data from torch's own generator."""

    def __init__(self, kind: str, *, width: int = 5) -> None:
        self.model = nn.Linear(3, width)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(0.1)
        self.optimizer: Optimizer = (
            AdamW(self.model.parameters(), lr=0.1, betas=(0.8, 0.9))
            if kind == "adamw"
            else SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        )
        self.scheduler: LRScheduler = CosineAnnealingLR(self.optimizer, STEPS)

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.randn(4, 3)).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()

    def values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_restored_run_ends_as_one_that_was_never_interrupted(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    whole = Run(kind)
    whole.go(STEPS)

    torch.manual_seed(1)
    first = Run(kind)
    first.go(4)
    Checkpoints(tmp_path).save(4, first.optimizer, first.scheduler, notes={"losses": [1.5]})

    torch.manual_seed(99)
    second = Run(kind)
    assert Checkpoints(tmp_path).restore(second.optimizer, second.scheduler) == (4, {"losses": [1.5]})
    second.go(STEPS - 4)
    for found, expected in zip(second.values(), whole.values(), strict=True):
        assert torch.equal(found, expected)


def test_only_the_last_checkpoints_stay(tmp_path: Path) -> None:
    run, kept = Run("adamw"), Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        kept.save(step, run.optimizer)
    assert kept.steps() == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    torch.manual_seed(2)
    run, kept = Run("sgd"), Checkpoints(tmp_path)
    kept.save(1, run.optimizer)
    run.go(1)
    after = run.values()
    kept.save(1, run.optimizer)
    run.go(1)
    kept.restore(run.optimizer)
    assert all(torch.equal(*pair) for pair in zip(run.values(), after, strict=True))


def test_without_a_checkpoint_a_run_begins_at_step_0(tmp_path: Path) -> None:
    run = Run("sgd")
    assert Checkpoints(tmp_path / "none").restore(run.optimizer) == (0, None)


def test_the_adapter_lies_beside_it(tmp_path: Path) -> None:
    class Model:
        def save_adapter(self, folder: object) -> None:
            (Path(str(folder)) / "adapter_config.json").write_text("{}")

    target = Checkpoints(tmp_path).save(7, Run("sgd").optimizer, model=Model())
    assert (target / "adapter_config.json").read_text() == "{}"


def test_another_runs_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, Run("sgd").optimizer)
    other = Run("sgd", width=6)
    before = other.values()
    with pytest.raises(CorollaError, match=r"\(5, 3\), expected \(6, 3\)") as caught:
        Checkpoints(tmp_path).restore(other.optimizer)
    assert caught.value.code is Code.BAD_SHAPE
    assert all(torch.equal(*pair) for pair in zip(other.values(), before, strict=True))


def test_a_schedule_that_was_not_saved_is_refused(tmp_path: Path) -> None:
    run = Run("sgd")
    Checkpoints(tmp_path).save(1, run.optimizer)
    with pytest.raises(CorollaError, match="without a scheduler"):
        Checkpoints(tmp_path).restore(run.optimizer, run.scheduler)


@pytest.mark.parametrize(("name", "text"), [("run.json", "{"), ("run.safetensors", "x"), ("run.json", "[]")])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, text: str) -> None:
    run = Run("sgd")
    target = Checkpoints(tmp_path).save(1, run.optimizer)
    (target / name).write_text(text)
    with pytest.raises(CorollaError, match="step-00000001") as caught:
        Checkpoints(tmp_path).restore(run.optimizer)
    assert caught.value.code is Code.UNREADABLE


def test_what_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    class Full:
        def save_adapter(self, folder: object) -> None:
            raise OSError(28, "No space left on device")

    run, kept = Run("sgd"), Checkpoints(tmp_path)
    kept.save(1, run.optimizer)
    with pytest.raises(CorollaError, match="No space left") as caught:
        kept.save(2, run.optimizer, model=Full())
    assert caught.value.code is Code.DISK_FULL
    assert kept.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_state_that_is_no_data_is_refused(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, object]:
            return {"rule": print}

        def load_state_dict(self, state_dict: dict[str, object]) -> None:
            raise AssertionError("never restored")

    with pytest.raises(CorollaError, match=r"scheduler\.rule is a builtin") as caught:
        Checkpoints(tmp_path).save(1, Run("sgd").optimizer, Odd())
    assert caught.value.code is Code.UNSUPPORTED
