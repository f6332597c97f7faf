"""Which address of a peer is tried when."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from corolla.daemon.network.dialling import (
    AVOID_ABROAD_S,
    AVOID_FAILED_S,
    AddressBook,
    Reach,
    order,
    reach_of,
    split_peer,
    try_each,
)
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import MAX_ADDRESSES

LOOPBACK = "/ip4/127.0.0.1/tcp/1"
LAN = "/ip4/192.168.1.7/tcp/1"
PUBLIC = "/ip4/8.8.8.8/tcp/1"
PUBLIC6 = "/ip6/2600::1/tcp/1"
NAMED = "/dns4/example.org/tcp/1"
RELAYED = "/ip4/192.168.1.9/tcp/1/p2p/QmRelay/p2p-circuit"


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        (LOOPBACK, Reach.NEAR),
        (LAN, Reach.NEAR),
        ("/ip6/::1/tcp/1", Reach.NEAR),
        ("/ip6/fe80::1/tcp/1", Reach.NEAR),
        ("/ip4/100.64.0.1/tcp/1", Reach.NEAR),
        (PUBLIC, Reach.PUBLIC),
        (PUBLIC6, Reach.PUBLIC),
        (NAMED, Reach.PUBLIC),
        ("/ip4/nonsense/tcp/1", Reach.PUBLIC),
        (RELAYED, Reach.RELAYED),
    ],
)
def test_reach(address: str, reach: Reach) -> None:
    assert reach_of(address) is reach


def test_near_comes_before_public_and_public_before_relayed() -> None:
    assert order([RELAYED, PUBLIC, LAN], {}, 0.0) == (LAN, PUBLIC, RELAYED)


def test_of_one_reach_the_newest_comes_first() -> None:
    assert order([PUBLIC6, PUBLIC, NAMED], {}, 0.0) == (PUBLIC6, PUBLIC, NAMED)


def test_what_failed_lately_comes_last_and_in_its_turn_again_later() -> None:
    failed = {PUBLIC: 100.0}
    assert order([PUBLIC, RELAYED], failed, 100.0 + AVOID_FAILED_S - 1) == (RELAYED, PUBLIC)
    assert order([PUBLIC, RELAYED], failed, 100.0 + AVOID_FAILED_S) == (PUBLIC, RELAYED)


def test_a_private_address_that_failed_is_of_another_network_for_an_hour() -> None:
    failed = {LAN: 100.0}
    assert order([LAN, RELAYED], failed, 100.0 + AVOID_ABROAD_S - 1) == (RELAYED, LAN)
    assert order([LAN, RELAYED], failed, 100.0 + AVOID_ABROAD_S) == (LAN, RELAYED)


@given(st.lists(st.sampled_from([LOOPBACK, LAN, PUBLIC, NAMED, RELAYED])), st.floats(0, 1e6))
def test_order_loses_nothing_and_repeats_nothing(addresses: list[str], now: float) -> None:
    found = order(addresses, {LAN: now}, now)
    assert sorted(found) == sorted(set(addresses))


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        (f"{LAN}/p2p/Qm1", (LAN, "Qm1")),
        (LAN, (LAN, None)),
        (f"{RELAYED}/p2p/Qm1", (RELAYED, "Qm1")),
        (RELAYED, (RELAYED, None)),
    ],
)
def test_the_last_peer_id_is_split_off(address: str, parts: tuple[str, str | None]) -> None:
    assert split_peer(address) == parts


@pytest.mark.parametrize("address", ["", "192.168.1.7:4001", "/" + "x" * 10_000])
def test_what_is_no_multiaddress_is_refused(address: str) -> None:
    with pytest.raises(CorollaError) as caught:
        split_peer(address)
    assert caught.value.code is Code.BAD_REQUEST


def test_the_book_keeps_the_newest_addresses_first_and_only_so_many() -> None:
    book = AddressBook()
    for port in range(2 * MAX_ADDRESSES):
        book.learn("Qm1", [f"/ip4/8.8.8.8/tcp/{port}"])
    known = book.known("Qm1")
    assert len(known) == MAX_ADDRESSES
    assert known[0] == f"/ip4/8.8.8.8/tcp/{2 * MAX_ADDRESSES - 1}"


def test_the_book_drops_what_names_another_peer() -> None:
    book = AddressBook()
    book.learn("Qm1", [f"{LAN}/p2p/Qm2", f"{PUBLIC}/p2p/Qm1"])
    assert book.known("Qm1") == (PUBLIC,)


def test_the_book_forgets_the_peer_unheard_of_for_longest() -> None:
    book = AddressBook(max_peers=2)
    for peer in ("Qm1", "Qm2", "Qm1", "Qm3"):
        book.learn(peer, [LAN])
    assert [book.known(peer) for peer in ("Qm1", "Qm2", "Qm3")] == [(LAN,), (), (LAN,)]


@pytest.mark.anyio
async def test_the_first_address_that_answers_is_taken() -> None:
    tried: list[str] = []

    async def attempt(address: str) -> str:
        tried.append(address)
        if address == LAN:
            raise CorollaError(Code.PEER_LOST, "connection refused")
        return f"connected to {address}"

    book = AddressBook()
    assert await try_each("Qm1", [RELAYED, PUBLIC, LAN], attempt, book) == f"connected to {PUBLIC}"
    assert tried == [LAN, PUBLIC]
    assert book.known("Qm1") == (PUBLIC,)
    tried.clear()
    await try_each("Qm1", [RELAYED, PUBLIC, LAN], attempt, book)
    assert tried == [PUBLIC]  # the refused one is not tried first again


def test_a_silent_address_costs_its_time_once() -> None:
    book = AddressBook()

    async def attempt(address: str) -> str:
        if address == LAN:
            await trio.sleep_forever()
        return address

    async def main() -> list[float]:
        times = []
        for _ in range(2):
            began = trio.current_time()
            assert await try_each("Qm1", [LAN, PUBLIC], attempt, book, each_s=5.0) == PUBLIC
            times.append(trio.current_time() - began)
        return times

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == [5.0, 0.0]


@pytest.mark.anyio
async def test_the_error_names_every_address_and_why() -> None:
    async def attempt(address: str) -> str:
        raise CorollaError(Code.PEER_LOST, f"{address} refused")

    with pytest.raises(CorollaError) as caught:
        await try_each("Qm1", [LAN, PUBLIC], attempt, AddressBook())
    assert caught.value.code is Code.PEER_LOST
    assert f"{LAN} refused" in caught.value.message
    assert caught.value.details["tried"] == [LAN, PUBLIC]


@pytest.mark.anyio
async def test_a_peer_without_address_is_lost_at_once() -> None:
    async def attempt(address: str) -> str:
        return address

    with pytest.raises(CorollaError, match="no address of it is known"):
        await try_each("Qm1", [], attempt, AddressBook())
