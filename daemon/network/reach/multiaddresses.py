"""Multiaddresses as bytes, which is how libp2p's messages carry them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from multiaddr import Multiaddr

from ....protocol.limits import MAX_NAME_CHARS
from ..dialling import Reach, reach_of
from .observations import endpoint_of


def packed(addresses: Iterable[str]) -> list[bytes]:
    """As bytes; these are our own addresses, so they can be read."""
    return [Multiaddr(address).to_bytes() for address in addresses]


def unpacked(data: bytes) -> str:
    """As text; "" for what is too long or unreadable, such as a transport unknown here."""
    if not 0 < len(data) <= MAX_NAME_CHARS:
        return ""
    try:
        return str(Multiaddr(data))
    except Exception:  # each part of an address has error types of its own
        return ""


def public_endpoints(addresses: Iterable[str]) -> tuple[str, ...]:
    """Those that are plain TCP over a public IP: no relays, no names, nothing in anybody's own network."""
    found = (a for a in addresses if endpoint_of(a) is not None and reach_of(a) is Reach.PUBLIC)
    return tuple(dict.fromkeys(found))
