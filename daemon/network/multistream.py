"""Agreeing on a stream's protocol in one round trip.

multistream-select lets the opener propose the negotiation itself and the protocol in one breath; the
library waits for the first answer before it makes the second proposal.
Source: https://github.com/multiformats/multistream-select
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from libp2p.stream_muxer.exceptions import MuxedStreamError

from ...protocol.errors import Code, error
from .yamux import YamuxStream

_MULTISTREAM: Final = "/multistream/1.0.0"
_NOT_AVAILABLE: Final = "na"
_MAX_TOKEN_BYTES: Final = 1024
_MAX_PROPOSALS: Final = 16


async def agree(stream: YamuxStream, peer: str, protocol: str) -> None:
    """Agree with the far side of a new stream on `protocol`.

    Raises `UNSUPPORTED`, `PROTOCOL_VIOLATION`, and the muxer's `MuxedStreamError`.
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


async def answer(stream: YamuxStream, serves: Callable[[str], bool]) -> str:
    """Agree with the opener of a stream on the first protocol it proposes that `serves` it.

    Raises `UNSUPPORTED` when none was, `PROTOCOL_VIOLATION`, and the muxer's `MuxedStreamError`. The caller
    bounds the time.
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


async def _read_token(stream: YamuxStream) -> str:
    size = shift = 0
    while True:
        byte = (await stream.read(1))[0]
        size |= (byte & 127) << shift
        shift += 7
        if not byte & 128:
            break
        if shift > 14:
            raise MuxedStreamError("a multistream answer of absurd length")
    if not 0 < size <= _MAX_TOKEN_BYTES:
        raise MuxedStreamError(f"a multistream answer of {size} bytes")
    data = b""
    while len(data) < size:
        data += await stream.read(size - len(data))
    return data.decode("utf-8", "replace").removesuffix("\n")
