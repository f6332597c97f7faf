"""Invitations: what proves a membership, what is refused, and tokens."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.invitations import (
    Charter,
    Proof,
    Revocations,
    Sealed,
    SwarmToken,
    accept,
    check_proof,
    decode_token,
    encode_token,
    invite,
    open_revocations,
    seal_revocations,
)
from corolla.protocol.limits import MAX_CLOCK_SKEW_S, MAX_INVITE_LIFETIME_S

OWNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EVE = Ed25519PrivateKey.from_private_bytes(b"e" * 32)
ROSES = Charter("roses", OWNER.public_key().public_bytes_raw(), b"1")
TULIPS = Charter("tulips", OWNER.public_key().public_bytes_raw(), b"1")
NOW = 1_800_000_000.0
INVITATION, GRANT = invite(ROSES, OWNER, now_unix_s=NOW, lifetime_s=3600, uses=1)


def refused(proof: Proof, charter: Charter = ROSES, peer: str = "bob", now: float = NOW) -> str:
    with pytest.raises(CorollaError) as caught:
        check_proof(proof, charter, peer, now_unix_s=now)
    assert caught.value.code is Code.NOT_INVITED
    return caught.value.message


def test_an_accepted_invitation_proves_membership_long_after_it_expired() -> None:
    proof = accept(INVITATION, ROSES, "bob", now_unix_s=NOW + 60)
    proven = check_proof(proof, ROSES, "bob", now_unix_s=NOW + 1e7)
    assert (proven.grant, proven.acceptance.peer) == (GRANT, "bob")


def test_an_expired_invitation_cannot_be_accepted() -> None:
    late = NOW + 3600 + MAX_CLOCK_SKEW_S + 1
    with pytest.raises(CorollaError, match="after it had expired") as caught:
        accept(INVITATION, ROSES, "bob", now_unix_s=late)
    assert "daemonctl invite" in caught.value.remedy


def test_another_peers_membership_is_refused() -> None:
    assert "membership of bob" in refused(accept(INVITATION, ROSES, "bob", now_unix_s=NOW), peer="eve")


def test_a_membership_of_another_swarm_is_refused() -> None:
    assert "signature" in refused(accept(INVITATION, ROSES, "bob", now_unix_s=NOW), TULIPS)


def test_an_invitation_that_the_owner_did_not_sign_is_refused() -> None:
    forged, _ = invite(ROSES, EVE, now_unix_s=NOW, lifetime_s=3600, uses=1)
    with pytest.raises(CorollaError, match="signature of the grant"):
        accept(forged, ROSES, "bob", now_unix_s=NOW)


def test_an_acceptance_without_the_invite_key_is_refused() -> None:
    stolen = dataclasses.replace(INVITATION, key=b"s" * 32)
    with pytest.raises(CorollaError, match="signature of the acceptance"):
        accept(stolen, ROSES, "bob", now_unix_s=NOW)


@pytest.mark.parametrize("part", ["grant", "acceptance"])
def test_a_changed_byte_is_refused(part: str) -> None:
    proof = accept(INVITATION, ROSES, "bob", now_unix_s=NOW)
    sealed: Sealed = getattr(proof, part)
    body = sealed.body[:-1] + bytes([sealed.body[-1] ^ 1])
    refused(dataclasses.replace(proof, **{part: Sealed(body, sealed.signature)}))


def test_an_acceptance_from_the_future_is_refused() -> None:
    proof = accept(INVITATION, ROSES, "bob", now_unix_s=NOW + 3000)
    assert "cannot be" in refused(proof, now=NOW)


@pytest.mark.parametrize(
    ("lifetime_s", "uses"), [(0, 1), (MAX_INVITE_LIFETIME_S + 1, 1), (60, 0), (60, 1001)]
)
def test_an_invitation_out_of_bounds_is_refused(lifetime_s: float, uses: int) -> None:
    with pytest.raises(CorollaError) as caught:
        invite(ROSES, OWNER, now_unix_s=0.0, lifetime_s=lifetime_s, uses=uses)
    assert caught.value.code is Code.BAD_REQUEST


def test_only_the_owners_revocations_are_believed() -> None:
    revocations = Revocations(3, ("bob", GRANT.invite_id))
    assert open_revocations(seal_revocations(revocations, ROSES, OWNER), ROSES) == revocations
    for sealed in (seal_revocations(revocations, ROSES, EVE), seal_revocations(revocations, TULIPS, OWNER)):
        with pytest.raises(CorollaError, match="signature"):
            open_revocations(sealed, ROSES)


def test_a_list_too_long_to_spread_is_refused() -> None:
    with pytest.raises(CorollaError) as caught:
        seal_revocations(Revocations(1, tuple(f"{i:0>200}" for i in range(1024))), ROSES, OWNER)
    assert caught.value.code is Code.LIMIT_EXCEEDED


def test_a_charter_fixes_the_swarm() -> None:
    ids = {
        dataclasses.replace(ROSES, **change).swarm_id
        for change in ({}, {"name": "rose"}, {"nonce": b"2"}, {"owner": bytes(32)})
    }
    assert len(ids) == 4


TOKENS = [
    SwarmToken("0" * 32, "garden", ("/ip4/127.0.0.1/tcp/4001/p2p/bob",)),
    SwarmToken(ROSES.swarm_id, "roses", (), ROSES, INVITATION),
]


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_comes_back_from_its_word(token: SwarmToken) -> None:
    word = encode_token(token)
    assert word.startswith("corolla:")
    assert not set(word) & set(" \n\"'=")
    assert decode_token(word) == token


def test_a_token_with_another_swarms_charter_is_refused() -> None:
    with pytest.raises(ValueError, match="charter"):
        SwarmToken("0" * 32, "roses", (), ROSES, INVITATION)


@pytest.mark.parametrize(
    "text", ["", "corolla:", "corolla:!!!", "/ip4/1.2.3.4/tcp/1", "corolla:" + "A" * 9999]
)
def test_a_damaged_token_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(CorollaError) as caught:
        decode_token(text)
    assert caught.value.code is Code.BAD_TOKEN
    assert "daemonctl status" in caught.value.remedy
