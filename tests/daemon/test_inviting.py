"""Invited swarms as a daemon has them: founding, tokens, standings over restarts and failed joins, bans."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.daemon.belonging.inviting import Inviting
from corolla.daemon.identity import Identity, identity_from_seed
from corolla.daemon.network.members.greeting import Swarm
from corolla.daemon.network.members.roll import Roll, Standing
from corolla.daemon.store import Store, open_store
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.invitations import Charter, SwarmToken, encode_token, invite

NOW = 1_800_000_000.0
DAY = 86400.0
OWNER, BOB = (identity_from_seed(bytes([n]) * 32) for n in (1, 2))
ROSES = Charter("roses", OWNER.public_key, b"1")
HOME = f"/ip4/192.0.2.7/tcp/4517/p2p/{OWNER.peer}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "state") as opened:
        yield opened


def token(*, key: Ed25519PrivateKey = OWNER.private_key, lifetime_s: float = DAY, named: str = HOME) -> str:
    """Of an invitation to roses."""
    invitation, _ = invite(ROSES, key, now_unix_s=NOW, lifetime_s=lifetime_s, uses=1)
    return encode_token(SwarmToken(ROSES.swarm_id, "roses", (named,), ROSES, invitation))


def inviting(store: Store, identity: Identity = BOB, at: float = NOW) -> Inviting:
    return Inviting(store, identity, clock=lambda: at)


def refused(made: Inviting, text: str) -> str:
    with pytest.raises(CorollaError) as caught:
        made.by_token(text)
    assert caught.value.code is Code.NOT_INVITED
    return str(caught.value)


def test_a_token_gives_a_standing_that_the_owner_believes(store: Store) -> None:
    entry = inviting(store).by_token(token())
    assert (entry.swarm, entry.bootstrap) == (Swarm(ROSES.swarm_id, "roses"), (HOME,))
    assert entry.standing is not None
    assert entry.standing.vouched == (OWNER.peer,)
    Roll(OWNER.peer, Standing(charter=ROSES), clock=lambda: NOW).admit(BOB.peer, entry.standing.proof)


def test_a_token_that_invites_nobody_says_what_is_wrong_with_it(store: Store) -> None:
    late = inviting(store, at=NOW + 2 * DAY)
    assert "after it had expired" in refused(late, token())
    assert "signature" in refused(inviting(store), token(key=BOB.private_key))
    bare = encode_token(SwarmToken(ROSES.swarm_id, "roses", (HOME,), ROSES))
    assert "holds no invitation (ask its owner for one" in refused(inviting(store), bare)
    assert inviting(store).standing == Standing()


def test_a_token_used_before_is_good_for_coming_back_after_it_expired(store: Store) -> None:
    text = token()
    entry = inviting(store).by_token(text)
    assert entry.standing is not None
    inviting(store).keep(entry.standing)
    again = inviting(store, at=NOW + 2 * DAY).by_token(text)
    assert again.standing == entry.standing


def test_the_owner_comes_back_by_any_token_and_needs_no_invitation(store: Store) -> None:
    entry = inviting(store, OWNER, at=NOW + 2 * DAY).by_token(token())
    assert entry.standing is not None
    assert entry.standing.charter == ROSES
    assert entry.standing.proof is None


def test_the_standing_is_of_one_swarm_and_bans_are_of_this_machine(store: Store) -> None:
    kept = inviting(store)
    kept.roll(None).ban("eve")
    entry = kept.by_token(token())
    assert entry.standing is not None
    kept.keep(entry.standing)
    store.update(swarm_id=ROSES.swarm_id, swarm="roses", invited=True)
    assert inviting(store).standing.proof == entry.standing.proof
    assert inviting(store).remembered() is not None
    assert kept.by_address(Swarm(ROSES.swarm_id, "roses"), HOME).standing == entry.standing
    for other in (kept.by_address(Swarm("thorns", "thorns"), HOME), kept.found("thorns", invited=False)):
        assert other.standing == Standing(banned=("eve",))
    kept.forget()
    assert inviting(store).standing == Standing(banned=("eve",))


def test_a_lost_membership_does_not_make_an_invited_swarm_an_open_one(store: Store) -> None:
    store.update(swarm_id=ROSES.swarm_id, swarm="roses", invited=True)
    made = inviting(store)
    assert made.remembered() is None
    assert "membership in swarm roses is lost" in str(made.hint())


def test_a_swarm_of_ours_is_invited_if_so_founded(store: Store) -> None:
    made = inviting(store, OWNER)
    assert made.found("roses", invited=False).standing == Standing()
    entry = made.found(" roses ", invited=True)
    assert entry.standing is not None
    assert entry.standing.charter is not None
    assert entry.standing.charter.owner_peer == OWNER.peer
    assert entry.swarm == Swarm(entry.standing.charter.swarm_id, "roses")
    with pytest.raises(CorollaError, match="65 characters"):
        made.found("r" * 65, invited=True)


def test_a_damaged_membership_is_said_to_be_so(store: Store) -> None:
    store.save_membership(b"\xff not a standing")
    with pytest.raises(CorollaError, match="membership is damaged") as caught:
        inviting(store)
    assert caught.value.code is Code.UNREADABLE
    assert "state folder" in caught.value.remedy
