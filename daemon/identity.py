"""Who this daemon is: one Ed25519 key in the state folder, and the peer id that follows from it.

Whoever reads the file can speak as this peer, so it is created with mode 0600 and never written again.
It knows nothing of networks; `network/libp2p/network.py` turns the key into libp2p's own type.
"""

from __future__ import annotations

import errno
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from ..protocol.errors import Code, CorollaError, error
from ..protocol.records import peer_id_of

KEY_FILE: Final = "identity.pem"
_MODE: Final = 0o600
_MAX_KEY_FILE_BYTES: Final = 64 * 1024  # a PEM of this kind has 119 bytes; whatever is larger is no key

_log = structlog.get_logger("corolla.identity")


@dataclass(frozen=True, slots=True)
class Identity:
    """A key and the names that follow from it. Its text form shows the peer id only."""

    private_key: Ed25519PrivateKey

    @property
    def public_key(self) -> bytes:
        """The raw public key, 32 bytes."""
        return self.private_key.public_key().public_bytes_raw()

    @property
    def seed(self) -> bytes:
        """The raw private key, 32 bytes: a secret."""
        return self.private_key.private_bytes_raw()

    @property
    def peer(self) -> str:
        """The libp2p peer id, base58."""
        return peer_id_of(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature of `data`, 64 bytes."""
        return self.private_key.sign(data)

    def __repr__(self) -> str:
        return f"Identity({self.peer})"


def new_identity() -> Identity:
    """A fresh random identity, kept nowhere."""
    return Identity(Ed25519PrivateKey.generate())


def identity_from_seed(seed: bytes) -> Identity:
    """The identity of a 32-byte seed, always the same: for simulations and tests."""
    return Identity(Ed25519PrivateKey.from_private_bytes(seed))


def load_identity(state_dir: Path) -> Identity:
    """The identity kept in a state folder; the first call creates folder and key.

    Raises `UNREADABLE` when the key file is damaged, is no Ed25519 key, or may not be read or created, and
    `DISK_FULL` when there is no room for it.
    """
    path = state_dir / KEY_FILE
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
        with path.open("rb") as file:
            _keep_private(path, file.fileno())
            pem = file.read(_MAX_KEY_FILE_BYTES + 1)
    except OSError as failure:
        raise _unusable(path, failure) from failure
    return Identity(_parse(path, pem))


def _create(path: Path) -> None:
    """Write a new key beside `path`, then give it its name: no reader ever sees half a key.

    When another process was faster, its key stays.
    """
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            _log.info("identity_kept", path=str(path), reason="another process created it first")
    finally:
        draft.unlink(missing_ok=True)


def _keep_private(path: Path, descriptor: int) -> None:
    mode = os.fstat(descriptor).st_mode & 0o777
    if mode & 0o077:
        os.fchmod(descriptor, _MODE)
        _log.warning("identity_was_readable", path=str(path), mode=f"{mode:04o}", now=f"{_MODE:04o}")


def _parse(path: Path, pem: bytes) -> Ed25519PrivateKey:
    remedy = "restore the file from a backup; or move it away and start again, which gives this machine a new peer id"
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as failure:
        raise error(
            Code.UNREADABLE, f"the identity file {path} is damaged: {len(pem)} bytes that are no key", remedy
        ) from failure
    if not isinstance(key, Ed25519PrivateKey):
        raise error(
            Code.UNREADABLE,
            f"the identity file {path} holds a {type(key).__name__}, expected an Ed25519 key",
            remedy,
        )
    return key


def _unusable(path: Path, failure: OSError) -> CorollaError:
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return error(
            Code.DISK_FULL,
            f"no room for the identity file {path}: {failure.strerror}",
            "free some disk space, or choose another folder with --state-dir",
        )
    return error(
        Code.UNREADABLE,
        f"the identity file {path} cannot be used: {failure.strerror or failure}",
        f"let the daemon's user read and write {path.parent}, or choose another folder with --state-dir",
    )
