"""Whether others can dial us: found out by dialling back, bounded, and not to be misled by one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio
import trio.testing
from multiaddr import Multiaddr

from corolla.daemon.identity import new_identity
from corolla.daemon.network.dialling import Reach, Reachability, reach_of
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.memory import MemoryHub, MemoryNetwork, memory_hub
from corolla.daemon.network.reach import autonat
from corolla.daemon.network.reach import observations as observations_module
from corolla.daemon.network.reach import reaching as reaching_module
from corolla.daemon.network.reach import whereabouts as whereabouts_module
from corolla.daemon.network.reach.autonat import (
    DIAL_BACK_PROTOCOL,
    DIAL_REQUEST_PROTOCOL,
    DialResponse,
    DialStatus,
    Status,
)
from corolla.daemon.network.reach.observations import Sighting
from corolla.daemon.network.reach.preamble import Preamble
from corolla.daemon.network.reach.proofs import (
    ENOUGH,
    FRESH_S,
    LASTING_S,
    Proof,
    Question,
    Verdict,
    judge,
    questions,
)
from corolla.daemon.network.reach.reaching import (
    Doorbell,
    Doorkeeper,
    Reaching,
    refusal,
    say_nonce,
)
from corolla.daemon.network.reach.relaying import RelayLimits
from corolla.daemon.network.reach.whereabouts import Whereabouts
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, error
from corolla.protocol.limits import DIAL_BACK_AGAIN_S, MAX_DIAL_BACKS, MAX_DIAL_BACKS_PER_MINUTE

pytestmark = pytest.mark.anyio

HOME = "/ip4/11.0.0.9/tcp/4517"
MAPPED = "/ip4/11.0.0.9/tcp/60001"
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def proof(place: str, reached: bool, *, address: str = HOME, at: float = 0.0) -> Proof:
    return Proof(place, address, reached, at)


# what it proves


@pytest.mark.parametrize(
    ("proofs", "own", "is_public"),
    [
        ([], (HOME,), None),
        ([proof("a", True)], (HOME,), True),
        ([proof("a", False)], (HOME,), False),
        ([proof("a", True), proof("b", False)], (HOME,), True),  # a failure is only somebody's word
        ([proof("a", True), proof("b", False), proof("c", False)], (HOME,), False),
        ([proof("a", True)], (), None),  # who says where we are, and dials us there, may have made it up
        ([proof("a", True), proof("b", True)], (), True),
        ([proof("a", True), proof("b", True), proof("c", False)], (), True),
        ([proof("a", True), proof("a", True)], (), None),
        ([proof("a", False)], (), False),
    ],
)
def test_the_verdict_of_dial_backs(proofs: list[Proof], own: Sequence[str], is_public: bool | None) -> None:
    verdict = judge(proofs, own, (HOME,), 1.0)
    assert verdict.is_public is is_public
    assert verdict.proven == ((HOME,) if is_public else ())


SIX = "/ip6/2606:4700::9/tcp/4517"


def test_who_can_be_dialled_by_ipv6_alone_keeps_its_relays_while_others_know_it_by_ipv4() -> None:
    reached, closed = proof("a", True, address=SIX), proof("b", False)
    assert judge([reached], (SIX,), (), 1.0) == Verdict(True, (SIX,))
    assert judge([reached], (SIX,), (HOME,), 1.0) == Verdict(None, (SIX,))
    assert judge([reached, closed], (SIX,), (HOME,), 1.0) == Verdict(False, (SIX,), (HOME,))
    where = Whereabouts((), Reachability.AUTO)
    where.judged(Verdict(False, (SIX,), (HOME,)))
    relayed = "/ip4/11.0.0.2/tcp/1/p2p/R/p2p-circuit"
    assert where.is_private(())
    assert where.all((relayed,), is_private=True) == (SIX, relayed)


def test_an_address_that_others_tried_in_vain_is_told_no_more() -> None:
    where = Whereabouts((), Reachability.AUTO)
    where.listens_on([Multiaddr(HOME), Multiaddr(SIX)])
    assert where.all((), is_private=False) == (HOME, SIX)
    where.judged(judge([proof("a", True), proof("b", False, address=SIX)], (HOME, SIX), (), 1.0))
    assert where.reachability() == "public"
    assert where.all((), is_private=False) == (HOME,)


def test_many_addresses_of_ipv6_leave_room_for_others() -> None:
    where = Whereabouts((), Reachability.AUTO)
    where.listens_on([Multiaddr(f"/ip6/2606:4700::{n}/tcp/4517") for n in range(1, 9)])
    relayed = "/ip4/11.0.0.2/tcp/1/p2p/R/p2p-circuit"
    assert where.all((relayed,), is_private=True).index(relayed) == 2


def test_the_last_word_of_a_place_counts() -> None:
    assert judge([proof("a", True), proof("a", False, at=5)], (HOME,), (), 6.0).is_public is False
    assert judge([proof("a", False), proof("a", True, at=5)], (HOME,), (), 6.0).is_public is True


def test_proofs_grow_old_and_go_with_those_who_see_us_there() -> None:
    both = [proof("a", True), proof("b", True)]
    assert judge(both, (), (HOME,), LASTING_S - 1).is_public is True
    assert judge(both, (), (HOME,), LASTING_S).is_public is None
    assert judge(both, (), (MAPPED,), 1.0).is_public is None


def test_each_is_asked_for_what_it_sees_and_only_until_enough_have_answered() -> None:
    sightings = {f"p{n}": Sighting(f"11.0.0.{n}", HOME, is_mapping=True) for n in range(20, 26)}
    asked = questions(sightings, (), (), 0.0)
    assert [q.address for q in asked] == [HOME] * ENOUGH
    assert len({q.place for q in asked}) == ENOUGH
    done = [proof(q.place, True) for q in asked]
    assert questions(sightings, (), done, 1.0) == []
    assert len(questions(sightings, (), done, FRESH_S)) == ENOUGH


def test_who_sees_another_ip_or_is_near_is_not_asked() -> None:
    own = ("/ip4/11.0.0.7/tcp/4517",)
    elsewhere = Sighting("11.0.0.2", "/ip4/11.0.0.8/tcp/1", is_mapping=True)
    assert questions({"p": elsewhere}, own, (), 0.0) == [Question("p", "11.0.0.2", "/ip4/11.0.0.8/tcp/1")]
    assert questions({"p": Sighting("", HOME, is_mapping=True)}, (HOME,), (), 0.0) == []


def test_a_verdict_decides_what_we_tell_of_ourselves() -> None:
    where = Whereabouts((), Reachability.AUTO)
    assert where.reachability() == "unknown"
    where.judged(judge([proof("a", True), proof("b", True)], (), (HOME,), 1.0))
    assert where.reachability() == "public"
    assert HOME in where.all((), is_private=False)
    where.judged(judge([proof("a", False)], (), (HOME,), 1.0))
    assert where.reachability() == "private"
    assert where.is_private(())
    assert HOME not in where.all((), is_private=True)


def test_the_owner_s_word_goes_before_what_was_found() -> None:
    found = judge([proof("a", True), proof("b", True)], (), (HOME,), 1.0)
    for told, is_private in ((Reachability.PRIVATE, True), (Reachability.PUBLIC, False)):
        where = Whereabouts((), told)
        where.judged(found)
        assert where.reachability() == told.value
        assert where.is_private(()) is is_private
        assert where.is_configured


# for whom we dial


@pytest.mark.parametrize(
    ("address", "observed", "why"),
    [
        (HOME, MAPPED, ""),
        ("/ip4/11.0.0.8/tcp/80", MAPPED, "you come from 11.0.0.9, not from 11.0.0.8"),
        ("/ip4/192.168.1.1/tcp/80", "/ip4/192.168.1.1/tcp/5", "you do not come to me over the internet"),
        (HOME, "", "you do not come to me over the internet"),
        (HOME, "/ip4/11.0.0.2/tcp/1/p2p/R/p2p-circuit", "you do not come to me over the internet"),
        ("/dns4/victim.example/tcp/80", MAPPED, "not an address of TCP over IP"),
        ("/ip4/11.0.0.9/tcp/1/p2p/X", MAPPED, "not an address of TCP over IP"),
        ("/ip6/::ffff:11.0.0.9/tcp/80", MAPPED, "you come from 11.0.0.9, not from ::ffff:b00:9"),
        ("nonsense", MAPPED, "not an address of TCP over IP"),
    ],
)
def test_nobody_is_dialled_but_the_asker_itself(address: str, observed: str, why: str) -> None:
    assert refusal(address, observed) == why


def test_a_peer_is_dialled_for_once_at_a_time_and_seldom() -> None:
    keeper = Doorkeeper()
    assert keeper.admit("a", 0.0) == ""
    assert "asked twice" in keeper.admit("a", 2 * DIAL_BACK_AGAIN_S)  # the first dial has not ended
    keeper.done("a")
    assert keeper.admit("a", 2 * DIAL_BACK_AGAIN_S) == ""
    keeper.done("a")
    assert "asked twice" in keeper.admit("a", 2 * DIAL_BACK_AGAIN_S + 1)


def test_few_are_dialled_for_at_once_and_in_a_minute() -> None:
    keeper = Doorkeeper()
    for number in range(MAX_DIAL_BACKS):
        assert keeper.admit(f"{number}", 0.0) == ""
    assert keeper.admit("more", 0.0) == "busy"
    for number in range(MAX_DIAL_BACKS):
        keeper.done(f"{number}")
    for number in range(MAX_DIAL_BACKS, MAX_DIAL_BACKS_PER_MINUTE):
        assert keeper.admit(f"{number}", 1.0) == ""
        keeper.done(f"{number}")
    assert keeper.admit("more", 2.0) == "busy"
    assert keeper.admit("more", 62.0) == ""


# asking and answering, in memory


@dataclass
class World:
    """Peers on a hub, as if on the internet: `home` asks, the others answer."""

    hub: MemoryHub
    sightings: dict[str, Sighting] = field(default_factory=dict)
    rung: list[tuple[str, str]] = field(default_factory=list)
    is_open: bool = True
    came_in: bool = True
    own: tuple[str, ...] = ()

    def member(self, peer: str) -> tuple[MemoryNetwork, Reaching]:
        network = self.hub.network(peer)
        network.observes = lambda other: MAPPED if other == "home" else HOME  # type: ignore[method-assign, assignment]

        async def ring(address: str, target: str, nonce: int) -> bool:
            self.rung.append((peer, address))
            if not self.is_open:
                raise error(Code.PEER_LOST, "connection refused")
            return await say_nonce(await network.open(target, DIAL_BACK_PROTOCOL, timeout_s=1), nonce)

        bell = Doorbell(ring, lambda stream: self.came_in, lambda: self.own, lambda: self.sightings)
        reaching = Reaching(network, bell)
        reaching.serve()
        return network, reaching

    def sees(self, peer: str, place: str) -> None:
        self.sightings[peer] = Sighting(place, HOME, is_mapping=True)


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with memory_hub() as hub:
        yield World(hub)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it, but where sockets are."""
    if "wide_loopback" in request.fixturenames:
        return "trio", {}
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


