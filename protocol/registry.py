"""How peers greet each other, and how they keep and find each other's records.

Greeting: whoever dialled says `Hello` on `HELLO_PROTOCOL` and gets the other's. Before that has shown one
swarm id, nothing else is served. Registry: on `REGISTRY_PROTOCOL` a peer asks a holder to `Store` its own
records, or to `Find` those under some keys. Each question is answered once, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from .errors import CorollaError, error_from_wire
from .invitations import Charter, Proof, Sealed
from .limits import (
    MAX_ADDRESSES_TOLD,
    MAX_ADMITTED_TOLD,
    MAX_BATCH_BYTES,
    MAX_KEYS_PER_FIND,
    MAX_MEMBERS_TOLD,
    MAX_NAME_CHARS,
    MAX_RECORD_LIFETIME_S,
    MAX_RECORDS_PER_MESSAGE,
)
from .messages import Message, Plain, Vocabulary, check_length, check_range
from .records import MAX_NAMES, Signed, check_addresses

HELLO_PROTOCOL: Final = "/corolla/hello/1"
REGISTRY_PROTOCOL: Final = "/corolla/registry/1"
KEY_BYTES: Final = 32
RUN_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class PeerAddresses:
    """Where a member was last reached."""

    peer: str
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        check_length("peer", self.peer, MAX_NAME_CHARS)
        check_length("addresses", self.addresses, MAX_ADDRESSES_TOLD)
        check_addresses(self.addresses)


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Who is there. swarm_id: "" of one who wants to learn which swarm this is, before joining it.

    version: of the program, for people. majors: of the peer protocols spoken. addresses: the speaker's.
    members: a sample of other members that the speaker is connected to; none for strangers.
    charter, proof: of an invited swarm, and that the speaker belongs to it. revocations: the owner's list.
    admitted: a sample of memberships that the speaker saw; none for strangers.
    unix_s: the speaker's clock; 0 if it tells none. observed: where the speaker sees the hearer.
    problem: why the hearer is not admitted (`CorollaError.to_wire`). run: drawn anew whenever the speaker starts.
    doubled: several runs greet in the hearer's name by turns, so another daemon uses its identity.
    """

    KIND: ClassVar[str] = "hello"
    swarm_id: str
    name: str
    version: str
    majors: tuple[int, ...] = (1,)
    addresses: tuple[str, ...] = ()
    members: tuple[PeerAddresses, ...] = ()
    charter: Charter | None = None
    proof: Proof | None = None
    revocations: Sealed | None = None
    admitted: tuple[Proof, ...] = ()
    unix_s: float = 0.0
    observed: str = ""
    problem: Plain = None
    run: bytes = b""
    doubled: bool = False

    def __post_init__(self) -> None:
        check_length("swarm_id", self.swarm_id, MAX_NAME_CHARS)
        check_length("name", self.name, MAX_NAME_CHARS)
        check_length("version", self.version, MAX_NAME_CHARS)
        check_length("majors", self.majors, MAX_NAMES)
        check_addresses(self.addresses)
        check_length("members", self.members, MAX_MEMBERS_TOLD)
        check_length("admitted", self.admitted, MAX_ADMITTED_TOLD)
        check_length("observed", self.observed, MAX_NAME_CHARS)
        check_length("run", self.run, RUN_BYTES)


@dataclass(frozen=True, slots=True)
class Entry:
    """A signed record on its way. remaining_s: of its lifetime, when it was sent.

    keys: those under which the holder shall keep it (when stored); empty when found.
    """

    signed: Signed
    remaining_s: float
    keys: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.remaining_s <= MAX_RECORD_LIFETIME_S:
            raise ValueError(f"remaining_s {self.remaining_s}, expected at most {MAX_RECORD_LIFETIME_S}")
        _check_keys(self.keys)


@dataclass(frozen=True, slots=True)
class Store(Message):
    """Keep these records, which are the sender's own. Answered by `Stored`."""

    KIND: ClassVar[str] = "store"
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        _check_entries(self.entries)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One record was not kept. index: in `Store.entries`. seq: the highest known of this record."""

    index: int
    error: Plain  # CorollaError.to_wire
    seq: int = 0

    def problem(self) -> CorollaError:
        """Why."""
        return error_from_wire(self.error)


@dataclass(frozen=True, slots=True)
class Stored(Message):
    """All records are kept, but these."""

    KIND: ClassVar[str] = "stored"
    refused: tuple[Refusal, ...] = ()

    def __post_init__(self) -> None:
        check_length("refused", self.refused, MAX_RECORDS_PER_MESSAGE)


@dataclass(frozen=True, slots=True)
class Find(Message):
    """Which records are under any of these keys? after: `Found.next` of the page before. → `Found`."""

    KIND: ClassVar[str] = "find"
    keys: tuple[bytes, ...]
    after: str = ""

    def __post_init__(self) -> None:
        _check_keys(self.keys)
        check_length("after", self.after, 2 * MAX_NAME_CHARS + 1)


@dataclass(frozen=True, slots=True)
class Found(Message):
    """A page of records, each once. next: ask again with this; "" if there are no more."""

    KIND: ClassVar[str] = "found"
    entries: tuple[Entry, ...] = ()
    next: str = ""

    def __post_init__(self) -> None:
        _check_entries(self.entries)
        check_length("next", self.next, 2 * MAX_NAME_CHARS + 1)


@dataclass(frozen=True, slots=True)
class Declined(Message):
    """The question was not understood, or may not be asked."""

    KIND: ClassVar[str] = "declined"
    error: Plain  # CorollaError.to_wire

    def problem(self) -> CorollaError:
        """Why."""
        return error_from_wire(self.error)


def _check_keys(keys: tuple[bytes, ...]) -> None:
    check_length("keys", keys, MAX_KEYS_PER_FIND)
    for key in keys:
        check_range("bytes of a key", len(key), KEY_BYTES, KEY_BYTES)


def _check_entries(entries: tuple[Entry, ...]) -> None:
    check_length("entries", entries, MAX_RECORDS_PER_MESSAGE)
    check_range("bytes of records", sum(len(e.signed.body) for e in entries), 0, MAX_BATCH_BYTES)


HELLO: Final = Vocabulary(Hello)
REGISTRY: Final = Vocabulary(Store, Stored, Find, Found, Declined)
