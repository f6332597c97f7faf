"""Members behind NATs serve and are served: through relays where there is no other way."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from corolla.protocol.invitations import SwarmToken, decode_token, encode_token

from ..model.tiny import save_tiny
from ..processes import DaemonProcess, wait_until
from .lab import PORT, Lab, Nat, why_not
from .members import (
    LabSwarm,
    carrier_of,
    is_relayed,
    lab_swarm,
    relaying_for,
    wait_reachable,
    wait_relayed_address,
)

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

REAL = os.environ.get("COROLLA_TEST_MODEL", "")
DIRECT_S = 60.0  # in which a direct connection comes about, if it can: the first failures are tried again
PROMPT = [3, 14, 15, 92, 65]
# The last is a router at home behind one of the provider's.
KINDS = ((), *((kind,) for kind in Nat), (Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED))


def named(kind: tuple[Nat, ...]) -> str:
    """For people."""
    return " behind ".join(nat.name.lower().replace("_", " ") for nat in kind) or "none"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return folder, save_tiny(folder, eos_token_id=None)


@pytest.fixture
def lab(model: tuple[Path, Any]) -> Iterator[tuple[Lab, LabSwarm]]:
    with lab_swarm(model[0]) as made:
        yield made


def expected(whole: Any, num_tokens: int) -> list[int]:
    with torch.inference_mode():
        out = whole.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return [int(token) for token in out[0, len(PROMPT) :]]


def generated(
    client: DaemonProcess, num_tokens: int, disturb: Any = lambda count: None
) -> tuple[list[int], float]:
    """Tokens, and seconds to the first of them."""
    began, first_s = time.monotonic(), 0.0
    tokens: list[int] = []
    with client.connect() as daemon:
        model = daemon.model(daemon.models()[0].name)
        for piece in model.generate(
            tokens=[PROMPT], max_new_tokens=num_tokens, stream=True, wait_s=60, ignore_eos=True
        ):
            first_s = first_s or time.monotonic() - began
            tokens.append(piece.token)
            disturb(len(tokens))
    return tokens, first_s


def peer_of(daemon: DaemonProcess) -> str:
    return daemon.status().peer


def test_a_server_behind_a_nat_serves_through_a_relay(
    lab: tuple[Lab, LabSwarm], model: tuple[Path, Any]
) -> None:
    net, swarm = lab
    public = swarm.found_on(net.host("pub"), "pub", "--model", str(model[0]), "--blocks", "0:2")
    home = swarm.serve_on(net.host("home", Nat.SYMMETRIC), "home", 2, 4)
    client = swarm.use_on(net.host("cafe", Nat.SYMMETRIC), "cafe")
    for daemon in (public, home):
        daemon.wait_online()
    client.wait_ready()
    wait_relayed_address(home)
    swarm.wait_covered(client, [1, 1, 1, 1])

    tokens, _ = generated(client, 24)

    assert tokens == expected(model[1], 24)
    assert is_relayed(client, peer_of(home))
    assert not is_relayed(client, peer_of(public))


def test_two_behind_nats_that_keep_ports_come_to_speak_directly(
    lab: tuple[Lab, LabSwarm], model: tuple[Path, Any]
) -> None:
    net, swarm = lab
    public = swarm.found_on(net.host("pub"), "pub", "--model", str(model[0]), "--blocks", "0:2")
    home = swarm.serve_on(net.host("home", Nat.PORT_RESTRICTED), "home", 2, 4)
    client = swarm.use_on(net.host("cafe", Nat.SHIFTED), "cafe")
    for daemon in (public, home):
        daemon.wait_online()
    client.wait_ready()
    wait_relayed_address(home)
    swarm.wait_covered(client, [1, 1, 1, 1])

    def until_direct(count: int) -> None:
        if count == 8:
            wait_until(lambda: not is_relayed(client, peer_of(home)), "a direct connection")

    tokens, _ = generated(client, 64, until_direct)

    assert tokens == expected(model[1], 64)  # whether it moved amid the text or before
    assert not is_relayed(client, peer_of(home))


def test_behind_a_nat_that_lets_callers_in_no_relay_is_used(
    lab: tuple[Lab, LabSwarm], model: tuple[Path, Any]
) -> None:
    """Two members see it at one address and dial it back there: that is where others then call."""
    net, swarm = lab
    public = swarm.found_on(net.host("pub"), "pub", "--model", str(model[0]), "--blocks", "0:2")
    swarm.on(net.host("two"), "two", "--blocks", "none", "--join", swarm.token)
    host = net.host("home", Nat.FULL_CONE)
    home = swarm.serve_on(host, "home", 2, 4)
    for daemon in (public, home):
        daemon.wait_online()
    outside = f"/ip4/{host.public_address}/tcp/{PORT}/p2p/{peer_of(home)}"
    wait_until(lambda: home.status().addresses[0] == outside, "home knows where it is reached")
    wait_until(lambda: not any("p2p-circuit" in a for a in home.status().addresses), "home needs no relay")

    client = swarm.use_on(net.host("cafe", Nat.SYMMETRIC), "cafe")
    client.wait_ready()
    swarm.wait_covered(client, [1, 1, 1, 1])
    tokens, _ = generated(client, 24)

    assert tokens == expected(model[1], 24)
    assert not is_relayed(client, peer_of(home))


@pytest.mark.long
def test_a_text_goes_on_while_its_circuits_are_renewed(
    lab: tuple[Lab, LabSwarm], model: tuple[Path, Any]
) -> None:
    """Each lasts ten seconds, and is replaced after eight; the text waits for two such changes."""
    net, swarm = lab
    serving = ("--model", str(model[0]), "--blocks", "0:2", "--no-relay")
    public = swarm.found_on(net.host("pub"), "pub", *serving)
    short = relaying_for(circuit_s=10.0)
    swarm.on(net.host("relay"), "relay", "--blocks", "none", "--join", swarm.token, prelude=short)
    home = swarm.serve_on(net.host("home", Nat.SYMMETRIC), "home", 2, 4, "--log-level", "debug")
    client = swarm.use_on(net.host("cafe", Nat.SYMMETRIC), "cafe")
    for daemon in (public, home):
        daemon.wait_online()
    client.wait_ready()
    swarm.wait_covered(client, [1, 1, 1, 1])
    caller = peer_of(client)

    def num_calls() -> int:
        said = (home.folder / "log").read_text().splitlines()
        return sum('"called"' in line and caller in line for line in said)

    def until_renewed(count: int) -> None:
        if count in (40, 120):
            before = num_calls()
            wait_until(lambda: num_calls() > before, "another circuit")

    tokens, _ = generated(client, 240, until_renewed)

    assert tokens == expected(model[1], 240)
    assert is_relayed(client, peer_of(home))
    assert num_calls() >= 3


@pytest.mark.long
def test_in_one_house_members_that_met_through_a_relay_come_to_speak_directly(
    lab: tuple[Lab, LabSwarm],
) -> None:
    """No multicast reaches the other, and their router lets nobody come back to it from inside."""
    net, swarm = lab
    swarm.found_on(net.host("pub"), "pub", "--blocks", "none")
    host = net.host("desk", Nat.SYMMETRIC)
    desk = swarm.on(host, "desk", "--blocks", "none", "--join", swarm.token)
    desk.wait_ready()
    wait_relayed_address(desk)
    shelf = swarm.on(net.beside(host, "shelf"), "shelf", "--blocks", "none", "--join", swarm.token)
    shelf.wait_ready()
    shelf.wait_for(lambda status: status.num_peers == 2, "has met both")
    wait_until(lambda: not is_relayed(shelf, peer_of(desk)), "a connection within the house")


def test_in_one_network_members_find_each_other_without_an_address(lab: tuple[Lab, LabSwarm]) -> None:
    """The token's addresses are dead, as after everybody's router gave out new ones."""
    net, swarm = lab
    founder = swarm.found_on(net.host("one"), "one", "--blocks", "none")
    token = decode_token(swarm.token)
    dead = (f"/ip4/11.0.9.9/tcp/{PORT}/p2p/{peer_of(founder)}",)
    other = swarm.on(net.host("two"), "two", "--blocks", "none")
    other.wait_ready()
    with other.connect() as asked:
        asked.join(encode_token(SwarmToken(token.swarm_id, token.name, dead)))
    assert other.status().num_peers == 1


@dataclass(frozen=True)
class Served:
    """What the matrix serves: a tiny model, or the real one where `COROLLA_TEST_MODEL` names its file.

    kill_at: after how many of a text's `num_tokens` a relay is killed.
    """

    model: Path
    num_blocks: int
    num_tokens: int
    kill_at: int

    def whole(self, daemon: DaemonProcess, tiny: Any) -> Any:
        """The same in one process. daemon: has read it."""
        if self.model != Path(REAL):
            return tiny
        with daemon.connect() as asked:
            folder = asked.pull(REAL).folder
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@dataclass(frozen=True)
class Row:
    """What was seen of one pair. way: in the end. cold_s, first_s: to the first token of the first and the second text.

    carried: whether the relay that was killed carried it; pause_s: the longest between tokens from then on.
    """

    client: str
    way: str
    cold_s: float
    first_s: float
    carried: bool
    pause_s: float

    def told(self) -> str:
        """For people."""
        after = "its relay killed" if self.carried else "a relay killed"
        return (
            f"client: {self.client}: {self.way}, first token {self.cold_s:.2f} s, warm {self.first_s:.2f} s;"
            f" {after}: at most {self.pause_s:.2f} s between tokens"
        )


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("server", KINDS, ids=named)
def test_the_matrix_of_nats(model: tuple[Path, Any], server: tuple[Nat, ...]) -> None:
    """One kind of NAT at the server's with every kind at the client's; amid each text a relay is killed.

    It is the relay that carries the connection then, if one does.
    """
    served = Served(Path(REAL), 30, 60, 20) if Path(REAL).is_file() else Served(model[0], 4, 240, 100)
    half, num_blocks = served.num_blocks // 2, served.num_blocks
    rows = []
    with lab_swarm(served.model) as (net, swarm):
        front = ("--model", str(served.model), "--blocks", f"0:{half}", "--no-relay")
        first = swarm.found_on(net.host("one"), "one", *front)
        relays = [
            swarm.on(net.host(name), name, "--blocks", "none", "--join", swarm.token)
            for name in ("two", "three")
        ]
        host = net.host("home", *server)
        home = swarm.serve_on(host, "home", half, num_blocks)
        first.wait_online()
        home.wait_online()
        text = expected(served.whole(first, model[1]), served.num_tokens)
        for number, kind in enumerate(KINDS):
            wait_reachable(home, host)
            client = swarm.use_on(net.host(f"cafe{number}", *kind), f"cafe{number}")
            client.wait_ready()
            swarm.wait_covered(client, [1] * num_blocks)
            row = seen_with_a_relay_killed(client, home, relays, text, served.kill_at)
            rows.append(
                replace(
                    row, client=named(kind), way=way_in_the_end(client, home, can_be_direct(server, kind))
                )
            )
            print(f"\nserver: {named(server)}, {rows[-1].told()}", flush=True)
            client.end()
    ways = {row.client: row.way for row in rows}
    assert ways == {named(kind): "direct" if can_be_direct(server, kind) else "relayed" for kind in KINDS}


def way_in_the_end(client: DaemonProcess, home: DaemonProcess, can_be_direct: bool) -> str:
    """How the client reaches the server; where it could be directly, once it had the time to find out."""
    patience_s = DIRECT_S if can_be_direct else 0.0
    try:
        wait_until(lambda: not is_relayed(client, peer_of(home)), "a direct connection", patience_s)
    except TimeoutError:
        return "relayed"
    return "direct"


def can_be_direct(one: tuple[Nat, ...], other: tuple[Nat, ...]) -> bool:
    """Whether connections between hosts behind these can be made at all: one lets callers in, or both keep ports."""
    is_open = any(set(kinds) <= {Nat.FULL_CONE} for kinds in (one, other))
    return is_open or Nat.SYMMETRIC not in (*one, *other)


def seen_with_a_relay_killed(
    client: DaemonProcess, home: DaemonProcess, relays: list[DaemonProcess], text: list[int], kill_at: int
) -> Row:
    """A text with a relay killed amid it, and back afterwards. Every token is the whole model's."""
    peers = {peer_of(relay): relay for relay in relays}
    times: list[float] = []
    killed: list[DaemonProcess] = []
    carried = False

    def kill_relay(count: int) -> None:
        nonlocal carried
        if count == kill_at:
            carrier = peers.get(carrier_of(client, peer_of(home)))
            carried = carrier is not None
            killed.append(carrier or relays[0])
            killed[0].kill()
        if killed:
            times.append(time.monotonic())

    _, cold_s = generated(client, 1)  # the client's worker starts, connections are made
    tokens, first_s = generated(client, len(text), kill_relay)
    assert tokens == text
    killed[0].start()
    killed[0].wait_for(lambda status: status.num_peers >= 2, "is back")
    pause_s = max(after - before for before, after in pairwise(times))
    return Row("", "", cold_s, first_s, carried, pause_s)
