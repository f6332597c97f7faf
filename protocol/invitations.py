"""What makes a peer a member of an invited swarm: charter, invitation, acceptance, revocation; and join tokens.

The swarm's id is a hash of its charter, which names the owner's key. The owner signs a grant for a fresh
invite key; whoever holds that key signs one peer's acceptance. Grant and acceptance together prove
membership to anyone who knows the charter, offline. The owner's list of revocations, numbered, ends it.
Every signature covers a domain prefix, the swarm id and the exact bytes sent, as with records.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Final, TypeVar

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import Code, CorollaError, error
from .limits import (
    MAX_ADDRESSES,
    MAX_CLOCK_SKEW_S,
    MAX_INVITE_LIFETIME_S,
    MAX_INVITE_USES,
    MAX_NAME_CHARS,
    MAX_RECORD_BYTES,
    MAX_REVOKED,
    MAX_SEALED_BYTES,
)
from .messages import check_length, check_range, from_plain, load_map, to_plain
from .records import peer_id_of

T = TypeVar("T")

TOKEN_PREFIX: Final = "corolla:"  # noqa: S105 - what every join token starts with
KEY_BYTES: Final = 32
INVITE_ID_CHARS: Final = 16
_GRANT: Final = b"corolla grant 1\x00"
_ACCEPTANCE: Final = b"corolla acceptance 1\x00"
_REVOCATIONS: Final = b"corolla revocations 1\x00"
_ASK: Final = "ask the owner of the swarm for a new token (daemonctl invite)"


@dataclass(frozen=True, slots=True)
class Charter:
    """What the id of an invited swarm commits to. owner: raw public key, 32 bytes; nonce: random."""

    name: str
    owner: bytes
    nonce: bytes

    def __post_init__(self) -> None:
        check_length("name", self.name, MAX_NAME_CHARS)
        check_range("bytes of owner", len(self.owner), KEY_BYTES, KEY_BYTES)
        check_length("nonce", self.nonce, KEY_BYTES)

    @property
    def swarm_id(self) -> str:
        """The id of the swarm, 32 hex digits; none of an open swarm can be the same."""
        parts = (self.name.encode(), self.owner, self.nonce)
        whole = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hashlib.sha256(b"corolla invited swarm 1\x00" + whole).hexdigest()[:32]

    @property
    def owner_peer(self) -> str:
        """The owner's peer id."""
        return peer_id_of(self.owner)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A statement as it travels: its bytes, and somebody's signature."""

    body: bytes
    signature: bytes

    def __post_init__(self) -> None:
        check_length("body", self.body, MAX_SEALED_BYTES)
        check_length("signature", self.signature, 64)


@dataclass(frozen=True, slots=True)
class Grant:
    """The owner's word for an invite key. uses: how many peers may accept. Times: unix seconds."""

    invite: bytes
    issued_at: float
    expires_at: float
    uses: int = 1

    def __post_init__(self) -> None:
        check_range("bytes of invite", len(self.invite), KEY_BYTES, KEY_BYTES)
        check_range("uses", self.uses, 1, MAX_INVITE_USES)
        if not 0 < self.expires_at - self.issued_at <= MAX_INVITE_LIFETIME_S:
            raise ValueError(f"a lifetime of {self.expires_at - self.issued_at} s")

    @property
    def invite_id(self) -> str:
        """The name of the invitation, for people and for revocations."""
        return hashlib.sha256(self.invite).hexdigest()[:INVITE_ID_CHARS]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One peer accepts an invitation. joined_at: unix seconds of its clock."""

    peer: str
    joined_at: float

    def __post_init__(self) -> None:
        check_length("peer", self.peer, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True)
class Proof:
    """A peer's membership: a `Grant` signed by the owner, an `Acceptance` signed by the invite key."""

    grant: Sealed
    acceptance: Sealed


@dataclass(frozen=True, slots=True)
class Proven:
    """What a proof says."""

    grant: Grant
    acceptance: Acceptance


