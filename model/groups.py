"""Which blocks share the pages of one table: those that look equally far back. Pure.

A row's page in a block with a window can be let go of once the window has passed it, while blocks without one
still need theirs. So blocks fall into groups by their windows, each with page tables of its own. All groups take
their pages from one pool, so a page has the same size in each: every group has the same number of blocks, and a
kind of block that has more of them makes up several groups.

Source: the hybrid cache of vLLM (v1/core/kv_cache_utils.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Final

_MOST_GROUPS: Final = 8  # each is one more table to lay out in every pass
_MOST_WASTE: Final = 1 / 8  # of a page's bytes, in groups that are not full


@dataclass(frozen=True, slots=True)
class Grouping:
    """windows: of each group; None attends everything. places: block → its group, and its place in a page of it.

    size: places in a page.
    """

    windows: tuple[int | None, ...]
    places: Mapping[int, tuple[int, int]]
    size: int

    @classmethod
    def whole(cls, blocks: tuple[int, ...], window: int | None = None) -> Grouping:
        """One group of all blocks."""
        return cls((window,), {block: (0, place) for place, block in enumerate(blocks)}, max(len(blocks), 1))

    @property
    def num_groups(self) -> int:
        """Pages that each page's worth of a row's tokens takes, before any is let go of."""
        return len(self.windows)

    def num_most(self, num_tokens: int, page_tokens: int, slack_tokens: int) -> int:
        """Pages that a row of so many tokens comes to hold. slack_tokens: that lie around a window at most."""
        whole = -(-num_tokens // page_tokens)
        return sum(
            whole if window is None else min(whole, -(-(window + slack_tokens) // page_tokens) + 1)
            for window in self.windows
        )


def grouped(windows: Mapping[int, int | None], shapes: Mapping[int, Hashable]) -> Grouping:
    """The grouping of blocks with these windows; blocks of different shapes share one group, and keep everything."""
    blocks = tuple(windows)
    kinds: dict[int | None, list[int]] = {}
    for block, window in windows.items():
        kinds.setdefault(window, []).append(block)
    if len(kinds) < 2:
        return Grouping.whole(blocks, next(iter(kinds), None))
    if len(set(shapes.values())) > 1:
        return Grouping.whole(blocks)
    sizes = {size: _num_groups(kinds, size) for size in range(1, len(blocks))}
    fitting = {size: num for size, num in sizes.items() if num <= _MOST_GROUPS}
    size = min(fitting, key=lambda size: (fitting[size] * size, -size), default=0)
    if not size or fitting[size] * size > len(blocks) * (1 + _MOST_WASTE):
        return Grouping.whole(blocks)
    places: dict[int, tuple[int, int]] = {}
    groups: list[int | None] = []
    for window in sorted(kinds, key=lambda window: (window is not None, window or 0)):
        for index, block in enumerate(kinds[window]):
            if index % size == 0:
                groups.append(window)
            places[block] = len(groups) - 1, index % size
    return Grouping(tuple(groups), places, size)


def _num_groups(kinds: Mapping[int | None, list[int]], size: int) -> int:
    return sum(-(-len(blocks) // size) for blocks in kinds.values())