async def judged(reaching: Reaching, within_s: float = 5.0) -> bool | None:
    """The verdict after some time of asking."""
    with trio.move_on_after(within_s):
        await reaching.run()
    return reaching.verdict.is_public


async def test_two_that_dial_us_back_prove_that_we_are_public() -> None:
    async with world() as w:
        _, home = w.member("home")
        for peer, place in (("ada", "11.0.0.2"), ("bob", "11.0.0.3")):
            w.member(peer)
            w.sees(peer, place)
        assert await judged(home) is True
        assert home.verdict.proven == (HOME,)
        assert sorted(w.rung) == [("ada", HOME), ("bob", HOME)]


async def test_a_closed_door_makes_us_private_until_it_opens() -> None:
    async with world() as w:
        _, home = w.member("home")
        for peer, place in (("ada", "11.0.0.2"), ("bob", "11.0.0.3")):
            w.member(peer)
            w.sees(peer, place)
        w.is_open = False
        assert await judged(home) is False
        w.is_open = True
        assert await judged(home, FRESH_S) is True


async def test_a_nonce_over_a_connection_of_ours_proves_nothing() -> None:
    async with world() as w:
        _, home = w.member("home")
        w.member("liar")
        w.sees("liar", "11.0.0.2")
        w.own = (HOME,)
        w.came_in = False
        assert await judged(home) is None


