"""Everything that IPv4 does, over IPv6: listening, dialling, port check, tokens, relays."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trio
from multiaddr import Multiaddr

from corolla.daemon.identity import new_identity
from corolla.daemon.network.dialling import Reach, Reachability, order, reach_of, split_peer
from corolla.daemon.network.libp2p import tcp as tcp_module
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.libp2p.tcp import listenable
from corolla.daemon.network.members.greeting import discover_swarm, found_swarm
from corolla.daemon.network.members.membership import Membership
from corolla.daemon.network.reach.relaying import RelayLimits
from corolla.daemon.network.reach.whereabouts import Whereabouts
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.invitations import SwarmToken, decode_token, encode_token

pytestmark = pytest.mark.anyio

ECHO = "/test/echo/1"
SIX = ("/ip6/::1/tcp/0",)
FOUR = ("/ip4/127.0.0.1/tcp/0",)
BOTH = ("/ip4/0.0.0.0/tcp/4517", "/ip6/::/tcp/4517")
has_loopback = listenable(("/ip6/::/tcp/0",)) != ()
needs_ipv6 = pytest.mark.skipif(not has_loopback, reason="this machine has no IPv6")


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)
    await stream.close()


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[Libp2pNetwork]:
    async with open_network(new_identity(), **{"listen": SIX, **options}) as network:
        network.handle(ECHO, echo)
        yield network


async def assert_echoes(network: Libp2pNetwork, peer: str) -> None:
    stream = await network.open(peer, ECHO, timeout_s=10)
    await stream.send(b"there?")
    assert await stream.receive() == b"there?"
    await stream.close()


@needs_ipv6
async def test_peers_talk_and_see_each_other_over_ipv6() -> None:
    async with opened() as one, opened() as other:
        (address,) = other.addresses()
        assert address.startswith("/ip6/::1/tcp/")
        assert await one.connect(address, timeout_s=5) == other.peer
        await assert_echoes(one, other.peer)
        await assert_echoes(other, one.peer)
        assert one.peers()[0].addresses == (split_peer(address)[0],)
        assert other.observes(one.peer).startswith("/ip6/::1/tcp/")


@needs_ipv6
async def test_one_listens_on_both_and_is_reached_on_both() -> None:
    async with opened(listen=(*FOUR, *SIX)) as both, opened(listen=FOUR) as four, opened() as six:
        addresses = {address.split("/")[1]: address for address in both.addresses()}
        assert await four.connect(addresses["ip4"], timeout_s=5) == both.peer
        assert await six.connect(addresses["ip6"], timeout_s=5) == both.peer
        await assert_echoes(four, both.peer)
        await assert_echoes(six, both.peer)


def test_of_equal_addresses_those_of_ipv4_are_told_first() -> None:
    where = Whereabouts((), Reachability.AUTO)
    where.listens_on(
        [Multiaddr("/ip6/fd00::2/tcp/1"), Multiaddr("/ip6/::1/tcp/1"), Multiaddr("/ip4/10.0.0.1/tcp/1")]
    )
    told = ("/ip4/10.0.0.1/tcp/1", "/ip6/fd00::2/tcp/1", "/ip6/::1/tcp/1")
    assert where.all((), is_private=False) == told


@needs_ipv6
async def test_where_ipv6_fails_ipv4_is_tried() -> None:
    async with opened(listen=FOUR) as one, opened(listen=FOUR) as other:
        with socket.socket(socket.AF_INET6) as dead:
            dead.bind(("::1", 0))  # bound, and nobody listens
            one.learn(other.peer, (f"/ip6/::1/tcp/{dead.getsockname()[1]}", *other.addresses()))
            await assert_echoes(one, other.peer)


@needs_ipv6
async def test_a_taken_port_is_noticed_on_ipv6() -> None:
    async with opened() as one:
        listen = split_peer(one.addresses()[0])[0]
        with pytest.raises(CorollaError) as caught:
            async with opened(listen=(listen,)):
                pytest.fail("two networks share a port")
        assert caught.value.code is Code.PORT_TAKEN


@needs_ipv6
async def test_the_wildcard_is_told_as_real_addresses() -> None:
    async with opened(listen=("/ip6/::/tcp/0",)) as one:
        told = one.addresses()
        assert told
        assert not any("/ip6/::/" in address or "/ip6/fe80" in address for address in told)


@needs_ipv6
async def test_a_swarm_is_found_and_joined_by_a_token_over_ipv6() -> None:
    roses = found_swarm("roses", bytes(32), b"1")
    async with opened() as one, opened() as other, anyio.create_task_group() as tasks:
        ada = Membership(one, roses)
        await tasks.start(ada.run)
        token = decode_token(encode_token(SwarmToken(roses.swarm_id, roses.name, one.addresses())))
        assert await discover_swarm(other, token.addresses[0]) == roses
        bob = Membership(other, roses, bootstrap=token.addresses)
        await tasks.start(bob.run)
        await bob.wait_joined(timeout_s=10)
        assert await ada.wait_member(other.peer, timeout_s=10)
        tasks.cancel_scope.cancel()


@needs_ipv6
async def test_a_relay_carries_over_ipv6() -> None:
    relay = {"relay": RelayLimits(), "reachability": Reachability.PUBLIC}
    async with (
        opened(**relay) as middle,
        opened(listen=(), reachability=Reachability.PRIVATE) as server,
        opened() as client,
    ):
        await server.connect(middle.addresses()[0], timeout_s=5)
        with trio.fail_after(20):
            while not server.relays.held:  # noqa: ASYNC110 - the network tells nobody of this
                await trio.sleep(0.01)
        client.learn(server.peer, server.addresses())
        await assert_echoes(client, server.peer)
        assert client.peers()[0].relayed or client.peers()[1].relayed


def test_without_ipv6_its_wildcard_is_left_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_module, "_has_ipv6", lambda: False)
    assert listenable(BOTH) == BOTH[:1]
    assert listenable(("/ip6/2001:db8::1/tcp/1",)) == (
        "/ip6/2001:db8::1/tcp/1",
    )  # it was asked for: an error


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("/ip6/2606:4700::1/tcp/1", Reach.PUBLIC),
        ("/ip6/fd00::2/tcp/1", Reach.NEAR),
        ("/ip6/fe80::1/tcp/1", Reach.NEAR),
        ("/ip6zone/eth0/ip6/fe80::1/tcp/1", Reach.NEAR),
        ("/ip6/::1/tcp/1", Reach.NEAR),
        ("/ip6/2606:4700::1/tcp/1/p2p/R/p2p-circuit", Reach.RELAYED),
    ],
)
def test_how_far_an_ipv6_address_is(address: str, reach: Reach) -> None:
    assert reach_of(address) is reach


def test_addresses_of_both_families_are_tried_by_their_reach() -> None:
    public = ("/ip6/2606:4700::1/tcp/1", "/ip4/8.8.8.8/tcp/1")
    near = "/ip6/fd00::2/tcp/1"
    assert order((*public, near), {}, 0.0) == (near, *public)
