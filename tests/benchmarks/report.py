"""The form of every benchmark's answer: a table for people, and one JSON envelope for programs.

A result holds what was measured (`value`), what ran beside it in the same run (`beside`), the two together
(`ratio`), and whether the target is met. Nothing here is a test: a busy machine fails nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One figure. `beside` has the same unit. `target` is the least (or, `at_most`, the greatest) good ratio."""

    name: str
    value: float
    unit: str
    beside: float | None = None
    target: float | None = None
    at_most: bool = False

    @property
    def ratio(self) -> float | None:
        """`value` over `beside`."""
        return self.value / self.beside if self.beside else None

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None without a target. Without `beside` the value itself is held to it."""
        reached = self.ratio if self.beside is not None else self.value
        if self.target is None or reached is None:
            return None
        return reached <= self.target if self.at_most else reached >= self.target


@dataclass
class Report:
    """The results of one run."""

    results: list[Measured] = field(default_factory=list)

    def add(self, measured: Measured) -> None:
        """Keep a result and print its line."""
        self.results.append(measured)
        print(_line(measured), flush=True)

    def finish(self, path: Path | None) -> None:
        """Write the envelope, if asked to."""
        if path is not None:
            path.write_text(json.dumps(self.envelope(), indent=2) + "\n")

    def envelope(self) -> dict[str, object]:
        """`{"version": 1, "machine": …, "results": […]}`."""
        rows = [{**asdict(m), "ratio": m.ratio, "holds": m.holds} for m in self.results]
        for row in rows:
            row.pop("at_most")
        return {"version": 1, "machine": machine(), "results": rows}


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; ends within five minutes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    return parser


def median(values: Sequence[float]) -> float:
    """The median, the figure to quote on a noisy machine."""
    return statistics.median(values)


def _line(m: Measured) -> str:
    line = f"{m.name:<52} {m.value:>10.3f} {m.unit:<10}"
    if m.beside is not None:
        line += f" beside {m.beside:>10.3f}   ratio {m.ratio:>6.2f}"
    if m.target is not None:
        line += f"   target {'≤' if m.at_most else '≥'} {m.target:g}: {'holds' if m.holds else 'missed'}"
    return line
