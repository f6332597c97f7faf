"""What the owner of a machine decides of others: who is invited, banned or revoked. One handler a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from ...protocol.errors import Code, error
from ...protocol.guests import BannedPeer, Invite, InviteView, Revoke
from ...protocol.invitations import Grant
from ..belonging.inviting import PEER
from ..control import Ask, Handler, Reply
from ..network.members.roll import Roll

if TYPE_CHECKING:
    from ..node import Node


class Guests:
    """Handlers of `protocol.guests`; they ask the node and hold nothing."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> Mapping[str, Handler]:
        """By the names of `protocol.control.METHODS`."""
        return {
            "invite": self.invite,
            "invites": self.invites,
            "bans": self.bans,
            "ban": self.ban,
            "unban": self.unban,
            "revoke": self.revoke,
        }

    async def invite(self, ask: Ask) -> Reply:
        arguments: Invite = ask.arguments
        await trio.lowlevel.checkpoint()
        invited = self._node.inviting.invite(self._node.the_belonging(), arguments.lifetime_s, arguments.uses)
        self._node.events.emit("invited", f"invitation {invited.invite} for {invited.uses}")
        return Reply(invited)

    async def invites(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        roll = self._node.inviting.roll(self._node.belonging)
        return Reply(tuple(_view(grant, roll) for grant in roll.granted))

    async def bans(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        return Reply(self._node.inviting.roll(self._node.belonging).banned)

    async def ban(self, ask: Ask) -> Reply:
        arguments: BannedPeer = ask.arguments
        await trio.lowlevel.checkpoint()
        if not PEER.fullmatch(arguments.peer):
            raise error(
                Code.BAD_REQUEST,
                f"{arguments.peer[:80]!r} is no peer id",
                "daemonctl peers lists those of the members",
            )
        belonging = self._node.belonging
        self._node.inviting.roll(belonging).ban(arguments.peer)
        if belonging is not None:
            belonging.membership.review()
        self._node.events.emit("banned", arguments.peer, peer=arguments.peer)
        return Reply()

    async def unban(self, ask: Ask) -> Reply:
        arguments: BannedPeer = ask.arguments
        await trio.lowlevel.checkpoint()
        belonging = self._node.belonging
        self._node.inviting.roll(belonging).unban(arguments.peer)
        if belonging is not None:
            belonging.membership.forgive(arguments.peer)
        self._node.events.emit("unbanned", arguments.peer, peer=arguments.peer)
        return Reply()

    async def revoke(self, ask: Ask) -> Reply:
        arguments: Revoke = ask.arguments
        await trio.lowlevel.checkpoint()
        self._node.inviting.revoke(self._node.the_belonging(), arguments.name)
        self._node.events.emit("revoked", arguments.name, name=arguments.name)
        return Reply()


def _view(grant: Grant, roll: Roll) -> InviteView:
    return InviteView(
        invite=grant.invite_id,
        issued_at=grant.issued_at,
        expires_at=grant.expires_at,
        uses=grant.uses,
        peers=roll.accepted(grant),
        revoked=grant.invite_id in roll.revoked,
    )
