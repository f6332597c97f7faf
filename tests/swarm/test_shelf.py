"""What a holder believes, keeps, supersedes and forgets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.daemon.network.registry.shelf import Shelf, batches, entry_bytes, origin_of
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import (
    MAX_BATCH_BYTES,
    MAX_CLOCK_SKEW_S,
    MAX_HEADER_BYTES,
    MAX_MANIFESTS_PER_MODEL,
    MAX_RECORDS_PER_KEY,
    MAX_RECORDS_PER_MESSAGE,
    MAX_RECORDS_PER_ORIGIN,
    SEQ_MEMORY_S,
)
from corolla.protocol.messages import encode
from corolla.protocol.records import (
    ManifestRecord,
    Record,
    SpanRecord,
    SpanState,
    blocks_key,
    keys_of,
    models_key,
    peer_id_of,
    sign,
)
from corolla.protocol.registry import Entry, Store
from corolla.protocol.tensors import DType
from corolla.protocol.work import ModelFacts

SWARM = "swarm"
NOW_UNIX = 1_800_000_000.0
FINGERPRINT = "f" * 64
FACTS = ModelFacts("m", FINGERPRINT, "LlamaForCausalLM", 30, 576, 49152, 8192, {})


class Owner:
    """A peer with a key and a clock."""

    def __init__(self, number: int = 1) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
        self.peer = peer_id_of(self.key.public_key().public_bytes_raw())

    def record(self, seq: int = 1, **changes: Any) -> SpanRecord:
        record = SpanRecord(
            peer=self.peer, worker=0, seq=seq, issued_at=NOW_UNIX, lifetime_s=60.0, fingerprint=FINGERPRINT,
            start=0, end=12, state=SpanState.ONLINE, dtype=DType.FLOAT32,
        )  # fmt: skip
        return dataclasses.replace(record, **changes)

    def entry(self, record: Record, *, keys: tuple[bytes, ...] | None = None, left_s: float = 60.0) -> Entry:
        signed = sign(record, SWARM, self.key)
        return Entry(signed, left_s, keys_of(record, SWARM) if keys is None else keys)

    def span(self, seq: int = 1, **changes: Any) -> Entry:
        return self.entry(self.record(seq, **changes))


ADA = Owner()


def put(shelf: Shelf, entry: Entry, owner: str | None = ADA.peer, *, now: float = 0.0, **more: Any) -> bool:
    return shelf.put(entry, now=now, now_unix=NOW_UNIX + now, owner=owner, **more)


def refusal(shelf: Shelf, entry: Entry, owner: str | None = ADA.peer, **more: Any) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        put(shelf, entry, owner, **more)
    return caught.value


def spans(shelf: Shelf, now: float = 0.0) -> list[int]:
    return [kept.record.seq for kept in shelf.spans(FINGERPRINT, now)]


def test_a_record_lives_for_its_lifetime_on_our_clock() -> None:
    shelf = Shelf(SWARM)
    assert put(shelf, ADA.span(), now=100.0)
    assert spans(shelf, 159.9) == [1]
    assert spans(shelf, 160.0) == []
    assert shelf.expire(160.0)
    assert len(shelf) == 0
    assert shelf.next_expiry() is None


def test_what_is_handed_on_has_the_remainder_only() -> None:
    first, second = Shelf(SWARM), Shelf(SWARM)
    put(first, ADA.span(), now=0.0)
    (found,) = first.find(keys_of(ADA.record(), SWARM), "", 45.0).entries
    assert found.remaining_s == 15.0
    put(second, found, None, now=200.0)
    assert spans(second, 214.9) == [1]
    assert spans(second, 215.0) == []


def test_a_higher_seq_supersedes_and_only_news_counts_as_such() -> None:
    shelf = Shelf(SWARM)
    assert put(shelf, ADA.span(1))
    assert not put(shelf, ADA.span(2, tokens_per_s=3.0), now=20.0)
    assert put(shelf, ADA.span(3, state=SpanState.DRAINING), now=20.0)
    assert spans(shelf, 79.0) == [3]


def test_a_repeated_record_renews_nothing() -> None:
    shelf = Shelf(SWARM)
    put(shelf, ADA.span())
    assert not put(shelf, ADA.span(), now=30.0)
    assert spans(shelf, 60.0) == []


def test_a_lower_or_equal_seq_is_a_replay_and_the_highest_is_told() -> None:
    shelf = Shelf(SWARM)
    put(shelf, ADA.span(5))
    for seq in (4, 5):
        problem = refusal(shelf, ADA.span(seq, tokens_per_s=1.0))
        assert problem.code is Code.BAD_RECORD
        assert problem.details["seq"] == 5
    assert spans(shelf) == [5]


def test_a_replay_is_refused_long_after_expiry_until_its_clock_betrays_it() -> None:
    shelf = Shelf(SWARM)
    put(shelf, ADA.span())
    for now in (61.0, MAX_CLOCK_SKEW_S - 1):
        shelf.expire(now)
        assert "was seen" in refusal(shelf, ADA.span(), now=now).message
    forgotten = 60.0 + SEQ_MEMORY_S
    shelf.expire(forgotten)
    assert "our time" in refusal(shelf, ADA.span(), now=forgotten).message


def test_a_withdrawal_hides_a_span_and_cannot_be_undone_by_replay() -> None:
    shelf = Shelf(SWARM)
    put(shelf, ADA.span(1))
    assert put(shelf, ADA.span(2, state=SpanState.GONE))
    assert spans(shelf) == []
    assert refusal(shelf, ADA.span(1)).code is Code.BAD_RECORD
    manifest = ManifestRecord(ADA.peer, 3, NOW_UNIX, 60.0, FACTS)
    put(shelf, ADA.entry(manifest))
    assert shelf.manifests(0.0) == (manifest,)
    put(shelf, ADA.entry(dataclasses.replace(manifest, seq=4, gone=True)))
    assert shelf.manifests(0.0) == ()


def test_nobody_stores_for_another() -> None:
    assert "did not sign" in refusal(Shelf(SWARM), ADA.span(), "somebody").message


def test_a_forged_record_is_refused() -> None:
    entry = ADA.span()
    forged = dataclasses.replace(entry.signed, signature=bytes(64))
    assert "signature" in refusal(Shelf(SWARM), dataclasses.replace(entry, signed=forged)).message


def test_keys_that_are_not_the_records_own_are_refused() -> None:
    foreign = blocks_key(SWARM, FINGERPRINT, 7)
    assert "keys" in refusal(Shelf(SWARM), ADA.entry(ADA.record(), keys=(foreign,))).message


@pytest.mark.parametrize("left_s", [0.0, 60.1])
def test_no_time_left_or_more_than_it_was_given_is_refused(left_s: float) -> None:
    assert "s left" in refusal(Shelf(SWARM), ADA.entry(ADA.record(), left_s=left_s)).message


def test_it_is_found_under_the_keys_it_was_stored_under_only() -> None:
    shelf = Shelf(SWARM)
    key, other = keys_of(ADA.record(), SWARM)
    put(shelf, ADA.entry(ADA.record(), keys=(key,)))
    assert len(shelf.find([key], "", 0.0).entries) == 1
    assert len(shelf.find([other], "", 0.0).entries) == 0
    assert len(shelf.find([key, other], "", 0.0).entries) == 1
    put(shelf, ADA.entry(ADA.record(2, start=8), keys=(other,)))
    assert len(shelf.find([key], "", 0.0).entries) == 0
    assert len(shelf.find([other], "", 0.0).entries) == 1


def test_news_that_we_find_ourselves_is_held_on_for_others() -> None:
    shelf = Shelf(SWARM)
    key, other = keys_of(ADA.record(), SWARM)
    put(shelf, ADA.entry(ADA.record(), keys=(key,)))
    put(shelf, ADA.entry(ADA.record(2), keys=()), None)
    assert len(shelf.find([key], "", 0.0).entries) == 1
    assert len(shelf.find([other], "", 0.0).entries) == 0


def fill(shelf: Shelf, count: int, *, origin: str = "", first: int = 100) -> list[Owner]:
    owners = [Owner(first + i) for i in range(count)]
    for index, owner in enumerate(owners):
        place = origin or f"net{index // MAX_RECORDS_PER_ORIGIN}"
        put(shelf, owner.span(end=8), owner.peer, origin=place)
    return owners


def test_a_full_key_refuses_newcomers_and_goes_on_refreshing() -> None:
    shelf = Shelf(SWARM)
    owners = fill(shelf, MAX_RECORDS_PER_KEY)
    assert refusal(shelf, ADA.span(), origin="elsewhere").code is Code.BUSY
    assert len(shelf) == MAX_RECORDS_PER_KEY
    put(shelf, owners[0].span(2, end=8), owners[0].peer, origin="net0")
    assert spans(shelf).count(2) == 1
    found = set()
    after = ""
    while True:
        page = shelf.find(keys_of(ADA.record(end=8), SWARM), after, 0.0)
        assert len(page.entries) <= MAX_RECORDS_PER_MESSAGE
        found |= {peer_id_of(entry.signed.public_key) for entry in page.entries}
        after = page.next
        if not after:
            break
    assert found == {owner.peer for owner in owners}


def test_one_network_does_not_fill_a_key_alone() -> None:
    shelf = Shelf(SWARM)
    owners = fill(shelf, MAX_RECORDS_PER_ORIGIN, origin="203.0.113.0/24")
    problem = refusal(shelf, ADA.span(), origin="203.0.113.0/24")
    assert problem.code is Code.BUSY
    assert "203.0.113.0/24" in problem.message
    put(shelf, ADA.span(), origin="elsewhere")
    put(shelf, owners[0].span(2, end=8), owners[0].peer, origin="203.0.113.0/24")


def test_a_full_shelf_refuses_newcomers() -> None:
    shelf = Shelf(SWARM, max_records=3)
    fill(shelf, 3)
    assert refusal(shelf, ADA.span()).code is Code.BUSY


def test_manifests_of_one_model_leave_room_for_others() -> None:
    shelf = Shelf(SWARM)

    def announce(owner: Owner, facts: ModelFacts) -> None:
        put(shelf, owner.entry(ManifestRecord(owner.peer, 1, NOW_UNIX, 60.0, facts)), owner.peer)

    owners = [Owner(10 + i) for i in range(MAX_MANIFESTS_PER_MODEL + 1)]
    for owner in owners[:-1]:
        announce(owner, FACTS)
    with pytest.raises(CorollaError, match="enough"):
        announce(owners[-1], FACTS)
    announce(owners[-1], dataclasses.replace(FACTS, fingerprint="another"))
    assert len(shelf.find([models_key(SWARM)], "", 0.0).entries) == MAX_MANIFESTS_PER_MODEL + 1


def test_batches_fit_a_message_whatever_they_hold() -> None:
    long = tuple(f"/dns/{'x' * 200}/tcp/{i}" for i in range(16))
    entries = [ADA.entry(ADA.record(i, start=0, end=1024, addresses=long)) for i in range(1, 150)]
    groups = batches(entries)
    assert [entry for group in groups for entry in group] == entries
    for group in groups:
        assert len(encode(Store(group))) < MAX_HEADER_BYTES
        assert sum(entry_bytes(entry) for entry in group) <= MAX_BATCH_BYTES


@pytest.mark.parametrize(
    ("addresses", "origin"),
    [
        (("/ip4/198.51.100.7/tcp/1",), "peer"),  # reserved for documentation: not a public address
        (("/ip4/8.8.4.7/tcp/1",), "8.8.4.0/24"),
        (("/ip6/2a00:1450:4001:81b::200e/tcp/1",), "2a00:1450:4001::/48"),
        (("/ip4/127.0.0.1/tcp/1",), "peer"),
        (("/ip4/192.168.1.7/tcp/1",), "peer"),
        (("/ip4/8.8.4.7/tcp/1/p2p/relay/p2p-circuit",), "8.8.4.0/24"),
        (("/memory/7", "/ip4/nonsense/tcp/1"), "peer"),
        ((), "peer"),
    ],
)
def test_an_origin_is_a_public_network_or_the_peer_itself(addresses: tuple[str, ...], origin: str) -> None:
    assert origin_of("peer", addresses) == origin
