"""Members behind NATs serve and are served: through relays where there is no other way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.protocol.invitations import SwarmToken, decode_token, encode_token

from ..model.tiny import save_tiny
from ..processes import DaemonProcess, wait_until
from .lab import PORT, Lab, Nat, why_not
from .members import LabSwarm, is_relayed, lab_swarm, wait_reachable, wait_relayed_address

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

PROMPT = [3, 14, 15, 92, 65]
KINDS = (None, *Nat)


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
        model = daemon.model("tiny")
        for piece in model.generate(tokens=[PROMPT], max_new_tokens=num_tokens, stream=True, wait_s=60):
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


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_matrix_of_nats(model: tuple[Path, Any]) -> None:
    """Every kind of NAT at the server's with every kind at the client's; the relay is killed amid the text."""
    rows = []
    for server_nat, client_nat in itertools.product(KINDS, KINDS):
        with lab_swarm(model[0]) as (net, swarm):
            swarm.found_on(net.host("one"), "one", "--model", str(model[0]), "--blocks", "0:2").wait_online()
            relays = [
                swarm.daemons["one"],
                swarm.on(net.host("two"), "two", "--blocks", "none", "--join", swarm.token),
            ]
            host = net.host("home", *([server_nat] if server_nat else []))
            home = swarm.serve_on(host, "home", 2, 4)
            client = swarm.use_on(net.host("cafe", *([client_nat] if client_nat else [])), "cafe")
            home.wait_online()
            client.wait_ready()
            wait_reachable(home, host)
            swarm.wait_covered(client, [1, 1, 1, 1])

            def kill_relay(count: int, relay: DaemonProcess = relays[1]) -> None:
                if count == 100:
                    relay.kill()

            tokens, first_s = generated(client, 240, kill_relay)
            assert tokens == expected(model[1], 240)
            way = "relayed" if is_relayed(client, peer_of(home)) else "direct"
            rows.append((server_nat, client_nat, way, first_s))
            assert way == "direct" or server_nat is not None
    print(f"\n{'server':>45} {'client':>45} way      first token")
    for server_nat, client_nat, way, first_s in rows:
        names = [nat.value if nat is not None else "public" for nat in (server_nat, client_nat)]
        print(f"{names[0]:>45.45} {names[1]:>45.45} {way:8} {first_s:.2f} s")
