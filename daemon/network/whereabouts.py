"""Where we are: the addresses that we tell others, and whether they can dial us there. No I/O.

What is known of it comes from outside: where we listen, what the owner announces, who called us, and who is
connected and how.
"""

from __future__ import annotations

from collections.abc import Sequence

from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr

from ...protocol.limits import MAX_ADDRESSES
from ...protocol.punch import Doors
from .dialling import Reach, Reachability, reach_of, split_peer
from .seam import PeerView


class Whereabouts:
    """Of one network. announce: addresses to tell first, such as a forwarded port."""

    def __init__(self, announce: Sequence[str], reachability: Reachability) -> None:
        self._announce = tuple(split_peer(address)[0] for address in announce)
        self._reachability = reachability
        self._bound: tuple[Multiaddr, ...] = ()
        self._was_called = False

    def listens_on(self, bound: Sequence[Multiaddr]) -> None:
        """These are our listeners, with real ports."""
        self._bound = tuple(bound)

    def called_from(self, addresses: Sequence[str]) -> None:
        """Somebody dialled us from there. Through a relay, or in our own network, that proves nothing."""
        self._was_called |= any(reach_of(address) is Reach.PUBLIC for address in addresses)

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

    def all(self, relayed: Sequence[str]) -> tuple[str, ...]:
        """What to tell others, best first: relayed addresses stand behind the public ones."""
        direct = self.direct()
        public = [address for address in direct if reach_of(address) is Reach.PUBLIC]
        return tuple(dict.fromkeys((*self._announce, *public, *relayed, *direct)))

    def doors(self, observed: Sequence[str], *, is_private: bool) -> Doors:
        """Where another may try to come through. observed: where our relays see us."""
        public = [address for address in self.direct() if reach_of(address) is Reach.PUBLIC]
        seen = dict.fromkeys((*public, *observed))
        return Doors(tuple(seen)[:MAX_ADDRESSES], is_open=bool(public) and not is_private)


def _distance_outwards(address: str) -> int:
    if reach_of(address) is Reach.NEAR:
        return 2 if "/127." in address or "/::1/" in address else 1
    return 0 if reach_of(address) is Reach.PUBLIC else 3
