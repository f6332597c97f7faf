"""Announcing, holding, finding and losing records, over the network in memory."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import cbor2
import pytest
import trio
import trio.testing
from anyio.abc import TaskGroup
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.daemon.network.conversation import Conversation
from corolla.daemon.network.members.greeting import found_swarm
from corolla.daemon.network.members.membership import Membership
from corolla.daemon.network.memory import MemoryHub, MemoryNetwork, memory_hub, uniform_delay
from corolla.daemon.network.registry import registry as registry_module
from corolla.daemon.network.registry.announcements import Offer
from corolla.daemon.network.registry.holders import SMALL_SWARM
from corolla.daemon.network.registry.registry import EXPIRE_EVERY_S, Registry
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.framing import encode_frame
from corolla.protocol.limits import (
    HOLDERS_PER_KEY,
    MAX_RECORD_BYTES,
    MAX_RECORD_LIFETIME_S,
    RECORD_LIFETIME_S,
    REFRESH_EVERY_S,
)
from corolla.protocol.messages import Message, to_plain
from corolla.protocol.records import (
    Signed,
    SpanRecord,
    SpanState,
    blocks_key,
    keys_of,
    models_key,
    peer_id_of,
    sign,
)
from corolla.protocol.registry import (
    REGISTRY,
    REGISTRY_PROTOCOL,
    Declined,
    Entry,
    Find,
    Found,
    Store,
    Stored,
)
from corolla.protocol.tensors import DType
from corolla.protocol.work import ModelFacts

pytestmark = pytest.mark.anyio
SWARM = found_swarm("roses", bytes(32), b"1")
UNIX = 1_800_000_000.0
FINGERPRINT = "f" * 64
FACTS = ModelFacts("m", FINGERPRINT, "LlamaForCausalLM", 30, 576, 49152, 8192, {})
OFFER = Offer(0, FINGERPRINT, 0, 12, SpanState.ONLINE, DType.FLOAT32, tokens_per_s=5.0)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


class Node:
    """One daemon as far as the registry goes."""

    def __init__(self, garden: Garden, number: int, **options: Any) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
        self.peer = peer_id_of(self.key.public_key().public_bytes_raw())
        self.network: MemoryNetwork = garden.hub.network(self.peer)
        bootstrap = [node.network.addresses()[0] for node in garden.nodes[:1]]
        rng = random.Random(number)
        self.clock_error_s = 0.0
        self.membership = Membership(self.network, SWARM, bootstrap=bootstrap, rng=rng)
        self.registry = Registry(
            self.network,
            self.membership,
            self.key,
            rng=rng,
            unix=lambda: UNIX + trio.current_time() + self.clock_error_s,
            **options,
        )

    def entry(self, record: SpanRecord, *, left_s: float = RECORD_LIFETIME_S) -> Entry:
        signed = sign(record, SWARM.swarm_id, self.key)
        return Entry(signed, left_s, keys_of(record, SWARM.swarm_id))

    def record(self, **changes: Any) -> SpanRecord:
        record = SpanRecord(
            peer=self.peer, worker=7, seq=1, issued_at=UNIX + trio.current_time(), lifetime_s=60.0,
            fingerprint=FINGERPRINT, start=0, end=8, state=SpanState.ONLINE, dtype=DType.FLOAT32,
        )  # fmt: skip
        return dataclasses.replace(record, **changes)

    async def ask(self, other: Node, question: Message) -> Message:
        stream = await self.network.open(other.peer, REGISTRY_PROTOCOL, timeout_s=5)
        answer = await Conversation(stream, REGISTRY).ask(question, timeout_s=5)
        await stream.close()
        return answer

    def sees(self) -> dict[tuple[str, int], SpanState]:
        return {
            (seen.record.peer, seen.record.worker): seen.record.state
            for seen in self.registry.spans_now(FINGERPRINT)
        }


class Garden:
    """Daemons on a hub, which all start from the first one."""

    def __init__(self, hub: MemoryHub, tasks: TaskGroup) -> None:
        self.hub = hub
        self.tasks = tasks
        self.nodes: list[Node] = []

    async def node(self, **options: Any) -> Node:
        node = Node(self, len(self.nodes) + 1, **options)
        self.nodes.append(node)
        await self.tasks.start(node.membership.run)
        await self.tasks.start(node.registry.run)
        return node

    async def grow(self, count: int) -> list[Node]:
        nodes = [await self.node() for _ in range(count)]
        if count > 1:
            await until(lambda: all(node.membership.members() for node in nodes))
        return nodes


@asynccontextmanager
async def garden(**options: Any) -> AsyncIterator[Garden]:
    async with memory_hub(**options) as hub, anyio.create_task_group() as tasks:
        yield Garden(hub, tasks)
        tasks.cancel_scope.cancel()


async def until(condition: Callable[[], bool], *, within_s: float = 5.0) -> None:
    """Wait on the mock clock."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - it takes no time: the clock jumps
            await trio.sleep(0.01)


