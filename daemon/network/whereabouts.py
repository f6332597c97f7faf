"""Where we are: the addresses that we tell others, and whether they can dial us there. No I/O.

What is known of it comes from outside: where we listen, what the owner announces, who called us, where others
see us, and who is connected and how.
"""

from __future__ import annotations

from collections.abc import Sequence

from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr

from ...protocol.limits import MAX_ADDRESSES
from ...protocol.punch import Doors
from .dialling import Reach, Reachability, reach_of, split_peer
from .observations import Seen, Sighting, combine
from .seam import PeerView


class Whereabouts:
    """Of one network. announce: addresses to tell first, such as a forwarded port."""

    def __init__(self, announce: Sequence[str], reachability: Reachability) -> None:
        self._announce = tuple(split_peer(address)[0] for address in announce)
        self._reachability = reachability
        self._bound: tuple[Multiaddr, ...] = ()
        self._was_called = False
        self._sightings: dict[str, Sighting] = {}  # by the peer that says so, while it is connected

    def listens_on(self, bound: Sequence[Multiaddr]) -> None:
        """These are our listeners, with real ports."""
        self._bound = tuple(bound)

    def called_from(self, addresses: Sequence[str]) -> None:
        """Somebody dialled us from there. Through a relay, or in our own network, that proves nothing."""
        self._was_called |= any(reach_of(address) is Reach.PUBLIC for address in addresses)

    def seen_by(self, peer: str, sighting: Sighting) -> bool:
        """A connected peer tells where it sees us; whether we are seen at other addresses now."""
        before = set(self.seen().addresses)
        self._sightings[peer] = sighting
        return set(self.seen().addresses) != before

    def lost(self, peer: str) -> None:
        """A peer is gone, and with it what it saw: a NAT keeps a mapping no longer than its connections."""
        self._sightings.pop(peer, None)

    def seen(self) -> Seen:
        """Where others see us, and through which kind of NAT."""
        return combine(tuple(self._sightings.values()), self.direct())

    def is_private(self, peers: Sequence[PeerView]) -> bool:
        """Whether others cannot dial us, as far as is known: we dial out into the world, nobody dials in."""
        if self._reachability is not Reachability.AUTO:
            return self._reachability is Reachability.PRIVATE
        if self._announce or self._was_called or not self._bound:
            return False
        return any(
            reach_of(address) is Reach.PUBLIC and not (view.relayed or view.inbound)
            for view in peers
            for address in view.addresses
        )

    def direct(self) -> tuple[str, ...]:
        """Announced addresses, then ours: public ones, those in our network, those on this machine."""
        found: dict[str, None] = {}
        for bound in self._bound:
            found.update(dict.fromkeys(str(address) for address in expand_wildcard_address(bound)))
        return (*self._announce, *sorted(found, key=_distance_outwards))

    def all(self, relayed: Sequence[str], *, is_private: bool) -> tuple[str, ...]:
        """What to tell others, best first: relayed addresses stand behind the public ones.

        Where others see us is told if they can dial us there.
        """
        direct = self.direct()
        public = [address for address in direct if reach_of(address) is Reach.PUBLIC]
        observed = () if is_private or self._announce else self.seen().addresses
        return tuple(dict.fromkeys((*self._announce, *public, *observed, *relayed, *direct)))

    def doors(self, told: Sequence[str], *, is_private: bool) -> Doors:
        """Where another may try to come through. told: where each of our relays sees us.

        One relay's word suffices here: what comes of a lie is a door that does not open.
        """
        public = [address for address in self.direct() if reach_of(address) is Reach.PUBLIC]
        observed = self.seen().addresses
        found = dict.fromkeys((*public, *observed, *told))
        return Doors(tuple(found)[:MAX_ADDRESSES], is_open=bool(public or observed) and not is_private)


def _distance_outwards(address: str) -> int:
    if reach_of(address) is Reach.NEAR:
        return 2 if "/127." in address or "/::1/" in address else 1
    return 0 if reach_of(address) is Reach.PUBLIC else 3
