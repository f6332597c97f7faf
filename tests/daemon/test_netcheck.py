"""`peers`, `netcheck` and `ping` of daemons that are connected over loopback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from corolla.daemon.answers.netcheck import carrier, find_peer, has_route
from corolla.daemon.network.seam import PeerView as Connection
from corolla.protocol.control import METHODS, Right
from corolla.protocol.errors import Code, CorollaError

from .test_node import ask, folder, node, pair, refused  # noqa: F401 - folder is a fixture

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@pytest.mark.anyio
async def test_two_members_see_each_other_direct_with_clock_and_round_trip(folder: Path) -> None:  # noqa: F811
    async with pair(folder) as (first, second, one, other):
        await other.join((await one.create_swarm("roses")).token)
        view = await other.netcheck()
        assert (view.swarm, view.peer) == ("roses", second.status().peer)
        assert view.wanted == (LOOPBACK,)
        assert view.listening[0].startswith("/ip4/127.0.0.1/tcp/")
        assert not view.listening[0].endswith("/0")
        assert view.announced == second.status().addresses
        (peer,) = view.peers
        assert (peer.peer, peer.connected, peer.relayed, peer.inbound) == (
            first.status().peer,
            True,
            False,
            False,
        )
        assert peer.connection
        assert peer.clock_ahead_s == pytest.approx(0.0, abs=30.0)  # one machine, and a slow one
        assert (view.num_clocks, view.clock_ahead_s) == (1, pytest.approx(-(peer.clock_ahead_s or 0.0)))
        assert "loopback_only" in [finding.name for finding in view.findings]
        assert not any(finding.is_problem for finding in view.findings if finding.name != "no_route")
        (back,) = await one.peers()
        assert (back.peer, back.inbound) == (second.status().peer, True)


@pytest.mark.anyio
async def test_a_member_is_pinged_by_its_id_or_the_end_of_it(folder: Path) -> None:  # noqa: F811
    async with pair(folder) as (first, _, one, other):
        await other.join((await one.create_swarm("roses")).token)
        peer = first.status().peer
        answer = await other.ping(peer, count=3)
        assert (answer.peer, len(answer.rtts_s), answer.relayed, answer.lost) == (peer, 3, False, False)
        assert answer.min_s == min(answer.rtts_s) <= answer.median_s <= max(answer.rtts_s)
        assert answer.address.startswith("/ip4/127.0.0.1/tcp/")
        assert (await other.ping(peer[-6:], count=1)).peer == peer


@pytest.mark.anyio
async def test_a_peer_that_cannot_be_pinged_is_a_clear_error(folder: Path) -> None:  # noqa: F811
    async with node(folder / "a") as daemon, await ask(daemon) as program:
        assert (await refused(program.ping("nobody"))).code is Code.NO_SWARM
        await program.create_swarm("roses")
        unknown = await refused(program.ping("nobody"))
        assert (unknown.code, "daemonctl peers" in unknown.remedy) == (Code.BAD_REQUEST, True)
        assert "itself" in (await refused(program.ping(daemon.status().peer))).message
        async with node(folder / "b") as gone:
            await gone.place.join(daemon.status().addresses[0])
            peer = gone.status().peer
            await daemon.the_belonging().membership.wait_member(peer, timeout_s=30)
        lost = await refused(program.ping(peer, timeout_s=5.0))
        assert lost.code is Code.PEER_LOST
        assert (peer in lost.message, bool(lost.remedy)) == (True, True)
        for wrong in ({"count": 0}, {"count": 1000}, {"timeout_s": 1e9}):
            assert (await refused(program.ping(peer, **wrong))).code is Code.BAD_REQUEST


@pytest.mark.anyio
async def test_a_daemon_outside_a_swarm_says_so(folder: Path) -> None:  # noqa: F811
    async with node(folder) as daemon, await ask(daemon) as program:
        view = await program.netcheck()
        assert (view.swarm, view.listening, view.peers) == (None, (), ())
        (problem,) = [f for f in view.findings if f.is_problem and f.name != "no_route"]
        assert (problem.name, "daemonctl join TOKEN" in problem.remedy) == ("no_swarm", True)
        assert await program.peers() == ()


def test_looking_is_for_all_and_pinging_for_users() -> None:
    rights = {name: METHODS[name].right for name in ("peers", "netcheck", "ping")}
    assert rights == {"peers": Right.SEE, "netcheck": Right.SEE, "ping": Right.USE}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("QmAlice", "QmAlice"), ("ice", "QmAlice"), ("QmAl…ice", "QmAlice"), ("QmBob", "QmBob")],
)
def test_a_peer_is_found_by_its_id_its_end_or_its_short_form(wanted: str, found: str) -> None:
    assert find_peer(wanted, "QmMe", ["QmAlice", "QmBob", "QmBob2QmBob"]) == found


@pytest.mark.parametrize(
    ("wanted", "words"), [("Bob", "may be any of"), ("", "no member"), ("…", "no member"), ("Me", "itself")]
)
def test_a_name_that_tells_no_peer_apart_is_refused(wanted: str, words: str) -> None:
    with pytest.raises(CorollaError, match=words):
        find_peer(wanted, "QmMe", ["QmAlice", "QmBob", "QmBob2QmBob"])


@pytest.mark.parametrize(
    ("addresses", "relayed", "through"),
    [
        (("/ip4/192.0.2.1/tcp/1",), False, ""),
        (("/ip4/192.0.2.1/tcp/1/p2p/QmRelay/p2p-circuit",), True, "QmRelay"),
        (("/ip4/192.0.2.1/tcp/1/p2p/QmRelay/p2p-circuit/p2p/QmBob",), True, "QmRelay"),
        (("/p2p-circuit",), True, ""),
    ],
)
def test_the_relay_that_carries_a_connection_is_told(
    addresses: tuple[str, ...], relayed: bool, through: str
) -> None:
    assert carrier(Connection("QmBob", addresses, relayed, False, None)) == through


def test_this_machine_has_a_route_to_itself() -> None:
    assert has_route(socket.AF_INET, "127.0.0.1")
    assert not has_route(socket.AF_INET, "240.0.0.300")