async def test_an_announcement_reaches_every_member_of_a_small_swarm_at_once() -> None:
    async with garden(delay=uniform_delay(0.0, 0.05)) as g:
        ada, bob, cyd = await g.grow(3)
        ada.registry.announce(OFFER)
        ada.registry.announce_model(FACTS)
        await until(lambda: bob.sees() == cyd.sees() == {(ada.peer, 0): SpanState.ONLINE}, within_s=1)
        assert [m.facts for m in bob.registry.manifests_now()] == [FACTS]
        (seen,) = bob.registry.spans_now(FINGERPRINT)
        assert (seen.record.start, seen.record.end, seen.record.tokens_per_s) == (0, 12, 5.0)
        assert seen.record.addresses == ada.network.addresses()
        assert not seen.mine
        assert not seen.suspect
        assert ada.registry.spans_now(FINGERPRINT)[0].mine


async def test_each_change_of_state_is_pushed_at_once() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        for state in (SpanState.LOADING, SpanState.ONLINE, SpanState.DRAINING):
            ada.registry.announce(dataclasses.replace(OFFER, state=state))
            await until(lambda: bob.sees() == {(ada.peer, 0): state}, within_s=1)  # noqa: B023
        ada.registry.withdraw(0)
        await until(lambda: bob.sees() == {}, within_s=1)


async def test_a_span_moved_elsewhere_is_no_longer_found_where_it_was() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        ada.registry.announce(OFFER)
        ada.registry.announce(dataclasses.replace(OFFER, start=16, end=24))
        await until(lambda: len(bob.sees()) == 1)
        keys = [blocks_key(SWARM.swarm_id, FINGERPRINT, bucket) for bucket in range(4)]
        found = [await ada.ask(bob, Find((key,))) for key in keys]
        assert [len(page.entries) for page in found if isinstance(page, Found)] == [0, 0, 1, 0]


async def test_records_are_kept_alive_by_refreshing_and_not_longer() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        ada.registry.announce(OFFER)
        await trio.sleep(10 * RECORD_LIFETIME_S)
        assert bob.sees() == {(ada.peer, 0): SpanState.ONLINE}
        g.hub.kill(ada.peer)
        await trio.sleep(RECORD_LIFETIME_S - REFRESH_EVERY_S - 1)
        assert bob.sees() == {(ada.peer, 0): SpanState.ONLINE}
        await trio.sleep(REFRESH_EVERY_S + 2)
        assert bob.sees() == {}


async def test_a_lost_peer_is_suspect_at_once_and_trusted_again_when_back() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        ada.registry.announce(OFFER)
        await until(lambda: len(bob.sees()) == 1)
        version = bob.registry.version
        g.hub.cut(ada.peer, bob.peer)
        (seen,) = bob.registry.spans_now(FINGERPRINT)
        assert seen.suspect
        assert bob.registry.version != version
        g.hub.heal(ada.peer, bob.peer)
        await until(lambda: not bob.registry.spans_now(FINGERPRINT)[0].suspect, within_s=10)


