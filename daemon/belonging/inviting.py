"""How this daemon founds and enters swarms, open or invited, and what it then decides of others.

It owns the standing of our membership that the store keeps. It opens no connections: the node enters where
`Entry` says, and the roll judges who else may be there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ...protocol.errors import Code, error
from ...protocol.guests import Invited
from ...protocol.invitations import (
    Charter,
    Proof,
    SwarmToken,
    accept,
    decode_token,
    encode_token,
)
from ...protocol.limits import MAX_ADDRESSES, MAX_NAME_CHARS
from ..identity import Identity
from ..network.members.greeting import Swarm, found_swarm
from ..network.members.roll import Roll, Standing, decode_standing, encode_standing
from ..store import Store
from .belonging import Belonging, Entry

MAX_VOUCHED: Final = 4 * MAX_ADDRESSES  # peers named by the last few tokens that we joined with
PEER: Final = re.compile(r"[1-9A-HJ-NP-Za-km-z]{46,64}")  # base58 of a multihash
_INVITE: Final = re.compile(r"[0-9a-f]{16}")


class Inviting:
    """Our standing in a swarm, and the ways into one. clock: unix seconds. Raises `UNREADABLE` when made."""

    def __init__(self, store: Store, identity: Identity, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._identity = identity
        self._clock = clock
        self._standing = decode_standing(store.load_membership())

    @property
    def standing(self) -> Standing:
        """What is on disk."""
        return self._standing

    def keep(self, standing: Standing) -> None:
        """Put it on disk. Raises `DISK_FULL`, `UNREADABLE`."""
        if standing != self._standing:
            self._store.save_membership(encode_standing(standing))
            self._standing = standing

    def forget(self) -> None:
        """We left: what remains is whom this machine bans."""
        self.keep(self._elsewhere())

    def remembered(self) -> Entry | None:
        """The swarm of the last run; None if there was none, or if our membership of it got lost."""
        state = self._store.state
        if not state.swarm_id or self.hint() is not None:
            return None
        return Entry(Swarm(state.swarm_id, state.swarm), state.bootstrap)

    def hint(self) -> str | None:
        """What to do where an invited swarm is remembered, and our membership of it is not."""
        state = self._store.state
        charter = self._standing.charter
        if not state.invited or (charter is not None and charter.swarm_id == state.swarm_id):
            return None
        return f"the membership in swarm {state.swarm} is lost: daemonctl join TOKEN, with a new one of its owner's"

    def found(self, name: str, invited: bool) -> Entry:
        """A new swarm of ours. Raises `BAD_REQUEST` for a bad name."""
        if not 0 < len(name.strip()) <= MAX_NAME_CHARS // 4:
            raise error(
                Code.BAD_REQUEST,
                f"a swarm's name of {len(name)} characters",
                "give one of 1 to 64 characters",
            )
        key, nonce = self._identity.public_key, os.urandom(16)
        if not invited:
            return Entry(found_swarm(name.strip(), key, nonce), standing=self._elsewhere())
        charter = Charter(name.strip(), key, nonce)
        return Entry(Swarm(charter.swarm_id, charter.name), standing=self._elsewhere(charter))

    def by_address(self, swarm: Swarm, address: str) -> Entry:
        """Into an open swarm, or the one in which we are, by a member's address."""
        same = self._store.state.swarm_id == swarm.swarm_id
        return Entry(swarm, (address,), self._standing if same else self._elsewhere())

    def by_token(self, text: str) -> Entry:
        """Into a swarm by a token; an invitation is accepted for this daemon.

        Raises `BAD_TOKEN`, and `NOT_INVITED` saying what is wrong with the invitation.
        """
        token = decode_token(text)
        charter = token.charter
        if charter is None:
            swarm = Swarm(token.swarm_id, token.name)
            same = self._store.state.swarm_id == swarm.swarm_id
            return Entry(swarm, token.addresses, self._standing if same else self._elsewhere())
        standing = self._standing if self._standing.charter == charter else self._elsewhere(charter)
        proof = self._proof(token, charter, standing.proof)
        vouched = (*standing.vouched, *(address.rpartition("/p2p/")[2] for address in token.addresses))
        entered = replace(standing, proof=proof, vouched=tuple(dict.fromkeys(vouched))[-MAX_VOUCHED:])
        return Entry(Swarm(charter.swarm_id, charter.name), token.addresses, entered)

    def _proof(self, token: SwarmToken, charter: Charter, known: Proof | None) -> Proof | None:
        """Our membership by a token; the owner needs none, and a token used before gives what it gave."""
        if charter.owner_peer == self._identity.peer:
            return None
        if token.invitation is None or (known is not None and known.grant == token.invitation.grant):
            if known is None:
                raise error(
                    Code.NOT_INVITED,
                    f"{charter.name} is an invited swarm, and this token of it holds no invitation",
                    "ask its owner for one (daemonctl invite)",
                )
            return known
        return accept(token.invitation, charter, self._identity.peer, now_unix_s=self._clock())

    def _elsewhere(self, charter: Charter | None = None) -> Standing:
        """A standing in another swarm than ours."""
        return Standing(charter=charter, banned=self._standing.banned)

    # what is decided of others

    def roll(self, belonging: Belonging | None) -> Roll:
        """The roll in use; outside a swarm one of our bans alone."""
        if belonging is not None:
            return belonging.membership.roll
        return Roll(self._identity.peer, self._standing, save=self.keep)

    def invite(self, belonging: Belonging, lifetime_s: float, uses: int) -> Invited:
        """A token that lets others in. Raises `BAD_REQUEST` if the swarm is open, or another's."""
        roll = belonging.membership.roll
        invitation, grant = roll.invite(self._identity.private_key, lifetime_s=lifetime_s, uses=uses)
        swarm = belonging.swarm
        addresses = belonging.introductions()
        token = SwarmToken(swarm.swarm_id, swarm.name, addresses, roll.charter, invitation)
        return Invited(encode_token(token), grant.invite_id, grant.expires_at, grant.uses)

    def revoke(self, belonging: Belonging, name: str) -> None:
        """End the membership of a peer, or of all who joined by an invitation. Raises `BAD_REQUEST`, …"""
        if not PEER.fullmatch(name) and not _INVITE.fullmatch(name):
            raise error(
                Code.BAD_REQUEST,
                f"{name[:80]!r} is neither a peer id nor the id of an invitation",
                "daemonctl peers lists peers, daemonctl invite --list invitations",
            )
        belonging.membership.roll.revoke(name, self._identity.private_key)
        belonging.membership.review()
