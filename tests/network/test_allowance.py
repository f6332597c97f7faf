"""What a peer may ask of us, and who may wait at the door: decided without any waiting."""

from __future__ import annotations

import pytest

from corolla.daemon.network.allowance import (
    MEMBER,
    STRANGER,
    WEIGH_EVERY_BYTES,
    Allowances,
    Bucket,
    Paces,
    Rate,
    heaviest,
)
from corolla.daemon.network.libp2p.lobby import Lobby, origin_of_socket
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import MAX_PACE_S, STREAMS_PER_PEER, STREAMS_PER_STRANGER

TEN = Rate(10.0, 100.0)


def test_a_pause_gives_so_much_at_once_and_no_more() -> None:
    bucket = Bucket()
    assert bucket.take(100, TEN, now=1000.0) == 0.0
    assert bucket.take(1, TEN, now=1000.0) == pytest.approx(0.1)
    assert bucket.take(100, TEN, now=5000.0) == 0.0  # however long the pause was
    assert bucket.take(30, TEN, now=5001.0) == pytest.approx(2.0)


def test_who_keeps_the_pace_never_waits() -> None:
    bucket = Bucket()
    assert [bucket.take(5, TEN, now=0.5 * turn) for turn in range(1000)] == [0.0] * 1000


def test_who_waits_as_told_gets_the_pace_in_the_long_run() -> None:
    bucket, now = Bucket(), 0.0
    for _ in range(1000):
        now += bucket.take(7, TEN, now)
    assert 7000 / now == pytest.approx(10, rel=0.02)


def test_a_peer_is_held_to_the_strictest_of_its_rates() -> None:
    allowance = Allowances(lambda peer: True).of("ada")
    assert allowance.take(1000, 10, 1, now=0.0) == 0.0
    assert allowance.take(1000, 10, int(MEMBER.opens.at_once) + 100, now=0.0) == pytest.approx(
        101 / MEMBER.opens.per_s
    )
    assert allowance.take(1000, int(MEMBER.frames.at_once * 5), 0, now=0.0) > MAX_PACE_S
    assert allowance.take(int(MEMBER.bytes.at_once * 5), 0, 0, now=0.0) > MAX_PACE_S


def test_a_stranger_may_little_until_it_is_a_member() -> None:
    members: set[str] = set()
    allowance = Allowances(members.__contains__).of("ada")
    flood = int(STRANGER.bytes.at_once + STRANGER.bytes.per_s)
    assert allowance.take(flood, 1, 1, now=0.0) == pytest.approx(1.0)
    assert allowance.unread_bytes == STRANGER.unread_bytes
    members.add("ada")
    assert allowance.take(flood, 1, 1, now=0.0) == 0.0
    assert allowance.unread_bytes == MEMBER.unread_bytes


@pytest.mark.parametrize(("is_member", "limit"), [(True, STREAMS_PER_PEER), (False, STREAMS_PER_STRANGER)])
def test_so_many_streams_are_served_at_once(is_member: bool, limit: int) -> None:
    allowance = Allowances(lambda peer: is_member).of("ada")
    streams = [allowance.stream() for _ in range(limit)]
    for stream in streams:
        stream.__enter__()
    with pytest.raises(CorollaError) as caught, allowance.stream():
        pytest.fail("one too many")
    assert caught.value.code is Code.LIMIT_EXCEEDED
    streams[0].__exit__(None, None, None)
    with allowance.stream():
        assert allowance.num_streams == limit


def test_nobody_gets_more_by_hanging_up() -> None:
    allowances = Allowances(lambda peer: False)
    allowances.of("ada").take(int(STRANGER.bytes.at_once), 0, 0, now=0.0)
    assert allowances.of("ada").take(1000, 0, 0, now=0.0) > 0
    assert allowances.of("bob").take(1000, 0, 0, now=0.0) == 0.0


def test_only_so_many_peers_are_remembered() -> None:
    allowances = Allowances(lambda peer: False, max_peers=3)
    for peer in "abcda":
        allowances.of(peer)
    assert len(allowances) == 3
    paces = Paces(TEN, max_peers=2)
    assert paces.take("a", 200, 0.0) > 0
    paces.take("b", 1, 0.0)
    assert paces.take("a", 1, 0.0) > 0
    paces.take("c", 1, 0.0)
    assert paces.take("b", 100, 0.0) == 0.0  # forgotten, and so as good as new


def test_memory_is_looked_at_each_time_much_came_in() -> None:
    looked: list[None] = []
    allowances = Allowances(lambda peer: True, on_bytes=lambda: looked.append(None))
    for turn in range(7):
        allowances.of(str(turn % 2)).take(WEIGH_EVERY_BYTES // 3 + 1, 1, 0, now=0.0)
    assert len(looked) == 2


def test_the_one_who_fills_most_of_our_memory_goes() -> None:
    assert heaviest({"ada": 60, "bob": 40}, 100) is None
    assert heaviest({"ada": 61, "bob": 40}, 100) == "ada"
    assert heaviest({}, 100) is None


# the door


def test_a_full_lobby_lets_a_newcomer_in_for_the_oldest_of_the_largest_crowd() -> None:
    lobby = Lobby(max_handshakes=5)
    crowd = [lobby.enter("203.0.113.0/24")[0] for _ in range(3)]
    others = [lobby.enter(origin)[0] for origin in ("198.51.100.0/24", "10.0.0.7")]
    guest, leaves = lobby.enter("192.0.2.0/24")
    assert leaves is crowd[0]
    assert lobby.num_waiting == 5
    _, leaves = lobby.enter("192.0.2.0/24")
    assert leaves is crowd[1]
    lobby.introduce(guest)
    _, leaves = lobby.enter("192.0.2.0/24")
    assert leaves is None
    assert others[0] is not others[1]


def test_an_origin_has_a_share_of_the_connections() -> None:
    lobby = Lobby(max_per_origin=2)
    guests = [lobby.enter("10.0.0.7")[0] for _ in range(2)]
    for guest in guests:
        lobby.introduce(guest)
    assert "limit 2" in lobby.refusal("10.0.0.7", now=0.0)
    assert lobby.refusal("10.0.0.8", now=0.0) == ""
    lobby.leave(guests[0])
    assert lobby.refusal("10.0.0.7", now=0.0) == ""


def test_an_origin_knocks_at_a_bounded_pace_and_this_machine_as_it_likes() -> None:
    lobby = Lobby(pace=Rate(1.0, 3.0))
    assert [bool(lobby.refusal("10.0.0.7", now=0.0)) for _ in range(5)] == [False] * 3 + [True] * 2
    assert lobby.refusal("10.0.0.8", now=0.0) == ""
    assert not any(lobby.refusal("", now=0.0) for _ in range(100))


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("8.8.8.8", "8.8.8.0/24"),
        ("2606:4700:1:2::3", "2606:4700:1::/48"),
        ("192.168.1.5", "192.168.1.5"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("127.0.0.1", ""),
        ("::1", ""),
        ("::ffff:127.0.0.1", ""),
        ("nonsense", "nonsense"),
    ],
)
def test_an_origin_is_a_network_of_the_world_or_a_private_address(address: str, origin: str) -> None:
    assert origin_of_socket(address) == origin
