"""Commands about who may be in the swarm: invite, revoke, ban, unban."""

from __future__ import annotations

import time

import click

from ...protocol.guests import InviteView
from ...protocol.limits import INVITE_LIFETIME_S
from ..client import Daemon
from ..output import Output
from .options import as_seconds, asking


@click.command()
@click.option(
    "--for",
    "for_s",
    callback=as_seconds,
    metavar="TIME",
    help="How long it may be used, such as 2h or 7d (the default).",
)
@click.option("--uses", type=click.IntRange(min=1), default=1, help="How many machines may join by it.")
@click.option("--list", "as_list", is_flag=True, help="List the invitations given, and who joined by them.")
@asking
def invite(daemon: Daemon, output: Output, for_s: float | None, uses: int, as_list: bool) -> None:
    """Make a token that lets one machine into the invited swarm of which this daemon is the owner."""
    if as_list:
        _list(output, daemon.invites())
        return
    invited = daemon.invite(lifetime_s=for_s or INVITE_LIFETIME_S, uses=uses)
    if output.as_json:
        output.envelope(invited=invited)
        return
    machines = "one machine" if uses == 1 else f"{uses} machines"
    output.say(f"invitation {invited.invite} for {machines}, until {_when(invited.expires_at)}; paste there:")
    output.line(f"daemonctl join {invited.token}")


def _list(output: Output, invites: tuple[InviteView, ...]) -> None:
    if output.as_json:
        output.envelope(invites=invites)
    elif not invites:
        output.say("no invitations: daemonctl invite makes one")
    else:
        output.table(
            ["invitation", "until", "used", "by"],
            [
                [
                    one.invite,
                    "revoked" if one.revoked else _when(one.expires_at),
                    f"{len(one.peers)} of {one.uses}",
                    " ".join(one.peers),
                ]
                for one in invites
            ],
        )


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


@click.command()
@click.argument("name", metavar="PEER|INVITATION")
@asking
def revoke(daemon: Daemon, output: Output, name: str) -> None:
    """End the membership of a peer, or of all who joined by an invitation. Every member hears it; it is for good."""
    daemon.revoke(name)
    if output.as_json:
        output.envelope(revoked=name)
    else:
        output.say(f"revoked {name}; members hear it as they meet")


@click.command()
@click.argument("peer", required=False)
@asking
def ban(daemon: Daemon, output: Output, peer: str | None) -> None:
    """Have nothing to do with PEER, from this daemon, in any swarm. Without PEER: list who is banned."""
    if peer is not None:
        daemon.ban(peer)
    banned = daemon.bans()
    if output.as_json:
        output.envelope(banned=banned)
    elif peer is not None:
        output.say(f"banned {peer}; daemonctl unban ends it")
    elif not banned:
        output.say("nobody is banned")
    else:
        for one in banned:
            output.line(one)


@click.command()
@click.argument("peer")
@asking
def unban(daemon: Daemon, output: Output, peer: str) -> None:
    """End the ban of PEER."""
    daemon.unban(peer)
    if output.as_json:
        output.envelope(banned=daemon.bans())
    else:
        output.say(f"{peer} is no longer banned")
