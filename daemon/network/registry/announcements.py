"""What this daemon says of itself in the registry: spans and models offered, withdrawn, signed.

It owns our offers and the sequence numbers of our records. It does not know who is told. Pure but for
`save_seq`, which keeps the sequence number on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ....protocol.limits import MAX_ADDRESSES, RECORD_LIFETIME_S
from ....protocol.records import ManifestRecord, Record, SpanRecord, SpanState, keys_of, peer_id_of, sign
from ....protocol.registry import Entry
from ....protocol.tensors import DType, Encoding
from ....protocol.work import ModelFacts
from ..members.greeting import PROTOCOL_MAJORS

MAX_SEQ_LEAD_MS: Final = 86_400_000  # another's word on our own `seq` is believed up to a day ahead


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker of ours has to offer; who, where and when is added. Fields as in `SpanRecord`."""

    worker: int
    fingerprint: str
    start: int
    end: int
    state: SpanState
    dtype: DType
    quantization: str | None = None
    encodings: tuple[Encoding, ...] = (Encoding.FLOAT32,)
    tokens_per_s: float = 0.0
    cache_tokens: int = 0
    movable: bool = False
    queue: int = 0


class Announcements:
    """Our offers, and the records that say them.

    stored_seq: the highest sequence number used by earlier runs; save_seq keeps it for later ones and is
    called before a number is used. unix: the wall clock, in seconds. Source: DESIGN, section 4, records.
    """

    def __init__(
        self,
        swarm_id: str,
        key: Ed25519PrivateKey,
        *,
        stored_seq: int,
        save_seq: Callable[[int], None],
        unix: Callable[[], float],
    ) -> None:
        self._swarm_id = swarm_id
        self._key = key
        self._peer = peer_id_of(key.public_key().public_bytes_raw())
        self._last_seq = stored_seq
        self._save_seq = save_seq
        self._unix = unix
        self._offers: dict[int, Offer] = {}
        self._facts: dict[str, ModelFacts] = {}
        self._withdrawn: list[Offer | ModelFacts] = []  # to be said once

    @property
    def last_seq(self) -> int:
        """The highest sequence number that we have signed."""
        return self._last_seq

    def offer(self, offer: Offer) -> bool:
        """Take up an offer; True if it should be pushed at once: more changed than its speed."""
        old = self._offers.get(offer.worker)
        self._check(offer)
        self._offers[offer.worker] = offer
        if old is None:
            return True
        if (old.fingerprint, old.start, old.end) != (offer.fingerprint, offer.start, offer.end):
            self._withdrawn.append(old)  # it stood under other keys
        return _without_speed(old) != _without_speed(offer)

    def withdraw(self, worker: int) -> bool:
        """Take an offer back; False if there was none."""
        offer = self._offers.pop(worker, None)
        if offer is not None:
            self._withdrawn.append(offer)
        return offer is not None

    def offer_model(self, facts: ModelFacts) -> bool:
        """Take up a manifest; True if it is new. Raises `LIMIT_EXCEEDED` if it names too many files."""
        if self._facts.get(facts.fingerprint) == facts:
            return False
        self._check(facts)
        self._facts[facts.fingerprint] = facts
        return True

    def withdraw_model(self, fingerprint: str) -> bool:
        """Take a manifest back; False if there was none."""
        facts = self._facts.pop(fingerprint, None)
        if facts is not None:
            self._withdrawn.append(facts)
        return facts is not None

    def sign_all(self, addresses: tuple[str, ...]) -> list[Entry]:
        """Every announcement as a fresh record, with all keys it belongs under; withdrawals first."""
        gone, self._withdrawn = self._withdrawn, []
        entries = [self._sign(item, addresses, is_gone=True) for item in gone]
        entries += [self._sign(offer, addresses) for offer in self._offers.values()]
        entries += [self._sign(facts, addresses) for facts in self._facts.values()]
        return entries

    def outbid(self, seq: int) -> bool:
        """Go on above a sequence number that a holder has seen of ours: our clock and our state went back.

        False, and nothing changes, if the number is one we are above already, or is absurd.
        """
        if not self._last_seq <= seq <= int(self._unix() * 1000) + MAX_SEQ_LEAD_MS:
            return False
        self._last_seq = seq
        return True

    def _sign(self, item: Offer | ModelFacts, addresses: tuple[str, ...], *, is_gone: bool = False) -> Entry:
        seq = max(self._last_seq + 1, int(self._unix() * 1000))
        self._save_seq(seq)
        self._last_seq = seq
        record = self._record(item, addresses, seq, is_gone)
        signed = sign(record, self._swarm_id, self._key)
        return Entry(signed, RECORD_LIFETIME_S, keys_of(record, self._swarm_id))

    def _check(self, item: Offer | ModelFacts) -> None:
        """Raise what signing would: better refused where it is offered than never heard of."""
        sign(self._record(item, (), 0, False), self._swarm_id, self._key)

    def _record(
        self, item: Offer | ModelFacts, addresses: tuple[str, ...], seq: int, is_gone: bool
    ) -> Record:
        issued_at = self._unix()
        if isinstance(item, ModelFacts):
            return ManifestRecord(self._peer, seq, issued_at, RECORD_LIFETIME_S, item, is_gone)
        return SpanRecord(
            peer=self._peer,
            seq=seq,
            issued_at=issued_at,
            lifetime_s=RECORD_LIFETIME_S,
            worker=item.worker,
            fingerprint=item.fingerprint,
            start=item.start,
            end=item.end,
            state=SpanState.GONE if is_gone else item.state,
            dtype=item.dtype,
            addresses=addresses[:MAX_ADDRESSES],
            quantization=item.quantization,
            encodings=item.encodings,
            tokens_per_s=item.tokens_per_s,
            cache_tokens=item.cache_tokens,
            protocol_majors=PROTOCOL_MAJORS,
            movable=item.movable,
            queue=item.queue,
        )


def _without_speed(offer: Offer) -> Offer:
    return dataclasses.replace(offer, tokens_per_s=0.0, cache_tokens=0, queue=0)
