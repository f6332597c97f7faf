"""The daemon's key file: made once, private, and clear about what is wrong with it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from libp2p.peer.id import ID

from corolla.daemon import identity as module
from corolla.daemon.identity import KEY_FILE, identity_from_seed, load_identity, new_identity
from corolla.daemon.network.libp2p.host import key_pair
from corolla.protocol.errors import Code, CorollaError


def test_a_second_load_gives_the_same_peer(tmp_path: Path) -> None:
    first = load_identity(tmp_path / "state")
    assert load_identity(tmp_path / "state").peer == first.peer


def test_the_file_is_private_and_alone(tmp_path: Path) -> None:
    load_identity(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


def test_a_readable_key_file_is_made_private_again(tmp_path: Path) -> None:
    load_identity(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)
    load_identity(tmp_path)
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600


def test_a_key_that_another_process_made_first_is_kept(tmp_path: Path) -> None:
    first = load_identity(tmp_path)
    module._create(tmp_path / KEY_FILE)
    assert load_identity(tmp_path).peer == first.peer
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_peer_id_and_key_agree_with_libp2p() -> None:
    identity = new_identity()
    pair = key_pair(identity)
    assert str(ID.from_pubkey(pair.public_key)) == identity.peer
    assert pair.public_key.verify(b"data", identity.sign(b"data"))


def test_a_signature_verifies_under_the_raw_public_key() -> None:
    identity = new_identity()
    Ed25519PublicKey.from_public_bytes(identity.public_key).verify(identity.sign(b"data"), b"data")


def test_a_seed_always_gives_the_same_peer() -> None:
    assert identity_from_seed(b"s" * 32).peer == identity_from_seed(b"s" * 32).peer


def test_text_form_keeps_the_secret() -> None:
    identity = new_identity()
    assert repr(identity) == f"Identity({identity.peer})"


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END"])
def test_a_damaged_file_is_named_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / KEY_FILE
    path.write_bytes(content)
    with pytest.raises(CorollaError, match=str(path)) as caught:
        load_identity(tmp_path)
    assert caught.value.code is Code.UNREADABLE
    assert "backup" in caught.value.remedy
    assert path.read_bytes() == content


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    pem = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / KEY_FILE).write_bytes(pem)
    with pytest.raises(CorollaError, match="expected an Ed25519 key"):
        load_identity(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorollaError, match="file") as caught:
        load_identity(tmp_path / "file" / "state")
    assert caught.value.code is Code.UNREADABLE


def test_a_full_disk_is_called_that_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CorollaError) as caught:
        load_identity(tmp_path)
    assert caught.value.code is Code.DISK_FULL
    assert list(tmp_path.iterdir()) == []
