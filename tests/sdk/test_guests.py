"""invite, revoke, ban and unban: what the SDK and `daemonctl` ask, and how they print the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import corolla
from corolla.protocol.control import PRIVACY_INVITED, Call, Joined
from corolla.protocol.errors import Exit
from corolla.protocol.guests import Invited, InviteView
from corolla.sdk.cli import main

from .fake import Connection, FakeDaemon

PEER = "12D3KooWS9CbfYFbTAxrk23eC8X1c8vQd2FEb86n8YPp4w8xSSS4"
GIVEN = InviteView("0123456789abcdef", 1e9, 2e9, 2, (PEER,))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("COROLLA_SOCKET", str(tmp_path / "control.sock"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with FakeDaemon(tmp_path / "control.sock") as daemon:
        banned: list[str] = []

        def ban(connection: Connection, call: Call) -> None:
            banned.append(given(call)["peer"])

        def unban(connection: Connection, call: Call) -> None:
            banned.remove(given(call)["peer"])

        daemon.handlers.update(
            {
                "invite": lambda c, call: Invited("a-token", GIVEN.invite, 2e9, given(call).get("uses", 1)),
                "invites": lambda c, call: [GIVEN, replace(GIVEN, revoked=True)],
                "revoke": lambda c, call: None,
                "ban": ban,
                "unban": unban,
                "bans": lambda c, call: list(banned),
            }
        )
        yield daemon


def given(call: Call) -> dict[str, Any]:
    return call.arguments if isinstance(call.arguments, dict) else {}


def ctl(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """What it says on stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == Exit.OK
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_invite_prints_the_line_to_paste_and_asks_for_its_time(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = ctl(capsys, "invite", "--for", "2d", "--uses", "3")
    assert out == "daemonctl join a-token\n"
    assert "3 machines" in err
    assert GIVEN.invite in err
    assert given(fake.calls[-1]) == {"lifetime_s": 2 * 86400.0, "uses": 3}
    answer = json.loads(ctl(capsys, "invite", "--json")[0])
    assert answer["version"] == 1
    assert answer["invited"]["token"] == "a-token"


def test_invitations_are_listed_with_who_joined_by_them(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = ctl(capsys, "invite", "--list")
    lines = out.splitlines()[1:]
    assert all(GIVEN.invite in line and "1 of 2" in line and PEER in line for line in lines)
    assert ["revoked" in line for line in lines] == [False, True]
    answer = json.loads(ctl(capsys, "invite", "--list", "--json")[0])
    assert [one["peers"] for one in answer["invites"]] == [[PEER], [PEER]]


def test_bans_are_made_listed_and_ended(fake: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nobody is banned" in ctl(capsys, "ban")[1]
    assert "daemonctl unban" in ctl(capsys, "ban", PEER)[1]
    assert ctl(capsys, "ban")[0] == f"{PEER}\n"
    assert json.loads(ctl(capsys, "ban", "--json")[0])["banned"] == [PEER]
    assert json.loads(ctl(capsys, "unban", PEER, "--json")[0])["banned"] == []


@pytest.mark.parametrize("name", [PEER, GIVEN.invite])
def test_revoke_takes_a_peer_or_an_invitation(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert name in ctl(capsys, "revoke", name)[1]
    assert given(fake.calls[-1]) == {"name": name}
    assert json.loads(ctl(capsys, "revoke", name, "--json")[0])["revoked"] == name


def test_an_invited_swarm_is_created_without_a_token_and_with_its_own_words(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.handlers["swarm.create"] = lambda c, call: Joined(given(call)["name"], "ab", "", PRIVACY_INVITED)
    out, err = ctl(capsys, "swarm", "create", "home", "--invited")
    assert out == ""
    assert PRIVACY_INVITED in err
    assert "daemonctl invite" in err
    assert given(fake.calls[-1]) == {"name": "home", "invited": True}


def test_status_and_the_first_text_speak_of_an_invited_swarm(
    fake: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "This swarm is open" in ctl(capsys, "generate", "one", "-n", "1")[1]
    status = replace(fake.status(), join_command=None, invited=True)
    fake.handlers["status"] = lambda c, call: replace(status, owner=True)
    assert "join: daemonctl invite" in ctl(capsys, "status")[1]
    fake.handlers["status"] = lambda c, call: status
    assert "ask the swarm's owner" in ctl(capsys, "status")[1]
    assert PRIVACY_INVITED in ctl(capsys, "generate", "one", "-n", "1")[1]
    assert PRIVACY_INVITED not in ctl(capsys, "generate", "one", "-n", "1")[1]


def test_the_blocking_sdk_and_the_asynchronous_one_ask_alike(fake: FakeDaemon) -> None:
    with corolla.connect() as daemon:
        assert daemon.invite(lifetime_s=60.0, uses=2).uses == 2
        assert daemon.invites()[0] == GIVEN
        daemon.revoke(PEER)
        daemon.ban(PEER)
        assert daemon.bans() == (PEER,)
        daemon.unban(PEER)
    asked = [(call.method, given(call)) for call in fake.calls]
    fake.calls.clear()

    async def ask() -> None:
        async with await corolla.aconnect() as daemon:
            assert (await daemon.invite(lifetime_s=60.0, uses=2)).uses == 2
            assert (await daemon.invites())[0] == GIVEN
            await daemon.revoke(PEER)
            await daemon.ban(PEER)
            assert await daemon.bans() == (PEER,)
            await daemon.unban(PEER)

    asyncio.run(ask())
    assert [(call.method, given(call)) for call in fake.calls] == asked