async def test_a_peer_that_others_still_hear_is_not_suspect_for_long() -> None:
    async with garden() as g:
        _, ada, bob = await g.grow(3)
        await until(lambda: all(len(node.membership.members()) == 2 for node in g.nodes))
        ada.registry.announce(OFFER)
        await until(lambda: len(bob.sees()) == 1)
        g.hub.cut(ada.peer, bob.peer)
        assert bob.registry.spans_now(FINGERPRINT)[0].suspect
        await trio.sleep(REFRESH_EVERY_S)
        (seen,) = await bob.registry.spans(FINGERPRINT, 30)
        assert not seen.suspect


async def test_a_newcomer_learns_what_was_announced_before_it_came() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        ada.registry.announce(OFFER)
        bob.registry.announce(dataclasses.replace(OFFER, start=12, end=30))
        bob.registry.announce_model(FACTS)
        await until(lambda: len(bob.sees()) == 2)
        cyd = await g.node()
        await until(lambda: len(cyd.sees()) == 2 and len(cyd.registry.manifests_now()) == 1, within_s=2)


async def test_a_reader_learns_through_others_of_one_it_cannot_reach() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        bob.registry.announce(OFFER)
        await until(lambda: len(ada.sees()) == 1)
        cyd = Node(g, 3)
        g.hub.cut(bob.peer, cyd.peer)
        g.nodes.append(cyd)
        await g.tasks.start(cyd.membership.run)
        await g.tasks.start(cyd.registry.run)
        await cyd.membership.wait_joined(timeout_s=5)
        seen = await cyd.registry.spans(FINGERPRINT, 30)
        assert [one.record.peer for one in seen] == [bob.peer]
        assert 0 < seen[0].expires_in_s <= RECORD_LIFETIME_S


async def test_those_who_wait_are_woken_by_news_and_by_expiry_but_not_by_refreshes() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        version = bob.registry.version
        ada.registry.announce(OFFER)
        with trio.fail_after(1):
            version = await bob.registry.wait_changed(version)
        with trio.move_on_after(5 * REFRESH_EVERY_S) as scope:
            await bob.registry.wait_changed(version)
        assert scope.cancelled_caught
        g.hub.kill(ada.peer)
        version = await bob.registry.wait_changed(version)
        with trio.fail_after(RECORD_LIFETIME_S + 5):
            await bob.registry.wait_changed(version)
        assert bob.sees() == {}


async def test_once_publish_returns_the_holders_have_heard() -> None:
    async with garden() as g:
        ada, bob, cyd = await g.grow(3)
        await until(lambda: len(ada.membership.members()) == 2)
        ada.registry.announce(OFFER)
        assert await ada.registry.publish() == 2
        assert len(bob.sees()) == len(cyd.sees()) == 1
        ada.registry.withdraw(0)
        await ada.registry.publish()
        assert bob.sees() == cyd.sees() == {}


async def test_a_refresh_is_one_message_to_each_holder_whatever_is_announced() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        heard: list[Message] = []

        async def hold(stream: Stream) -> None:
            conversation = Conversation(stream, REGISTRY)
            while (question := await conversation.hear()) is not None:
                heard.append(question)
                await conversation.say(Stored())
            await stream.close()

        bob.network.handle(REGISTRY_PROTOCOL, hold)
        for worker in range(5):
            ada.registry.announce(dataclasses.replace(OFFER, worker=worker))
        ada.registry.announce_model(FACTS)
        await ada.registry.publish()
        heard.clear()
        await trio.sleep(3 * REFRESH_EVERY_S)
        stores = [question for question in heard if isinstance(question, Store)]
        assert 3 <= len(stores) <= 4  # as often as it says that it lives
        assert {len(store.entries) for store in stores} == {6}


async def test_sequence_numbers_grow_over_restarts_though_the_clock_goes_back() -> None:
    async with garden() as g:
        saved: list[int] = []
        ada = await g.node(stored_seq=int(UNIX * 1000) + 10_000_000, save_seq=saved.append)
        bob = await g.node()
        await until(lambda: len(ada.membership.members()) == 1)
        ada.registry.announce(OFFER)
        await until(lambda: len(bob.sees()) == 1)
        assert bob.registry.spans_now(FINGERPRINT)[0].record.seq == int(UNIX * 1000) + 10_000_001
        assert saved == sorted(set(saved))
        assert saved[0] > int(UNIX * 1000) + 10_000_000


