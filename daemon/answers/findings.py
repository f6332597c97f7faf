"""What is wrong with a daemon's place in the network, and the remedy: a pure judgement of a `Netcheck`.

Each rule is a function that gives its findings; their order is the order in which a person should act. A rule
keeps silent about what follows from a finding of an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from ...protocol.limits import MAX_CLOCK_SKEW_S
from ...protocol.netcheck import Finding, Netcheck
from ...protocol.views import PeerView

CLOCK_WARNING_S: Final = 60.0  # a minute off, and the rest of the five follows with a drifting clock
SLOW_RELAY_S: Final = 0.3  # a token travels through it once for each hop
_LOOPBACK: Final = ("/ip4/127.", "/ip6/::1/")

Rule: TypeAlias = Callable[[Netcheck], Iterator[Finding]]


def judge(view: Netcheck) -> tuple[Finding, ...]:
    """All that is worth saying of a view, the gravest first."""
    found = [finding for rule in RULES for finding in rule(view)]
    return (*(f for f in found if f.is_problem), *(f for f in found if not f.is_problem))


def _routes(view: Netcheck) -> Iterator[Finding]:
    if not view.has_ipv4 and not view.has_ipv6:
        yield Finding(
            "no_route",
            "this machine has no route into the world, neither by IPv4 nor by IPv6",
            "connect it to a network; only members on this machine or in its network can be met",
            is_problem=not view.swarm or not _connected(view),
        )
    elif not view.has_ipv4:
        yield Finding(
            "no_ipv4",
            "this machine has no route by IPv4",
            "members that have IPv4 alone are met through relays; get a route by IPv4 to meet them directly",
            is_problem=False,
        )
    elif not view.has_ipv6:
        yield Finding(
            "no_ipv6",
            "this machine has no route by IPv6",
            "nothing has to be done; with IPv6, which often needs no NAT, more members can be met directly",
            is_problem=False,
        )


def _swarm(view: Netcheck) -> Iterator[Finding]:
    if view.swarm_problem:
        remedy = view.swarm_remedy or "daemonctl leave, then daemonctl join TOKEN"
        yield Finding("swarm_failed", view.swarm_problem, remedy)
    elif view.swarm is None:
        yield Finding(
            "no_swarm",
            "this daemon is in no swarm, so it listens nowhere and knows nobody",
            "daemonctl join TOKEN, or daemonctl swarm create NAME",
        )


def _listening(view: Netcheck) -> Iterator[Finding]:
    if view.swarm is None:
        return
    if not view.wanted:
        yield Finding(
            "listens_nowhere",
            "the configuration names no address to listen on, so only members that are dialled can be met",
            "daemonctl config set listen '[\"/ip4/0.0.0.0/tcp/4517\"]', then start the daemon again",
            is_problem=False,
        )
    elif not view.listening:
        yield Finding(
            "not_listening",
            f"the daemon listens on none of {', '.join(view.wanted)}",
            "choose a free port: daemonctl config set listen '[\"/ip4/0.0.0.0/tcp/PORT\"]', then start it again",
        )
    elif all(address.startswith(_LOOPBACK) for address in view.listening):
        yield Finding(
            "loopback_only",
            "the daemon listens for this machine alone, so no other can dial it",
            "daemonctl config set listen '[\"/ip4/0.0.0.0/tcp/4517\"]', then start the daemon again",
            is_problem=False,
        )
    elif any(address.startswith("/ip6/") for address in view.wanted) and not any(
        address.startswith("/ip6/") for address in view.listening
    ):
        yield Finding(
            "not_listening_ipv6",
            "the daemon was to listen by IPv6 and does not: this machine has no IPv6, or the port is taken there",
            "turn IPv6 on in this machine and start the daemon again; nothing has to be done without it",
            is_problem=False,
        )


def _company(view: Netcheck) -> Iterator[Finding]:
    if view.swarm is None or _connected(view) or view.swarm_problem:
        return
    if view.peers or view.unreached:
        tried = "; ".join(view.unreached[:3])
        yield Finding(
            "no_peers",
            f"no member is connected, of {len(view.peers)} known" + (f" ({tried})" if tried else ""),
            "let outgoing TCP through the firewall, see that a member runs, or join again by a fresh token",
        )
    else:
        yield Finding(
            "alone",
            f"nobody else is in swarm {view.swarm} yet, so nobody can tell how this machine is reached",
            "let others in: daemonctl status prints the line to paste there (daemonctl invite, where invited)",
            is_problem=False,
        )


def _reach(view: Netcheck) -> Iterator[Finding]:
    reach = view.reach
    if view.swarm is None or not _connected(view):
        return
    if reach.reachability == "private" and not reach.relays:
        yield Finding(
            "unreachable",
            "others can neither dial this machine nor come through a relay, so it serves only whom it dials",
            f"forward {_port(view)} to this machine in the router and open it in the firewall,"
            " or have one public member run with relay = true",
        )
    elif reach.reachability == "private" and len(reach.relays) == 1:
        yield Finding(
            "one_relay",
            f"others come through a single relay, {reach.relays[0].peer}; without it nobody could",
            f"forward {_port(view)} in the router, or have more public members run with relay = true",
            is_problem=False,
        )
    if reach.reachability == "unknown":
        yield Finding(
            "reach_unknown",
            "no member could tell yet whether others can dial this machine",
            "wait a minute; if it stays so, say it: daemonctl config set reachability public (or private)",
            is_problem=False,
        )
    if reach.configured and reach.reachability == "public" and not reach.proven and view.peers:
        yield Finding(
            "public_unproven",
            "the configuration says that others can dial this machine; none has shown it",
            f"see that {_port(view)} is open and forwarded, or: daemonctl config set reachability auto",
            is_problem=False,
        )
    if reach.mapped and reach.reachability == "private":
        yield Finding(
            "forwarded_in_vain",
            f"the router forwards {', '.join(reach.mapped)}, and still nobody can dial it: the provider has a NAT too",
            "ask the provider for a public IPv4 address or for IPv6; relays serve until then",
            is_problem=False,
        )
    if reach.nat == "symmetric" and reach.reachability != "public":
        yield Finding(
            "symmetric_nat",
            "the NAT gives each connection another port, so direct ones to other NATs mostly fail",
            f"forward {_port(view)} in the router, or turn on UPnP there",
            is_problem=False,
        )


def _relaying(view: Netcheck) -> Iterator[Finding]:
    connected = _connected(view)
    if connected and all(peer.relayed for peer in connected):
        yield Finding(
            "all_relayed",
            f"all {len(connected)} connected members are met through relays, which is slow and bounded",
            f"forward {_port(view)} in the router; see that the firewall lets outgoing TCP through",
        )
    for relay in view.reach.relays:
        if relay.rtt_s is not None and relay.rtt_s > SLOW_RELAY_S:
            yield Finding(
                "slow_relay",
                f"relay {relay.peer} is {relay.rtt_s * 1000:.0f} ms away",
                "a public member that is nearer, with relay = true, is taken by itself",
                is_problem=False,
            )
    if view.swarm is not None and view.reach.reachability == "public" and not view.wants_relay:
        yield Finding(
            "relays_nobody",
            "this machine could carry members behind NATs, and its configuration says no",
            "daemonctl config set relay true",
            is_problem=False,
        )


def _clock(view: Netcheck) -> Iterator[Finding]:
    ahead_s = view.clock_ahead_s
    if ahead_s is None or abs(ahead_s) < CLOCK_WARNING_S:
        return
    side = "ahead of" if ahead_s > 0 else "behind"
    whose = "the only clock" if view.num_clocks == 1 else f"the median of {view.num_clocks} clocks"
    outcome = (
        "members refuse its records"
        if abs(ahead_s) >= MAX_CLOCK_SKEW_S
        else f"from {MAX_CLOCK_SKEW_S:.0f} s on its records are refused"
    )
    here = "set it: timedatectl set-ntp true"
    yield Finding(
        "clock",
        f"this machine's clock is {abs(ahead_s):.0f} s {side} {whose} that members told; {outcome}",
        f"{here}, here or there" if view.num_clocks == 1 else here,
    )


def _connected(view: Netcheck) -> tuple[PeerView, ...]:
    return tuple(peer for peer in view.peers if peer.connected)


def _port(view: Netcheck) -> str:
    """The port to open, in words."""
    for address in view.listening:
        parts = address.split("/")
        if "tcp" in parts[:-1]:
            return f"TCP port {parts[parts.index('tcp') + 1]}"
    return "its TCP port"


RULES: Final[tuple[Rule, ...]] = (_swarm, _routes, _listening, _clock, _company, _reach, _relaying)
