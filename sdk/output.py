"""How `daemonctl` speaks: data on stdout, talk on stderr, JSON for programs.

In a terminal tables are drawn by rich and words have weight; in a pipe everything is plain text in columns.
rich is imported only when it draws.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from ..protocol.control import Piece
from ..protocol.errors import CorollaError
from ..protocol.messages import to_plain

ENVELOPE_VERSION: Final = 1
_STATE_COLOURS: Final = {
    "online": "green",
    "loading": "yellow",
    "joining": "yellow",
    "draining": "yellow",
    "idle": "yellow",
    "stopping": "yellow",
    "failed": "red",
    "stopped": "red",
}


class Output:
    """Where one command's answer goes. as_json: one envelope `{"version": 1, …}` in place of text."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def envelope(self, **fields: Any) -> None:
        """Data for programs, on one line."""
        plain = {name: complete(value) for name, value in fields.items()}
        click.echo(json.dumps({"version": ENVELOPE_VERSION, **plain}, ensure_ascii=False, default=str))

    def say(self, text: str) -> None:
        """Talk, on stderr."""
        click.echo(text, err=True)

    def line(self, text: str = "") -> None:
        """A line of data."""
        click.echo(text)

    def heading(self, text: str) -> None:
        """A line that opens a part of the answer."""
        click.secho(text, bold=True)

    def facts(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values, aligned."""
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            click.echo(f"  {click.style(name.ljust(width), dim=True)}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under column names; drawn in a terminal, in plain columns otherwise."""
        if sys.stdout.isatty():
            _draw(columns, rows)
            return
        for line in aligned([[column.upper() for column in columns], *rows]):
            click.echo(line)


def print_error(problem: CorollaError, as_json: bool) -> None:
    """One clear line with the remedy; as JSON on stdout for programs."""
    if as_json:
        click.echo(json.dumps({"version": ENVELOPE_VERSION, "error": problem.to_wire()}, default=str))
        return
    remedy = f" ({problem.remedy})" if problem.remedy else ""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {problem.message}{remedy}", err=True)


def complete(value: Any) -> Any:
    """A view as plain maps with every field: programs should not have to know defaults."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: complete(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, (list, tuple)):
        return [complete(item) for item in value]
    if isinstance(value, dict):
        return {key: complete(item) for key, item in value.items()}
    return to_plain(value)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines whose columns stand under each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def state(name: str) -> str:
    """The name of a state in its colour; click drops the colour in a pipe."""
    return click.style(name, fg=_STATE_COLOURS.get(name))


def event_text(piece: Piece) -> str:
    """What an event among the pieces says, in one line."""
    detail = piece.detail.get("text") if isinstance(piece.detail, dict) else piece.detail
    return f"{piece.event}: {detail}" if detail else str(piece.event)


def num_bytes(count: int) -> str:
    """A size for people, in powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if hours < 1:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if days < 2 else f"{days:.0f} days"


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text.from_ansi(cell) for cell in row))
    Console().print(table)
