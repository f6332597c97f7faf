"""Whether others can dial a peer: it asks one that it speaks with to dial it back, and sees what comes.

On `REACH_PROTOCOL` a peer asks `DialMe` and is answered `Dialled`. In between the asked one makes a new
connection to that address and says the `Nonce` over it, on `RING_PROTOCOL`; a nonce that came so proves more
than the answer does. Only the address from which the asker speaks is ever dialled, at one port, and seldom:
nobody can be made to knock at a third one's door. Source: libp2p's AutoNAT v2,
https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md; it is not spoken itself because the library
has v1 alone, which has no nonce and dials from the port that the asker's NAT has opened already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from .limits import MAX_NAME_CHARS
from .messages import Message, Vocabulary, check_length, check_range

REACH_PROTOCOL: Final = "/corolla/reach/1"
RING_PROTOCOL: Final = "/corolla/reach/ring/1"
NONCE_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class DialMe(Message):
    """Asker → asked: dial this multiaddress, which is mine, and say the nonce there. → `Dialled`."""

    KIND: ClassVar[str] = "dial_me"
    address: str
    nonce: bytes

    def __post_init__(self) -> None:
        check_length("address", self.address, MAX_NAME_CHARS)
        check_range("bytes of a nonce", len(self.nonce), NONCE_BYTES, NONCE_BYTES)


@dataclass(frozen=True, slots=True)
class Dialled(Message):
    """Asked → asker: what came of it. tried: False if it was not dialled at all. reason: why not, or why in vain."""

    KIND: ClassVar[str] = "dialled"
    tried: bool
    reached: bool = False
    reason: str = ""

    def __post_init__(self) -> None:
        check_length("reason", self.reason, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True)
class Nonce(Message):
    """Asked → asker, over the connection that it made."""

    KIND: ClassVar[str] = "nonce"
    nonce: bytes

    def __post_init__(self) -> None:
        check_range("bytes of a nonce", len(self.nonce), NONCE_BYTES, NONCE_BYTES)


REACH: Final = Vocabulary(DialMe, Dialled)
RING: Final = Vocabulary(Nonce)
