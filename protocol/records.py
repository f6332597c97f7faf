"""What peers sign: records of spans, manifests of models; and their registry keys.

The signature covers a domain prefix, the swarm id and the exact bytes sent. Receivers verify and keep those
bytes and never re-encode them (DESIGN: records). Only this module of the protocol and `invitations.py` import
`cryptography`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from .errors import Code, CorollaError, error
from .limits import (
    MAX_ADDRESSES,
    MAX_BLOCKS,
    MAX_CLOCK_SKEW_S,
    MAX_MANIFEST_BYTES,
    MAX_NAME_CHARS,
    MAX_RECORD_BYTES,
    MAX_RECORD_LIFETIME_S,
)
from .messages import check_length, check_range, from_plain, load_map, to_plain
from .tensors import DType, Encoding
from .work import ModelFacts

_DOMAIN: Final = b"corolla record 1\x00"
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
MAX_NAMES: Final = 16  # of encodings or versions in one record
BLOCKS_PER_KEY: Final = 8  # a bucket of the registry: few look-ups for a route, few records in a bucket


class SpanState(StrEnum):
    """What a worker does with its span."""

    LOADING = "loading"
    ONLINE = "online"
    DRAINING = "draining"
    GONE = "gone"  # a signed withdrawal


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """A worker's announcement of its span. issued_at: unix seconds of the signer's clock."""

    peer: str
    worker: int
    seq: int
    issued_at: float
    lifetime_s: float
    fingerprint: str
    start: int
    end: int
    state: SpanState
    dtype: DType
    addresses: tuple[str, ...] = ()
    quantization: str | None = None
    encodings: tuple[Encoding, ...] = (Encoding.FLOAT32,)
    tokens_per_s: float = 0.0
    cache_tokens: int = 0
    protocol_majors: tuple[int, ...] = (1,)
    movable: bool = False  # may placement ask it to serve other blocks?
    queue: int = 0  # requests that waited there lately, on average

    def __post_init__(self) -> None:
        _check_common(self.peer, self.seq, self.lifetime_s)
        check_range("worker", self.worker, 0, 255)
        check_range("start", self.start, 0, MAX_BLOCKS - 1)
        check_range("end", self.end, self.start + 1, MAX_BLOCKS)
        check_length("fingerprint", self.fingerprint, MAX_NAME_CHARS)
        check_length("quantization", self.quantization or "", MAX_NAME_CHARS)
        check_length("encodings", self.encodings, MAX_NAMES)
        check_length("protocol_majors", self.protocol_majors, MAX_NAMES)
        check_range("cache_tokens", self.cache_tokens, 0, 1 << 62)
        check_range("queue", self.queue, 0, 1 << 31)
        if self.tokens_per_s < 0:
            raise ValueError(f"tokens_per_s {self.tokens_per_s}, expected 0 or more")
        check_addresses(self.addresses)


@dataclass(frozen=True, slots=True)
class ManifestRecord:
    """A peer's announcement of a model that it serves a part of. gone: a signed withdrawal."""

    peer: str
    seq: int
    issued_at: float
    lifetime_s: float
    facts: ModelFacts
    gone: bool = False

    def __post_init__(self) -> None:
        _check_common(self.peer, self.seq, self.lifetime_s)
        check_length("name", self.facts.name, MAX_NAME_CHARS)
        check_length("fingerprint", self.facts.fingerprint, MAX_NAME_CHARS)
        check_range("num_blocks", self.facts.num_blocks, 1, MAX_BLOCKS)


def check_addresses(addresses: tuple[str, ...]) -> None:
    """Raise ValueError unless these may be one peer's multiaddresses."""
    check_length("addresses", addresses, MAX_ADDRESSES)
    for address in addresses:
        check_length("address", address, MAX_NAME_CHARS)
        if not address.startswith("/"):
            raise ValueError(f"address {address!r} is no multiaddress")


def _check_common(peer: str, seq: int, lifetime_s: float) -> None:
    check_length("peer", peer, MAX_NAME_CHARS)
    check_range("seq", seq, 0, 1 << 62)
    if not 0 < lifetime_s <= MAX_RECORD_LIFETIME_S:
        raise ValueError(f"lifetime_s {lifetime_s}, expected at most {MAX_RECORD_LIFETIME_S}")


Record = SpanRecord | ManifestRecord
_KINDS: Final[dict[str, type[SpanRecord] | type[ManifestRecord]]] = {
    "span": SpanRecord,
    "manifest": ManifestRecord,
}


@dataclass(frozen=True, slots=True)
class Signed:
    """A record as it travels: its bytes, its signature, and the signer's raw public key (32 bytes)."""

    body: bytes
    signature: bytes
    public_key: bytes


