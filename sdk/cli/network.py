"""Commands that look at the network: peers, ping, netcheck."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import click

from ...protocol.errors import Exit
from ...protocol.netcheck import MAX_PING_TIMEOUT_S, MAX_PINGS, Finding, Netcheck
from ...protocol.views import PeerView
from ..client import Daemon
from ..output import Output, duration
from ..picture import short_peer
from .options import asking

CLOCK_SHOWN_S: Final = 1.0  # what greetings measure is no finer


@click.command()
@asking
def peers(daemon: Daemon, output: Output) -> None:
    """The members of the swarm that the daemon knows: connected ones first, then those it has heard of."""
    members = daemon.peers()
    if output.as_json:
        output.envelope(peers=members)
        return
    if not members:
        output.say("no peers yet: daemonctl netcheck says why")
        return
    output.table(
        ["peer", "connected", "rtt", "clock", "version", "serves", "address"],
        [
            [
                member.peer,
                _way(member),
                milliseconds(member.rtt_s),
                _clock(member.clock_ahead_s),
                member.version,
                ", ".join(member.spans),
                next(iter((*member.connection, *member.addresses)), ""),
            ]
            for member in members
        ],
    )


@click.command()
@click.argument("peer")
@click.option(
    "--count", "-c", default=4, show_default=True, type=click.IntRange(1, MAX_PINGS), help="How many times."
)
@click.option(
    "--timeout",
    "timeout_s",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0.1, MAX_PING_TIMEOUT_S),
    help="Seconds for the connection, and for each answer.",
)
@asking
def ping(daemon: Daemon, output: Output, peer: str, count: int, timeout_s: float) -> int:
    """Measure the round trip to the member PEER: its id, or an end of it as tables shorten it.

    Exits with 7 if an answer stayed out.
    """
    answer = daemon.ping(peer, count=count, timeout_s=timeout_s)
    if output.as_json:
        output.envelope(ping=answer)
    else:
        for rtt_s in answer.rtts_s:
            output.line(milliseconds(rtt_s))
        way = f"through {answer.through or 'a relay'}" if answer.relayed else "direct"
        lost = f", then no answer in {timeout_s:g} s" if answer.lost else ""
        output.line(
            f"{short_peer(answer.peer)}: {way}, {len(answer.rtts_s)} of {count} answered{lost};"
            f" min {milliseconds(answer.min_s)}, median {milliseconds(answer.median_s)}"
        )
    return Exit.DEGRADED if answer.lost else Exit.OK


@click.command()
@asking
def netcheck(daemon: Daemon, output: Output) -> int:
    """How this machine is reached, through whom, and what is wrong, each with its remedy.

    Exits with 7 if something is.
    """
    view = daemon.netcheck()
    if output.as_json:
        output.envelope(netcheck=view)
    else:
        _show(view, output)
    return Exit.DEGRADED if any(finding.is_problem for finding in view.findings) else Exit.OK


def _show(view: Netcheck, output: Output) -> None:
    reach = view.reach
    connected = [peer for peer in view.peers if peer.connected]
    relayed = sum(peer.relayed for peer in connected)
    output.heading(f"{reach.reachability} {'(as configured)' if reach.configured else ''}".strip())
    output.facts(
        [
            ("peer", view.peer),
            ("swarm", view.swarm or "none"),
            ("listening", _list(view.listening)),
            ("announced", _list(view.announced)),
            ("observed", _list(reach.observed)),
            ("dialled by others", _list(reach.proven)),
            ("forwarded by router", _list(reach.mapped)),
            ("nat", reach.nat),
            ("routes", " ".join(_routes(view)) or "none"),
            ("relays used", "; ".join(_relays(view)) or "none"),
            ("relays for others", _relaying(view)),
            ("members", f"{len(connected) - relayed} direct, {relayed} relayed, of {len(view.peers)} known"),
            ("clock", _median_clock(view)),
        ]
    )
    if connected:
        output.table(
            ["peer", "connected", "rtt", "clock"],
            [
                [short_peer(p.peer), _way(p), milliseconds(p.rtt_s), _clock(p.clock_ahead_s)]
                for p in connected
            ],
        )
    show_findings(view.findings, output)


def show_findings(findings: Iterable[Finding], output: Output) -> None:
    """What is wrong, and what else is worth saying, each with its remedy."""
    for finding in findings:
        mark = click.style(
            "problem" if finding.is_problem else "note", fg="red" if finding.is_problem else "cyan"
        )
        output.line(f"{mark}: {finding.text}")
        if finding.remedy:
            output.line(f"  remedy: {finding.remedy}")


def milliseconds(seconds: float | None) -> str:
    """A round trip for people; nothing if it was not measured."""
    return "" if seconds is None else f"{seconds * 1000:.1f} ms"


def _way(peer: PeerView) -> str:
    if not peer.connected:
        return "no" if peer.unseen_s is None else f"no, for {duration(peer.unseen_s)}"
    if not peer.relayed:
        return "direct"
    return f"through {short_peer(peer.through)}" if peer.through else "relayed"


def _clock(ahead_s: float | None) -> str:
    if ahead_s is None:
        return ""
    return f"{ahead_s:+.0f} s" if abs(ahead_s) >= CLOCK_SHOWN_S else "same"


def _median_clock(view: Netcheck) -> str:
    if view.clock_ahead_s is None:
        return "no member told its time"
    return f"{view.clock_ahead_s:+.1f} s against the median of {view.num_clocks}"


def _routes(view: Netcheck) -> list[str]:
    return [name for name, there in (("IPv4", view.has_ipv4), ("IPv6", view.has_ipv6)) if there]


def _relays(view: Netcheck) -> list[str]:
    return [
        f"{short_peer(relay.peer)} {milliseconds(relay.rtt_s) or 'not measured'}"
        for relay in view.reach.relays
    ]


def _relaying(view: Netcheck) -> str:
    reach = view.reach
    if not reach.offers_relay:
        return "no"
    return f"yes: {reach.num_reservations} reservations, {reach.num_circuits} circuits"


def _list(addresses: Iterable[str]) -> str:
    return ", ".join(addresses) or "none"