async def test_whose_word_is_all_there_is_proves_nothing() -> None:
    async with world() as w:
        _, home = w.member("home")
        liar, _ = w.member("liar")

        async def lie(stream: Stream) -> None:
            await asked_for(stream)
            await Preamble(stream).say(autonat.response(DialResponse(Status.OK, 0, DialStatus.OK)))
            await stream.close()

        liar.handle(DIAL_REQUEST_PROTOCOL, lie)
        w.sees("liar", "11.0.0.2")
        w.own = (HOME,)
        assert await judged(home) is None


async def test_a_stranger_s_nonce_is_not_taken_for_the_one_who_was_asked() -> None:
    async with world() as w:
        _, home = w.member("home")
        asked, _ = w.member("asked")
        stranger, _ = w.member("stranger")
        w.sees("asked", "11.0.0.2")
        w.own = (HOME,)

        async def hand_on(stream: Stream) -> None:
            nonce = (await asked_for(stream)).nonce
            assert not await say_nonce(await stranger.open("home", DIAL_BACK_PROTOCOL, timeout_s=1), nonce)
            await Preamble(stream).say(autonat.response(DialResponse(Status.OK, 0, DialStatus.OK)))
            await stream.close()

        asked.handle(DIAL_REQUEST_PROTOCOL, hand_on)
        assert await judged(home) is None


