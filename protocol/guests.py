"""What a program asks of its daemon about who may be in the swarm: invitations, bans, revocations.

Invitations and revocations are the owner's of an invited swarm, and hold for every member. A ban is this
daemon's own, in any swarm. The signed statements behind them are in `invitations`, which the SDK does not read.
"""

from __future__ import annotations

from dataclasses import dataclass

from .limits import INVITE_LIFETIME_S


@dataclass(frozen=True, slots=True)
class Invite:
    """`invite`: a token for an invited swarm, answered by `Invited`. uses: how many machines may join by it."""

    lifetime_s: float = INVITE_LIFETIME_S
    uses: int = 1


@dataclass(frozen=True, slots=True)
class Invited:
    """token: what the newcomer pastes after `daemonctl join`; whoever reads it first may use it.

    invite: names the invitation in `revoke`. expires_at: unix seconds.
    """

    token: str
    invite: str
    expires_at: float
    uses: int = 1


@dataclass(frozen=True, slots=True)
class InviteView:
    """An invitation of ours, in `invites`. peers: who joined by it, as far as this daemon knows."""

    invite: str
    issued_at: float
    expires_at: float
    uses: int = 1
    peers: tuple[str, ...] = ()
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class BannedPeer:
    """`ban` and `unban`: a peer id."""

    peer: str


@dataclass(frozen=True, slots=True)
class Revoke:
    """`revoke`: a peer id, or an invitation's id, with whom all end who joined by it."""

    name: str
