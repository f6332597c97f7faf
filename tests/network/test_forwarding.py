"""A router forwards a port to us: asked for when it helps, renewed, taken back, and believed only when proved."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from multiaddr import Multiaddr
from trio.testing import wait_all_tasks_blocked

from corolla.daemon.network.dialling import Reachability
from corolla.daemon.network.reach import forwarding as forwarding_module
from corolla.daemon.network.reach.forwarding import LEASE_S, Forwarding, Gateway, find_gateway
from corolla.daemon.network.reach.observations import Sighting
from corolla.daemon.network.reach.proofs import Proof, Verdict, judge
from corolla.daemon.network.reach.whereabouts import Whereabouts
from corolla.protocol.errors import Code, CorollaError, error

from .router import LOOPBACK, Router, upnp

pytestmark = pytest.mark.anyio

MAPPED = "/ip4/11.0.0.9/tcp/4517"


def ask() -> Gateway:
    return find_gateway(LOOPBACK, search_ms=200)


@asynccontextmanager
async def kept(
    find: Callable[[], Gateway], is_wanted: Callable[[], bool] = lambda: True
) -> AsyncIterator[tuple[Forwarding, trio.Event]]:
    """A forwarding that runs, and what is set when it has an address."""
    there = trio.Event()
    forwarding = Forwarding(lambda: 4517, is_wanted, lambda: there.set(), find)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forwarding.run)
        with trio.fail_after(20):
            yield forwarding, there
        nursery.cancel_scope.cancel()


# with a router that speaks UPnP


async def test_a_port_is_forwarded_while_we_run_and_taken_back_at_the_end() -> None:
    with upnp(Router()) as router:
        async with kept(ask) as (forwarding, there):
            await there.wait()
            assert forwarding.addresses == (MAPPED,)
            assert router.mappings == {4517: (LOOPBACK, 4517, LEASE_S)}
        assert router.mappings == {}


async def test_another_outside_port_is_taken_where_ours_is_another_machine_s() -> None:
    with upnp(Router(taken=(4517, 4518))) as router:
        async with kept(ask) as (forwarding, there):
            await there.wait()
            assert forwarding.addresses == ("/ip4/11.0.0.9/tcp/4519",)
            assert router.mappings == {4519: (LOOPBACK, 4517, LEASE_S)}


async def test_a_router_that_knows_no_leases_is_asked_without() -> None:
    with upnp(Router(only_permanent=True)) as router:
        async with kept(ask) as (_, there):
            await there.wait()
            assert router.mappings == {4517: (LOOPBACK, 4517, 0)}
        assert router.mappings == {}


def test_without_a_router_the_search_ends_with_a_reason() -> None:
    with pytest.raises(CorollaError, match="no router answers") as caught:
        ask()
    assert caught.value.code is Code.UNSUPPORTED


# with one in memory


class Memory:
    """A gateway that notes what it is asked."""

    def __init__(self, ip: str = "11.0.0.9", *, refuses: bool = False) -> None:
        self.ip = ip
        self.refuses = refuses
        self.asked: list[str] = []
        self.renewed = threading.Event()

    def external_ip(self) -> str:
        return self.ip

    def forward(self, outside: int, inside: int) -> None:
        self.asked.append(f"+{outside}")
        if self.refuses:
            raise error(Code.UNSUPPORTED, "not authorized")
        if len(self.asked) >= 3:
            self.renewed.set()

    def withdraw(self, outside: int) -> None:
        self.asked.append(f"-{outside}")


async def test_it_is_renewed_before_its_lease_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding_module, "RENEW_AFTER_S", 0.01)
    gateway = Memory()
    async with kept(lambda: gateway):
        await trio.to_thread.run_sync(gateway.renewed.wait)
    assert set(gateway.asked[:-1]) == {"+4517"}
    assert gateway.asked[-1] == "-4517"


async def test_an_address_that_changes_is_told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding_module, "RENEW_AFTER_S", 0.01)
    gateway = Memory()
    async with kept(lambda: gateway) as (forwarding, there):
        await there.wait()
        gateway.ip = "11.0.0.10"
        while forwarding.addresses == (MAPPED,):  # noqa: ASYNC110 - it changes in its own time
            await trio.sleep(0.01)
        assert forwarding.addresses == ("/ip4/11.0.0.10/tcp/4517",)


@pytest.mark.parametrize("gateway", [Memory(refuses=True), Memory("192.168.7.2"), Memory("100.64.0.7")])
async def test_a_router_that_refuses_or_is_behind_another_nat_helps_nobody(
    gateway: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding_module, "AGAIN_S", 0.01)
    num_found = 0

    def find() -> Gateway:
        nonlocal num_found
        num_found += 1
        return gateway

    async with kept(find) as (forwarding, _):
        while num_found < 3:  # noqa: ASYNC110 - it tries again in its own time
            await trio.sleep(0.01)
        assert forwarding.addresses == ()


async def test_nobody_is_asked_until_it_is_wanted() -> None:
    gateway, is_wanted = Memory(), False
    async with kept(lambda: gateway, lambda: is_wanted) as (forwarding, there):
        await wait_all_tasks_blocked()
        assert gateway.asked == []
        is_wanted = True
        forwarding.stir()
        await there.wait()


# when it is wanted, and what is believed of it


def behind(*, verdict: Verdict | None = None, reachability: Reachability = Reachability.AUTO) -> Whereabouts:
    """A machine that the world sees, at another address than its own."""
    where = Whereabouts((), reachability)
    where.listens_on([Multiaddr("/ip4/192.168.1.7/tcp/4517")])
    where.seen_by("ada", Sighting("11.0.0.2", "/ip4/11.0.0.9/tcp/60001", is_mapping=True))
    where.judged(verdict or Verdict())
    return where


def test_a_router_is_asked_by_whom_the_world_sees_and_cannot_dial() -> None:
    assert behind().wants_forwarding()
    assert behind(verdict=Verdict(False)).wants_forwarding()
    assert not behind(verdict=Verdict(True, (MAPPED,))).wants_forwarding()
    assert not behind(reachability=Reachability.PRIVATE).wants_forwarding()
    unseen = Whereabouts((), Reachability.AUTO)
    unseen.listens_on([Multiaddr("/ip4/192.168.1.7/tcp/4517")])
    assert not unseen.wants_forwarding()
    public = behind()
    public.listens_on([Multiaddr("/ip4/11.0.0.9/tcp/4517")])
    assert not public.wants_forwarding()


def test_what_a_router_says_is_told_to_others_only_when_one_has_dialled_it() -> None:
    where = behind(verdict=Verdict(False))
    where.forwarded((MAPPED,))
    assert MAPPED not in where.all((), is_private=True)
    proof = Proof("11.0.0.2", MAPPED, reached=True, at=0.0)
    where.judged(judge([proof], where.world(), (), 1.0))
    assert where.reachability() == "public"
    assert where.all((), is_private=False)[0] == MAPPED


@pytest.mark.parametrize(("bound", "port"), [("192.168.1.7", 4517), ("0.0.0.0", 4517), ("127.0.0.1", None)])
def test_a_port_of_this_machine_alone_is_not_forwarded(bound: str, port: int | None) -> None:
    where = Whereabouts((), Reachability.AUTO)
    where.listens_on([Multiaddr(f"/ip4/{bound}/tcp/4517")])
    assert where.port() == port