async def test_who_does_not_speak_it_is_asked_ever_more_rarely() -> None:
    async with world() as w:
        network, home = w.member("home")
        w.hub.network("old")
        w.sees("old", "11.0.0.2")
        opened: list[str] = []
        really = network.open

        async def counted(peer: str, protocol: str, *, timeout_s: float) -> Any:
            opened.append(peer)
            return await really(peer, protocol, timeout_s=timeout_s)

        network.open = counted  # type: ignore[method-assign]
        assert await judged(home, 120.0) is None
        assert 4 <= len(opened) <= 7


async def test_when_all_is_known_nothing_is_done_until_it_grows_old() -> None:
    """Also where one that did not answer need not be asked any longer."""
    async with world() as w:
        _, home = w.member("home")
        w.hub.network("old")
        w.sees("old", "11.0.0.9")
        assert await judged(home) is None
        for number in range(ENOUGH):
            w.member(f"p{number}")
            w.sees(f"p{number}", f"11.0.0.{20 + number}")
        num_looks = 0

        def look() -> dict[str, Sighting]:
            nonlocal num_looks
            num_looks += 1
            return w.sightings

        home._bell = replace(home._bell, sightings=look)
        assert await judged(home, FRESH_S - 60) is True
        assert num_looks < 30


async def asked_for(stream: Stream) -> autonat.DialRequest:
    return autonat.as_request(await Preamble(stream).hear(autonat.ENVELOPE))


async def answered(home: MemoryNetwork, *addresses: str) -> DialResponse:
    """What `ada` answers who asks for these."""
    stream = await home.open("ada", DIAL_REQUEST_PROTOCOL, timeout_s=1)
    talk = Preamble(stream)
    await talk.say(autonat.request(addresses, 7))
    answer = autonat.as_response(await talk.hear(autonat.ENVELOPE))
    assert await stream.receive() == b""
    return answer


async def test_nobody_is_made_to_dial_a_third_one() -> None:
    """Nor a relay, nor anybody in its own network, nor whom a name stands for."""
    async with world() as w:
        home, _ = w.member("home")
        w.member("ada")
        relayed = f"/ip4/11.0.0.9/tcp/1/p2p/{new_identity().peer}/p2p-circuit"
        others = ("/ip4/11.0.0.66/tcp/80", "/ip4/192.168.1.1/tcp/80", relayed, "/dns4/example.org/tcp/80")
        assert await answered(home, *others) == DialResponse(Status.REFUSED)
        assert w.rung == []
        assert (await answered(home, *others, HOME, MAPPED)).index == 4  # the first one that is its own
        assert w.rung == [("ada", HOME)]
        assert await answered(home, HOME) == DialResponse(Status.REJECTED)  # too soon