async def test_one_whose_state_and_clock_went_back_outbids_what_holders_remember() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        future = ada.record(worker=0, seq=int(UNIX * 1000) + 3_600_000, state=SpanState.LOADING)
        assert await ada.ask(bob, Store((ada.entry(future),))) == Stored()
        ada.registry.announce(OFFER)
        await until(lambda: bob.sees() == {(ada.peer, 0): SpanState.ONLINE}, within_s=1)
        assert bob.registry.spans_now(FINGERPRINT)[0].record.seq > future.seq


async def refused(asker: Node, holder: Node, entry: Entry) -> CorollaError:
    answer = await asker.ask(holder, Store((entry,)))
    assert isinstance(answer, Stored)
    (refusal,) = answer.refused
    assert refusal.index == 0
    return refusal.problem()


async def test_what_is_refused_is_answered_one_by_one() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        good = ada.entry(ada.record())
        bad = ada.entry(ada.record(worker=8), left_s=61.0)
        answer = await ada.ask(bob, Store((bad, good, bad)))
        assert isinstance(answer, Stored)
        assert [refusal.index for refusal in answer.refused] == [0, 2]
        assert bob.sees() == {(ada.peer, 7): SpanState.ONLINE}


async def test_forged_replayed_and_foreign_records_are_refused() -> None:
    async with garden() as g:
        ada, bob, eve = await g.grow(3)
        entry = ada.entry(ada.record(seq=5))
        forged = dataclasses.replace(entry.signed, signature=bytes(64))
        problem = await refused(ada, bob, dataclasses.replace(entry, signed=forged))
        assert "signature" in problem.message
        problem = await refused(eve, bob, entry)
        assert "did not sign" in problem.message
        await ada.ask(bob, Store((entry,)))
        problem = await refused(ada, bob, ada.entry(ada.record(seq=4)))
        assert problem.code is Code.BAD_RECORD
        assert problem.details["seq"] == 5


async def test_who_stores_without_end_is_told_to_store_later_and_others_are_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry_module, "RECORDS_PER_S", 1.0)
    monkeypatch.setattr(registry_module, "RECORDS_AT_ONCE", 100)
    async with garden() as g:
        ada, bob, eve = await g.grow(3)
        refused_codes = set()
        for seq in range(1, 5):
            answer = await eve.ask(
                bob, Store(tuple(eve.entry(eve.record(worker=w, seq=seq)) for w in range(40)))
            )
            assert isinstance(answer, Stored)
            refused_codes |= {refusal.problem().code for refusal in answer.refused}
        assert refused_codes == {Code.BUSY}
        assert bob.sees().keys() == {(eve.peer, worker) for worker in range(40)}
        answer = await ada.ask(bob, Store((ada.entry(ada.record()),)))
        assert answer == Stored()


async def test_a_wrong_clock_is_refused_and_said() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        problem = await refused(ada, bob, ada.entry(ada.record(issued_at=UNIX - 3600)))
        assert "clock" in problem.remedy


def signed_anyhow(node: Node, **changes: Any) -> Entry:
    """A record with fields that no honest peer would sign, stored under the keys of a good one."""
    good = node.record()
    body = cbor2.dumps({"": "span", **to_plain(good), **changes})
    domain = b"corolla record 1\x00" + SWARM.swarm_id.encode() + b"\x00"
    raw = node.key.public_key().public_bytes_raw()
    return Entry(Signed(body, node.key.sign(domain + body), raw), 60.0, keys_of(good, SWARM.swarm_id))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lifetime_s": MAX_RECORD_LIFETIME_S + 1}, "lifetime_s"),
        ({"lifetime_s": 30.0}, "60 s left of 30"),
        ({"tomorrow": "x" * MAX_RECORD_BYTES}, "limit"),
        ({"addresses": ["/ip4/192.0.2.7/tcp/1"] * 17}, "addresses"),
        ({"end": 0}, "end"),
    ],
    ids=["too long-lived", "outliving itself", "oversized", "too many addresses", "no blocks"],
)
async def test_what_no_honest_peer_signs_is_refused_by_its_holder(
    changes: dict[str, Any], named: str
) -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        problem = await refused(ada, bob, signed_anyhow(ada, **changes))
        assert problem.code is Code.BAD_RECORD
        assert named in problem.message
        assert bob.sees() == {}
        assert await ada.ask(bob, Store((signed_anyhow(ada),))) == Stored()


