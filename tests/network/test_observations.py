"""What others say of where they see us: several together are believed, one alone never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.daemon.network.dialling import Reachability
from corolla.daemon.network.reach.observations import QUORUM, Nat, Sighting, combine, endpoint_of, place_of
from corolla.daemon.network.reach.whereabouts import Whereabouts

HOME = "/ip4/11.0.0.9/tcp/4517"
PEERS = [f"11.0.0.{number}" for number in range(20, 40)]
ADDRESSES = [f"/ip4/11.0.1.{number}/tcp/4517" for number in range(5)]


def mapped(place: str, address: str) -> Sighting:
    return Sighting(place, address, is_mapping=True)


def test_one_observer_decides_nothing() -> None:
    seen = combine([mapped(PEERS[0], HOME)], ())
    assert seen.addresses == ()
    assert seen.nat is Nat.UNKNOWN


def test_two_observers_at_different_places_are_believed() -> None:
    seen = combine([mapped(PEERS[0], HOME), mapped(PEERS[1], HOME)], ())
    assert seen.addresses == (HOME,)
    assert seen.nat is Nat.ENDPOINT_INDEPENDENT


def test_many_peers_at_one_place_are_one_observer() -> None:
    assert combine([mapped(PEERS[0], HOME)] * 10, ()).addresses == ()


def test_another_port_for_each_is_a_symmetric_nat() -> None:
    seen = combine([mapped(PEERS[0], HOME), mapped(PEERS[1], "/ip4/11.0.0.9/tcp/60001")], ())
    assert seen.addresses == ()
    assert seen.nat is Nat.SYMMETRIC


def test_seen_at_our_own_interface_there_is_no_nat() -> None:
    assert combine([mapped(PEERS[0], HOME), mapped(PEERS[1], HOME)], (HOME,)).nat is Nat.NONE


def test_those_who_dialled_us_say_nothing_of_the_mapping() -> None:
    called = [Sighting(place, HOME, is_mapping=False) for place in PEERS[:3]]
    assert combine(called, ()).addresses == (HOME,)
    assert combine(called, ()).nat is Nat.UNKNOWN


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.168.1.2/tcp/4517",
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/11.0.0.9/udp/4517",
        "/ip4/11.0.0.9/tcp/0",
        "/ip4/11.0.0.9/tcp/65536",
        "/dns4/example.org/tcp/4517",
        "/ip6/11.0.0.9/tcp/4517",
        "/ip4/11.0.0.9/tcp/4517/p2p/12D3KooW",
        "/ip4/11.0.0.8/tcp/1/p2p/R/p2p-circuit",
        "nonsense",
        "",
    ],
)
def test_what_is_no_public_endpoint_is_not_believed_however_many_say_it(address: str) -> None:
    assert combine([mapped(place, address) for place in PEERS], ()).addresses == ()


@given(
    truths=st.integers(min_value=QUORUM, max_value=len(PEERS) - 1),
    lie=st.sampled_from([*ADDRESSES, "nonsense", "/ip4/10.0.0.1/tcp/1"]),
    at=st.integers(min_value=0, max_value=QUORUM),
)
def test_a_single_liar_changes_no_address(truths: int, lie: str, at: int) -> None:
    honest = [mapped(place, HOME) for place in PEERS[:truths]]
    told = [*honest[:at], mapped(PEERS[-1], lie), *honest[at:]]
    assert combine(told, ()).addresses == (HOME,)
    assert combine(told, ()).nat is Nat.ENDPOINT_INDEPENDENT


@given(
    st.lists(st.builds(Sighting, st.sampled_from(["", *PEERS]), st.sampled_from(ADDRESSES), st.booleans()))
)
def test_the_order_of_the_sightings_does_not_matter(sightings: list[Sighting]) -> None:
    assert combine(sightings, ()) == combine(sightings[::-1], ())


@given(st.text(max_size=80))
def test_no_text_upsets_the_parser(text: str) -> None:
    endpoint = endpoint_of(text)
    assert endpoint is None or 0 < endpoint[1] < 65536
    assert isinstance(place_of(text), str)


def test_a_place_is_an_address_or_a_network_of_ipv6() -> None:
    assert place_of("/ip4/11.0.0.9/tcp/1") == "11.0.0.9"
    assert place_of("/ip6/2001:4860:1:2:3::9/tcp/1") == "2001:4860:1:2::/64"
    assert place_of("/ip4/192.168.0.1/tcp/1") == ""
    assert place_of("/dns4/example.org/tcp/1") == ""


def test_observed_addresses_are_told_to_others_when_they_can_be_dialled() -> None:
    where = Whereabouts((), Reachability.PUBLIC)
    assert not where.seen_by("one", mapped(PEERS[0], HOME))
    assert where.seen_by("two", mapped(PEERS[1], HOME))
    assert HOME in where.all((), is_private=False)
    assert HOME not in where.all((), is_private=True)
    assert where.doors(()) == (HOME,)


def test_with_the_observer_goes_what_it_saw() -> None:
    where = Whereabouts((), Reachability.PUBLIC)
    where.seen_by("one", mapped(PEERS[0], HOME))
    where.seen_by("two", mapped(PEERS[1], HOME))
    where.lost("two")
    assert where.seen().addresses == ()


def test_an_announced_address_needs_no_observed_one_beside_it() -> None:
    where = Whereabouts(("/ip4/11.0.0.5/tcp/7",), Reachability.AUTO)
    where.seen_by("one", mapped(PEERS[0], HOME))
    where.seen_by("two", mapped(PEERS[1], HOME))
    assert where.all((), is_private=False) == ("/ip4/11.0.0.5/tcp/7",)
