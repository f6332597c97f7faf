"""From a relayed connection to a direct one: two peers behind NATs open their doors for each other.

Spoken on `PUNCH_PROTOCOL` over the relayed connection, by the peer that made it. Both say where others see
them. A caller that anybody can dial is then dialled. Otherwise it says `Now` and dials, and so does the called
one: each packet that goes out opens the sender's NAT for the one that comes, and the two openings meet as one
connection (RFC 9293, section 3.5, simultaneous open). The caller is its client, the called one its server.
Source: Ford, Srisuresh and Kegel 2005, Peer-to-peer communication across network address translators;
https://github.com/libp2p/specs/blob/master/relay/DCUtR.md, whose own protocol is not spoken: it is of use between
members alone, since others are served nothing over a relay, and it does not say which side is the server of a
connection that both have opened, which Noise must know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from .limits import MAX_ADDRESSES, MAX_NAME_CHARS
from .messages import Message, Vocabulary, check_length, check_range

PUNCH_PROTOCOL: Final = "/corolla/punch/1"


@dataclass(frozen=True, slots=True)
class Doors(Message):
    """Both ways: multiaddresses where a peer might be reached, as others saw it. Without `/p2p/…`.

    is_open: whether anybody may dial them.
    """

    KIND: ClassVar[str] = "doors"
    addresses: tuple[str, ...] = ()
    is_open: bool = False

    def __post_init__(self) -> None:
        check_range("number of addresses", len(self.addresses), 0, MAX_ADDRESSES)
        for address in self.addresses:
            check_length("address", address, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True)
class Now(Message):
    """Caller → called: I dial; dial too."""

    KIND: ClassVar[str] = "now"


PUNCH: Final = Vocabulary(Doors, Now)
