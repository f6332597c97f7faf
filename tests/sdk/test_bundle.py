"""What an archive of `daemonctl doctor` holds, and above all what it does not."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.views import DaemonEvent, ReachView
from corolla.sdk.bundle import LEFT_OUT, Redactor, write_bundle

TOKEN = "corolla:o2hzd2FybV9pZHggZjM1ZGNjOGI1ODRmYTUyNWNmZWU2NjAzMWY1ZmM3"
PEER = "12D3KooWS9CbfYFbTAxrk23eC8X1c8vQd2FEb86n8YPp4w8xSSS4"
PEM = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ\n-----END PRIVATE KEY-----"
SECRETS = (
    TOKEN, "MC4CAQAwBQYDK2VwBCIEIJ", "198.51.100.7", "8.8.8.8", "192.168.1.20", "2001:db8::7", "2606:4700::1111",
    "hf_abcdefghijkl", "my diary", "alice", "workstation", "home.example.org", "::ffff:8.8.4.4",
)  # fmt: skip
VALUES = {
    "status": {
        "join_command": f"daemonctl join {TOKEN}",
        "addresses": [f"/ip4/198.51.100.7/tcp/4517/p2p/{PEER}"],
    },
    "config": {
        "join": TOKEN,
        "announce": ["/dns4/home.example.org/tcp/1"],
        "operators": ["alice"],
        "blocks": "auto",
    },
    "events": (
        DaemonEvent(
            "join_failed",
            1.0,
            "2001:db8::7: refused, [2606:4700::1111]:4517 too",
            {"generated": ["my diary"]},
        ),
        DaemonEvent("x", 1.0, f"a line with {TOKEN}, at 12:09:03", {"prompts": ["my diary"], "peer": PEER}),
    ),
    "netcheck": ReachView(observed=("/ip4/8.8.8.8/tcp/9",), proven=("/ip6/2606:4700::1111/tcp/9",)),
}
LOG = f"""12:09:03 workstation corollad: dialled ::ffff:8.8.4.4, 8.8.8.8:4517 and 192.168.1.20.
{PEM}
token={TOKEN} HF_TOKEN=hf_abcdefghijkl /home/alice/models 127.0.0.1 ::1 0.0.0.0 version 0.1.0
Authorization: Bearer {"q" * 20} and {"Zz9" * 40}
"""


def packed(path: Path) -> dict[str, str]:
    with tarfile.open(path, "r:gz") as archive:
        return {one.name: (archive.extractfile(one) or one).read().decode() for one in archive}  # type: ignore[union-attr]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    write_bundle(tmp_path / "b.tar.gz", VALUES, {"log": LOG}, Redactor(("workstation", "alice")))
    assert (tmp_path / "b.tar.gz").stat().st_mode & 0o777 == 0o600
    return packed(tmp_path / "b.tar.gz")


def test_no_key_token_text_name_or_address_is_in_it(files: dict[str, str]) -> None:
    everything = "\n".join(files.values())
    for secret in (*SECRETS, "q" * 20, "Zz9Zz9"):
        assert any(secret in source for source in (LOG, str(VALUES))), secret  # it was there to be found
        assert secret not in everything, secret


def test_what_helps_is_still_there(files: dict[str, str]) -> None:
    assert set(files) == {
        f"corolla-doctor/{name}"
        for name in ("status.json", "config.json", "events.json", "netcheck.json", "log.txt")
    }
    log = files["corolla-doctor/log.txt"]
    for words in (
        "12:09:03",
        "127.0.0.1",
        "::1 0.0.0.0",
        "version 0.1.0",
        "<key>",
        "<ipv4-private-2>",
        "dialled",
    ):
        assert words in log
    config = json.loads(files["corolla-doctor/config.json"])
    assert config == {
        "join": LEFT_OUT,
        "announce": ["/dns4/<name-1>/tcp/1"],
        "operators": LEFT_OUT,
        "blocks": "auto",
    }
    assert PEER in files["corolla-doctor/status.json"]
    assert "refused" in files["corolla-doctor/events.json"]


def test_an_address_has_one_mask_everywhere_that_tells_its_kind() -> None:
    redactor = Redactor()
    assert redactor.text("8.8.8.8 10.0.0.1 8.8.4.4") == "<ipv4-public-1> <ipv4-private-1> <ipv4-public-2>"
    assert redactor.value({"a": ["/ip4/8.8.4.4/tcp/1"]}) == {"a": ["/ip4/<ipv4-public-2>/tcp/1"]}
    assert (
        redactor.text("fe80::1: down; fe80:: up, 12:00:00")
        == "<ipv6-private-1>: down; <ipv6-private-2> up, 12:00:00"
    )


@pytest.mark.parametrize("value", [5, 2.5, None, True, [], {}, "", ()])
def test_plain_values_are_left_as_they_are(value: object) -> None:
    assert Redactor().value(value) == (list(value) if isinstance(value, tuple) else value)


def test_what_may_be_an_address_is_masked_though_it_is_none() -> None:
    text = Redactor().text("2001:db8:0:0:0:0:0:1:4517 \\n2001:db8::7 999.1.1.1 T12:00:00Z 0.1.0")
    assert text == "<unclear-1> \\n<ipv6-private-1> <unclear-2> T12:00:00Z 0.1.0"


def test_bytes_never_leave() -> None:
    assert Redactor().value({"x": b"secret"}) == {"x": LEFT_OUT}


def test_a_file_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(CorollaError) as caught:
        write_bundle(tmp_path / "b", {}, {}, Redactor())
    assert (caught.value.code, (tmp_path / "b").read_text()) == (Code.BAD_REQUEST, "mine")
    with pytest.raises(CorollaError) as caught:
        write_bundle(tmp_path / "no" / "b", {}, {}, Redactor())
    assert caught.value.code is Code.UNREADABLE