def sign(record: Record, swarm_id: str, key: Ed25519PrivateKey) -> Signed:
    """The record, signed for one swarm. Raises `LIMIT_EXCEEDED` if it is too long to be announced."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    body = cbor2.dumps({"": kind, **to_plain(record)})
    if len(body) > _max_bytes(record):
        raise error(
            Code.LIMIT_EXCEEDED,
            f"a {kind} record of {len(body)} bytes, limit {_max_bytes(record)}",
            "store the weights in fewer files" if kind == "manifest" else "announce fewer addresses",
        )
    return Signed(body, key.sign(_signed_bytes(swarm_id, body)), key.public_key().public_bytes_raw())


def verify(signed: Signed, swarm_id: str, *, now_unix_s: float) -> Record:
    """The record inside, once it has proved to be its peer's own, for this swarm and of this time.

    Raises `BAD_RECORD` naming what is wrong. `issued_at` may differ from our clock by `MAX_CLOCK_SKEW_S`.
    """
    if len(signed.body) > MAX_MANIFEST_BYTES:
        raise error(Code.BAD_RECORD, f"a record of {len(signed.body)} bytes, limit {MAX_MANIFEST_BYTES}")
    try:
        Ed25519PublicKey.from_public_bytes(signed.public_key).verify(
            signed.signature, _signed_bytes(swarm_id, signed.body)
        )
    except (InvalidSignature, ValueError) as problem:
        raise error(Code.BAD_RECORD, "a record whose signature does not hold for this swarm") from problem
    try:
        fields = load_map(signed.body)
        cls: Any = _KINDS.get(str(fields.pop("", "")))
        if cls is None:
            raise error(Code.BAD_RECORD, "a record of unknown kind")
        record: Record = from_plain(cls, fields)
    except CorollaError as problem:
        raise error(Code.BAD_RECORD, f"a malformed record: {problem.message}") from problem
    if len(signed.body) > _max_bytes(record):
        raise error(Code.BAD_RECORD, f"a record of {len(signed.body)} bytes, limit {_max_bytes(record)}")
    if record.peer != peer_id_of(signed.public_key):
        raise error(Code.BAD_RECORD, f"a record of {record.peer} signed by {peer_id_of(signed.public_key)}")
    skew_s = record.issued_at - now_unix_s
    if abs(skew_s) > MAX_CLOCK_SKEW_S:
        raise error(
            Code.BAD_RECORD,
            f"a record of {record.peer} issued {skew_s:+.0f} s from our time, limit {MAX_CLOCK_SKEW_S:.0f}",
            "set both clocks",
            skew_s=skew_s,
        )
    return record


def _max_bytes(record: Record) -> int:
    return MAX_MANIFEST_BYTES if isinstance(record, ManifestRecord) else MAX_RECORD_BYTES


def _signed_bytes(swarm_id: str, body: bytes) -> bytes:
    return _DOMAIN + swarm_id.encode() + b"\x00" + body


def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id (base58) of a raw Ed25519 public key.

    Source: libp2p specification, peer-ids: the identity multihash of the key's protobuf.
    """
    if len(public_key) != 32:
        raise error(Code.BAD_RECORD, f"a public key of {len(public_key)} bytes, expected 32")
    return _base58(b"\x00\x24\x08\x01\x12\x20" + public_key)


def _base58(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    return _BASE58[0] * (len(data) - len(data.lstrip(b"\x00"))) + digits


def blocks_key(swarm_id: str, fingerprint: str, bucket: int) -> bytes:
    """The registry key under which spans that touch blocks of `bucket` are announced."""
    return hashlib.sha256(f"{swarm_id}/{fingerprint}/{bucket}".encode()).digest()


def models_key(swarm_id: str) -> bytes:
    """The registry key under which the swarm's models are announced."""
    return hashlib.sha256(f"{swarm_id}/models".encode()).digest()


def buckets(start: int, end: int) -> range:
    """The buckets that blocks [start, end) touch."""
    return range(start // BLOCKS_PER_KEY, (end - 1) // BLOCKS_PER_KEY + 1)


def keys_of(record: Record, swarm_id: str) -> tuple[bytes, ...]:
    """Every registry key under which a record may be announced."""
    if isinstance(record, ManifestRecord):
        return (models_key(swarm_id),)
    return tuple(
        blocks_key(swarm_id, record.fingerprint, bucket) for bucket in buckets(record.start, record.end)
    )


def subkey_of(record: Record) -> str:
    """What names a record among those of one key; its newer versions have the same."""
    if isinstance(record, ManifestRecord):
        return f"{record.peer}/{record.facts.fingerprint}"
    return f"{record.peer}/{record.worker}"


def swarm_id_of(name: str, founder_key: bytes, nonce: bytes) -> str:
    """The id of the swarm that the owner of a raw public key founded under a name: 32 hex digits."""
    parts = (name.encode(), founder_key, nonce)
    whole = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.sha256(b"corolla swarm 1\x00" + whole).hexdigest()[:32]
