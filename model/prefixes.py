"""Pages of what sessions began with, kept so that later ones of the same user need not compute them again. Pure.

A page is known by a name that stands for everything before its end, so that a chain of names is a prefix. Names
come from the daemon, which has mixed the user, the adapter, the encoding and the blocks into them: whoever knows a
name may read the page. The cache holds its pages as any session does, and gives them back, those used longest ago
first, before any session has to make room.

Source: Kwon et al. 2023, PagedAttention, section 4.4, shared prefixes; the chain of hashes is vLLM's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from .pool import PagePool


class Prefixes:
    """Name → the page of each group of blocks. It holds each of them once."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()  # used longest ago first

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, name: bytes) -> bool:
        return name in self._pages

    def keep(self, names: Sequence[bytes], pages: Mapping[bytes, tuple[int, ...]]) -> None:
        """Hold full pages under their names, where none is held yet. names: the whole chain, which counts as used."""
        for name, page in pages.items():
            if name not in self._pages:
                self._pool.hold(page)
                self._pool.share(page)
                self._pages[name] = page
        self._use(names)

    def longest(self, names: Iterable[bytes], most: int) -> tuple[tuple[int, ...], ...]:
        """The pages of the longest prefix that is here, at most `most`, of each group of blocks; they count as used."""
        found: list[bytes] = []
        for name in names:
            if len(found) >= most or name not in self._pages:
                break
            found.append(name)
        self._use(found)
        return tuple(zip(*(self._pages[name] for name in found), strict=True))

    def give_back(self, num_wanted: int) -> None:
        """Let go of pages until so many more are free, or none is left that no session holds."""
        num_wanted += self._pool.num_free
        for name, pages in tuple(self._pages.items()):
            if self._pool.num_free >= num_wanted:
                return
            if any(self._pool.holders(page) == 1 for page in pages):
                self._pool.release(self._pages.pop(name))

    def _use(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):  # what comes later is worth nothing without what comes before
            if name in self._pages:
                self._pages.move_to_end(name)
