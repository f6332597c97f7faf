"""`corollad` that tells on SIGUSR1 how much it holds: tasks, objects, open files. For tests alone."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path
from types import FrameType

import trio

from corolla.daemon.__main__ import main


def tell(number: int, frame: FrameType | None) -> None:
    """Write a file that appears all at once."""
    gc.collect()
    vitals = {
        "tasks": _tasks_below(trio.lowlevel.current_root_task()),
        "objects": len(gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
    }
    path = Path(os.environ["COROLLA_VITALS"])
    path.with_suffix(".new").write_text(json.dumps(vitals))
    path.with_suffix(".new").rename(path)


def _tasks_below(task: trio.lowlevel.Task | None) -> list[str]:
    """The names of a task's children and theirs."""
    if task is None:
        return []
    children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return [child.name.rpartition(".")[2] for child in children] + [
        name for child in children for name in _tasks_below(child)
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, tell)
    main()
