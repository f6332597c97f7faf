"""Looks at the network for `peers`, `netcheck` and `ping`: who is there, how, and how far.

It collects and measures; what is wrong is decided by `findings`. It changes nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Final

import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.netcheck import Netcheck, Pinged, PingPeer
from ...protocol.views import PeerView
from ..belonging.belonging import Belonging
from ..control import Ask, Handler, Reply
from ..network.dialling import split_peer
from ..network.pinging import ping
from ..network.seam import PeerView as Connection
from .findings import judge

if TYPE_CHECKING:
    from ..node import Node

# Addresses that are nobody's (RFC 5737, RFC 3849), asked only for the route that would be taken.
_BEYOND: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
_CIRCUIT: Final = "/p2p-circuit"


class NetworkChecks:
    """The handlers of these methods."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> Mapping[str, Handler]:
        """By the names of `protocol.control.METHODS`."""
        return {"peers": self.peers, "netcheck": self.netcheck, "ping": self.ping}

    async def peers(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        belonging = self._node.belonging
        return Reply(() if belonging is None else peer_views(belonging))

    async def netcheck(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        view = collect(self._node)
        return Reply(replace(view, findings=judge(view)))

    async def ping(self, ask: Ask) -> Reply:
        arguments: PingPeer = ask.arguments
        return Reply(await ping_peer(self._node.the_belonging(), arguments))


def collect(node: Node) -> Netcheck:
    """The network as this daemon sees it now, not judged yet."""
    config, belonging, problem = node.config, node.belonging, node.place.problem
    has_ipv4, has_ipv6 = (has_route(family, beyond) for family, beyond in _BEYOND)
    view = Netcheck(
        node.status().peer,
        swarm_problem=problem.message if problem is not None else "",
        swarm_remedy=problem.remedy if problem is not None else "",
        wanted=config.listen,
        has_ipv4=has_ipv4,
        has_ipv6=has_ipv6,
        wants_relay=config.relay,
    )
    if belonging is None:
        return view
    reach, peers = belonging.network.reach(), peer_views(belonging)
    clocks = [peer.clock_ahead_s for peer in peers if peer.clock_ahead_s is not None]
    return replace(
        view,
        swarm=belonging.swarm.name,
        listening=reach.listening,
        announced=belonging.network.addresses(),
        reach=reach,
        peers=peers,
        unreached=tuple(f"{address}: {why}" for address, why in belonging.membership.unreached()),
        clock_ahead_s=-median(clocks) if clocks else None,
        num_clocks=len(clocks),
    )


def has_route(family: int, beyond: str) -> bool:
    """Whether this machine has a route there. Nothing is sent: the system only looks it up."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((beyond, 9))
    except OSError:
        return False
    return True


def peer_views(belonging: Belonging) -> tuple[PeerView, ...]:
    """The members that we know: first those connected, then those heard of."""
    spans: dict[str, list[str]] = {}
    for span in belonging.routes.describe().spans:
        spans.setdefault(span.peer, []).append(f"{span.model} {span.start}:{span.end} {span.state}")
    live = {view.peer: view for view in belonging.network.peers()}
    members = {member.peer: member for member in belonging.membership.members()}
    known = {told.peer: told.addresses for told in belonging.membership.known()}
    views = []
    for peer in dict.fromkeys((*members, *known)):
        member, connection = members.get(peer), live.get(peer)
        view = PeerView(
            peer=peer,
            addresses=member.addresses if member is not None else tuple(known[peer]),
            connected=member is not None,
            version=member.version if member is not None else "",
            spans=tuple(spans.get(peer, ())),
            clock_ahead_s=member.clock_ahead_s if member is not None else None,
            unseen_s=belonging.membership.unseen_s(peer),
        )
        if connection is not None:
            view = replace(
                view,
                relayed=connection.relayed,
                rtt_s=connection.rtt_s,
                connection=connection.addresses,
                through=carrier(connection),
                inbound=connection.inbound,
            )
        views.append(view)
    return tuple(views)


def carrier(connection: Connection) -> str:
    """The relay that carries a connection; "" of a direct one, or if its address does not say."""
    if not connection.relayed:
        return ""
    ways = (address.partition(_CIRCUIT)[0] for address in connection.addresses if _CIRCUIT in address)
    return next((peer for way in ways if way and (peer := split_peer(way)[1])), "")


async def ping_peer(belonging: Belonging, asked: PingPeer) -> Pinged:
    """Measure the round trip to a member, over the live connection or a new one. Raises as `Daemon.ping` says."""
    network = belonging.network
    peer = find_peer(asked.peer, network.peer, [view.peer for view in peer_views(belonging)])
    try:
        rtts = await ping(network, peer, asked.count, timeout_s=asked.timeout_s)
    except CorollaError as problem:
        remedy = "it may be off or behind a NAT without a relay; daemonctl netcheck tells how this side is"
        raise error(problem.code, problem.message, problem.remedy or remedy, **problem.details) from problem
    connection = next((view for view in network.peers() if view.peer == peer), None)
    return Pinged(
        peer,
        rtts,
        min(rtts),
        median(rtts),
        relayed=connection is not None and connection.relayed,
        through=carrier(connection) if connection is not None else "",
        address=connection.addresses[0] if connection is not None and connection.addresses else "",
        lost=len(rtts) < asked.count,
    )


def find_peer(wanted: str, ours: str, known: list[str]) -> str:
    """The peer meant by an id or by its end, such as `daemonctl` shortens ids to. Raises `BAD_REQUEST`."""
    end = wanted.rpartition("…")[2]
    found = [peer for peer in (ours, *known) if peer == wanted or (end and peer.endswith(end))]
    if wanted in found:
        found = [wanted]
    if not found:
        raise error(
            Code.BAD_REQUEST,
            f"no member {wanted!r} is known here, of {len(known)}",
            "daemonctl peers lists those that are",
        )
    if len(found) > 1:
        raise error(Code.BAD_REQUEST, f"{wanted!r} may be any of {', '.join(found[:5])}", "give the whole id")
    if found == [ours]:
        raise error(Code.BAD_REQUEST, f"{wanted!r} is this daemon itself", "name another member")
    return found[0]
