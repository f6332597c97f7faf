"""A hostile peer over real libp2p: it is no member of an invited swarm, speaks every protocol, and gets nothing.

Nothing is identify, ping and the greeting, which tells it the swarm's name and why it is not let in.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import trio
from libp2p.stream_muxer.exceptions import MuxedStreamError

from corolla.daemon.belonging.belonging import Belonging, Entry, Terms, belong
from corolla.daemon.identity import Identity, identity_from_seed
from corolla.daemon.network.conversation import Conversation
from corolla.daemon.network.dialling import Reachability
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.members.greeting import Swarm
from corolla.daemon.network.members.roll import Standing
from corolla.daemon.network.reach.relaying import RelayLimits
from corolla.daemon.network.registry.announcements import Offer
from corolla.daemon.network.seam import Network
from corolla.daemon.network.traffic import Traffic
from corolla.daemon.serving.twin import twin_facts
from corolla.daemon.tally import Tally
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.invitations import Charter, Proof, accept, invite
from corolla.protocol.limits import MAX_HELLO_BYTES
from corolla.protocol.messages import Message, encode
from corolla.protocol.records import SpanState, models_key
from corolla.protocol.registry import HELLO, HELLO_PROTOCOL, REGISTRY_PROTOCOL, Find, Hello
from corolla.protocol.tensors import DType

pytestmark = pytest.mark.anyio

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
OWNER, BOB, EVE = (identity_from_seed(bytes([n]) * 32) for n in (1, 2, 3))
ROSES = Charter("roses", OWNER.public_key, b"1")
IDENTIFY, PUSH, PING = "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"
EVERYBODYS = {IDENTIFY, PUSH, PING, HELLO_PROTOCOL}
FACTS = twin_facts(num_blocks=4)


@dataclass
class Roses:
    """An invited swarm of two, one of whom serves; and a stranger that is connected with the owner."""

    owner: Belonging
    bob: Belonging
    eve: Libp2pNetwork

    @property
    def served(self) -> set[str]:
        """Every protocol that the owner serves to members."""
        network = self.owner.network
        assert isinstance(network, Libp2pNetwork)
        return {str(protocol) for protocol in network._host.multiselect.handlers if protocol}

    async def connect(self) -> None:
        if not self.eve.peers():
            await self.eve.connect(self.owner.network.addresses()[0], timeout_s=5)

    async def speaks(self, protocol: str) -> bool:
        """Whether the owner agrees to speak a protocol with Eve, who comes back when she is parted with."""
        for _ in range(20):
            try:
                await self.connect()
                stream = await self.eve.open(self.owner.network.peer, protocol, timeout_s=5)
            except CorollaError as problem:
                if problem.code is Code.UNSUPPORTED:
                    return False
                if problem.code is not Code.PEER_LOST:
                    raise
            else:
                stream.reset()
                return True
        raise AssertionError(f"{protocol} was neither agreed on nor refused")

    async def greet(self, hello: Hello) -> Hello:
        stream = await self.eve.open(self.owner.network.peer, HELLO_PROTOCOL, timeout_s=5)
        conversation = Conversation(stream, HELLO, max_header_bytes=MAX_HELLO_BYTES, max_payload_bytes=0)
        answer = await conversation.ask(hello, timeout_s=5)
        assert isinstance(answer, Hello)
        return answer


def terms(identity: Identity, proof: Proof | None) -> Terms:
    return Terms(
        identity=identity,
        listen=LOOPBACK,
        announce=(),
        stored_seq=0,
        save_seq=lambda seq: None,
        session_grace_s=60.0,
        reachability=Reachability.PUBLIC,
        relay=RelayLimits(),
        admits=lambda client: None,
        on_charge=lambda peer, weight, reason: None,
        traffic=Traffic(),
        tally=Tally(),
        standing=Standing(charter=ROSES, proof=proof),
    )


def proof_of(peer: str) -> Proof:
    """A membership by an invitation of the owner's."""
    now = time.time()
    invitation, _ = invite(ROSES, OWNER.private_key, now_unix_s=now, lifetime_s=600, uses=1)
    return accept(invitation, ROSES, peer, now_unix_s=now)


@asynccontextmanager
async def roses() -> AsyncIterator[Roses]:
    swarm = Swarm(ROSES.swarm_id, "roses")
    async with (
        belong(terms(OWNER, None), Entry(swarm)) as owner,
        belong(terms(BOB, proof_of(BOB.peer)), Entry(swarm, owner.network.addresses())) as bob,
        open_network(EVE, listen=LOOPBACK, kad_protocol=f"/corolla/kad/{ROSES.swarm_id}/1") as eve,
    ):
        await bob.membership.wait_joined(timeout_s=30)
        assert await owner.membership.wait_member(BOB.peer, timeout_s=30)
        owner.registry.announce_model(FACTS)
        owner.registry.announce(
            Offer(0, FACTS.fingerprint, 0, 4, SpanState.ONLINE, DType.FLOAT32, tokens_per_s=9.0)
        )
        await owner.registry.publish()
        made = Roses(owner, bob, eve)
        await made.connect()
        yield made


