"""Messages of DCUtR, by which two peers at the ends of a circuit open their NATs for each other.

`B`, which was called over the relay, opens the stream. Both say `CONNECT` with the addresses where others see them,
then `B` says `SYNC`, and both dial. Source: https://github.com/libp2p/specs/blob/master/relay/DCUtR.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from ....protocol.errors import Code, error
from ....protocol.limits import MAX_ADDRESSES_OFFERED
from .multiaddresses import packed, public_endpoints, unpacked

DCUTR_PROTOCOL: Final = "/libp2p/dcutr"


def connect(addresses: Iterable[str]) -> HolePunch:
    """Here others see me."""
    return HolePunch(type=HolePunch.CONNECT, ObsAddrs=packed(addresses))


def sync() -> HolePunch:
    """`B` → `A`: dial as soon as this arrives."""
    return HolePunch(type=HolePunch.SYNC)


def doors_of(message: HolePunch) -> tuple[str, ...]:
    """Addresses in a `CONNECT` that may be dialled: plain TCP at public IPs. Anything else in it is passed over.

    Raises `PROTOCOL_VIOLATION` if it is no `CONNECT`, `LIMIT_EXCEEDED` if it names too many.
    """
    _expect(message, HolePunch.CONNECT)
    if len(message.ObsAddrs) > MAX_ADDRESSES_OFFERED:
        said = f"a punch with {len(message.ObsAddrs)} addresses"
        raise error(Code.LIMIT_EXCEEDED, f"{said}, at most {MAX_ADDRESSES_OFFERED} are taken")
    return public_endpoints(map(unpacked, message.ObsAddrs))


def check_sync(message: HolePunch) -> None:
    """Raise `PROTOCOL_VIOLATION` if it is no `SYNC`."""
    _expect(message, HolePunch.SYNC)


def _expect(message: HolePunch, kind: HolePunch.Type.ValueType) -> None:
    if not message.HasField("type") or message.type != kind:
        said = HolePunch.Type.Name(message.type) if message.HasField("type") else "nothing"
        raise error(Code.PROTOCOL_VIOLATION, f"a punch that says {said}, not {HolePunch.Type.Name(kind)}")
