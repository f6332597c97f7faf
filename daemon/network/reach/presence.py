"""How others come to us: what we know of it, what we do about it, and what we tell.

It joins the parts that know or do: whereabouts, dial-backs, a router's forwarding, relays used and relaying
offered. It owns who is told when an address changes. Which connections stand, the network says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from ....protocol.views import ReachView
from ..dialling import Reachability
from ..seam import Network, Stream
from ..traffic import Traffic
from .forwarding import Forwarding
from .observations import Sighting
from .reaching import Doorbell, Reaching, Ring
from .relaying import RelayLimits, RelayService
from .relays import Relays, Upgrade
from .whereabouts import Whereabouts


@dataclass(frozen=True, slots=True)
class Choices:
    """What the owner chose. announce: addresses to tell first. relay: what we carry for others; None is nothing.

    upnp: whether to ask our router for help.
    """

    announce: tuple[str, ...] = ()
    reachability: Reachability = Reachability.AUTO
    relay: RelayLimits | None = None
    upnp: bool = False


@dataclass(frozen=True, slots=True)
class Means:
    """What presence needs of its network. take: makes a connection of an inbound circuit.

    ring, came_in: as in `Doorbell`. traffic: counts what is carried, and for whom.
    """

    take: Upgrade
    ring: Ring
    came_in: Callable[[Stream], bool]
    traffic: Traffic


class Presence:
    """Of one network."""

    def __init__(self, network: Network, means: Means, choices: Choices) -> None:
        relay, where = choices.relay, Whereabouts(choices.announce, choices.reachability)
        self._network = network
        self._is_relay_wanted = relay.is_wanted if relay is not None else lambda: False
        self._listeners: list[Callable[[], None]] = []
        self.whereabouts: Final = where
        self.relays: Final = Relays(network, means.take, self.is_private, self._tell)
        self.relaying: Final = (
            RelayService(
                network,
                relay,
                means.traffic.relayed,
                is_offering=self._offers_relay,
                own_bytes=lambda: means.traffic.own_bytes,
            )
            if relay is not None
            else None
        )
        bell = Doorbell(means.ring, means.came_in, where.world, where.sightings)
        self._reaching = Reaching(network, bell, self._judged)
        self._forwarding = Forwarding(
            where.port, lambda: choices.upnp and where.wants_forwarding(), self._forwarded
        )

    def serve(self) -> None:
        """Answer others from now on."""
        self.relays.serve()
        if self.relaying is not None:
            self.relaying.serve()
        self._reaching.serve()
        self._network.on_peer(lambda peer, connected: self._reaching.stir())

    def start(self, nursery: trio.Nursery) -> None:
        """Find out how we are reached, and keep reservations where we need them."""
        nursery.start_soon(self.relays.run)
        nursery.start_soon(self._reaching.run)
        nursery.start_soon(self._forwarding.run)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener()` whenever `addresses` may be others than before."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Tell nobody any more."""
        self._listeners.clear()

    def seen_by(self, peer: str, sighting: Sighting) -> None:
        """A connected peer tells where it sees us."""
        has_moved = self.whereabouts.seen_by(peer, sighting)
        self._reaching.stir()
        self._forwarding.stir()
        if has_moved:
            self._tell()

    def is_private(self) -> bool:
        """Whether others cannot dial us, as far as is known."""
        return self.whereabouts.is_private(self._network.peers())

    def addresses(self) -> tuple[str, ...]:
        """Where others may reach us, best first, without `/p2p/…` of ours."""
        return self.whereabouts.all(self.relays.addresses(), is_private=self.is_private())

    def doors(self) -> tuple[str, ...]:
        """Where one may try to come through who opens our NAT together with us."""
        return self.whereabouts.doors(self.relays.observed())

    def view(self) -> ReachView:
        """All of it, for people."""
        where, relaying = self.whereabouts, self.relaying
        seen = where.seen()
        return ReachView(
            where.reachability(),
            configured=where.is_configured,
            nat=seen.nat,
            observed=seen.addresses,
            proven=where.proven,
            mapped=self._forwarding.addresses,
            relays=self.relays.uses(),
            offers_relay=relaying is not None and self._offers_relay(),
            num_reservations=relaying.num_reservations if relaying is not None else 0,
            num_circuits=relaying.num_circuits if relaying is not None else 0,
            listening=where.listening,
        )

    def _offers_relay(self) -> bool:
        return self._is_relay_wanted() and not self.is_private()

    def _judged(self) -> None:
        self.whereabouts.judged(self._reaching.verdict)
        self.relays.stir()
        self._tell()

    def _forwarded(self) -> None:
        self.whereabouts.forwarded(self._forwarding.addresses)
        self._reaching.stir()

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()
