"""Invited swarms: who gets in, who is put out, over the network in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from anyio import create_task_group
from anyio.abc import TaskGroup
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.daemon.network.conversation import Conversation
from corolla.daemon.network.members.greeting import Swarm
from corolla.daemon.network.members.membership import Membership
from corolla.daemon.network.members.roll import Roll, Standing
from corolla.daemon.network.memory import MemoryHub, memory_hub
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.invitations import Charter, Proof, accept
from corolla.protocol.records import peer_id_of
from corolla.protocol.registry import HELLO, HELLO_PROTOCOL, Hello

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


async def enter(
    hub: MemoryHub,
    tasks: TaskGroup,
    peer: str,
    shown: Proof | None = None,
    on_refused: Callable[[CorollaError], None] = lambda problem: None,
) -> Membership:
    membership = Membership(
        hub.network(peer),
        Swarm(ROSES.swarm_id, "roses"),
        bootstrap=[] if peer == OWNER else [f"/memory/{OWNER}/p2p/{OWNER}"],
        roll=Roll(peer, Standing(charter=ROSES, proof=shown), clock=lambda: NOW),
        on_refused=on_refused,
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


async def test_one_put_out_hears_why_once_and_asks_ever_more_rarely() -> None:
    async with memory_hub() as hub, create_task_group() as tasks:
        owner = await enter(hub, tasks, OWNER)
        heard: list[str] = []
        bob = await enter(hub, tasks, "bob", proof(owner, "bob"), lambda problem: heard.append(str(problem)))
        await bob.wait_joined(timeout_s=5)
        assert await owner.wait_member("bob", timeout_s=5)
        met: list[str] = []
        network = hub.find(OWNER)
        assert network is not None
        network.on_peer(lambda peer, connected: met.append(peer) if connected else None)
        owner.roll.revoke("bob", KEY)
        owner.review()
        await trio.sleep(600)
        assert len(heard) == 1
        assert f"{OWNER} refused us: the owner of the swarm revoked the membership of bob" in heard[0]
        assert bob.refusal is not None
        assert not bob.members()
        assert 10 <= len(met) <= 25  # after 0.5 s, 1 s, 2 s, …, and then once a minute
        tasks.cancel_scope.cancel()


async def test_one_forgiven_comes_back() -> None:
    async with memory_hub() as hub, create_task_group() as tasks:
        owner = await enter(hub, tasks, OWNER)
        bob = await enter(hub, tasks, "bob", proof(owner, "bob"))
        await bob.wait_joined(timeout_s=5)
        owner.roll.ban("bob")
        owner.review()
        await trio.sleep(300)
        assert bob.refusal is not None
        owner.roll.unban("bob")
        owner.forgive("bob")
        assert await bob.wait_member(OWNER, timeout_s=70)
        assert bob.refusal is None
        assert await owner.wait_member("bob", timeout_s=5)
        tasks.cancel_scope.cancel()


async def test_one_whose_invitation_was_revoked_may_come_by_another() -> None:
    async with memory_hub() as hub, create_task_group() as tasks:
        owner = await enter(hub, tasks, OWNER)
        first = proof(owner, "bob")
        bob = await enter(hub, tasks, "bob", first)
        await bob.wait_joined(timeout_s=5)
        (grant,) = owner.roll.granted
        owner.roll.revoke(grant.invite_id, KEY)
        owner.review()
        await trio.sleep(
            300
        )  # the end of the connection may overtake the farewell: he asks again, and is told
        assert bob.refusal is not None
        assert f"revoked invitation {grant.invite_id} of bob" in bob.refusal.message
        owner.roll.admit("bob", proof(owner, "bob"))
        assert not owner.roll.is_barred("bob")
        tasks.cancel_scope.cancel()


async def test_a_refusal_is_told_at_once_although_another_address_is_dead() -> None:
    async with memory_hub() as hub, create_task_group() as tasks:
        await enter(hub, tasks, OWNER)
        eve = Membership(
            hub.network("eve"),
            Swarm(ROSES.swarm_id, "roses"),
            bootstrap=["/memory/nobody/p2p/nobody", f"/memory/{OWNER}/p2p/{OWNER}"],
            roll=Roll("eve", Standing(charter=ROSES), clock=lambda: NOW),
        )
        await tasks.start(eve.run)
        began = trio.current_time()
        with pytest.raises(CorollaError, match="showed no membership") as caught:
            await eve.wait_joined(timeout_s=100)
        assert caught.value.code is Code.NOT_INVITED
        assert trio.current_time() - began < 100
        tasks.cancel_scope.cancel()


async def test_a_stranger_does_not_make_a_member_believe_that_it_was_put_out() -> None:
    async with memory_hub() as hub, create_task_group() as tasks:
        owner = await enter(hub, tasks, OWNER)
        bob = await enter(hub, tasks, "bob", proof(owner, "bob"))
        await bob.wait_joined(timeout_s=5)
        hub.kill(OWNER)
        await trio.sleep(60)
        assert not bob.members()
        eve, bobs = hub.network("eve"), hub.find("bob")
        assert bobs is not None
        lie = Hello(
            ROSES.swarm_id, "roses", "1", charter=ROSES, proof=bob.roll.proof,
            problem=error(Code.NOT_INVITED, "you are out").to_wire(),
        )  # fmt: skip
        await eve.connect(bobs.addresses()[0], timeout_s=5)
        stream = await eve.open("bob", HELLO_PROTOCOL, timeout_s=5)
        await Conversation(stream, HELLO).say(lie)
        await trio.sleep(60)
        assert not eve.peers()  # it was heard, and parted with
        assert bob.refusal is None
        tasks.cancel_scope.cancel()
