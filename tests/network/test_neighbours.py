"""Members of one swarm find each other in a local network, and nobody else does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, ClassVar

import anyio
import pytest
import trio
from anyio.abc import TaskGroup
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import ServiceInfo

from corolla.daemon.identity import new_identity
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.members.greeting import Swarm, found_swarm
from corolla.daemon.network.members.membership import Membership
from corolla.daemon.network.reach import neighbours as neighbours_module
from corolla.daemon.network.reach.neighbours import (
    MAX_NEIGHBOURS,
    SERVICE,
    Neighbours,
    entry_of,
    listens_beyond,
    member_of,
)
from corolla.protocol.limits import MAX_ADDRESSES_TOLD
from corolla.protocol.registry import PeerAddresses

pytestmark = pytest.mark.anyio

ROSES = found_swarm("roses", bytes(32), b"1")
TULIPS = found_swarm("tulips", bytes(32), b"1")
PEER = "12D3KooWPeer"
LOOPBACK = "127.0.0.1"


# what is told


def told(*addresses: str, swarm: Swarm = ROSES) -> ServiceInfo:
    entry = entry_of(PEER, swarm.swarm_id, [f"{address}/p2p/{PEER}" for address in addresses])
    assert entry is not None
    return entry


def test_an_entry_is_read_by_the_swarm_s_members_as_it_was_meant() -> None:
    address = "/ip4/192.168.1.7/tcp/4517"
    assert member_of(told(address), ROSES.swarm_id) == PeerAddresses(PEER, (f"{address}/p2p/{PEER}",))
    assert member_of(told(address), TULIPS.swarm_id) is None


def test_an_entry_tells_nothing_of_the_swarm_to_others() -> None:
    text = told("/ip4/192.168.1.7/tcp/4517").text
    assert ROSES.swarm_id.encode() not in text
    assert ROSES.name.encode() not in text


def test_private_addresses_come_first_and_relayed_ones_not_at_all() -> None:
    near, far = "/ip4/192.168.1.7/tcp/1", "/ip4/8.8.8.8/tcp/1"
    relayed = f"/ip4/8.8.4.4/tcp/1/p2p/{PEER}/p2p-circuit"
    found = member_of(told(relayed, far, near), ROSES.swarm_id)
    assert found is not None
    assert found.addresses == (f"{near}/p2p/{PEER}", f"{far}/p2p/{PEER}")
    assert entry_of(PEER, ROSES.swarm_id, [f"{relayed}/p2p/{PEER}"]) is None


def test_few_of_many_addresses_are_told() -> None:
    found = member_of(told(*(f"/ip4/10.0.0.{n}/tcp/1" for n in range(20))), ROSES.swarm_id)
    assert found is not None
    assert len(found.addresses) == MAX_ADDRESSES_TOLD


@pytest.mark.parametrize(
    ("name", "properties"),
    [
        (f"{PEER}.{SERVICE}", {}),
        (f"{PEER}.{SERVICE}", {b"a0": b"nonsense"}),
        (f"{PEER}.{SERVICE}", {b"a0": b"\xff\xfe"}),
        (f"{PEER}.{SERVICE}", {b"a0": b"/dns4/example.org/tcp/1"}),
        (f"pe/er.{SERVICE}", {b"a0": b"/ip4/10.0.0.1/tcp/1"}),
    ],
)
def test_entries_that_make_no_sense_are_passed_over(name: str, properties: dict[bytes, bytes]) -> None:
    tag = told("/ip4/10.0.0.1/tcp/1").properties[b"s"]
    entry = ServiceInfo(SERVICE, name, port=1, properties={b"s": tag, **properties})
    assert member_of(entry, ROSES.swarm_id) is None


@pytest.mark.parametrize(
    ("listen", "beyond"),
    [
        (("/ip4/0.0.0.0/tcp/4517", "/ip6/::/tcp/4517"), True),
        (("/ip4/127.0.0.1/tcp/4517",), False),
        (("/ip4/127.0.0.1/tcp/4517", "/ip6/::1/tcp/4517"), False),
        (("/ip4/127.0.0.1/tcp/4517", "/ip4/192.168.1.7/tcp/4517"), True),
        ((), False),
    ],
)
def test_who_listens_on_loopback_alone_has_no_neighbours(listen: tuple[str, ...], beyond: bool) -> None:
    assert listens_beyond(listen) is beyond


# finding each other, by multicast on loopback


class House:
    """Networks on loopback, and members that know nobody but hear their neighbours."""

    def __init__(self, networks: list[Libp2pNetwork], tasks: TaskGroup) -> None:
        self.networks = networks
        self.tasks = tasks

    async def member(self, number: int, swarm: Swarm) -> Membership:
        network = self.networks[number]
        membership = Membership(network, swarm)
        await self.tasks.start(membership.run)
        self.listen(network, swarm, membership.hear_of)
        return membership

    def listen(self, network: Libp2pNetwork, swarm: Swarm, heard: Callable[[PeerAddresses], None]) -> None:
        neighbours = Neighbours(network, swarm.swarm_id, heard, interfaces=(LOOPBACK,))
        self.tasks.start_soon(neighbours.run)


@asynccontextmanager
async def a_house(num_networks: int) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        opened = [
            open_network(new_identity(), listen=(f"/ip4/{LOOPBACK}/tcp/0",)) for _ in range(num_networks)
        ]
        networks = [await stack.enter_async_context(network) for network in opened]
        async with anyio.create_task_group() as tasks:
            yield House(networks, tasks)
            tasks.cancel_scope.cancel()


async def test_members_of_one_swarm_find_each_other_and_others_stay_apart() -> None:
    async with a_house(3) as house:
        ada, bob = await house.member(0, ROSES), await house.member(1, ROSES)
        eve = await house.member(2, TULIPS)
        with trio.fail_after(30):
            while not (ada.members() and bob.members()):  # noqa: ASYNC110 - they tell it to others than us
                await trio.sleep(0.02)
        assert len(ada.members()) == len(bob.members()) == 1
        assert not eve.members()
        assert eve.num_known == 0


async def test_a_false_entry_admits_nobody() -> None:
    """One of another swarm says that it is of ours: it is dialled, and its handshake shows what it is."""
    async with a_house(2) as house:
        ada, theirs = await house.member(0, ROSES), house.networks[1]
        await house.tasks.start(Membership(theirs, TULIPS).run)
        house.listen(theirs, ROSES, lambda told: None)
        with trio.fail_after(30):
            while theirs.peer not in ada._strangers:  # noqa: ASYNC110 - it is told to nobody
                await trio.sleep(0.02)
        assert ada.members() == ()


async def test_a_prankster_gets_no_further_than_a_few_dials() -> None:
    async with a_house(1) as house:
        heard: list[PeerAddresses] = []
        neighbours = Neighbours(house.networks[0], ROSES.swarm_id, heard.append)
        for number in range(3 * MAX_NEIGHBOURS):
            peer = f"12D3KooW{number}"
            entry = entry_of(peer, ROSES.swarm_id, [f"/ip4/10.0.0.1/tcp/1/p2p/{peer}"])
            assert entry is not None
            neighbours.take(entry)
        assert len(heard) == MAX_NEIGHBOURS


async def test_without_multicast_it_ends_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(**_: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(neighbours_module, "Zeroconf", lacking)
    async with a_house(1) as house:
        with trio.fail_after(10):
            await Neighbours(house.networks[0], ROSES.swarm_id, lambda told: None).run()


@given(
    name=st.text(max_size=80),
    values=st.dictionaries(
        st.sampled_from([b"a0", b"a1", b"a3"]), st.binary(max_size=200) | st.none(), max_size=3
    ),
)
def test_no_entry_upsets_who_reads_it(name: str, values: dict[bytes, bytes | None]) -> None:
    class Entry:
        properties: ClassVar[Any] = {b"s": told("/ip4/10.0.0.1/tcp/1").properties[b"s"], **values}

    entry: Any = Entry()
    entry.name = f"{name}.{SERVICE}"
    found = member_of(entry, ROSES.swarm_id)
    assert found is None or all(address.endswith(f"/p2p/{found.peer}") for address in found.addresses)