@pytest.mark.parametrize("error_s", [-120.0, 120.0])
async def test_a_peer_whose_clock_is_two_minutes_off_serves_and_finds_like_any_other(error_s: float) -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        bob.clock_error_s = error_s
        ada.registry.announce(OFFER)
        bob.registry.announce(OFFER)
        everybody = {(ada.peer, 0): SpanState.ONLINE, (bob.peer, 0): SpanState.ONLINE}
        await until(lambda: ada.sees() == bob.sees() == everybody)
        for _ in range(10):  # refreshes, for as long as several lifetimes
            await trio.sleep(REFRESH_EVERY_S)
            assert ada.sees() == bob.sees() == everybody
        g.hub.kill(bob.peer)
        await trio.sleep(RECORD_LIFETIME_S + EXPIRE_EVERY_S)
        assert ada.sees() == {(ada.peer, 0): SpanState.ONLINE}  # no sooner and no later for its clock


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        encode_frame(b"\xa2\x60\x64find\x64keys\x81\x41\x00"),  # a key of one byte
        encode_frame(b"\xa2\x60\x65store\x67entries\x81\xa0"),
    ],
)
async def test_nonsense_ends_the_stream_and_nothing_else(data: bytes) -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        stream = await ada.network.open(bob.peer, REGISTRY_PROTOCOL, timeout_s=5)
        await stream.send(data)
        with pytest.raises(CorollaError):
            await stream.receive()
        assert isinstance(await ada.ask(bob, Find((models_key(SWARM.swarm_id),))), Found)


async def test_a_question_of_a_later_version_is_declined_and_the_stream_goes_on() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        stream = await ada.network.open(bob.peer, REGISTRY_PROTOCOL, timeout_s=5)
        conversation = Conversation(stream, REGISTRY)
        await stream.send(encode_frame(b"\xa1\x60\x65watch"))
        answer = await conversation.hear()
        assert isinstance(answer, Declined)
        assert answer.problem().code is Code.UNSUPPORTED
        assert isinstance(await conversation.ask(Stored(), timeout_s=5), Declined)
        key = models_key(SWARM.swarm_id)
        assert isinstance(await conversation.ask(Find((key,)), timeout_s=5), Found)


async def test_many_records_come_in_pages() -> None:
    async with garden() as g:
        ada, bob = await g.grow(2)
        for worker in range(60):
            ada.registry.announce(dataclasses.replace(OFFER, worker=worker, end=8))
            bob.registry.announce(dataclasses.replace(OFFER, worker=worker, end=8))
        await until(lambda: len(ada.sees()) == 120)
        cyd = await g.node()
        await cyd.membership.wait_joined(timeout_s=5)
        g.hub.cut(cyd.peer, bob.peer)
        await cyd.registry.spans(FINGERPRINT, 30)
        assert len(cyd.sees()) == 120


async def test_holders_that_hang_or_lie_delay_a_reader_by_a_bounded_time_only() -> None:
    async with garden() as g:
        ada, bob, liar, hung = await g.grow(4)
        await until(lambda: all(len(node.membership.members()) == 3 for node in g.nodes))

        async def lie(stream: Stream) -> None:
            await Conversation(stream, REGISTRY).hear()
            await stream.send(b"\x00" * 100)

        liar.network.handle(REGISTRY_PROTOCOL, lie)
        g.hub.hang(hung.peer)
        ada.registry.announce(OFFER)
        await until(lambda: len(bob.sees()) == 1)
        with trio.fail_after(10):
            assert len(await bob.registry.spans(FINGERPRINT, 30)) == 1


async def test_a_full_disk_stops_announcing_and_nothing_else() -> None:
    def full(seq: int) -> None:
        raise CorollaError(Code.DISK_FULL, "no space left")

    async with garden() as g:
        ada = await g.node(save_seq=full)
        bob = await g.node()
        bob.registry.announce(OFFER)
        ada.registry.announce(OFFER)
        await until(lambda: len(ada.sees()) == 1)
        assert bob.sees() == {(bob.peer, 0): SpanState.ONLINE}


