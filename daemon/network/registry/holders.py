"""Who holds what: with whom the records under a key are stored, and of whom they are asked.

In a small swarm every member holds everything, so that news arrives by itself; in a large one the holders of a
key are the dialable peers nearest to it (Maymounkov and Mazières 2002, Kademlia), looked up again after a while
and whenever one of them fails. It owns what was looked up. It reads no record and sends none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Final

import anyio

from ....protocol.limits import HOLDERS_PER_KEY
from ....protocol.registry import Entry
from ..members.membership import Membership
from ..seam import Network

SMALL_SWARM: Final = 16  # members, with us: up to here every member holds every record
HOLDERS_TTL_S: Final = 600.0
MAX_ASKING: Final = 16  # keys looked up at once


class Holders:
    """Of one member's registry. clock: in seconds."""

    def __init__(self, network: Network, membership: Membership, clock: Callable[[], float]) -> None:
        self._network = network
        self._membership = membership
        self._clock = clock
        self._found: dict[bytes, tuple[tuple[str, ...], float]] = {}  # of a key: who, and when looked up

    @property
    def are_all(self) -> bool:
        """Whether the swarm is so small that every member holds everything."""
        return self._membership.num_known + 1 <= SMALL_SWARM

    def of(self, key: bytes) -> tuple[str, ...]:
        """Whom a key's records are stored with and asked of, without us."""
        if self.are_all:
            return tuple(member.peer for member in self._membership.members())
        return self._found.get(key, ((), 0.0))[0]

    def address(self, entries: Iterable[Entry]) -> dict[str, list[Entry]]:
        """What goes to whom: each holder gets an entry once, with those of its keys that it shall hold."""
        outbox: dict[str, list[Entry]] = {}
        for entry in entries:
            by_holder: dict[str, list[bytes]] = {}
            for key in entry.keys:
                for holder in self.of(key):
                    by_holder.setdefault(holder, []).append(key)
            for holder, keys in by_holder.items():
                outbox.setdefault(holder, []).append(dataclasses.replace(entry, keys=tuple(keys)))
        return outbox

    async def find(self, keys: Iterable[bytes]) -> None:
        """Look up the holders of keys whose holders are not known, or have not been looked up for long."""
        if self.are_all:
            return
        now = self._clock()
        limiter = anyio.CapacityLimiter(MAX_ASKING)

        async def look_up(key: bytes) -> None:
            async with limiter:
                peers = await self._network.closest_peers(key, HOLDERS_PER_KEY)
            if peers:
                self._found[key] = (peers, now)

        async with anyio.create_task_group() as tasks:
            for key in keys:
                holders, looked_at = self._found.get(key, ((), 0.0))
                if not holders or now - looked_at > HOLDERS_TTL_S:
                    tasks.start_soon(look_up, key)

    def failed(self, holder: str) -> None:
        """Look the holders of its keys up again."""
        self._found = {key: item for key, item in self._found.items() if holder not in item[0]}