@dataclass(frozen=True, slots=True)
class Revocations:
    """Who is no longer a member: peer ids, and ids of invitations with all whom they let in."""

    seq: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range("seq", self.seq, 0, 1 << 62)
        check_length("names", self.names, MAX_REVOKED)
        for name in self.names:
            check_length("name", name, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a token carries for a newcomer: the raw private invite key, and the owner's grant for it."""

    key: bytes
    grant: Sealed


def invite(
    charter: Charter, owner_key: Ed25519PrivateKey, *, now_unix_s: float, lifetime_s: float, uses: int
) -> tuple[Invitation, Grant]:
    """A fresh invitation. Raises `BAD_REQUEST` for a lifetime or number of uses out of range."""
    key = Ed25519PrivateKey.generate()
    try:
        grant = Grant(key.public_key().public_bytes_raw(), now_unix_s, now_unix_s + lifetime_s, uses)
    except ValueError as problem:
        raise error(
            Code.BAD_REQUEST,
            f"cannot invite for {lifetime_s:g} s and {uses} peers: {problem}",
            f"at most {MAX_INVITE_LIFETIME_S / 86400:.0f} days and {MAX_INVITE_USES} peers",
        ) from problem
    return Invitation(key.private_bytes_raw(), _seal(grant, _GRANT, charter.swarm_id, owner_key)), grant


def accept(invitation: Invitation, charter: Charter, peer: str, *, now_unix_s: float) -> Proof:
    """A peer's membership by an invitation. Raises `NOT_INVITED` saying what is wrong with it."""
    try:
        key = Ed25519PrivateKey.from_private_bytes(invitation.key)
    except ValueError as problem:
        raise error(Code.NOT_INVITED, f"an invitation without its key: {problem}", _ASK) from problem
    acceptance = _seal(Acceptance(peer, now_unix_s), _ACCEPTANCE, charter.swarm_id, key)
    proof = Proof(invitation.grant, acceptance)
    check_proof(proof, charter, peer, now_unix_s=now_unix_s)
    return proof


def check_proof(proof: Proof, charter: Charter, peer: str, *, now_unix_s: float) -> Proven:
    """What a proof says, once it has shown that `peer` was invited in time.

    Raises `NOT_INVITED`. It does not know of revocations, nor how often an invitation was used.
    """
    grant = _open(Grant, proof.grant, _GRANT, charter.swarm_id, charter.owner)
    acceptance = _open(Acceptance, proof.acceptance, _ACCEPTANCE, charter.swarm_id, grant.invite)
    if acceptance.peer != peer:
        raise error(Code.NOT_INVITED, f"{peer} showed the membership of {acceptance.peer}", _ASK)
    early, late = grant.issued_at - MAX_CLOCK_SKEW_S, grant.expires_at + MAX_CLOCK_SKEW_S
    if not early <= acceptance.joined_at <= min(late, now_unix_s + MAX_CLOCK_SKEW_S):
        after_s = acceptance.joined_at - grant.expires_at
        reason = f"{after_s:.0f} s after it had expired" if after_s > 0 else "at a time that cannot be"
        raise error(Code.NOT_INVITED, f"{peer} accepted invitation {grant.invite_id} {reason}", _ASK)
    return Proven(grant, acceptance)


def seal_revocations(revocations: Revocations, charter: Charter, owner_key: Ed25519PrivateKey) -> Sealed:
    """The owner's list, signed. Raises `LIMIT_EXCEEDED` when it has grown too long to be spread."""
    try:
        return _seal(revocations, _REVOCATIONS, charter.swarm_id, owner_key)
    except ValueError as problem:
        raise error(
            Code.LIMIT_EXCEEDED,
            f"a list of {len(revocations.names)} revocations is too long to be spread: {problem}",
            "found a new swarm and invite again whom you trust",
        ) from problem


def open_revocations(sealed: Sealed, charter: Charter) -> Revocations:
    """The owner's list. Raises `NOT_INVITED` if it is not the owner's."""
    return _open(Revocations, sealed, _REVOCATIONS, charter.swarm_id, charter.owner)


def _seal(statement: object, domain: bytes, swarm_id: str, key: Ed25519PrivateKey) -> Sealed:
    body = cbor2.dumps(to_plain(statement))
    return Sealed(body, key.sign(_signed_bytes(domain, swarm_id, body)))


def _open(cls: type[T], sealed: Sealed, domain: bytes, swarm_id: str, public_key: bytes) -> T:
    kind = cls.__name__.lower()
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            sealed.signature, _signed_bytes(domain, swarm_id, sealed.body)
        )
        return from_plain(cls, load_map(sealed.body))
    except (InvalidSignature, ValueError) as problem:
        raise error(Code.NOT_INVITED, f"the signature of the {kind} does not hold", _ASK) from problem
    except CorollaError as problem:
        raise error(Code.NOT_INVITED, f"a malformed {kind}: {problem.message}", _ASK) from problem


def _signed_bytes(domain: bytes, swarm_id: str, body: bytes) -> bytes:
    return domain + swarm_id.encode() + b"\x00" + body


@dataclass(frozen=True, slots=True)
class SwarmToken:
    """What a newcomer needs: which swarm, whom to ask, and into an invited one the invitation."""

    swarm_id: str
    name: str
    addresses: tuple[str, ...]
    charter: Charter | None = None
    invitation: Invitation | None = None

    def __post_init__(self) -> None:
        check_length("swarm_id", self.swarm_id, MAX_NAME_CHARS)
        check_length("name", self.name, MAX_NAME_CHARS)
        check_length("addresses", self.addresses, MAX_ADDRESSES)
        if self.charter is not None and self.charter.swarm_id != self.swarm_id:
            raise ValueError(f"a charter of swarm {self.charter.swarm_id}, expected {self.swarm_id}")


def encode_token(token: SwarmToken) -> str:
    """The token as one word to paste."""
    return TOKEN_PREFIX + base64.urlsafe_b64encode(cbor2.dumps(to_plain(token))).decode().rstrip("=")


def decode_token(text: str) -> SwarmToken:
    """The token in a word. Raises `BAD_TOKEN`."""
    try:
        if not text.startswith(TOKEN_PREFIX) or len(text) > MAX_RECORD_BYTES:
            raise ValueError("it does not start with " + TOKEN_PREFIX)
        data = text[len(TOKEN_PREFIX) :]
        raw = base64.b64decode(data + "=" * (-len(data) % 4), altchars=b"-_", validate=True)
        return from_plain(SwarmToken, load_map(raw))
    except (ValueError, CorollaError) as problem:
        raise error(
            Code.BAD_TOKEN,
            f"{text[:40]!r} is no join token: {problem}",
            "paste the whole line that `daemonctl status` prints on a member's machine",
        ) from problem