def greeting(proof: Proof | None = None, swarm_id: str = ROSES.swarm_id) -> Hello:
    return Hello(swarm_id, "roses", "evil", charter=ROSES, proof=proof)


async def check_nothing(story: Roses) -> None:
    """Eve is served nothing, and the swarm does not know her."""
    assert len(story.served - EVERYBODYS) >= 8  # sessions, pushes, training, registry, Kademlia, relaying, …
    for protocol in sorted(story.served - EVERYBODYS):
        assert not await story.speaks(protocol), protocol
    assert [member.peer for member in story.owner.membership.members()] == [BOB.peer]
    assert EVE.peer not in await story.owner.network.closest_peers(b"k" * 32, 8)
    assert EVE.peer not in {told.peer for told in story.owner.membership.known()}


async def test_one_that_does_not_greet_is_served_identify_and_ping() -> None:
    async with roses() as story:
        await check_nothing(story)
        stream = await story.eve.open(story.owner.network.peer, PING, timeout_s=5)
        await stream.send(b"p" * 32)
        assert await stream.receive() == b"p" * 32
        stream.reset()
        stream = await story.eve.open(story.owner.network.peer, IDENTIFY, timeout_s=5)
        assert await stream.receive()
        stream.reset()


@pytest.mark.parametrize("shown", ["nothing", "a stolen membership", "a forged one", "no swarm"])
async def test_one_that_greets_without_a_membership_hears_why_and_of_nobody(shown: str) -> None:
    async with roses() as story:
        stolen = story.bob.membership.roll.proof
        assert stolen is not None
        forged, _ = invite(ROSES, EVE.private_key, now_unix_s=time.time(), lifetime_s=600, uses=1)
        grant = forged.grant
        proofs = {
            "nothing": None,
            "a stolen membership": stolen,
            "a forged one": replace(stolen, grant=grant),
            "no swarm": None,
        }
        hello = greeting(proofs[shown], "" if shown == "no swarm" else ROSES.swarm_id)
        heard = await story.greet(hello)
        assert (heard.problem is None) == (shown == "no swarm")
        assert (heard.name, heard.charter) == ("roses", ROSES)
        assert (heard.members, heard.admitted, heard.revocations) == ((), (), None)
        await check_nothing(story)
        with pytest.raises(CorollaError):  # what she heard does not make her a member elsewhere
            story.bob.membership.roll.admit(EVE.peer, heard.proof)


async def say_at_once(network: Network, peer: str, question: Message) -> bytes:
    """Propose the registry's protocol and ask along with it, without waiting; all that comes back in a while."""
    assert isinstance(network, Libp2pNetwork)
    connection = network._connections.live(peer)
    assert connection is not None
    muxed = await connection.muxed_conn.open_stream()
    proposal = bytes([len(REGISTRY_PROTOCOL) + 1]) + REGISTRY_PROTOCOL.encode() + b"\n"
    heard = b""
    with trio.move_on_after(30):
        try:
            await muxed.write(b"\x13/multistream/1.0.0\n" + proposal + encode(question))
            await muxed.close()
            while data := await muxed.read(4096):
                heard += data
        except MuxedStreamError:  # reset, which is an answer too
            return heard
    return heard


async def test_one_that_speaks_on_without_waiting_for_the_refusal_is_not_heard() -> None:
    question = Find((models_key(ROSES.swarm_id),))
    async with roses() as story:
        await story.connect()
        heard = await say_at_once(story.eve, story.owner.network.peer, question)
        assert heard in (b"", b"\x13/multistream/1.0.0\n", b"\x13/multistream/1.0.0\n\x03na\n")
        asked_by_bob = await say_at_once(story.bob.network, story.owner.network.peer, question)
        assert FACTS.fingerprint.encode() in asked_by_bob  # so might she have been answered
        await check_nothing(story)


async def test_one_put_out_is_served_as_a_stranger_at_once() -> None:
    async with roses() as story:
        member = proof_of(EVE.peer)
        assert (await story.greet(greeting(member))).problem is None
        assert await story.owner.membership.wait_member(EVE.peer, timeout_s=5)
        for protocol in sorted(story.served):
            assert await story.speaks(protocol), protocol
        lasting = await story.eve.open(story.owner.network.peer, REGISTRY_PROTOCOL, timeout_s=5)
        story.owner.membership.roll.revoke(EVE.peer, OWNER.private_key)
        story.owner.membership.review()
        with trio.fail_after(10), pytest.raises(CorollaError):
            await lasting.receive()
        await check_nothing(story)
        await story.connect()
        heard = await story.greet(greeting(member))
        assert isinstance(heard.problem, dict)
        assert "revoked" in str(heard.problem["message"])
