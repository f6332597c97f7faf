"""The roll: who is admitted to an invited swarm, over expiry, reuse, revocation, bans and restarts."""

from __future__ import annotations

import random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.daemon.network.members.roll import Roll, Standing, decode_standing, encode_standing
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.invitations import Charter, Proof, accept
from corolla.protocol.records import peer_id_of

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OWNER = peer_id_of(KEY.public_key().public_bytes_raw())
ROSES = Charter("roses", KEY.public_key().public_bytes_raw(), b"1")
NOW = 1_800_000_000.0
DAY = 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Garden:
    """An owner's roll, and others'; one clock. saved: the newest standing of each."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.saved: dict[str, Standing] = {}
        self.owner = self.roll(OWNER)

    def roll(self, peer: str, standing: Standing | None = None) -> Roll:
        def save(new: Standing) -> None:
            self.saved[peer] = new

        return Roll(peer, standing or Standing(charter=ROSES), save=save, clock=self.clock)

    def proofs(self, *peers: str, uses: int = 1) -> list[Proof]:
        """Of peers that all accept one invitation, now."""
        invitation, _ = self.owner.invite(KEY, lifetime_s=DAY, uses=uses)
        return [accept(invitation, ROSES, peer, now_unix_s=self.clock.now) for peer in peers]


def refused(roll: Roll, peer: str, proof: Proof | None) -> str:
    with pytest.raises(CorollaError) as caught:
        roll.admit(peer, proof)
    assert caught.value.code is Code.NOT_INVITED
    return caught.value.message


def test_an_open_swarm_admits_all_whom_it_does_not_ban() -> None:
    roll = Roll("ada")
    roll.admit("bob", None)
    roll.ban("bob")
    assert "banned" in refused(roll, "bob", None)
    roll.unban("bob")
    roll.admit("bob", None)


def test_the_owner_needs_no_proof_and_everybody_else_does() -> None:
    g = Garden()
    bob = g.roll("bob")
    bob.admit(OWNER, None)
    assert "showed no membership" in refused(bob, "eve", None)
    bob.admit("cyd", g.proofs("cyd")[0])


def test_an_invitation_admits_no_more_than_its_uses() -> None:
    g = Garden()
    bob, cyd, eve = g.proofs("bob", "cyd", "eve", uses=2)
    g.owner.admit("bob", bob)
    g.owner.admit("bob", bob)  # the same peer again is no further use
    g.owner.admit("cyd", cyd)
    assert "was for 2" in refused(g.owner, "eve", eve)


def test_an_expired_invitation_admits_those_whom_somebody_saw_in_time() -> None:
    g = Garden()
    bob, eve = g.proofs("bob", "eve", uses=2)
    g.owner.admit("bob", bob)
    g.clock.now += 30 * DAY
    g.owner.admit("bob", bob)
    assert "has expired" in refused(g.owner, "eve", eve)  # its false time does not help
    newcomer = g.roll("dan")
    assert "has expired" in refused(newcomer, "bob", bob)
    newcomer.hear_of(g.owner.sample(random.Random(1)))
    newcomer.admit("bob", bob)


def test_peers_named_by_the_token_are_believed() -> None:
    g = Garden()
    (bob,) = g.proofs("bob")
    g.clock.now += 30 * DAY
    g.roll("dan", Standing(charter=ROSES, vouched=("bob",))).admit("bob", bob)


def test_memberships_that_do_not_hold_are_not_learned() -> None:
    g = Garden()
    bob, cyd = g.proofs("bob")[0], g.proofs("cyd")[0]
    dan = g.roll("dan")
    dan.hear_of([Proof(bob.grant, cyd.acceptance), *g.proofs("eve", "fay")])
    assert len(dan.sample(random.Random(1))) == 1  # of two on one invitation, the first


def test_a_revoked_peer_and_a_revoked_invitation_are_barred() -> None:
    g = Garden()
    (bob,) = g.proofs("bob")
    invitation, grant = g.owner.invite(KEY, lifetime_s=DAY, uses=2)
    cyd = accept(invitation, ROSES, "cyd", now_unix_s=NOW)
    g.owner.admit("bob", bob)
    g.owner.admit("cyd", cyd)
    g.owner.revoke("bob", KEY)
    g.owner.revoke(grant.invite_id, KEY)
    assert g.owner.is_barred("bob")
    assert g.owner.is_barred("cyd")
    dan = g.roll("dan")
    assert g.owner.revocations is not None
    assert dan.hear_revocations(g.owner.revocations)
    assert "revoked" in refused(dan, "bob", bob)
    assert "revoked" in refused(dan, "cyd", cyd)


def test_an_older_list_of_revocations_does_not_replace_a_newer_one() -> None:
    g = Garden()
    g.owner.revoke("bob", KEY)
    old = g.owner.revocations
    g.owner.revoke("cyd", KEY)
    new = g.owner.revocations
    assert old is not None
    assert new is not None
    dan = g.roll("dan")
    assert dan.hear_revocations(new)
    assert not dan.hear_revocations(old)
    assert dan.revoked == ("bob", "cyd")


def test_everything_is_kept_over_a_restart() -> None:
    g = Garden()
    (bob,) = g.proofs("bob")
    g.owner.admit("bob", bob)
    g.owner.revoke("eve", KEY)
    g.owner.ban("fay")
    g.clock.now += 30 * DAY
    again = g.roll(OWNER, decode_standing(encode_standing(g.saved[OWNER])))
    again.admit("bob", bob)
    assert again.revoked == ("eve",)
    assert again.banned == ("fay",)
    again.revoke("gil", KEY)
    dan = g.roll("dan", Standing(charter=ROSES, revocations=g.saved[OWNER].revocations))
    assert dan.revoked == ("eve", "gil")  # the number went on from where it was


def test_only_the_owner_invites_and_revokes() -> None:
    g = Garden()
    for act in (
        lambda: g.roll("bob").invite(KEY, lifetime_s=DAY, uses=1),
        lambda: g.roll("bob").revoke("cyd", KEY),
        lambda: Roll("bob").invite(KEY, lifetime_s=DAY, uses=1),
        lambda: g.owner.revoke(OWNER, KEY),
        lambda: g.owner.ban(OWNER),
        lambda: g.owner.unban("nobody"),
    ):
        with pytest.raises(CorollaError) as caught:
            act()
        assert caught.value.code is Code.BAD_REQUEST


@pytest.mark.parametrize("data", [b"\xff", b"\xa0", encode_standing(Standing())[:-1]])
def test_a_damaged_file_is_named_with_a_remedy(data: bytes) -> None:
    with pytest.raises(CorollaError) as caught:
        decode_standing(data)
    assert caught.value.code is Code.UNREADABLE
    assert "join again" in caught.value.remedy
