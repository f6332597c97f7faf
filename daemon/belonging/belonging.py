"""Our place in one swarm: its network, members, registry and routes, for as long as we belong to it.

It joins the parts and owns none of their decisions. Leaving withdraws our records before the network closes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Final

import anyio
import structlog

from ... import __version__
from ...protocol.errors import Code, CorollaError, error
from ...protocol.invitations import SwarmToken, encode_token
from ...protocol.registry import HELLO_PROTOCOL
from ..identity import Identity
from ..network.dialling import Reachability
from ..network.libp2p.network import open_network
from ..network.members.greeting import Swarm, discover_swarm
from ..network.members.membership import Membership
from ..network.members.roll import Roll, Standing
from ..network.reach.neighbours import Neighbours, listens_beyond
from ..network.reach.relaying import RelayLimits
from ..network.registry.registry import Registry
from ..network.seam import Network
from ..network.traffic import Traffic
from ..serving.peers import HopService
from ..serving.training import TrainingService
from ..swarm.blame import Ledger
from ..tally import Tally
from .routes import Routes

FAREWELL_S: Final = 2.0  # for withdrawing our records; who misses it sees them expire
MAX_TOKEN_ADDRESSES: Final = 4

_log = structlog.get_logger("corolla.belonging")


@dataclass(frozen=True, slots=True)
class Belonging:
    """The parts of one membership. over: set when it ends, before its network closes."""

    swarm: Swarm
    network: Network
    membership: Membership
    registry: Registry
    routes: Routes
    ledger: Ledger
    hops: HopService
    over: anyio.Event

    def left(self) -> CorollaError:
        """The error of what ends because the membership does."""
        return error(
            Code.SESSION_LOST,
            f"this daemon left swarm {self.swarm.name}",
            "ask again once it is back in a swarm: daemonctl status",
        )

    def token(self) -> str:
        """What others need to join; "" in an invited swarm, where each newcomer needs an invitation."""
        if self.membership.roll.charter is not None:
            return ""
        return encode_token(SwarmToken(self.swarm.swarm_id, self.swarm.name, self.introductions()))

    def introductions(self) -> tuple[str, ...]:
        """Addresses for a newcomer to ask: ours, then others', so that it gets in without us."""
        others = (member.addresses[0] for member in self.membership.members() if member.addresses)
        ours = self.network.addresses()[:MAX_TOKEN_ADDRESSES]
        return (*ours, *islice(others, MAX_TOKEN_ADDRESSES))

    def known_addresses(self) -> tuple[str, ...]:
        """Where members are, worth remembering for the next start."""
        told = [address for known in self.membership.known() for address in known.addresses[:2]]
        return tuple(dict.fromkeys(told))[:64]


@dataclass(frozen=True, slots=True)
class Entry:
    """How to enter a swarm: which, whom to ask first, and with which standing; None is the one kept."""

    swarm: Swarm
    bootstrap: tuple[str, ...] = ()
    standing: Standing | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What belonging needs of the daemon. relay: what we carry for others; None is nothing.

    mdns, upnp: whether to look for members in the local network, and to ask the router for help.
    standing, save_standing: what is kept of our membership, as `Roll` says.
    admits, on_charge, on_refused: as `HopService`, `Ledger` and `Membership` say.
    traffic: counts and paces what we send. tally: counts the rest.
    """

    identity: Identity
    listen: Sequence[str]
    announce: Sequence[str]
    stored_seq: int
    save_seq: Callable[[int], None]
    session_grace_s: float
    reachability: Reachability
    relay: RelayLimits | None
    admits: Callable[[str], None]
    on_charge: Callable[[str, float, str], None]
    traffic: Traffic
    tally: Tally
    mdns: bool = False
    upnp: bool = False
    standing: Standing | None = None
    save_standing: Callable[[Standing], None] = lambda standing: None
    on_refused: Callable[[CorollaError], None] = lambda problem: None


@asynccontextmanager
async def belong(terms: Terms, entry: Entry) -> AsyncIterator[Belonging]:
    """Enter a swarm; leave it, withdrawing our records, at the end. Raises what `open_network` raises."""
    kad_protocol = f"/corolla/kad/{entry.swarm.swarm_id[:32]}/1"
    async with (
        open_network(
            terms.identity,
            listen=terms.listen,
            announce=terms.announce,
            kad_protocol=kad_protocol,
            reachability=terms.reachability,
            relay=terms.relay,
            traffic=terms.traffic,
            upnp=terms.upnp,
            guard=_greetings_alone,
        ) as network,
        anyio.create_task_group() as tasks,
    ):
        roll = Roll(network.peer, terms.standing, save=terms.save_standing)
        membership = Membership(
            network,
            entry.swarm,
            bootstrap=entry.bootstrap,
            version=__version__,
            roll=roll,
            on_refused=terms.on_refused,
        )
        registry = Registry(
            network,
            membership,
            terms.identity.private_key,
            stored_seq=terms.stored_seq,
            save_seq=terms.save_seq,
        )
        ledger = Ledger(terms.on_charge)
        hops = HopService(network, grace_s=terms.session_grace_s, admits=terms.admits, tally=terms.tally)
        membership.on_review(lambda: hops.part_with(roll.is_barred))
        TrainingService(network, hops.worker_for, hops.note_training)  # the network holds it
        routes = Routes(network, membership, registry, ledger)
        await tasks.start(membership.run)
        await tasks.start(registry.run)
        await tasks.start(hops.run)
        if terms.mdns and listens_beyond(terms.listen):
            tasks.start_soon(Neighbours(network, entry.swarm.swarm_id, membership.hear_of).run)
        over = anyio.Event()
        try:
            yield Belonging(entry.swarm, network, membership, registry, routes, ledger, hops, over)
        finally:
            over.set()
            with anyio.move_on_after(FAREWELL_S, shield=True):
                await _say_farewell(registry)
            tasks.cancel_scope.cancel()


def _greetings_alone(peer: str, protocol: str) -> bool:
    """What is served until `Membership` says whom it knows."""
    return protocol == HELLO_PROTOCOL


async def _say_farewell(registry: Registry) -> None:
    for seen in registry.all_spans_now():
        if seen.mine:
            registry.withdraw(seen.record.worker)
    for model in {manifest.facts.fingerprint for manifest in registry.manifests_now()}:
        registry.withdraw_model(model)  # ours only; others' are not ours to withdraw
    try:
        await registry.publish()
    except CorollaError as problem:
        _log.info("farewell_failed", problem=str(problem))


async def discover(terms: Terms, address: str) -> Swarm:
    """The swarm of the member at a multiaddress. Raises `NO_PEERS`, and what `discover_swarm` raises."""
    if not address.startswith("/"):
        raise error(
            Code.BAD_TOKEN,
            f"{address[:40]!r} is neither a join token nor a multiaddress",
            "paste the whole line that `daemonctl status` prints on a member's machine",
        )
    if address.startswith(("/ip4/", "/ip6/", "/dns")) and "/tcp/" not in address:
        raise error(
            Code.BAD_TOKEN,
            f"the multiaddress {address[:100]!r} names no port",
            "write it like /ip4/192.0.2.7/tcp/4517/p2p/PEER, as `daemonctl status` prints it there",
        )
    async with open_network(terms.identity, listen=()) as network:
        try:
            charter = terms.standing.charter if terms.standing is not None else None
            return await discover_swarm(network, address, charter=charter)
        except CorollaError as problem:
            if problem.code is not Code.PEER_LOST:
                raise
            raise error(Code.NO_PEERS, problem.message, problem.remedy) from problem
