"""Who has to send what again, so that every hop holds all that is committed. Pure.

Hops that lack something form runs; the nearest hop above a run that still has the history replays through
the whole run, and if none has it, the client does (DESIGN, repair).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

CLIENT: Final = -1  # the index of the client as a source


@dataclass(frozen=True, slots=True)
class Holding:
    """What a hop said when it was linked: see `steps.Linked`. complete: nothing is missing."""

    held: tuple[int, ...]
    history_from: tuple[int, ...]
    complete: bool

    @classmethod
    def of(cls, held: tuple[int, ...], history_from: tuple[int, ...], lengths: tuple[int, ...]) -> Holding:
        """From a hop's answer. A hop without the base's table says zeros, which is complete for no table
        but the empty one: rows without tokens have to be made, too."""
        return cls(held, history_from, held == lengths and (any(lengths) or not lengths))

    def after(self, starts: tuple[int, ...], lengths: tuple[int, ...]) -> Holding:
        """What the hop holds once it took part in a replay."""
        history = tuple(min(first, start) for first, start in zip(self.history_from, starts, strict=True))
        return Holding(lengths, history, True)


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """Hop `source` (or the client) sends positions from `starts` on, through all hops up to `last`."""

    source: int
    last: int
    starts: tuple[int, ...]

    @property
    def num_hops(self) -> int:
        """How many hops the replay passes below its source."""
        return self.last - self.source


def next_replay(
    lengths: tuple[int, ...], holdings: Sequence[Holding], refused: Collection[int]
) -> ReplayPlan | None:
    """The replay that is needed first, from upstream; None if every hop is complete.

    lengths: tokens of each committed row. refused: hops that turned out not to have their history.
    """
    first = next((i for i, holding in enumerate(holdings) if not holding.complete), None)
    if first is None:
        return None
    last = first
    while last + 1 < len(holdings) and not holdings[last + 1].complete:
        last += 1
    run = holdings[first : last + 1]
    starts = tuple(min(holding.held[row] for holding in run) for row in range(len(lengths)))
    for source in range(first - 1, CLIENT, -1):
        if source not in refused and _has(holdings[source], starts, lengths):
            return ReplayPlan(source, last, starts)
    return ReplayPlan(CLIENT, last, starts)


def _has(holding: Holding, starts: tuple[int, ...], lengths: tuple[int, ...]) -> bool:
    return all(
        start >= length or first <= start
        for first, start, length in zip(holding.history_from, starts, lengths, strict=True)
    )
