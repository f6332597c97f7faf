"""Which daemon serves which blocks, as lines of text: the swarm in one glance. Pure.

blocks      0         10        20        30
12D3…kQ7v   ██████████                       0:10   online
12D3…x2Bd             ░░░░░░░░░░             10:20  loading
                                ··········   20:30  nobody
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_MAX_COLUMNS: Final = 60  # of the bar: fits a terminal of 100 together with names and states
_FILL: Final = {
    "online": "█", "loading": "░", "draining": "▒", "in use": "█", "ready": "▒", "nobody": "·",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bar:
    """One span in the picture. name: who serves it. state chooses the filling; note stands behind it."""

    name: str
    start: int
    end: int
    state: str
    note: str = ""


def picture(
    num_blocks: int, bars: Sequence[Bar], missing: Sequence[tuple[int, int]] = ()
) -> list[tuple[str, str]]:
    """Lines of the picture, each with the state that may give it a colour ("" for the scale).

    missing: runs of blocks that nobody serves (state "nobody"); see `gaps`.
    """
    if num_blocks < 1:
        return []
    columns = min(_MAX_COLUMNS, num_blocks if num_blocks > 20 else num_blocks * max(1, 40 // num_blocks))
    width = max([len("blocks"), *(len(bar.name) for bar in bars)])
    lines = [(f"{'blocks':<{width}}  {_scale(num_blocks, columns)}", "")]
    absent = [Bar("", start, end, "nobody") for start, end in missing]
    for bar in sorted([*bars, *absent], key=lambda bar: (bar.start, bar.end, bar.name == "", bar.name)):
        drawn = _bar(bar.start, bar.end, num_blocks, columns, _FILL.get(bar.state, "x"))
        tail = f"{bar.start}:{bar.end}".ljust(7) + f" {bar.state} {bar.note}".rstrip()
        lines.append((f"{bar.name:<{width}}  {drawn}  {tail}", bar.state))
    return lines


def replica_runs(replicas: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of blocks with equally many replicas: start, end, count."""
    runs: list[tuple[int, int, int]] = []
    for block, count in enumerate(replicas):
        if runs and runs[-1][2] == count:
            runs[-1] = (runs[-1][0], block + 1, count)
        else:
            runs.append((block, block + 1, count))
    return runs


def gaps(num_blocks: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs of blocks that no span covers."""
    found = []
    position = 0
    for start, end in sorted(spans):
        if start > position:
            found.append((position, min(start, num_blocks)))
        position = max(position, end)
    if position < num_blocks:
        found.append((position, num_blocks))
    return found


def short_peer(peer: str) -> str:
    """A peer id that people can tell from another: its end, since all begin alike."""
    return peer if len(peer) <= 12 else f"{peer[:4]}…{peer[-6:]}"


def _bar(start: int, end: int, num_blocks: int, columns: int, fill: str) -> str:
    first = start * columns // num_blocks
    last = max(first + 1, end * columns // num_blocks)
    return (" " * first + fill * (last - first)).ljust(columns)


def _scale(num_blocks: int, columns: int) -> str:
    """Block numbers over the columns where they begin."""
    step = max(1, -(-num_blocks // 6))
    line = ""
    for block in range(0, num_blocks, step):
        line = line.ljust(block * columns // num_blocks) + str(block)
    return (line.ljust(columns - len(str(num_blocks))) + str(num_blocks)).ljust(columns)
