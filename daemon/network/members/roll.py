"""The roll of a swarm: who may be a member, as far as this daemon can prove; and whom it bans.

It owns our own proof, the owner's revocations, the memberships seen so far and the local bans, and hands
each change to be kept on disk. In an open swarm everyone may be a member who is not banned. It opens no
streams: `membership.py` carries what is said here.

An acceptance tells its own time, so an old token could be used with a false one. Therefore an expired
invitation admits only those whom somebody saw in time: members tell each other of the memberships they saw.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import cbor2
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ....protocol.errors import Code, CorollaError, error
from ....protocol.invitations import (
    Charter,
    Grant,
    Invitation,
    Proof,
    Proven,
    Revocations,
    Sealed,
    check_proof,
    invite,
    open_revocations,
    seal_revocations,
)
from ....protocol.limits import MAX_ADMITTED, MAX_ADMITTED_TOLD, MAX_CLOCK_SKEW_S, MAX_GRANTED
from ....protocol.messages import from_plain, load_map, to_plain

_ASK: Final = "ask the owner of the swarm for a new token (daemonctl invite)"
_log = structlog.get_logger("corolla.roll")


@dataclass(frozen=True, slots=True)
class Standing:
    """What is kept on disk. charter: of an invited swarm. proof: our own; the owner needs none.

    admitted: memberships seen. vouched: peers named by the token that we joined with. banned: peer ids.
    granted: the owner's invitations, without their keys.
    """

    charter: Charter | None = None
    proof: Proof | None = None
    revocations: Sealed | None = None
    admitted: tuple[Proof, ...] = ()
    vouched: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    granted: tuple[Grant, ...] = ()


def encode_standing(standing: Standing) -> bytes:
    """The bytes to keep."""
    return cbor2.dumps({"version": 1, **to_plain(standing)})


def decode_standing(data: bytes) -> Standing:
    """What was kept; b"" is nothing. Raises `UNREADABLE` for bytes that were damaged, or are of a later version."""
    if not data:
        return Standing()
    try:
        fields = load_map(data)
        if fields.pop("version", None) != 1:
            raise error(Code.UNREADABLE, "it is of another version of Corolla")
        return from_plain(Standing, fields)
    except CorollaError as problem:
        raise error(
            Code.UNREADABLE,
            f"what was kept of this daemon's membership is damaged: {problem.message}",
            "move the file `membership` out of the state folder, and join again by a new token",
        ) from problem


class Roll:
    """The roll of one swarm, kept by one of its members.

    peer: our own id. save: keeps a standing on disk. clock: unix seconds.
    """

    def __init__(
        self,
        peer: str,
        standing: Standing | None = None,
        *,
        save: Callable[[Standing], None] = lambda standing: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._peer = peer
        self._standing = standing or Standing()
        self._save = save
        self._clock = clock
        self._revocations = Revocations(0)
        self._seen: dict[str, Proven] = {}
        self._proofs: dict[str, Proof] = {}
        charter = self._standing.charter
        if charter is not None:
            if self._standing.revocations is not None:
                self._revocations = open_revocations(self._standing.revocations, charter)
            for proof in self._standing.admitted:
                self._note(proof, charter)

    @property
    def charter(self) -> Charter | None:
        """Of an invited swarm; None in an open one."""
        return self._standing.charter

    @property
    def proof(self) -> Proof | None:
        """Our own membership, to be shown."""
        return self._standing.proof

    @property
    def revocations(self) -> Sealed | None:
        """The owner's newest list known here."""
        return self._standing.revocations

    @property
    def banned(self) -> tuple[str, ...]:
        """Whom this daemon bans, whoever they are to others."""
        return self._standing.banned

    @property
    def revoked(self) -> tuple[str, ...]:
        """Peers and invitations that the owner revoked."""
        return self._revocations.names

    @property
    def granted(self) -> tuple[Grant, ...]:
        """The invitations that we gave, as far as they are of use or were used."""
        return self._standing.granted

    def accepted(self, grant: Grant) -> tuple[str, ...]:
        """Who joined by an invitation, as far as we saw."""
        return tuple(peer for peer, seen in self._seen.items() if seen.grant.invite == grant.invite)

    @property
    def is_owner(self) -> bool:
        """Whether the swarm is invited and ours."""
        return self.charter is not None and self.charter.owner_peer == self._peer

    def sample(self, rng: random.Random) -> tuple[Proof, ...]:
        """Some of the memberships seen, to be told to a member."""
        known = tuple(self._proofs.values())
        return tuple(rng.sample(known, min(len(known), MAX_ADMITTED_TOLD)))

    # judging

    def is_barred(self, peer: str) -> bool:
        """Whether a peer is banned or revoked, itself or by its invitation."""
        return self.bar(peer) is not None

    def bar(self, peer: str) -> CorollaError | None:
        """Why a peer is barred: `NOT_INVITED`; None if it is not."""
        if peer in self.banned:
            return error(
                Code.NOT_INVITED, f"{peer} is banned here", "ask the owner of that machine: daemonctl unban"
            )
        if peer in self.revoked:
            return _revoked("the membership", peer)
        seen = self._seen.get(peer)
        if seen is not None and seen.grant.invite_id in self.revoked:
            return _revoked(f"invitation {seen.grant.invite_id}", peer)
        return None

    def is_credible(self, peer: str, proof: Proof | None) -> bool:
        """Whether a peer may be a member by what it shows; nothing is noted."""
        charter = self.charter
        if charter is None or peer == charter.owner_peer:
            return True
        try:
            return proof is not None and bool(check_proof(proof, charter, peer, now_unix_s=self._clock()))
        except CorollaError as problem:
            _log.info("membership_not_believed", peer=peer, problem=str(problem))
            return False

    def admit(self, peer: str, proof: Proof | None) -> None:
        """Note a peer as a member. Raises `NOT_INVITED` saying why it is none."""
        charter = self.charter
        problem = self.bar(peer)
        if problem is not None and (peer in self.banned or peer in self.revoked):
            raise problem  # one whose invitation was revoked may come with another
        if charter is None or peer == charter.owner_peer:
            return
        if proof is None:
            raise error(
                Code.NOT_INVITED,
                f"{charter.name} is an invited swarm, and {peer} showed no membership",
                "ask its owner for a token (daemonctl invite)",
            )
        proven = check_proof(proof, charter, peer, now_unix_s=self._clock())
        if proven.grant.invite_id in self.revoked:
            raise _revoked(f"invitation {proven.grant.invite_id}", peer)
        known = self._seen.get(peer)
        if known is not None and known.grant.invite == proven.grant.invite:
            return
        self._check_use(peer, proven.grant)
        self._keep(peer, proof, proven)
        self._change(admitted=tuple(self._proofs.values()))

    def hear_of(self, proofs: Iterable[Proof]) -> None:
        """Note memberships that a member saw; what does not hold is left out."""
        charter = self.charter
        if charter is None:
            return
        known = {proof.acceptance.body for proof in self._proofs.values()}
        before = len(self._seen)
        for proof in proofs:
            if proof.acceptance.body not in known:
                self._note(proof, charter)
        if len(self._seen) > before:
            self._change(admitted=tuple(self._proofs.values()))

    def hear_revocations(self, sealed: Sealed) -> bool:
        """Take a list of the owner's; whether it is newer than ours. Raises `NOT_INVITED` for a forged one."""
        if self.charter is None or sealed == self.revocations:
            return False
        heard = open_revocations(sealed, self.charter)
        if heard.seq <= self._revocations.seq:
            return False
        self._revocations = heard
        self._change(revocations=sealed)
        return True

    def _check_use(self, peer: str, grant: Grant) -> None:
        """Raise `NOT_INVITED` if the invitation has expired, or served as many as it may."""
        others = [p for p, seen in self._seen.items() if seen.grant.invite == grant.invite and p != peer]
        if len(others) >= grant.uses:
            raise error(
                Code.NOT_INVITED,
                f"invitation {grant.invite_id} was for {grant.uses}, and {others[0]} accepted it before {peer}",
                _ASK,
            )
        late_s = self._clock() - grant.expires_at - MAX_CLOCK_SKEW_S
        if late_s > 0 and peer not in self._standing.vouched:
            raise error(
                Code.NOT_INVITED,
                f"invitation {grant.invite_id} has expired, and nobody known here saw {peer} accept it in time",
                _ASK,
            )

    def _note(self, proof: Proof, charter: Charter) -> None:
        """Keep a membership that others saw in time, if it holds."""
        try:
            peer = from_plain(_Accepted, load_map(proof.acceptance.body)).peer
            proven = check_proof(proof, charter, peer, now_unix_s=self._clock())
        except CorollaError as problem:
            _log.info("membership_not_believed", problem=str(problem))
            return
        invite_key = proven.grant.invite
        others = sum(1 for p, seen in self._seen.items() if seen.grant.invite == invite_key and p != peer)
        if peer not in self._seen and others < proven.grant.uses:
            self._keep(peer, proof, proven)

    def _keep(self, peer: str, proof: Proof, proven: Proven) -> None:
        if peer not in self._seen and len(self._seen) >= MAX_ADMITTED:
            _log.warning("roll_is_full", num=len(self._seen), left_out=peer)
            return
        self._seen[peer] = proven
        self._proofs[peer] = proof

    # what the owner and the user of this machine decide

    def invite(self, key: Ed25519PrivateKey, *, lifetime_s: float, uses: int) -> tuple[Invitation, Grant]:
        """A fresh invitation. Raises `BAD_REQUEST` if the swarm is open, or not ours."""
        now = self._clock()
        charter = self._our_charter("invite")
        invitation, grant = invite(charter, key, now_unix_s=now, lifetime_s=lifetime_s, uses=uses)
        kept = [g for g in self.granted if g.expires_at + MAX_CLOCK_SKEW_S > now or self.accepted(g)]
        self._change(granted=(*kept, grant)[-MAX_GRANTED:])
        return invitation, grant

    def revoke(self, name: str, key: Ed25519PrivateKey) -> None:
        """Add a peer id, or an invitation's id, to our list. Raises `BAD_REQUEST`, `LIMIT_EXCEEDED`."""
        charter = self._our_charter("revoke")
        if name == self._peer:
            raise error(Code.BAD_REQUEST, "the owner of a swarm cannot be revoked", "leave it instead")
        if name in self._revocations.names:
            return
        try:
            revocations = Revocations(self._revocations.seq + 1, (*self._revocations.names, name))
        except ValueError as problem:
            raise error(
                Code.LIMIT_EXCEEDED, f"no more revocations: {problem}", "found a new swarm and invite again"
            ) from problem
        sealed = seal_revocations(revocations, charter, key)
        self._revocations = revocations
        self._change(revocations=sealed)

    def ban(self, peer: str) -> None:
        """Have nothing to do with a peer, from this daemon."""
        if peer == self._peer:
            raise error(Code.BAD_REQUEST, f"{peer} is this daemon", "give another peer's id")
        self._change(banned=tuple(dict.fromkeys((*self.banned, peer))))

    def unban(self, peer: str) -> None:
        """End a ban. Raises `BAD_REQUEST` if there is none."""
        if peer not in self.banned:
            raise error(Code.BAD_REQUEST, f"{peer} is not banned here", "daemonctl ban lists who is")
        self._change(banned=tuple(other for other in self.banned if other != peer))

    def _our_charter(self, verb: str) -> Charter:
        charter = self.charter
        if charter is None:
            raise error(
                Code.BAD_REQUEST,
                f"this swarm is open: there is nobody to {verb}",
                "daemonctl status prints the token that lets anybody join; daemonctl ban keeps a peer from this daemon",
            )
        if not self.is_owner:
            raise error(
                Code.BAD_REQUEST,
                f"only the owner of swarm {charter.name} can {verb}: {charter.owner_peer}",
                f"run `daemonctl {verb}` on the owner's machine; daemonctl ban keeps a peer from this daemon",
            )
        return charter

    def _change(self, **changes: object) -> None:
        standing = replace(self._standing, **changes)  # type: ignore[arg-type]
        self._save(standing)
        self._standing = standing


def _revoked(what: str, peer: str) -> CorollaError:
    return error(Code.NOT_INVITED, f"the owner of the swarm revoked {what} of {peer}", _ASK)


@dataclass(frozen=True, slots=True)
class _Accepted:
    """The name in an acceptance, before its signature is looked at."""

    peer: str
