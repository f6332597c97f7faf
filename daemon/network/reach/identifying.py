"""What a connected peer says of itself by libp2p's identify: where it listens, and where it sees us.

Anybody may say anything there. Source: https://github.com/libp2p/specs/blob/master/identify/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import parse_identify_response

from ....protocol.errors import Code, error
from ....protocol.limits import CIRCUIT_TIMEOUT_S, MAX_ADDRESSES_OFFERED, MAX_IDENTIFY_BYTES
from ..seam import Network
from .multiaddresses import unpacked


@dataclass(frozen=True, slots=True)
class Told:
    """observed: where the peer sees us, "" if it does not say. listens: where it may be dialled, as it says."""

    observed: str = ""
    listens: tuple[str, ...] = ()


async def identify(network: Network, peer: str) -> Told:
    """Ask a peer. Raises `PEER_LOST`, `UNSUPPORTED`, `PROTOCOL_VIOLATION`, and `TIMEOUT`."""
    stream = await network.open(peer, str(IDENTIFY), timeout_s=CIRCUIT_TIMEOUT_S)
    data = b""
    try:
        with trio.fail_after(CIRCUIT_TIMEOUT_S):
            while len(data) <= MAX_IDENTIFY_BYTES and (piece := await stream.receive()):
                data += piece
    except trio.TooSlowError as problem:
        raise error(Code.TIMEOUT, f"{peer} did not say who it is in {CIRCUIT_TIMEOUT_S:g} s") from problem
    finally:
        stream.reset()
    return read_identify(data)


def read_identify(data: bytes) -> Told:
    """What an identify says. Raises `PROTOCOL_VIOLATION`, and `LIMIT_EXCEEDED` for one too long."""
    if len(data) > MAX_IDENTIFY_BYTES:
        raise error(Code.LIMIT_EXCEEDED, f"an identify of more than {MAX_IDENTIFY_BYTES} bytes")
    try:
        told = parse_identify_response(data)
    except Exception as problem:  # of protobuf, or of the library about its length
        raise error(Code.PROTOCOL_VIOLATION, f"an unreadable identify: {problem}"[:200]) from problem
    listens = (unpacked(address) for address in told.listen_addrs[:MAX_ADDRESSES_OFFERED])
    return Told(unpacked(told.observed_addr), tuple(address for address in listens if address))
