"""What this daemon did for others, counted by itself and kept over restarts. Nobody else is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from ..protocol.errors import CorollaError
from ..protocol.views import Contribution
from .lending import Lending
from .serving.peers import HopService
from .store import Store

COUNT_EVERY_S: Final = 5.0
SAVE_EVERY_S: Final = 60.0  # so much is lost by a kill


class Contributing:
    """Counts while `run` runs; the sums of all runs lie in the store."""

    def __init__(self, lending: Lending, store: Store, on_event: Callable[[str, str], None]) -> None:
        self._lending = lending
        self._store = store
        self._on_event = on_event
        before = store.load_contribution()
        self._block_tokens = int(before.get("block_tokens", 0))
        self._lending_s = before.get("lending_s", 0.0)
        self._counted: tuple[HopService | None, int] = (None, 0)  # by whom, how far

    def so_far(self) -> Contribution:
        """In all runs."""
        self._count_tokens()
        return Contribution(self._block_tokens, self._lending_s)

    async def run(self) -> None:
        """Count until cancelled."""
        saved_at = counted_at = trio.current_time()
        while True:
            await trio.sleep(COUNT_EVERY_S)
            now = trio.current_time()
            if self._lending.belonging is not None and self._lending.serving():
                self._lending_s += now - counted_at
            counted_at = now
            self._count_tokens()
            if now - saved_at >= SAVE_EVERY_S:
                saved_at = now
                self.save()

    def save(self) -> None:
        """Remember it now."""
        sums = self.so_far()
        try:
            self._store.save_contribution({"block_tokens": sums.block_tokens, "lending_s": sums.lending_s})
        except CorollaError as problem:
            self._on_event("store_failed", str(problem))

    def _count_tokens(self) -> None:
        belonging = self._lending.belonging
        if belonging is None:
            return
        service, before = self._counted
        done = belonging.hops.statistics().block_tokens
        self._block_tokens += done - (before if service is belonging.hops else 0)
        self._counted = (belonging.hops, done)
