"""What this daemon did for others, counted by itself and kept over restarts. Nobody else is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Final

import trio

from ...protocol.errors import CorollaError
from ...protocol.views import Contribution
from ..network.traffic import Traffic
from ..store import Store
from ..tally import Tally
from .lending import Lending

COUNT_EVERY_S: Final = 5.0
SAVE_EVERY_S: Final = 60.0  # so much is lost by a kill


class Contributing:
    """Counts while `run` runs; the sums of all runs lie in the store. tally, traffic: what this run did so far."""

    def __init__(
        self,
        lending: Lending,
        store: Store,
        on_event: Callable[[str, str], None],
        tally: Tally,
        traffic: Traffic,
    ) -> None:
        self._lending = lending
        self._store = store
        self._on_event = on_event
        self._tally = tally
        self._traffic = traffic
        before = store.load_contribution()
        self._before = Contribution(
            int(before.get("block_tokens", 0)),
            before.get("lending_s", 0.0),
            int(before.get("training_tokens", 0)),
            int(before.get("relayed_bytes", 0)),
        )
        self._lending_s = 0.0

    def so_far(self) -> Contribution:
        """In all runs."""
        before, tally = self._before, self._tally
        return Contribution(
            before.block_tokens + tally.block_tokens,
            before.lending_s + self._lending_s,
            before.training_tokens + tally.training_tokens,
            before.relayed_bytes + self._traffic.relayed_bytes,
        )

    async def run(self) -> None:
        """Count until cancelled."""
        saved_at = counted_at = trio.current_time()
        while True:
            await trio.sleep(COUNT_EVERY_S)
            now = trio.current_time()
            if self._lending.belonging is not None and self._lending.serving():
                self._lending_s += now - counted_at
            counted_at = now
            if now - saved_at >= SAVE_EVERY_S:
                saved_at = now
                self.save()

    def save(self) -> None:
        """Remember it now."""
        try:
            self._store.save_contribution(asdict(self.so_far()))
        except CorollaError as problem:
            self._on_event("store_failed", str(problem))
