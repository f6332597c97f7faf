"""Members of our swarm in the same local network, found by multicast DNS.

It owns our entry there and what it heard of others', and believes none of it: whoever is heard of is dialled, and
the handshake shows whether it belongs to the swarm. The entry names our peer id, our addresses and a hash of the
swarm's id, by which others see that it is theirs. The library `zeroconf` runs in threads of its own.
Source: RFC 6762 and 6763; https://github.com/libp2p/specs/blob/master/discovery/mdns.md for the idea. Not its
records: their service is everybody's, and a daemon would dial every libp2p program in the house.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import structlog
import trio
from anyio import to_thread
from zeroconf import InterfaceChoice, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from ....protocol.limits import MAX_ADDRESSES_TOLD, MAX_NAME_CHARS
from ....protocol.registry import PeerAddresses
from ..dialling import split_peer
from ..seam import Network
from .observations import endpoint_of

SERVICE: Final = "_corolla._tcp.local."
MAX_NEIGHBOURS: Final = 64  # heard of in one run; a house has fewer, and a prankster gets no further
MAX_WAITING: Final = 64  # names that wait to be looked up
LOOK_UP_S: Final = 3.0
CLOSE_S: Final = 2.0  # for saying good-bye
_SWARM: Final = b"s"

_log = structlog.get_logger("corolla.neighbours")


class Neighbours:
    """Of one network in one swarm. heard: told of each member that may be there.

    interfaces: IP addresses of those to use; none is all.
    """

    def __init__(
        self,
        network: Network,
        swarm_id: str,
        heard: Callable[[PeerAddresses], None],
        *,
        interfaces: Sequence[str] = (),
    ) -> None:
        self._network = network
        self._swarm_id = swarm_id
        self._heard = heard
        self._interfaces = tuple(interfaces)
        self._peers: set[str] = set()  # heard of
        self._moved = trio.Event()

    async def run(self) -> None:
        """Tell of us and listen for others until cancelled; ends where there is no multicast."""
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL + 1)  # others' malformed packets
        interfaces = list(self._interfaces) if self._interfaces else InterfaceChoice.All
        try:
            zeroconf = await to_thread.run_sync(partial(Zeroconf, interfaces=interfaces))
        except OSError as problem:
            _log.info("mdns_off", reason=str(problem))
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, zeroconf)
                nursery.start_soon(self._listen, zeroconf)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
                await to_thread.run_sync(zeroconf.close, abandon_on_cancel=True)

    async def _tell(self, zeroconf: Zeroconf) -> None:
        """Keep our entry, with the addresses of the moment."""
        self._network.on_addresses(lambda: self._moved.set())
        told: ServiceInfo | None = None
        while True:
            self._moved = trio.Event()
            entry = entry_of(self._network.peer, self._swarm_id, self._network.addresses())
            if entry is not None and entry != told:
                change = partial(zeroconf.register_service, entry, cooperating_responders=True)
                if told is not None:
                    change = partial(zeroconf.update_service, entry)
                await to_thread.run_sync(change, abandon_on_cancel=True)
                told = entry
            await self._moved.wait()

    async def _listen(self, zeroconf: Zeroconf) -> None:
        names, waiting = trio.open_memory_channel[str](MAX_WAITING)
        loop = trio.lowlevel.current_trio_token()

        def offer(name: str) -> None:
            try:
                names.send_nowait(name)
            except trio.WouldBlock:
                _log.debug("neighbour_passed_over", name=name)  # it tells of itself again

        def changed(
            zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
        ) -> None:
            if state_change is ServiceStateChange.Removed:
                return
            try:
                loop.run_sync_soon(offer, name)
            except trio.RunFinishedError:
                _log.debug("neighbour_too_late", name=name)

        browse = partial(ServiceBrowser, zeroconf, SERVICE, handlers=[changed])
        await to_thread.run_sync(browse, abandon_on_cancel=True)
        async for name in waiting:
            look_up = partial(zeroconf.get_service_info, SERVICE, name, timeout=int(1000 * LOOK_UP_S))
            entry = await to_thread.run_sync(look_up, abandon_on_cancel=True)
            if entry is not None:
                self.take(entry)

    def take(self, entry: ServiceInfo) -> None:
        """Somebody's entry: told on, if it is a member's."""
        told = member_of(entry, self._swarm_id)
        if told is None or told.peer == self._network.peer:
            return
        if told.peer not in self._peers and len(self._peers) >= MAX_NEIGHBOURS:
            return
        self._peers.add(told.peer)
        _log.debug("neighbour", peer=told.peer, addresses=told.addresses)
        self._heard(told)


def entry_of(peer: str, swarm_id: str, addresses: Sequence[str]) -> ServiceInfo | None:
    """What we tell of ourselves; None without an address at which neighbours could dial us."""
    endpoints = {bare: e for a in addresses if (e := endpoint_of(bare := split_peer(a)[0])) is not None}
    told = sorted(endpoints, key=lambda a: not ipaddress.ip_address(endpoints[a][0]).is_private)
    told = told[:MAX_ADDRESSES_TOLD]
    if not told:
        return None
    properties = {_SWARM: _tag(swarm_id), **{b"a%d" % n: a.encode() for n, a in enumerate(told)}}
    return ServiceInfo(
        SERVICE,
        f"{peer}.{SERVICE}",
        port=endpoints[told[0]][1],
        properties=properties,
        server=f"{peer}.local.",
        parsed_addresses=[endpoints[address][0] for address in told],
    )


def member_of(entry: ServiceInfo, swarm_id: str) -> PeerAddresses | None:
    """Whom an entry tells of, and where; None if it is of another swarm, or makes no sense."""
    peer = entry.name.removesuffix(f".{SERVICE}")
    if entry.properties.get(_SWARM) != _tag(swarm_id) or not peer.isalnum() or len(peer) > MAX_NAME_CHARS:
        return None
    values = (entry.properties.get(b"a%d" % number) for number in range(MAX_ADDRESSES_TOLD))
    found = [value.decode("ascii", "replace") for value in values if value]
    told = tuple(f"{address}/p2p/{peer}" for address in found if endpoint_of(address) is not None)
    return PeerAddresses(peer, told) if told else None


def listens_beyond(addresses: Sequence[str]) -> bool:
    """Whether a daemon that listens there can have neighbours at all: not one on loopback alone."""
    endpoints = [endpoint_of(split_peer(address)[0]) for address in addresses]
    return any(not ipaddress.ip_address(endpoint[0]).is_loopback for endpoint in endpoints if endpoint)


def _tag(swarm_id: str) -> bytes:
    """By which members know their swarm, and others learn nothing."""
    return hashlib.sha256(b"corolla mdns " + swarm_id.encode()).hexdigest()[:32].encode()
