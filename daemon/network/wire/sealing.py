"""The messages of an agreed Noise connection: plain bytes to sealed ones and back.

It owns one direction's key and count, and waits for nothing; `noise.py` agrees on the keys and has the socket.
Source: https://noiseprotocol.org/noise.html#cipherstate-functions (ChaChaPoly), and libp2p's two length bytes.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from noise.exceptions import NoiseInvalidMessage

TAG_BYTES: Final = 16
MAX_PLAIN_BYTES: Final = 65_535 - TAG_BYTES  # of one message
_LENGTH: Final = struct.Struct(">H")
_NONCE: Final = struct.Struct("<4xQ")


class Sealer:
    """What we send. key: 32 bytes. count: of messages sealed with it before."""

    def __init__(self, key: bytes, count: int) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._count = count

    def seal(self, plain: bytes) -> tuple[bytes, bytes]:
        """One message, at most `MAX_PLAIN_BYTES`, in two pieces that follow each other on the wire."""
        sealed = self._cipher.encrypt(_NONCE.pack(self._count), plain, None)
        self._count += 1
        return _LENGTH.pack(len(sealed)), sealed


class Unsealer:
    """What we receive, cut anywhere. key, count: as `Sealer`."""

    def __init__(self, key: bytes, count: int) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._count = count
        self._rest = b""  # of a message that has not come whole

    def unseal(self, data: bytes) -> list[bytes]:
        """The messages that are whole by now, without empty ones. Raises `NoiseInvalidMessage` for a forged one."""
        if self._rest:
            data = self._rest + data
        found = []
        at, end = 0, len(data)
        view = memoryview(data)
        while end - at >= _LENGTH.size:
            start = at + _LENGTH.size
            stop = start + int(_LENGTH.unpack_from(data, at)[0])
            if stop > end:
                break
            try:
                plain = self._cipher.decrypt(_NONCE.pack(self._count), view[start:stop], None)
            except InvalidTag as forged:
                raise NoiseInvalidMessage("a message that the far side did not seal") from forged
            self._count += 1
            at = stop
            if plain:
                found.append(plain)
        self._rest = data[at:]
        return found
