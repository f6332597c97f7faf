"""What `daemonctl netcheck` says on real hosts: how each is reached, who is met how, what is wrong and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from corolla.protocol.netcheck import Netcheck

from ..processes import DaemonProcess, wait_until
from .gateway import gateway_of
from .lab import PORT, Host, Lab, Nat, why_not
from .members import LabSwarm, lab_swarm, skewed

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

ALONE = ("--blocks", "none")


@pytest.fixture
def lab() -> Iterator[tuple[Lab, LabSwarm]]:
    with lab_swarm(None) as made:
        yield made


def join(swarm: LabSwarm, host: Host, name: str, *arguments: str, prelude: str = "") -> DaemonProcess:
    """A daemon that serves nothing joins from a host."""
    words = (*ALONE, "--join", swarm.token, *arguments)
    daemon = swarm.on(host, name, *words, prelude=prelude)
    daemon.wait_ready()
    return daemon


def settled(daemon: DaemonProcess, is_settled: Callable[[Netcheck], bool], what: str) -> dict[str, Any]:
    """What the command says once the daemon has found out."""

    def reached() -> bool:
        with daemon.connect() as asked:
            return is_settled(asked.netcheck())

    try:
        wait_until(reached, f"{daemon.name}: {what}")
    except TimeoutError as problem:
        raise AssertionError(f"{problem}\n{netcheck(daemon)}") from problem
    return netcheck(daemon)


def netcheck(daemon: DaemonProcess) -> dict[str, Any]:
    """`daemonctl netcheck --json`."""
    program = [sys.executable, "-c", "from corolla.sdk.cli import main; main()", "netcheck", "--json"]
    done = subprocess.run([*program, "--socket", str(daemon.socket)], capture_output=True, text=True)
    view: dict[str, Any] = json.loads(done.stdout)["netcheck"]
    problems = [finding for finding in view["findings"] if finding["is_problem"]]
    assert done.returncode == (7 if problems else 0), done.stderr
    return view


def findings(view: dict[str, Any]) -> dict[str, str]:
    """The remedies by the names of the findings, without what a lab without IPv6 and the world's routes lacks."""
    missing = ("no_ipv6", "no_route")
    return {f["name"]: f["remedy"] for f in view["findings"] if f["name"] not in missing}


def ways(view: dict[str, Any]) -> dict[str, str]:
    """How each connected member is met: `direct`, or the relay in between."""
    return {p["peer"]: p["through"] if p["relayed"] else "direct" for p in view["peers"] if p["connected"]}


def has_relays(count: int) -> Callable[[Netcheck], bool]:
    """Private, with just so many relays whose round trip is known."""
    return lambda view: (
        view.reach.reachability == "private"
        and len(view.reach.relays) == count
        and all(relay.rtt_s is not None for relay in view.reach.relays)
    )


def test_behind_a_nat_the_one_relay_is_named_and_what_to_do(lab: tuple[Lab, LabSwarm]) -> None:
    net, swarm = lab
    public = swarm.found_on(net.host("pub"), "pub", *ALONE)
    home = join(swarm, net.host("home", Nat.PORT_RESTRICTED), "home")
    relay = public.status().peer

    view = settled(home, has_relays(1), "private, with a relay")

    assert [one["peer"] for one in view["reach"]["relays"]] == [relay]
    assert 0 < view["reach"]["relays"][0]["rtt_s"] < 5
    assert relay in view["announced"][0]
    assert ways(view) == {relay: "direct"}
    assert f"TCP port {PORT}" in findings(view)["one_relay"]
    assert ways(netcheck(public)) == {home.status().peer: "direct"}