async def test_a_manifest_too_long_to_announce_is_refused_where_it_is_offered() -> None:
    async with garden() as g:
        ada, _ = await g.grow(2)
        files = {f"model-{i:05}.safetensors": "a" * 64 for i in range(2000)}
        with pytest.raises(CorollaError) as caught:
            ada.registry.announce_model(dataclasses.replace(FACTS, files=files))
        assert caught.value.code is Code.LIMIT_EXCEEDED


async def test_in_a_large_swarm_the_nearest_peers_hold_and_everyone_finds() -> None:
    async with garden() as g:
        nodes = await g.grow(SMALL_SWARM + 8)
        await until(lambda: all(n.membership.num_known >= SMALL_SWARM for n in nodes), within_s=600)
        ada, bob = nodes[3], nodes[-1]
        ada.registry.announce(OFFER)
        ada.registry.announce_model(FACTS)
        await until(lambda: len(ada.sees()) == 1)
        await ada.registry.publish()
        holding = [n for n in nodes if n is not ada and n.sees()]
        buckets = 2
        assert HOLDERS_PER_KEY <= len(holding) <= HOLDERS_PER_KEY * buckets
        assert [m.facts for m in await bob.registry.models()] == [FACTS]
        assert [seen.record.peer for seen in await bob.registry.spans(FINGERPRINT, 30)] == [ada.peer]
        victims: Sequence[Node] = [n for n in holding if n not in (ada, bob)][:4]
        for victim in victims:
            g.hub.kill(victim.peer)
        await trio.sleep(RECORD_LIFETIME_S + REFRESH_EVERY_S)
        assert [seen.record.peer for seen in await bob.registry.spans(FINGERPRINT, 30)] == [ada.peer]


async def test_records_of_a_banned_peer_go_at_once_and_are_taken_from_nobody() -> None:
    async with garden() as g:
        ada, bob, cyd = await g.grow(3)
        ada.registry.announce(OFFER)
        await until(lambda: bool(bob.sees() and cyd.sees()))
        (signed,) = ada.registry._shelf.of_peer(ada.peer, trio.current_time())
        bob.membership.roll.ban(ada.peer)
        bob.membership.review()
        assert bob.sees() == {}
        await until(lambda: not bob.membership.is_member(ada.peer))
        await bob.registry.spans(FINGERPRINT, 30, max_age_s=0.0)  # cyd tells of it again
        assert bob.sees() == {}
        assert cyd.sees() == {(ada.peer, 0): SpanState.ONLINE}
        kept = Entry(signed.signed, 1.0, signed.keys)
        with pytest.raises(CorollaError, match="is banned here"):
            bob.registry._put(kept, owner=None, origin="")


async def test_it_goes_on_when_a_third_of_the_peers_vanish() -> None:
    """Who lives is found by all who live, who vanished is found by nobody after a minute, news still spread."""
    async with garden() as g:
        nodes = await g.grow(SMALL_SWARM + 8)
        await until(lambda: all(n.membership.num_known >= SMALL_SWARM for n in nodes), within_s=600)
        serving = nodes[::3]  # eight of them, three of which vanish
        for node in serving:
            node.registry.announce(OFFER)
        await until(lambda: all((node.peer, 0) in node.sees() for node in serving))
        await trio.sleep(REFRESH_EVERY_S)
        gone = nodes[1::2][: len(nodes) // 3]
        for node in gone:
            g.hub.kill(node.peer)
        await trio.sleep(RECORD_LIFETIME_S + REFRESH_EVERY_S)
        living = [node for node in nodes if node not in gone]
        alive = {node.peer for node in serving if node not in gone}
        assert 0 < len(alive) < len(serving)
        late = next(node for node in living if node not in serving)
        late.registry.announce(OFFER)
        await trio.sleep(REFRESH_EVERY_S)
        for reader in living:
            found = await reader.registry.spans(FINGERPRINT, 30, max_age_s=0)
            assert {seen.record.peer for seen in found} == {*alive, late.peer}
