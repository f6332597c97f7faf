"""What is seen of a run: a bar with the loss while it goes on, and afterwards a plot of the losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnStep = Callable[[int, float], None]  # step, its loss


@contextmanager
def bar(label: str, steps: int) -> Iterator[OnStep]:
    """A progress bar on stderr; call what it gives after each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=steps, loss="")

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=f"loss {loss:.4f}")

        yield on_step


def largest_difference(one: list[float], other: list[float]) -> float:
    """Of the losses of two runs, step by step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def report(out: Path, told: dict[str, Any], drawn: dict[str, list[float]], title: str) -> None:
    """Leave what came of a run in its folder, and say where."""
    (out / "losses.json").write_text(json.dumps(told, indent=2))
    if plot(out / "loss.png", drawn, title):
        print(f"plot: {out / 'loss.png'}")
    else:
        print("no plot: pip install matplotlib")
    print(f"adapter: {out / 'adapter'}")


def plot(path: Path, curves: dict[str, list[float]], title: str) -> bool:
    """Draw losses over steps; whether that was possible, which needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    # The later ones are thinner, since curves that agree lie on each other.
    for width, (label, losses) in zip((4.0, 1.5, 1.0), curves.items(), strict=False):
        axes.plot(range(1, len(losses) + 1), losses, label=label, linewidth=width)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend()
    figure.savefig(path)
    return True