async def test_the_asked_one_tells_a_closed_door_from_one_that_does_not_take_the_nonce() -> None:
    async with world() as w:
        home, _ = w.member("home")
        w.member("ada")
        assert await answered(home, HOME) == DialResponse(
            Status.OK, 0, DialStatus.DIAL_BACK_ERROR
        )  # not asked
        w.is_open = False
        await trio.sleep(DIAL_BACK_AGAIN_S)
        assert await answered(home, HOME) == DialResponse(Status.OK, 0, DialStatus.DIAL_ERROR)


@pytest.mark.parametrize(
    "said",
    [
        autonat.ENVELOPE(dialDataRequest={"addrIdx": 0, "numBytes": 30_000}),
        autonat.ENVELOPE(dialResponse={"status": 17, "dialStatus": 100}),
        autonat.ENVELOPE(dialResponse={"status": 200, "dialStatus": 17}),
        autonat.ENVELOPE(dialResponse={"status": 200, "addrIdx": 1, "dialStatus": 100}),
        autonat.ENVELOPE(dialResponse={"status": 200, "dialStatus": 101}),
        autonat.ENVELOPE(dialResponse={"status": 101}),
        autonat.ENVELOPE(),
    ],
)
async def test_an_answer_that_means_nothing_proves_nothing(said: Any) -> None:
    async with world() as w:
        _, home = w.member("home")
        odd, _ = w.member("odd")

        async def answer(stream: Stream) -> None:
            await asked_for(stream)
            await Preamble(stream).say(said)
            await stream.close()

        odd.handle(DIAL_REQUEST_PROTOCOL, answer)
        w.sees("odd", "11.0.0.2")
        w.own = (HOME,)
        assert await judged(home) is None


async def test_silence_is_not_waited_for() -> None:
    async with world() as w:
        network, _ = w.member("home")
        w.member("ada")
        stream = await network.open("ada", DIAL_REQUEST_PROTOCOL, timeout_s=1)
        with trio.fail_after(2 * reaching_module.RING_S), pytest.raises(Exception, match="reset"):
            await stream.receive()


# over real connections, as if loopback were the internet


@pytest.fixture
def wide_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def reach(address: str) -> Reach:
        found = reach_of(address)
        return Reach.PUBLIC if found is Reach.NEAR else found

    for module in (observations_module, whereabouts_module):
        monkeypatch.setattr(module, "reach_of", reach)


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[Libp2pNetwork]:
    options = {"listen": LOOPBACK, "relay": RelayLimits(), **options}
    async with open_network(new_identity(), **options) as network:
        yield network


async def until(condition: Any) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - the network tells nobody of this
            await trio.sleep(0.01)


def greet(one: Libp2pNetwork, other: Libp2pNetwork) -> None:
    """What their greetings would tell."""
    one.observed_by(other.peer, other.observes(one.peer))
    other.observed_by(one.peer, one.observes(other.peer))


async def test_a_daemon_that_listens_in_the_open_finds_itself_public(wide_loopback: None) -> None:
    async with opened() as home, opened() as member:
        await member.connect(home.addresses()[0], timeout_s=5)
        await until(lambda: home.observes(member.peer))
        greet(home, member)
        await until(lambda: home.reach().reachability == "public")
        view = home.reach()
        assert view.offers_relay
        assert not view.configured
        assert [f"{address}/p2p/{home.peer}" for address in view.proven] == [home.addresses()[0]]
        await until(lambda: len(member.peers()) == 1 and len(member.peers()[0].addresses) == 1)


async def test_a_daemon_whose_door_is_shut_reserves_and_offers_nothing(
    wide_loopback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened() as home, opened(reachability=Reachability.PUBLIC) as middle:

        async def shut(*_: Any, **__: Any) -> Any:
            raise error(Code.PEER_LOST, "no answer")

        monkeypatch.setattr(middle, "_dial", shut)
        await home.connect(middle.addresses()[0], timeout_s=5)
        await until(lambda: middle.observes(home.peer))
        greet(home, middle)
        await until(lambda: home.reach().reachability == "private")
        await until(lambda: home.reach().relays)
        assert not home.reach().offers_relay
        assert not any(address.startswith(a) for a in home.reach().proven for address in home.addresses())
