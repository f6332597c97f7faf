"""The signed records that this daemon holds, for others and from others. Pure: no I/O, no clock of its own.

It owns the rules by which a record is believed, kept, superseded and forgotten (DESIGN, section 4). It does
not know who holds what elsewhere, nor how records travel.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from ....protocol.errors import Code, error
from ....protocol.limits import (
    MAX_BATCH_BYTES,
    MAX_MANIFESTS_PER_MODEL,
    MAX_RECORDS_PER_KEY,
    MAX_RECORDS_PER_MESSAGE,
    MAX_RECORDS_PER_ORIGIN,
    MAX_STORED_RECORDS,
    SEQ_MEMORY_S,
)
from ....protocol.records import (
    ManifestRecord,
    Record,
    Signed,
    SpanRecord,
    SpanState,
    keys_of,
    peer_id_of,
    subkey_of,
    verify,
)
from ....protocol.registry import KEY_BYTES, Entry, Found
from ..dialling import network_of

_R = TypeVar("_R", SpanRecord, ManifestRecord)

ENTRY_OVERHEAD_BYTES: Final = 256  # of an entry besides its body and keys: signature, public key, field names


@dataclass(frozen=True, slots=True)
class Kept:
    """One record on the shelf. keys: those under which we hold it for others. Times are monotonic seconds."""

    record: Record
    signed: Signed
    keys: tuple[bytes, ...]
    origin: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Known:
    """The highest sequence number ever seen of a record, remembered past its expiry against replays."""

    seq: int
    forget_at: float


class Shelf:
    """Records of one swarm, by subkey (whose record) and by key (where it is looked for).

    `now` is the monotonic clock throughout, `now_unix` the wall clock, both in seconds.
    """

    def __init__(self, swarm_id: str, *, max_records: int = MAX_STORED_RECORDS) -> None:
        self._swarm_id = swarm_id
        self._max_records = max_records
        self._kept: dict[str, Kept] = {}
        self._by_key: dict[bytes, set[str]] = {}
        self._known: dict[str, _Known] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def put(
        self, entry: Entry, *, now: float, now_unix: float, owner: str | None = None, origin: str = ""
    ) -> bool:
        """Keep a record; True if it says anything new, beyond being alive.

        owner: the peer that asks us to hold it, which must be its signer; None for a record that was found.
        origin: whose share of a key it counts against, see `origin_of`.
        Raises `BAD_RECORD` (forged, expired, too long-lived, of a wrong clock, under wrong keys; replayed,
        then with the highest `seq` seen in `details`) and `BUSY` (no room).
        """
        if owner is not None and peer_id_of(entry.signed.public_key) != owner:
            raise error(Code.BAD_RECORD, f"{owner} stores a record that it did not sign")
        record = verify(entry.signed, self._swarm_id, now_unix_s=now_unix)
        subkey = subkey_of(record)
        if not set(entry.keys) <= set(keys_of(record, self._swarm_id)):
            raise error(Code.BAD_RECORD, f"record {subkey} is stored under keys that are not its own")
        if not 0 < entry.remaining_s <= record.lifetime_s:
            raise error(
                Code.BAD_RECORD,
                f"record {subkey} has {entry.remaining_s:g} s left of {record.lifetime_s:g}",
            )
        old = self._kept.get(subkey)
        if old is not None and old.signed == entry.signed:
            keys = tuple(
                dict.fromkeys((*old.keys, *entry.keys))
            )  # its expiry stands: a repeat renews nothing
            self._check_room(record, subkey, entry.keys, old, origin)
            self._place(subkey, dataclasses.replace(old, keys=keys, origin=origin or old.origin))
            return False
        known = self._known.get(subkey)
        if known is not None and record.seq <= known.seq:
            raise error(
                Code.BAD_RECORD,
                f"record {subkey} has seq {record.seq}, but {known.seq} was seen",
                seq=known.seq,
            )
        self._check_room(record, subkey, entry.keys, old, origin)
        expires_at = now + entry.remaining_s
        keys = entry.keys
        if owner is None and old is not None:  # news of a record that we hold: hold it on
            keys = tuple(key for key in old.keys if key in keys_of(record, self._swarm_id))
            origin = old.origin
        self._place(subkey, Kept(record, entry.signed, keys, origin, expires_at))
        self._known[subkey] = _Known(record.seq, expires_at + SEQ_MEMORY_S)
        return old is None or _substance(old.record) != _substance(record)

    def _check_room(
        self, record: Record, subkey: str, keys: Iterable[bytes], old: Kept | None, origin: str
    ) -> None:
        """Raise `BUSY` if a newcomer finds no room. What is on the shelf already always is refreshed."""
        if old is None and subkey not in self._known and len(self._known) >= 4 * self._max_records:
            raise error(Code.BUSY, f"{len(self._known)} records are remembered, limit reached")
        if old is None and len(self._kept) >= self._max_records:
            raise error(Code.BUSY, f"{len(self._kept)} records are held, limit {self._max_records}")
        for key in keys:
            if old is not None and key in old.keys:
                continue
            others = [self._kept[other] for other in self._by_key.get(key, ()) if other != subkey]
            if len(others) >= MAX_RECORDS_PER_KEY:
                raise error(Code.BUSY, f"{len(others)} records under one key, limit {MAX_RECORDS_PER_KEY}")
            if sum(kept.origin == origin for kept in others) >= MAX_RECORDS_PER_ORIGIN:
                raise error(
                    Code.BUSY, f"{MAX_RECORDS_PER_ORIGIN} records under one key come from {origin} already"
                )
            if isinstance(record, ManifestRecord):
                _check_manifests(record, others)

    def _place(self, subkey: str, kept: Kept) -> None:
        self._remove(subkey)
        self._kept[subkey] = kept
        for key in kept.keys:
            self._by_key.setdefault(key, set()).add(subkey)

    def _remove(self, subkey: str) -> None:
        old = self._kept.pop(subkey, None)
        for key in old.keys if old is not None else ():
            self._by_key[key].discard(subkey)
            if not self._by_key[key]:
                del self._by_key[key]

    def expire(self, now: float) -> bool:
        """Drop what has expired, and forget what was remembered long enough; True if anything was dropped."""
        dead = [subkey for subkey, kept in self._kept.items() if kept.expires_at <= now]
        for subkey in dead:
            self._remove(subkey)
        for subkey in [s for s, known in self._known.items() if known.forget_at <= now]:
            del self._known[subkey]
        return bool(dead)

    def drop(self, barred: Callable[[str], bool]) -> bool:
        """Drop what barred peers signed, and go on remembering its sequence numbers; True if there was any."""
        dropped = [subkey for subkey, kept in self._kept.items() if barred(kept.record.peer)]
        for subkey in dropped:
            self._remove(subkey)
        return bool(dropped)

    def next_expiry(self) -> float | None:
        """When the next record expires."""
        return min((kept.expires_at for kept in self._kept.values()), default=None)

    # reading

    def spans(self, fingerprint: str, now: float) -> tuple[Kept, ...]:
        """Living span records of a model, withdrawn ones left out, in the order of their subkeys."""
        return tuple(
            kept
            for kept, record in self._living(now, SpanRecord)
            if record.fingerprint == fingerprint and record.state is not SpanState.GONE
        )

    def all_spans(self, now: float) -> tuple[Kept, ...]:
        """Living span records of all models that we happen to hold."""
        return tuple(k for k, record in self._living(now, SpanRecord) if record.state is not SpanState.GONE)

    def manifests(self, now: float) -> tuple[ManifestRecord, ...]:
        """Living manifests, withdrawn ones left out."""
        return tuple(record for _, record in self._living(now, ManifestRecord) if not record.gone)

    def _living(self, now: float, cls: type[_R]) -> Iterator[tuple[Kept, _R]]:
        for subkey in sorted(self._kept):
            kept = self._kept[subkey]
            if kept.expires_at > now and isinstance(kept.record, cls):
                yield kept, kept.record

    def of_peer(self, peer: str, now: float) -> tuple[Kept, ...]:
        """Living records that a peer signed, withdrawals too."""
        return tuple(k for k in self._kept.values() if k.record.peer == peer and k.expires_at > now)

    def find(self, keys: Sequence[bytes], after: str, now: float) -> Found:
        """The page of records held under any of these keys whose subkeys follow `after`."""
        wanted = sorted({subkey for key in keys for subkey in self._by_key.get(key, ()) if subkey > after})
        entries: list[Entry] = []
        size = 0
        last = ""
        for subkey in wanted:
            kept = self._kept[subkey]
            if kept.expires_at <= now:
                continue
            entry = Entry(kept.signed, min(kept.expires_at - now, kept.record.lifetime_s))
            size += entry_bytes(entry)
            if entries and (len(entries) == MAX_RECORDS_PER_MESSAGE or size > MAX_BATCH_BYTES):
                return Found(tuple(entries), last)
            entries.append(entry)
            last = subkey
        return Found(tuple(entries))


def _check_manifests(record: ManifestRecord, others: Iterable[Kept]) -> None:
    same = sum(
        isinstance(kept.record, ManifestRecord) and kept.record.facts.fingerprint == record.facts.fingerprint
        for kept in others
    )
    if same >= MAX_MANIFESTS_PER_MODEL:
        raise error(Code.BUSY, f"{same} manifests of {record.facts.name} are held, which is enough")


def _substance(record: Record) -> Record:
    """A record without what changes at each refresh."""
    if isinstance(record, SpanRecord):
        return dataclasses.replace(
            record, seq=0, issued_at=0.0, lifetime_s=1.0, tokens_per_s=0.0, cache_tokens=0
        )
    return dataclasses.replace(record, seq=0, issued_at=0.0, lifetime_s=1.0)


def entry_bytes(entry: Entry) -> int:
    """About how many bytes of a message's header an entry takes, rounded up."""
    return len(entry.signed.body) + len(entry.keys) * (KEY_BYTES + 2) + ENTRY_OVERHEAD_BYTES


def batches(entries: Iterable[Entry]) -> list[tuple[Entry, ...]]:
    """Entries in as few groups as fit one message each, in order."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        size = entry_bytes(entry)
        if not groups or size > room or len(groups[-1]) == MAX_RECORDS_PER_MESSAGE:
            groups.append([])
            room = MAX_BATCH_BYTES
        groups[-1].append(entry)
        room -= size
    return [tuple(group) for group in groups]


def origin_of(peer: str, addresses: Sequence[str]) -> str:
    """Whose share of a key a peer counts against: its /24 or /48, or itself on a private network.

    addresses: of its live connections; that of its relay, if it came through one.
    """
    for address in addresses:
        parts = address.split("/")
        if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
            continue
        try:
            ip = ipaddress.ip_address(parts[2])
        except ValueError:
            continue
        return network_of(ip) or peer
    return peer
