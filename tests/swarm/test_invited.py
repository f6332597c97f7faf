"""Invited swarms: who gets in, who is put out, over the network in memory."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from anyio import create_task_group
from anyio.abc import TaskGroup
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.daemon.network.greeting import Swarm
from corolla.daemon.network.membership import Membership
from corolla.daemon.network.memory import MemoryHub, memory_hub
from corolla.daemon.network.roll import Roll, Standing
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import CorollaError
from corolla.protocol.invitations import Charter, Proof, accept
from corolla.protocol.records import peer_id_of

pytestmark = pytest.mark.anyio
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OWNER = peer_id_of(KEY.public_key().public_bytes_raw())
ROSES = Charter("roses", KEY.public_key().public_bytes_raw(), b"1")
NOW = 1_800_000_000.0


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


def proof(owner: Membership, peer: str) -> Proof:
    invitation, _ = owner.roll.invite(KEY, lifetime_s=60, uses=1)
    return accept(invitation, ROSES, peer, now_unix_s=NOW)


async def enter(hub: MemoryHub, tasks: TaskGroup, peer: str, shown: Proof | None = None) -> Membership:
    membership = Membership(
        hub.network(peer),
        Swarm(ROSES.swarm_id, "roses"),
        bootstrap=[] if peer == OWNER else [f"/memory/{OWNER}/p2p/{OWNER}"],
        roll=Roll(peer, Standing(charter=ROSES, proof=shown), clock=lambda: NOW),
    )
    await tasks.start(membership.run)
    return membership


async def test_an_invited_peer_gets_in_and_an_uninvited_one_hears_why_not() -> None:
    async with memory_hub() as hub, create_task_group() as tasks:
        owner = await enter(hub, tasks, OWNER)
        bob = await enter(hub, tasks, "bob", proof(owner, "bob"))
        await bob.wait_joined(timeout_s=5)
        eve = await enter(hub, tasks, "eve")
        with pytest.raises(CorollaError, match="showed no membership"):
            await eve.wait_joined(timeout_s=5)
        thief = await enter(hub, tasks, "thief", bob.roll.proof)
        with pytest.raises(CorollaError, match="showed the membership of bob"):
            await thief.wait_joined(timeout_s=5)
        assert {member.peer for member in owner.members()} == {"bob"}
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["revoke", "ban"])
async def test_who_is_put_out_loses_running_streams_and_stays_out(how: str) -> None:
    async with memory_hub() as hub, create_task_group() as tasks:
        owner = await enter(hub, tasks, OWNER)

        async def hold(stream: Stream) -> None:
            await trio.sleep_forever()

        network = hub.find(OWNER)
        assert network is not None
        network.handle("/corolla/secret/1", hold)
        bob = await enter(hub, tasks, "bob", proof(owner, "bob"))
        cyd = await enter(hub, tasks, "cyd", proof(owner, "cyd"))
        await bob.wait_joined(timeout_s=5)
        assert await owner.wait_member("bob", timeout_s=5)
        assert await cyd.wait_member(OWNER, timeout_s=5)
        bobs = hub.find("bob")
        assert bobs is not None
        stream = await bobs.open(OWNER, "/corolla/secret/1", timeout_s=5)
        if how == "revoke":
            owner.roll.revoke("bob", KEY)
        else:
            owner.roll.ban("bob")
        owner.review()
        with trio.fail_after(5), pytest.raises(CorollaError):
            await stream.receive()
        await trio.sleep(60)
        assert not owner.is_member("bob")
        assert cyd.is_member(OWNER)
        assert cyd.roll.is_barred("bob") == (how == "revoke")  # the owner's list spreads, a ban does not
        tasks.cancel_scope.cancel()
