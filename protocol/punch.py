"""From a relayed connection to a direct one: two peers behind NATs open their doors for each other.

Spoken on `PUNCH_PROTOCOL` over the relayed connection, by the peer that made it. Both say where their NATs
show them; then the caller dials, and if that fails it has opened its own NAT for the other, who dials next.
One after the other, nobody has to guess who accepts and who calls, as with a simultaneous opening.
Source: Ford, Srisuresh and Kegel 2005, Peer-to-peer communication across network address translators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from .limits import MAX_ADDRESSES, MAX_NAME_CHARS
from .messages import Message, Vocabulary, check_length, check_range

PUNCH_PROTOCOL: Final = "/corolla/punch/1"


@dataclass(frozen=True, slots=True)
class Doors(Message):
    """Both ways: multiaddresses where a peer might be reached, as others saw it. Without `/p2p/…`."""

    KIND: ClassVar[str] = "doors"
    addresses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range("number of addresses", len(self.addresses), 0, MAX_ADDRESSES)
        for address in self.addresses:
            check_length("address", address, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True)
class YourTurn(Message):
    """Caller → called: my dials failed, but what you dial now may come through. Answered by `Tried`."""

    KIND: ClassVar[str] = "your_turn"


@dataclass(frozen=True, slots=True)
class Tried(Message):
    """Called → caller: whether the dials reached you."""

    KIND: ClassVar[str] = "tried"
    connected: bool = False


PUNCH: Final = Vocabulary(Doors, YourTurn, Tried)
