"""Where we are: the addresses that we tell others, and whether they can dial us there. No I/O.

What is known of it comes from outside: where we listen, what the owner announces, where others see us, whether
they could dial us there, and who is connected and how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from libp2p.utils.address_validation import expand_wildcard_address
from multiaddr import Multiaddr

from ....protocol.limits import MAX_ADDRESSES
from ..dialling import Reach, Reachability, reach_of, split_peer
from ..seam import PeerView
from .observations import Seen, Sighting, combine, endpoint_of
from .proofs import Verdict

MAX_IPV6_FIRST: Final = 2  # of a machine's many addresses: few are told of all, and others have to find room


class Whereabouts:
    """Of one network. announce: addresses to tell first, such as a forwarded port."""

    def __init__(self, announce: Sequence[str], reachability: Reachability) -> None:
        self._announce = tuple(split_peer(address)[0] for address in announce)
        self._reachability = reachability
        self._bound: tuple[Multiaddr, ...] = ()
        self._sightings: dict[str, Sighting] = {}  # by the peer that says so, while it is connected
        self._verdict = Verdict()
        self._forwarded: tuple[str, ...] = ()

    def listens_on(self, bound: Sequence[Multiaddr]) -> None:
        """These are our listeners, with real ports."""
        self._bound = tuple(bound)

    @property
    def listening(self) -> tuple[str, ...]:
        """Our listeners, as multiaddresses."""
        return tuple(str(bound) for bound in self._bound)

    def judged(self, verdict: Verdict) -> None:
        """What came of others' dialling us back."""
        self._verdict = verdict

    def forwarded(self, addresses: Sequence[str]) -> None:
        """Where a router takes calls for us, as it says."""
        self._forwarded = tuple(addresses)

    def port(self) -> int | None:
        """On which we listen for others of our network; None if for this machine's alone."""
        endpoints = [endpoint_of(str(bound)) for bound in self._bound if str(bound).startswith("/ip4/")]
        ports = [endpoint[1] for endpoint in endpoints if endpoint and not endpoint[0].startswith("127.")]
        return ports[0] if ports else None

    def wants_forwarding(self) -> bool:
        """Whether a router's help could make us reachable: the world sees us, and nobody has dialled us back."""
        is_seen = any(sighting.place for sighting in self._sightings.values())
        has_public = any(a.startswith("/ip4/") and reach_of(a) is Reach.PUBLIC for a in self.direct())
        return is_seen and not (self.is_configured or has_public or self._verdict.is_public)

    @property
    def is_configured(self) -> bool:
        """Whether the owner said how we are reached."""
        return self._reachability is not Reachability.AUTO or bool(self._announce)

    @property
    def proven(self) -> tuple[str, ...]:
        """Our addresses at which others dialled us back."""
        return self._verdict.proven

    def reachability(self) -> str:
        """`public`, `private` or `unknown`, as the owner says or as others found."""
        if self._reachability is not Reachability.AUTO:
            return self._reachability.value
        is_public = True if self._announce else self._verdict.is_public
        return "unknown" if is_public is None else "public" if is_public else "private"

    def is_private(self, peers: Sequence[PeerView]) -> bool:
        """Whether others have to come to us through relays.

        So it is held of one who dials out into the world, until somebody has dialled it back.
        """
        known = self.reachability()
        if known != "unknown":
            return known == "private"
        return bool(self._bound) and any(
            reach_of(address) is Reach.PUBLIC and not (view.relayed or view.inbound)
            for view in peers
            for address in view.addresses
        )

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

    def sightings(self) -> Mapping[str, Sighting]:
        """Where each connected peer sees us."""
        return dict(self._sightings)

    def world(self) -> tuple[str, ...]:
        """The public addresses that we know ourselves: announced ones, of our interfaces and from our router."""
        return tuple(a for a in (*self.direct(), *self._forwarded) if reach_of(a) is Reach.PUBLIC)

    def direct(self) -> tuple[str, ...]:
        """Announced addresses, then ours: public ones, those in our network, those on this machine."""
        found: dict[str, None] = {}
        for bound in self._bound:
            found.update(dict.fromkeys(str(address) for address in expand_wildcard_address(bound)))
        return (*self._announce, *sorted(found, key=_distance_outwards))

    def all(self, relayed: Sequence[str], *, is_private: bool) -> tuple[str, ...]:
        """What to tell others, best first: announced and proven addresses, other public ones, relayed ones, near ones.

        Where others see us is told if they can dial us there; our own public addresses unless they tried in vain.
        """
        direct = [address for address in self.direct() if self._may_be_dialled(address)]
        public = [address for address in direct if reach_of(address) is Reach.PUBLIC]
        four = [address for address in public if not address.startswith("/ip6/")]
        six = [address for address in public if address.startswith("/ip6/")][:MAX_IPV6_FIRST]
        seen = () if is_private or self._announce or self.proven else self.seen().addresses
        return tuple(dict.fromkeys((*self._announce, *self.proven, *four, *six, *seen, *relayed, *direct)))

    def doors(self, told: Sequence[str]) -> tuple[str, ...]:
        """Where another may try to come through. told: where each of our relays sees us.

        One relay's word suffices here: what comes of a lie is a door that does not open.
        """
        return tuple(dict.fromkeys((*self.world(), *self.seen().addresses, *told)))[:MAX_ADDRESSES]

    def _may_be_dialled(self, address: str) -> bool:
        """Whether there is hope for an address of ours, as far as others have found."""
        if self.is_configured or reach_of(address) is not Reach.PUBLIC or address in self.proven:
            return True
        return self._verdict.is_public is not False and address not in self._verdict.vain


def _distance_outwards(address: str) -> tuple[int, bool]:
    """Of equals, IPv4 first: everybody has it."""
    is_six = address.startswith("/ip6/")
    if reach_of(address) is Reach.NEAR:
        return 2 if "/127." in address or "/::1/" in address else 1, is_six
    return 0 if reach_of(address) is Reach.PUBLIC else 3, is_six