@pytest.mark.long
def test_each_host_is_told_how_it_is_reached(lab: tuple[Lab, LabSwarm]) -> None:
    """In one swarm: two public hosts, one of which has a wrong clock, and one behind each kind of NAT."""
    net, swarm = lab
    open_host = net.host("pub")
    public = swarm.found_on(open_host, "pub", *ALONE)
    late = join(swarm, net.host("late"), "late", prelude=skewed(120.0))
    hosts = {
        "cone": net.host("cone", Nat.FULL_CONE),
        "home": net.host("home", Nat.PORT_RESTRICTED),
        "cafe": net.host("cafe", Nat.SYMMETRIC),
        "flat": net.host("flat", Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED),
    }
    behind = {name: join(swarm, host, name) for name, host in hosts.items()}
    relays = {daemon.status().peer for daemon in (public, late)}

    def is_public(view: Netcheck) -> bool:
        return view.reach.reachability == "public" and len(view.peers) == 1 + len(behind)

    def is_hidden(nat: str) -> Callable[[Netcheck], bool]:
        return lambda view: (
            view.reach.reachability == "private"
            and view.reach.nat == nat
            and len(view.reach.relays) >= len(relays)
            and all(relay.rtt_s is not None for relay in view.reach.relays)
            and view.num_clocks == len(view.peers) == 1 + len(behind)
        )

    view = settled(public, is_public, "public")
    assert view["reach"]["nat"] == "none"
    assert view["reach"]["proven"] == [f"/ip4/{open_host.address}/tcp/{PORT}"]
    assert view["reach"]["offers_relay"]
    assert view["reach"]["relays"] == []
    assert findings(view) == {}

    view = settled(late, is_public, "public")
    assert 110 < view["clock_ahead_s"] < 130
    assert "timedatectl set-ntp true" in findings(view)["clock"]
    assert ways(view)[public.status().peer] == "direct"

    view = settled(behind["cone"], is_public, "dialled from outside")
    assert view["reach"]["nat"] == "endpoint-independent"
    assert view["reach"]["proven"] == [f"/ip4/{hosts['cone'].public_address}/tcp/{PORT}"]
    assert (view["reach"]["relays"], findings(view)) == ([], {})

    for name in ("home", "flat"):
        view = settled(
            behind[name], is_hidden("endpoint-independent"), "private behind a NAT that keeps ports"
        )
        assert relays <= {one["peer"] for one in view["reach"]["relays"]}
        assert view["reach"]["observed"] == [f"/ip4/{hosts[name].public_address}/tcp/{PORT}"]
        assert findings(view) == {}

    view = settled(behind["cafe"], is_hidden("symmetric"), "private behind a symmetric NAT")
    assert f"forward TCP port {PORT}" in findings(view)["symmetric_nat"]
    met = ways(view)
    carriers = {*relays, behind["cone"].status().peer}
    assert {met[peer] for peer in carriers} == {"direct"}
    assert {met[behind[name].status().peer] for name in ("home", "flat")} <= carriers
    wait_until(
        lambda: ways(netcheck(behind["home"]))[behind["flat"].status().peer] == "direct",
        "the two whose NATs keep ports meet directly",
        deadline_s=400.0,  # where the machine was too busy for the first attempts, the last comes so late
    )


@pytest.mark.long
def test_a_router_that_speaks_upnp_makes_a_home_public(lab: tuple[Lab, LabSwarm]) -> None:
    net, swarm = lab
    public = swarm.found_on(net.host("pub"), "pub", *ALONE)
    join(swarm, net.host("two"), "two")
    host = net.host("home", Nat.PORT_RESTRICTED)
    outside = f"/ip4/{host.public_address}/tcp/{PORT}"
    with gateway_of(host):
        home = join(swarm, host, "home")
        view = settled(home, lambda view: view.reach.reachability == "public", "public by its router")
        assert view["reach"]["mapped"] == view["reach"]["proven"] == [outside]
        view = settled(home, lambda view: not view.reach.relays, "needs no relay")
        assert (view["announced"][0].rpartition("/p2p/")[0], findings(view)) == (outside, {})
        cafe = join(swarm, net.host("cafe", Nat.SYMMETRIC), "cafe")
        met = settled(cafe, lambda view: len(view.peers) == 3, "has met all")
        assert ways(met)[home.status().peer] == "direct"
        assert ways(met)[public.status().peer] == "direct"


@pytest.mark.long
def test_a_router_behind_another_nat_is_left_alone(lab: tuple[Lab, LabSwarm]) -> None:
    """What it would forward leads nowhere: its own address outside is of the outer router's network."""
    net, swarm = lab
    swarm.found_on(net.host("pub"), "pub", *ALONE)
    host = net.host("flat", Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED)
    with gateway_of(host) as gateway:
        gateway.external_ip = "192.168.1.2"
        flat = join(swarm, host, "flat")
        view = settled(flat, has_relays(1), "private, with a relay")
        wait_until(lambda: "not_forwarded" in flat.log(), "the router was asked where it is")
        assert (view["reach"]["mapped"], gateway.mappings) == ([], {})
        assert "one_relay" in findings(view)
