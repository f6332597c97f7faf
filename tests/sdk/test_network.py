"""peers, ping and netcheck: what the SDK and `daemonctl` ask, how they print the answers, and how they exit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corolla.protocol.errors import Code, Exit, error
from corolla.protocol.netcheck import Finding, Netcheck, Pinged
from corolla.protocol.views import PeerView, ReachView, RelayUse
from corolla.sdk.cli import main

from .fake import FakeDaemon

ADA, BOB, RELAY = (f"12D3KooW{'x' * 38}{name}" for name in ("adaada", "bobbob", "relays"))
VIEW = Netcheck(
    "12D3KooWme",
    "roses",
    listening=("/ip4/0.0.0.0/tcp/4517",),
    announced=("/ip4/198.51.100.7/tcp/4517",),
    reach=ReachView(
        "private", nat="symmetric", observed=("/ip4/198.51.100.7/tcp/9",), relays=(RelayUse(RELAY, "", 0.04),)
    ),
    peers=(
        PeerView(ADA, connected=True, rtt_s=0.0123, clock_ahead_s=-75.0, version="0.1.0"),
        PeerView(
            BOB, ("/ip4/192.0.2.1/tcp/1",), connected=True, relayed=True, through=RELAY, clock_ahead_s=0.1
        ),
    ),
    clock_ahead_s=37.5,
    num_clocks=2,
    has_ipv6=False,
    findings=(Finding("symmetric_nat", "a hard NAT", "forward a port", is_problem=False),),
)
PING = Pinged(ADA, (0.012, 0.010, 0.011), 0.010, 0.011, address="/ip4/192.0.2.1/tcp/1")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("COROLLA_SOCKET", str(tmp_path / "control.sock"))
    with FakeDaemon(tmp_path / "control.sock") as daemon:
        daemon.handlers.update(
            {
                "netcheck": lambda c, call: VIEW,
                "ping": lambda c, call: PING,
                "peers": lambda c, call: VIEW.peers,
            }
        )
        yield daemon


def ctl(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str, str]:
    """Its exit code, and what it says on stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_netcheck_tells_what_it_sees_and_the_remedies(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ctl(capsys, "netcheck")
    assert code == Exit.OK
    for words in (
        "private", "symmetric", "/ip4/0.0.0.0/tcp/4517", "/ip4/198.51.100.7/tcp/4517", "/ip4/198.51.100.7/tcp/9",
        "12D3…relays 40.0 ms", "1 direct, 1 relayed, of 2 known", "+37.5 s against the median of 2", "-75 s",
        "through 12D3…relays", "12.3 ms", "note: a hard NAT\n  remedy: forward a port\n",
    ):  # fmt: skip
        assert words in out
    told = json.loads(ctl(capsys, "netcheck", "--json")[1])["netcheck"]
    assert (told["reach"]["nat"], told["has_ipv6"]) == ("symmetric", False)
    assert told["peers"][1]["through"] == RELAY


def test_netcheck_with_a_problem_exits_as_degraded(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = replace(VIEW, findings=(Finding("no_peers", "nobody there", "join again"),))
    fake.handlers["netcheck"] = lambda c, call: broken
    code, out, _ = ctl(capsys, "netcheck")
    assert (code, "problem: nobody there" in out) == (Exit.DEGRADED, True)
    assert ctl(capsys, "netcheck", "--json")[0] == Exit.DEGRADED


def test_peers_are_listed_with_the_way_to_them(fake: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ctl(capsys, "peers")
    ada, bob = (line for line in out.splitlines() if line.startswith("12D3"))
    assert code == Exit.OK
    assert ada.split()[1:] == ["direct", "12.3", "ms", "-75", "s", "0.1.0"]
    assert "through 12D3…relays" in bob
    assert bob.endswith("/ip4/192.0.2.1/tcp/1")


def test_of_one_that_is_gone_it_is_said_for_how_long(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.handlers["peers"] = lambda c, call: [PeerView(ADA, unseen_s=185.0), PeerView(BOB)]
    _, out, _ = ctl(capsys, "peers")
    assert "no, for 3 min" in out
    assert "no," not in out.splitlines()[-1]


def test_ping_tells_each_round_trip_and_the_way(fake: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ctl(capsys, "ping", ADA, "-c", "3", "--timeout", "2")
    assert fake.calls[-1].arguments == {"peer": ADA, "count": 3, "timeout_s": 2.0}
    assert code == Exit.OK
    assert out.splitlines() == [
        "12.0 ms", "10.0 ms", "11.0 ms", "12D3…adaada: direct, 3 of 3 answered; min 10.0 ms, median 11.0 ms",
    ]  # fmt: skip
    assert json.loads(ctl(capsys, "ping", ADA, "--json")[1])["ping"]["median_s"] == 0.011


def test_a_ping_with_a_lost_answer_exits_as_degraded(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.handlers["ping"] = lambda c, call: replace(PING, relayed=True, through=RELAY, lost=True)
    code, out, _ = ctl(capsys, "ping", ADA)
    assert code == Exit.DEGRADED
    assert f"through {RELAY}, 3 of 4 answered, then no answer in 10 s" in out


@pytest.mark.parametrize(
    ("code", "exits"),
    [(Code.BAD_REQUEST, Exit.USAGE), (Code.PEER_LOST, Exit.ERROR), (Code.TIMEOUT, Exit.TIMEOUT)],
)
def test_a_ping_in_vain_exits_as_its_error_says(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str], code: Code, exits: int
) -> None:
    def refuse(*_: object) -> None:
        raise error(code, "no such luck", "try another")

    fake.handlers["ping"] = refuse
    ended, _, said = ctl(capsys, "ping", "nobody")
    assert (ended, "no such luck (try another)" in said) == (exits, True)
