"""Where others see us, and what their words together are worth. Pure.

Each greeting tells the other side where it is seen. Any one of them may lie, so an address counts only when
observers at several places tell the same. Ports seen by those whom we dialled from our listening port show
what a NAT makes of that port: one for all, or another for each. Source: RFC 5780, section 4.3;
https://github.com/libp2p/specs/blob/master/identify/README.md (observedAddr).
"""

from __future__ import annotations

import ipaddress
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ..dialling import Reach, reach_of

QUORUM: Final = 2  # observers at different places; one alone decides nothing


class Nat(StrEnum):
    """What stands between us and the world. Source of the words: RFC 4787, section 4.1."""

    UNKNOWN = "unknown"
    NONE = "none"
    ENDPOINT_INDEPENDENT = "endpoint-independent"  # one mapped port for all
    SYMMETRIC = "symmetric"  # another for each


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one peer says. place: of the observer, see `place_of`; address: where it sees us.

    is_mapping: whether we dialled it from the port on which we listen, so that the address shows the mapping of
    that port. Otherwise it dialled us there.
    """

    place: str
    address: str
    is_mapping: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """What several sightings come to. addresses: those that a quorum tells, the most often told first."""

    addresses: tuple[str, ...] = ()
    nat: Nat = Nat.UNKNOWN


def place_of(address: str) -> str:
    """Where an observer is, so that many peers at one place count once: its IPv4 address, or its IPv6 /64.

    "" for an address that is no public one: who is near us sees another side of us than the world does.
    """
    parts = address.split("/")
    if reach_of(address) is not Reach.PUBLIC or len(parts) < 3:
        return ""
    try:
        ip = ipaddress.ip_address(parts[2])
    except ValueError:
        return ""
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def endpoint_of(address: str) -> tuple[str, int] | None:
    """IP address and TCP port of a plain `/ip4/…/tcp/…` or `/ip6/…/tcp/…`; None for anything else."""
    parts = address.split("/")
    if len(parts) != 5 or parts[0] or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
        return None
    try:
        ip = ipaddress.ip_address(parts[2])
    except ValueError:
        return None
    fits = f"ip{ip.version}" == parts[1] and parts[4].isdecimal() and 0 < int(parts[4]) < 65536
    return (str(ip), int(parts[4])) if fits else None


def combine(sightings: Sequence[Sighting], own: Collection[str]) -> Seen:
    """What these sightings, one of each peer, come to. own: addresses of our own interfaces.

    One liar can neither make us believe an address nor make us doubt one that two others tell.
    """
    places: defaultdict[str, set[str]] = defaultdict(set)
    for sighting in sightings:
        if sighting.place and endpoint_of(sighting.address) and reach_of(sighting.address) is Reach.PUBLIC:
            places[sighting.address].add(sighting.place)
    told = sorted(places, key=lambda address: (-len(places[address]), address))
    believed = tuple(address for address in told if len(places[address]) >= QUORUM)
    return Seen(believed, _nat([one for one in sightings if one.place], believed, own))


def _nat(sightings: Sequence[Sighting], believed: Sequence[str], own: Collection[str]) -> Nat:
    """The kind of NAT, of IPv4 alone: IPv6 has firewalls, and seldom NATs."""
    own_ips = {endpoint[0] for address in own if (endpoint := endpoint_of(address))}
    if any((endpoint := endpoint_of(address)) and endpoint[0] in own_ips for address in believed):
        return Nat.NONE
    mappings = {(one.place, one.address) for one in sightings if one.is_mapping and "/ip4/" in one.address}
    if len({place for place, _ in mappings}) < QUORUM:
        return Nat.UNKNOWN
    ((_, most),) = Counter(address for _, address in mappings).most_common(1)
    if most >= QUORUM and 2 * most > len(mappings):
        return Nat.ENDPOINT_INDEPENDENT
    return Nat.SYMMETRIC
