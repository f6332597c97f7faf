"""The laboratory does to packets what it says: the NATs differ just as their names do."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from .lab import PORT, SHIFT, Host, Lab, Nat, Quality, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

LISTEN = (
    "import socket; s = socket.create_server(('0.0.0.0', {port}), reuse_port=True); print('up', flush=True);"
    " c, a = s.accept(); print(*a, flush=True); c.sendall(b'x'); c.recv(1)"
)
CALL = (
    "import socket; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1);"
    " s.settimeout(1); s.bind(('0.0.0.0', {source})); s.connect(('{address}', {port})); s.recv(1)"
)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def called(server: Host, client: Host, *, port: int = 7000, address: str = "") -> tuple[str, int]:
    """Whom `server` sees when `client` calls it from `PORT`. Raises CalledProcessError if it cannot."""
    command = server.command("python3", "-c", LISTEN.format(port=port))
    listener = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "up\n"
        client.run(
            "python3", "-c", CALL.format(source=PORT, address=address or server.public_address, port=port)
        )
        host, seen_port = listener.stdout.readline().split()
        return host, int(seen_port)
    finally:
        listener.kill()
        listener.communicate()


def test_public_hosts_reach_each_other_until_the_cable_is_pulled(lab: Lab) -> None:
    one, two = lab.host("a"), lab.host("b")
    assert called(one, two) == (two.address, PORT)
    two.cut()
    with pytest.raises(subprocess.CalledProcessError):
        called(one, two)
    two.heal()
    assert called(one, two, port=7001) == (two.address, PORT)


@pytest.mark.parametrize(
    ("nat", "seen"), [(Nat.FULL_CONE, PORT), (Nat.PORT_RESTRICTED, PORT), (Nat.SHIFTED, PORT + SHIFT)]
)
def test_a_nat_shows_its_own_address_and_the_port_of_its_kind(lab: Lab, nat: Nat, seen: int) -> None:
    server, home = lab.host("a"), lab.host("h", nat)
    assert called(server, home) == (home.public_address, seen)
    assert home.address.startswith("192.168.")


def test_a_symmetric_nat_shows_another_port_to_each(lab: Lab) -> None:
    one, two, home = lab.host("a"), lab.host("b"), lab.host("h", Nat.SYMMETRIC)
    ports = {called(one, home)[1], called(two, home)[1]}
    assert len(ports | {PORT}) == 3


def test_only_a_full_cone_lets_strangers_in(lab: Lab) -> None:
    stranger, cone, restricted = (
        lab.host("s"),
        lab.host("c", Nat.FULL_CONE),
        lab.host("r", Nat.PORT_RESTRICTED),
    )
    assert called(cone, stranger)[0] == stranger.address
    with pytest.raises(subprocess.CalledProcessError):
        called(restricted, stranger)


def test_two_nats_in_a_row_show_the_outer_one(lab: Lab) -> None:
    server, home = lab.host("a"), lab.host("h", Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED)
    assert called(server, home) == (home.public_address, PORT)


def test_a_slow_link_takes_its_time(lab: Lab) -> None:
    server, far = lab.host("a"), lab.host("f", quality=Quality(delay_s=0.05))
    said = far.run("ping", "-c", "3", "-i", "0.2", server.address)
    assert float(said.rsplit("= ", 1)[1].split("/")[0]) >= 100  # ms, there and back
    assert called(server, far)[0] == far.address
