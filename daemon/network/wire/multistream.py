"""Agreeing on a protocol in one round trip: of a stream, and of what secures and multiplexes a connection.

multistream-select lets the opener propose the negotiation itself and the protocol in one breath; the
library waits for the first answer before it makes the second proposal. It also believes any length that a
stranger announces, before anything is known of it; here a proposal is short.
Source: https://github.com/multiformats/multistream-select
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from ....protocol.errors import Code, error

_MULTISTREAM: Final = "/multistream/1.0.0"
_NOT_AVAILABLE: Final = "na"
_MAX_TOKEN_BYTES: Final = 1024
_MAX_PROPOSALS: Final = 16


class Wire(Protocol):
    """What is agreed on: a stream, or a connection."""

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes; `b""`, or an exception of its own, at the end."""

    async def write(self, data: bytes) -> object:
        """Send all of it."""


async def agree(stream: Wire, peer: str, protocol: str) -> None:
    """Agree with the far side of what is new on `protocol`.

    Raises `UNSUPPORTED`, `PROTOCOL_VIOLATION`, `PEER_LOST`, and the stream's own exceptions.
    """
    await stream.write(_token(_MULTISTREAM) + _token(protocol))
    for expected in (_MULTISTREAM, protocol):
        answer = await _read_token(stream)
        if answer == _NOT_AVAILABLE and expected == protocol:
            raise error(Code.UNSUPPORTED, f"peer {peer} does not speak {protocol}")
        if answer != expected:
            raise error(
                Code.PROTOCOL_VIOLATION, f"peer {peer} answered {answer[:80]!r} to the proposal {expected!r}"
            )


async def answer(stream: Wire, serves: Callable[[str], bool]) -> str:
    """Agree with the opener of a stream on the first protocol it proposes that `serves` it.

    Raises `UNSUPPORTED` when none was, `PROTOCOL_VIOLATION`, `PEER_LOST`, and the stream's own exceptions.
    The caller bounds the time.
    """
    await stream.write(_token(_MULTISTREAM))
    greeting = await _read_token(stream)
    if greeting != _MULTISTREAM:
        raise error(
            Code.PROTOCOL_VIOLATION, f"a stream began with {greeting[:80]!r}, expected {_MULTISTREAM!r}"
        )
    for _ in range(_MAX_PROPOSALS):
        protocol = await _read_token(stream)
        if serves(protocol):
            await stream.write(_token(protocol))
            return protocol
        await stream.write(_token(_NOT_AVAILABLE))
    raise error(Code.UNSUPPORTED, f"none of {_MAX_PROPOSALS} proposed protocols is served")


def _token(text: str) -> bytes:
    """One message of multistream-select: length as varint, text, newline."""
    data = text.encode() + b"\n"
    head = bytearray()
    left = len(data)
    while left > 127:
        head.append(left & 127 | 128)
        left >>= 7
    head.append(left)
    return bytes(head) + data


async def _read_token(stream: Wire) -> str:
    size = shift = 0
    while True:
        (byte,) = await _read(stream, 1)
        size |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            break
        if shift > 14:
            raise error(Code.PROTOCOL_VIOLATION, "a multistream message of absurd length")
    if not 0 < size <= _MAX_TOKEN_BYTES:
        raise error(Code.PROTOCOL_VIOLATION, f"a multistream message of {size} bytes")
    return (await _read(stream, size)).decode("utf-8", "replace").removesuffix("\n")


async def _read(stream: Wire, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.read(size - len(data))
        if not piece:
            raise error(Code.PEER_LOST, "the far side ended before a protocol was agreed on")
        data += piece
    return data
