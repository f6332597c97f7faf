"""Signed records: what they prove, what is refused, and that their bytes stay what they were."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import (
    MAX_CLOCK_SKEW_S,
    MAX_MANIFEST_BYTES,
    MAX_RECORD_BYTES,
    MAX_RECORD_LIFETIME_S,
)
from corolla.protocol.messages import to_plain
from corolla.protocol.records import (
    ManifestRecord,
    Record,
    Signed,
    SpanRecord,
    SpanState,
    blocks_key,
    buckets,
    keys_of,
    models_key,
    peer_id_of,
    sign,
    subkey_of,
    swarm_id_of,
    verify,
)
from corolla.protocol.tensors import DType, Encoding
from corolla.protocol.work import ModelFacts

SWARM = "0123456789abcdef0123456789abcdef"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEER = peer_id_of(KEY.public_key().public_bytes_raw())
NOW = 1_800_000_000.0
SPAN = SpanRecord(
    peer=PEER,
    worker=1,
    seq=7,
    issued_at=NOW,
    lifetime_s=60.0,
    fingerprint="f" * 64,
    start=4,
    end=20,
    state=SpanState.ONLINE,
    dtype=DType.FLOAT32,
    addresses=(f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}",),
    encodings=(Encoding.FLOAT32, Encoding.BFLOAT16),
    tokens_per_s=12.5,
    cache_tokens=4096,
)
FACTS = ModelFacts(
    name="SmolLM2-135M-Instruct",
    fingerprint="f" * 64,
    architecture="LlamaForCausalLM",
    num_blocks=30,
    hidden_size=576,
    vocab_size=49152,
    max_position=8192,
    files={"model.safetensors": "a" * 64},
    licence="apache-2.0",
)
MANIFEST = ManifestRecord(PEER, 8, NOW, 60.0, FACTS)

# Peers of every release must agree on these bytes: change them only with a new domain and major version.
GOLDEN_SPAN_BODY = (
    "af60647370616e64706565727834313244334b6f6f574134586f70314a6154334d487877594d6b436570597376346950"
    "566f704d5877437a3569485964426665534266776f726b6572016373657107696973737565645f6174fb41dad2748000"
    "00006a6c69666574696d655f73fb404e0000000000006b66696e6765727072696e747840666666666666666666666666"
    "666666666666666666666666666666666666666666666666666666666666666666666666666666666666666666666666"
    "666666666573746172740463656e6414657374617465666f6e6c696e6565647479706567666c6f617433326961646472"
    "65737365738178502f6970342f3132372e302e302e312f7463702f343030312f7032702f313244334b6f6f574134586f"
    "70314a6154334d487877594d6b436570597376346950566f704d5877437a3569485964426665534269656e636f64696e"
    "67738267666c6f617433326862666c6f617431366c746f6b656e735f7065725f73fb40290000000000006c6361636865"
    "5f746f6b656e73191000"
)
GOLDEN_SPAN_SIGNATURE = (
    "bea2e881a5de085a9dae4bcad490c49baac6aaaac2b50e219d19fa4b8df263dd9d1ca9ae2c18f4552cb488186f7b2826"
    "fd008dc231638d28887b2ebd3f4cc304"
)
GOLDEN_MANIFEST_BODY = (
    "a660686d616e696665737464706565727834313244334b6f6f574134586f70314a6154334d487877594d6b4365705973"
    "76346950566f704d5877437a356948596442666553426373657108696973737565645f6174fb41dad274800000006a6c"
    "69666574696d655f73fb404e000000000000656661637473a9646e616d6575536d6f6c4c4d322d3133354d2d496e7374"
    "727563746b66696e6765727072696e747840666666666666666666666666666666666666666666666666666666666666"
    "666666666666666666666666666666666666666666666666666666666666666666666c61726368697465637475726570"
    "4c6c616d61466f7243617573616c4c4d6a6e756d5f626c6f636b73181e6b68696464656e5f73697a651902406a766f63"
    "61625f73697a6519c0006c6d61785f706f736974696f6e1920006566696c6573a1716d6f64656c2e7361666574656e73"
    "6f7273784061616161616161616161616161616161616161616161616161616161616161616161616161616161616161"
    "616161616161616161616161616161616161616161676c6963656e63656a6170616368652d322e30"
)
GOLDEN_MANIFEST_SIGNATURE = (
    "29a11be4fbf72d1ea98357b53e450f3e58811264ea351a65d4e3b612a2c34a76123f9bb66c6326b3eaa9cdc099a26b02"
    "dd687f9a7bbc59861dca5740475ed104"
)


@pytest.mark.parametrize(
    ("record", "body", "signature"),
    [
        (SPAN, GOLDEN_SPAN_BODY, GOLDEN_SPAN_SIGNATURE),
        (MANIFEST, GOLDEN_MANIFEST_BODY, GOLDEN_MANIFEST_SIGNATURE),
    ],
)
def test_signed_bytes_are_those_of_the_first_release(record: Record, body: str, signature: str) -> None:
    signed = sign(record, SWARM, KEY)
    assert signed.body.hex() == body
    assert signed.signature.hex() == signature
    old = Signed(bytes.fromhex(body), bytes.fromhex(signature), KEY.public_key().public_bytes_raw())
    assert verify(old, SWARM, now_unix_s=NOW) == record


def test_peer_ids_are_those_of_libp2p() -> None:
    key = KEY.public_key().public_bytes_raw()
    assert peer_id_of(key) == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"


def test_a_record_is_verified_against_its_bytes_and_not_reencoded() -> None:
    """An unknown key of a later release must survive: the signature covers the bytes sent."""
    import cbor2

    body = cbor2.dumps({"": "span", **to_plain(SPAN), "colour": "green"})
    signed = Signed(
        body,
        KEY.sign(b"corolla record 1\x00" + SWARM.encode() + b"\x00" + body),
        KEY.public_key().public_bytes_raw(),
    )
    assert verify(signed, SWARM, now_unix_s=NOW) == SPAN


def refusal(signed: Signed, *, swarm: str = SWARM, now: float = NOW) -> str:
    with pytest.raises(CorollaError) as caught:
        verify(signed, swarm, now_unix_s=now)
    assert caught.value.code is Code.BAD_RECORD
    return caught.value.message


def test_a_changed_byte_is_refused() -> None:
    signed = sign(SPAN, SWARM, KEY)
    forged = dataclasses.replace(signed, body=signed.body.replace(b"\x14", b"\x15", 1))
    assert forged.body != signed.body
    assert "signature" in refusal(forged)


def test_a_record_of_another_swarm_is_refused() -> None:
    assert "swarm" in refusal(sign(SPAN, SWARM, KEY), swarm="another")


def test_a_record_about_somebody_else_is_refused() -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32))
    assert PEER in refusal(sign(SPAN, SWARM, stranger))


@pytest.mark.parametrize("skew_s", [-MAX_CLOCK_SKEW_S - 1, MAX_CLOCK_SKEW_S + 1])
def test_a_record_from_a_wrong_clock_is_refused(skew_s: float) -> None:
    signed = sign(SPAN, SWARM, KEY)
    assert "our time" in refusal(signed, now=NOW - skew_s)


@pytest.mark.parametrize("skew_s", [-MAX_CLOCK_SKEW_S + 1, MAX_CLOCK_SKEW_S - 1])
def test_a_clock_a_little_wrong_is_borne(skew_s: float) -> None:
    assert verify(sign(SPAN, SWARM, KEY), SWARM, now_unix_s=NOW - skew_s) == SPAN


def signed_by_hand(**changes: object) -> Signed:
    import cbor2

    body = cbor2.dumps({"": "span", **to_plain(SPAN), **changes})
    signature = KEY.sign(b"corolla record 1\x00" + SWARM.encode() + b"\x00" + body)
    return Signed(body, signature, KEY.public_key().public_bytes_raw())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"lifetime_s": MAX_RECORD_LIFETIME_S + 1}, "lifetime_s"),
        ({"lifetime_s": 0.0}, "lifetime_s"),
        ({"end": 4}, "end"),
        ({"end": 5000}, "end"),
        ({"worker": 256}, "worker"),
        ({"state": "asleep"}, "asleep"),
        ({"tokens_per_s": -1.0}, "tokens_per_s"),
        ({"tokens_per_s": float("nan")}, "tokens_per_s"),
        ({"addresses": ["not one"]}, "multiaddress"),
        ({"addresses": ["/x"] * 17}, "addresses"),
        ({"seq": -1}, "seq"),
        ({"": "gospel"}, "unknown kind"),
        ({"quantization": "x" * (MAX_RECORD_BYTES + 1)}, "quantization"),
    ],
)
def test_bad_fields_are_refused_though_signed(changes: dict[str, object], what: str) -> None:
    assert what in refusal(signed_by_hand(**changes))


def test_an_oversized_record_is_refused_before_its_signature_is_looked_at() -> None:
    too_long = Signed(bytes(MAX_MANIFEST_BYTES + 1), bytes(64), bytes(32))
    assert str(MAX_MANIFEST_BYTES) in refusal(too_long)


def test_a_span_may_not_be_as_long_as_a_manifest() -> None:
    assert str(MAX_RECORD_BYTES) in refusal(signed_by_hand(padding="x" * MAX_RECORD_BYTES))


def test_a_manifest_of_many_files_fits_and_one_of_too_many_is_refused_by_the_signer() -> None:
    def files(n: int) -> dict[str, str]:
        return {f"model-{i:05}-of-{n:05}.safetensors": "a" * 64 for i in range(n)}

    large = dataclasses.replace(MANIFEST, facts=dataclasses.replace(FACTS, files=files(300)))
    assert verify(sign(large, SWARM, KEY), SWARM, now_unix_s=NOW) == large
    huge = dataclasses.replace(MANIFEST, facts=dataclasses.replace(FACTS, files=files(1000)))
    with pytest.raises(CorollaError) as caught:
        sign(huge, SWARM, KEY)
    assert caught.value.code is Code.LIMIT_EXCEEDED


def test_a_bad_key_is_refused() -> None:
    signed = sign(SPAN, SWARM, KEY)
    assert "signature" in refusal(dataclasses.replace(signed, public_key=bytes(31)))


def test_a_span_is_found_under_the_keys_of_every_bucket_that_it_touches() -> None:
    assert list(buckets(4, 20)) == [0, 1, 2]
    assert list(buckets(8, 16)) == [1]
    assert keys_of(SPAN, SWARM) == tuple(blocks_key(SWARM, "f" * 64, bucket) for bucket in (0, 1, 2))
    assert keys_of(MANIFEST, SWARM) == (models_key(SWARM),)
    assert blocks_key(SWARM, "f", 1) != blocks_key("another", "f", 1)


def test_subkeys_tell_workers_and_models_apart_but_not_versions() -> None:
    assert subkey_of(SPAN) == subkey_of(dataclasses.replace(SPAN, seq=8, start=0))
    assert subkey_of(SPAN) != subkey_of(dataclasses.replace(SPAN, worker=2))
    assert subkey_of(MANIFEST) != subkey_of(SPAN)


def test_a_swarm_id_depends_on_name_founder_and_nonce() -> None:
    public = KEY.public_key().public_bytes_raw()
    ids = {
        swarm_id_of("a", public, b"n"),
        swarm_id_of("b", public, b"n"),
        swarm_id_of("a", bytes(32), b"n"),
        swarm_id_of("a", public, b"m"),
        swarm_id_of("a" + chr(public[0]), public[1:], b"n"),  # no cut between the parts may be moved
    }
    assert len(ids) == 5
    assert all(len(swarm_id) == 32 for swarm_id in ids)
