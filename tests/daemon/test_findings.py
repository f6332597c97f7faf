"""What is wrong with a daemon's place in the network: each situation, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from corolla.daemon.answers.findings import judge
from corolla.protocol.netcheck import Netcheck
from corolla.protocol.views import PeerView, ReachView, RelayUse

LISTENING = ("/ip4/0.0.0.0/tcp/4517", "/ip6/::/tcp/4517")
DIRECT = PeerView("ada", connected=True, rtt_s=0.02)
RELAYED = PeerView("bob", connected=True, relayed=True, through="ada")
GONE = PeerView("cid")
PUBLIC = ReachView("public", nat="none", proven=LISTENING[:1], offers_relay=True)
PRIVATE = ReachView(
    "private", nat="endpoint-independent", relays=(RelayUse("r1", "", 0.02), RelayUse("r2", ""))
)
WELL = Netcheck(
    "me",
    "roses",
    wanted=LISTENING,
    listening=LISTENING,
    reach=PUBLIC,
    peers=(DIRECT,),
    clock_ahead_s=0.2,
    num_clocks=1,
)
BEHIND_NAT = replace(WELL, reach=PRIVATE)


def test_nothing_is_said_of_a_daemon_that_is_well() -> None:
    assert judge(WELL) == ()
    assert judge(BEHIND_NAT) == ()


@pytest.mark.parametrize(
    ("view", "problems", "notes"),
    [
        (replace(WELL, swarm=None, listening=(), peers=(), reach=ReachView()), ["no_swarm"], []),
        (replace(WELL, swarm=None, peers=(), swarm_problem="port 1 is taken"), ["swarm_failed"], []),
        (replace(WELL, peers=(), swarm_problem="ada refused us"), ["swarm_failed"], []),
        (replace(WELL, has_ipv4=False, has_ipv6=False), [], ["no_route"]),
        (replace(WELL, has_ipv4=False, has_ipv6=False, peers=(GONE,)), ["no_route", "no_peers"], []),
        (replace(WELL, has_ipv4=False), [], ["no_ipv4"]),
        (replace(WELL, has_ipv6=False), [], ["no_ipv6"]),
        (replace(WELL, wanted=(), listening=()), [], ["listens_nowhere"]),
        (replace(WELL, listening=()), ["not_listening"], []),
        (replace(WELL, listening=("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1")), [], ["loopback_only"]),
        (replace(WELL, listening=LISTENING[:1]), [], ["not_listening_ipv6"]),
        (replace(WELL, clock_ahead_s=59.9), [], []),
        (replace(WELL, clock_ahead_s=-60.0), ["clock"], []),
        (replace(WELL, clock_ahead_s=None, num_clocks=0), [], []),
        (replace(WELL, peers=()), [], ["alone"]),
        (replace(WELL, peers=(GONE,)), ["no_peers"], []),
        (replace(WELL, peers=(), unreached=("/ip4/192.0.2.7/tcp/1: refused",)), ["no_peers"], []),
        (replace(WELL, peers=(RELAYED,)), ["all_relayed"], []),
        (replace(WELL, peers=(RELAYED, DIRECT)), [], []),
        (replace(WELL, reach=replace(PRIVATE, relays=())), ["unreachable"], []),
        (replace(WELL, reach=replace(PRIVATE, relays=PRIVATE.relays[:1])), [], ["one_relay"]),
        (
            replace(WELL, reach=replace(PRIVATE, mapped=("/ip4/198.51.100.1/tcp/4517",))),
            [],
            ["forwarded_in_vain"],
        ),
        (replace(WELL, reach=replace(PRIVATE, nat="symmetric")), [], ["symmetric_nat"]),
        (
            replace(WELL, reach=replace(PRIVATE, relays=(RelayUse("r1", "", 0.5), RelayUse("r2", "")))),
            [],
            ["slow_relay"],
        ),
        (replace(WELL, reach=ReachView()), [], ["reach_unknown"]),
        (replace(WELL, reach=replace(PUBLIC, configured=True, proven=())), [], ["public_unproven"]),
        (replace(WELL, wants_relay=False), [], ["relays_nobody"]),
        (replace(BEHIND_NAT, wants_relay=False), [], []),
    ],
)
def test_each_situation_is_named(view: Netcheck, problems: list[str], notes: list[str]) -> None:
    found = judge(view)
    assert [finding.name for finding in found if finding.is_problem] == problems
    assert [finding.name for finding in found if not finding.is_problem] == notes
    assert all(finding.text and finding.remedy for finding in found)


def test_problems_come_before_notes() -> None:
    found = judge(replace(WELL, has_ipv6=False, clock_ahead_s=400.0))
    assert [finding.name for finding in found] == ["clock", "no_ipv6"]


@pytest.mark.parametrize(
    ("ahead_s", "num_clocks", "words"),
    [
        (75.0, 3, "75 s ahead of the median of 3 clocks that members told; from 300 s on"),
        (-301.0, 3, "301 s behind the median of 3 clocks that members told; members refuse its records"),
        (75.0, 1, "75 s ahead of the only clock"),
    ],
)
def test_a_wrong_clock_is_told_with_its_consequence(ahead_s: float, num_clocks: int, words: str) -> None:
    (finding,) = judge(replace(WELL, clock_ahead_s=ahead_s, num_clocks=num_clocks))
    assert words in finding.text
    assert ("here or there" in finding.remedy) == (num_clocks == 1)


def test_remedies_name_the_port_and_what_members_said() -> None:
    (unreachable,) = judge(replace(WELL, reach=replace(PRIVATE, relays=())))
    assert "TCP port 4517" in unreachable.remedy
    (refused,) = judge(replace(WELL, swarm_problem="refused", swarm_remedy="ask the owner"))
    assert (refused.text, refused.remedy) == ("refused", "ask the owner")
    (alone,) = judge(replace(WELL, peers=(), unreached=("/ip4/192.0.2.7/tcp/1: refused",)))
    assert "/ip4/192.0.2.7/tcp/1: refused" in alone.text
