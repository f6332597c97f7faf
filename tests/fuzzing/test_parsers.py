"""Every parser, given whatever a hostile far side may send: a value comes out, or the error that it documents."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from corolla.daemon.network.dialling import AddressBook, reach_of, split_peer
from corolla.daemon.network.members.roll import Roll, Standing, decode_standing
from corolla.daemon.network.reach.circuits import split_circuit
from corolla.daemon.network.reach.multiaddresses import packed, public_endpoints, unpacked
from corolla.daemon.network.registry.shelf import Shelf, origin_of
from corolla.daemon.network.wire.muxing import Mux, ViolationError
from corolla.protocol.control import FROM_DAEMON, METHODS, TO_DAEMON
from corolla.protocol.errors import Code, CorollaError, error_from_wire
from corolla.protocol.framing import Frame, FrameParser, encode_frame
from corolla.protocol.invitations import (
    TOKEN_PREFIX,
    Charter,
    Proof,
    Revocations,
    Sealed,
    SwarmToken,
    accept,
    check_proof,
    decode_token,
    encode_token,
    invite,
    open_revocations,
)
from corolla.protocol.limits import MAX_CBOR_DEPTH
from corolla.protocol.messages import Vocabulary, encode, from_plain, load_map
from corolla.protocol.records import ManifestRecord, Signed, SpanRecord, peer_id_of, verify
from corolla.protocol.registry import HELLO, REGISTRY, Entry
from corolla.protocol.steps import PUSH, SESSION, Row, check_payload
from corolla.protocol.tensors import Encoding, count_tokens, is_finite
from corolla.protocol.training import TRAINING
from corolla.protocol.work import FROM_WORKER, TO_WORKER

from .hostile import FUZZ, fields_of, form, headers_of, hostile_bytes, junk, may_refuse, mutations

pytestmark = pytest.mark.timeout(120)  # nothing here takes more than moments; a parser that hangs would

VOCABULARIES = {
    "session": SESSION,
    "push": PUSH,
    "training": TRAINING,
    "hello": HELLO,
    "registry": REGISTRY,
    "to daemon": TO_DAEMON,
    "from daemon": FROM_DAEMON,
    "to worker": TO_WORKER,
    "from worker": FROM_WORKER,
}
NOW = 1_800_000_000.0
SWARM = "5" * 32
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key().public_bytes_raw()
PEER = peer_id_of(PUBLIC)
CHARTER = Charter("choir", PUBLIC, b"n" * 16)
INVITATION, GRANT = invite(CHARTER, KEY, now_unix_s=NOW, lifetime_s=3600, uses=2)
INVITE_KEY = Ed25519PrivateKey.from_private_bytes(INVITATION.key)
PROOF = accept(INVITATION, CHARTER, PEER, now_unix_s=NOW)
TOKEN = encode_token(SwarmToken(CHARTER.swarm_id, "choir", ("/ip4/192.0.2.7/tcp/1",), CHARTER, INVITATION))


@st.composite
def cut(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    """Bytes in pieces, as a network cuts them."""
    whole = draw(data)
    at = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    return [whole[a:b] for a, b in zip([0, *at], [*at, len(whole)], strict=True)]


FRAMES = [encode_frame(b"\xa0"), encode_frame(b"\xa1\x60\x63now", b"payload"), encode_frame(b"h" * 90) * 3]


@FUZZ
@given(cut(hostile_bytes(FRAMES)))
def test_framing_gives_frames_or_a_limit(pieces: list[bytes]) -> None:
    parser = FrameParser(max_header_bytes=100, max_payload_bytes=50)
    kept = 0
    with may_refuse(Code.LIMIT_EXCEEDED):
        for piece in pieces:
            kept += len(piece)
            parser.feed(piece)
            for frame in parser.frames():
                assert len(frame.header) <= 100
                assert len(frame.payload) <= 50
                kept -= 8 + len(frame.header) + len(frame.payload)
            assert parser.num_buffered_bytes == kept < 158


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_gives_messages_or_blames_the_sender(name: str) -> None:
    vocabulary = VOCABULARIES[name]

    @FUZZ
    @given(headers_of(*vocabulary.classes), st.binary(max_size=20))
    def check(header: bytes, payload: bytes) -> None:
        decode(vocabulary, Frame(header, payload))

    @FUZZ
    @given(headers_of(*vocabulary.classes).flatmap(lambda header: mutations([header])), st.binary(max_size=2))
    def check_bytes(header: bytes, payload: bytes) -> None:
        decode(vocabulary, Frame(header, payload))

    check()
    check_bytes()


def decode(vocabulary: Vocabulary, frame: Frame) -> None:
    """Decode; what came out must be the message that it says it is, also to the next one who reads it."""
    with may_refuse(Code.PROTOCOL_VIOLATION, Code.UNSUPPORTED):
        message = vocabulary.decode(frame)
        assert isinstance(message, vocabulary.classes)
        reported = getattr(message, "problem", None)
        if callable(reported):
            assert isinstance(reported(), CorollaError)
        parser = FrameParser()
        parser.feed(encode(message))
        (again,) = parser.frames()
        assert repr(vocabulary.decode(again)) == repr(message)  # not `==`: a plain value may hold a NaN


@pytest.mark.parametrize("method", sorted(METHODS))
def test_arguments_of_a_call_are_read_or_refused(method: str) -> None:
    arguments = METHODS[method].arguments

    @FUZZ
    @given(fields_of(arguments) | junk)
    def check(fields: object) -> None:
        with may_refuse(Code.PROTOCOL_VIOLATION):
            assert isinstance(from_plain(arguments, fields), arguments)

    check()


@FUZZ
@given(hostile_bytes([cbor2.dumps({"a": [1, {"b": 2.5}], "c": b"d"})]))
def test_cbor_is_a_map_or_a_violation(data: bytes) -> None:
    with contextlib.suppress(CorollaError):
        assert isinstance(load_map(data), dict)


@pytest.mark.parametrize(
    "data",
    [
        b"\xa1\x60" + b"\x81" * 200_000 + b"\x00",
        b"\xa1\x60" + b"\xa1\x60" * 100_000 + b"\x00",
        b"\xa1\x60" + b"\xc1" * 200_000 + b"\x00",
        b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\xa1\x60\x9b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\xa1\x60\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\xa1\x60\xc2\x5a\x00\x03\xff\xff" + b"\xff" * 0x3FFFF,
        b"\xa1\x60\xc4\x82\x1b\x7f\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\xa1\x60\xd8\x23\x78\x1c((((((((((a*)*)*)*)*)*)*)*)*",
        b"\xa1\x60\xd8\x1c\x81\xd8\x1d\x00",
    ],
    ids=["lists", "maps", "tags", "pairs", "items", "bytes", "bignum", "decimal", "pattern", "cycle"],
)
def test_cbor_made_to_cost_is_refused_cheaply(data: bytes) -> None:
    with pytest.raises(CorollaError) as caught:
        load_map(data)
    assert caught.value.code is Code.PROTOCOL_VIOLATION


def test_nesting_is_borne_as_deep_as_said() -> None:
    nested: Any = 0
    for _ in range(MAX_CBOR_DEPTH - 2):
        nested = [nested]
    assert load_map(cbor2.dumps({"a": nested})) == {"a": nested}


wires = st.fixed_dictionaries(
    {},
    optional={
        "code": st.sampled_from([code.value for code in Code]) | junk,
        "message": junk,
        "remedy": junk,
        "details": st.dictionaries(st.sampled_from(("self", "code", "seq", "missing")) | st.text(), junk),
    },
)


@FUZZ
@given(wires | junk)
def test_an_error_from_afar_is_an_error(wire: object) -> None:
    problem = error_from_wire(wire)
    assert isinstance(problem, CorollaError)
    assert str(error_from_wire(problem.to_wire())) == str(problem)


# what is signed


def signed(body: bytes, swarm_id: str = SWARM) -> Signed:
    return Signed(body, KEY.sign(b"corolla record 1\x00" + swarm_id.encode() + b"\x00" + body), PUBLIC)


def sealed(domain: bytes, key: Ed25519PrivateKey, body: bytes) -> Sealed:
    return Sealed(body, key.sign(domain + b"\x00" + CHARTER.swarm_id.encode() + b"\x00" + body))


def of_record(kind: str, fields: dict[str, Any]) -> bytes:
    """A body that a member may well sign: its own peer id, of now, and the rest as it comes."""
    return cbor2.dumps({"": kind, **fields, "peer": PEER, "issued_at": NOW})


bodies = st.one_of(
    st.builds(of_record, st.just("span"), fields_of(SpanRecord)),
    st.builds(of_record, st.just("manifest"), fields_of(ManifestRecord)),
    st.builds(cbor2.dumps, junk),
    st.binary(max_size=100),
)


@FUZZ
@given(bodies, st.binary(max_size=33), st.binary(max_size=65))
def test_a_record_is_good_or_bad_whoever_signed_it(body: bytes, key: bytes, signature: bytes) -> None:
    for one in (signed(body), signed(body, "another"), Signed(body, signature, key)):
        with may_refuse(Code.BAD_RECORD):
            assert verify(one, SWARM, now_unix_s=NOW).peer == PEER


@FUZZ
@given(st.lists(st.tuples(bodies, fields_of(Entry)), max_size=4))
def test_a_shelf_keeps_a_record_or_says_why_not(entries: list[tuple[bytes, dict[str, Any]]]) -> None:
    shelf = Shelf(SWARM, max_records=2)
    for body, fields in entries:
        with may_refuse(Code.BAD_RECORD, Code.BUSY, Code.PROTOCOL_VIOLATION):
            entry = from_plain(
                Entry, {**fields, "signed": {"body": b"", "signature": b"", "public_key": b""}}
            )
            entry = Entry(signed(body), entry.remaining_s, entry.keys)
            shelf.put(entry, now=5.0, now_unix=NOW, owner=PEER, origin="here")
    assert len(shelf) <= 2
    shelf.expire(1000.0)
    assert len(shelf) == 0


grants = st.builds(
    lambda fields, invite_key: cbor2.dumps({**fields, "invite": invite_key}),
    fields_of(type(GRANT)),
    st.just(GRANT.invite) | junk,
)
acceptances = st.builds(cbor2.dumps, st.fixed_dictionaries({"peer": st.just(PEER), "joined_at": form(float)}))
statements = grants | acceptances | st.builds(cbor2.dumps, junk) | st.binary(max_size=80)


@FUZZ
@given(statements, statements)
def test_a_membership_is_proven_or_refused(grant: bytes, acceptance: bytes) -> None:
    owners = sealed(b"corolla grant 1", KEY, grant)
    accepted = sealed(b"corolla acceptance 1", INVITE_KEY, acceptance)
    roll = Roll(PEER, Standing(CHARTER))
    for proof in (
        Proof(owners, accepted),
        Proof(INVITATION.grant, accepted),
        Proof(owners, PROOF.acceptance),
        Proof(Sealed(grant, b""), PROOF.acceptance),
    ):
        roll.hear_of([proof])
        with may_refuse(Code.NOT_INVITED):
            assert check_proof(proof, CHARTER, PEER, now_unix_s=NOW).acceptance.peer == PEER


@FUZZ
@given(st.builds(cbor2.dumps, fields_of(Revocations) | junk) | statements)
def test_revocations_are_the_owners_or_refused(body: bytes) -> None:
    with contextlib.suppress(CorollaError):
        assert open_revocations(sealed(b"corolla revocations 1", KEY, body), CHARTER).seq >= 0
    with pytest.raises(CorollaError) as caught:
        open_revocations(Sealed(body, bytes(64)), CHARTER)
    assert caught.value.code is Code.NOT_INVITED


@FUZZ
@given(
    mutations([TOKEN.encode()]).map(lambda data: data.decode("utf-8", "replace"))
    | st.builds(
        lambda fields: TOKEN_PREFIX + base64.urlsafe_b64encode(cbor2.dumps(fields)).decode(),
        fields_of(SwarmToken) | junk,
    )
    | st.text()
)
def test_a_token_is_read_or_refused(text: str) -> None:
    with may_refuse(Code.BAD_TOKEN, Code.NOT_INVITED):
        token = decode_token(text)
        if token.charter is not None and token.invitation is not None:
            accept(token.invitation, token.charter, PEER, now_unix_s=NOW)


@FUZZ
@given(st.builds(lambda fields: cbor2.dumps({"version": 1, **fields}), fields_of(Standing)) | hostile_bytes())
def test_what_was_kept_of_a_membership_is_read_or_called_damaged(data: bytes) -> None:
    with may_refuse(Code.UNREADABLE):
        assert isinstance(decode_standing(data), Standing)


# what is not CBOR


@FUZZ
@given(st.binary(max_size=400), st.sampled_from(Encoding), st.integers(1, 200))
def test_tensors_are_counted_or_of_bad_shape(payload: bytes, encoding: Encoding, hidden_size: int) -> None:
    with may_refuse(Code.BAD_SHAPE):
        num_tokens = count_tokens(payload, encoding, hidden_size)
        assert num_tokens * encoding.token_bytes(hidden_size) == len(payload)
        assert is_finite(payload, encoding, hidden_size) in (True, False)
        check_payload((Row(-1, 0, num_tokens),), payload, encoding.token_bytes(hidden_size))


addresses = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ("", "ip4", "ip6", "127.0.0.1", "999.1.1.1", "fe80::1%eth0", "::", "tcp", "0", "-1", "99999999", "p2p",
         "p2p-circuit", PEER, "x" * 300, "\x00", "dns4", "..")
    )
    | st.text(max_size=5),
    max_size=9,
).map(lambda parts: "/" + "/".join(parts))  # fmt: skip


@FUZZ
@given(addresses)
def test_an_address_is_taken_apart_or_refused(address: str) -> None:
    reach_of(address)
    assert public_endpoints((address,)) in ((), (address,))
    assert origin_of(PEER, (address,))
    for read in (split_peer, split_circuit):
        with may_refuse(Code.BAD_REQUEST):
            read(address)
    book = AddressBook(max_addresses=2)
    with contextlib.suppress(CorollaError):
        book.learn(PEER, (address, address + "/p2p/" + PEER))
    assert len(book.known(PEER)) <= 2


@FUZZ
@given(
    st.binary(max_size=400)
    | mutations(packed(["/ip4/11.0.0.9/tcp/1", f"/dns4/a/tcp/1/p2p/{PEER}/p2p-circuit"]))
)
def test_an_address_in_bytes_is_read_or_passed_over(data: bytes) -> None:
    address = unpacked(data)
    for public in public_endpoints((address,)):
        assert unpacked(*packed([public])) == public


def muxed_traffic() -> list[bytes]:
    """What two muxers said to each other in a short talk."""
    one, two = Mux(initiator=True), Mux(initiator=False)
    stream = one.open()
    one.send(stream, memoryview(b"question" * 50))
    one.ping(7)
    said = [b"".join(one.next_messages(1))]
    two.receive(said[0])
    for theirs in two.streams:
        two.accept(theirs)
        two.send(theirs, memoryview(b"answer"))
        two.finish(theirs)
    said.append(b"".join(two.next_messages(1)))
    one.receive(said[1])
    one.reset(stream)
    return [*said, b"".join(one.next_messages(1))]


@FUZZ
@given(st.lists(hostile_bytes(muxed_traffic()), max_size=8), st.booleans())
def test_the_muxer_goes_on_or_names_the_violation(pieces: list[bytes], initiator: bool) -> None:
    mux = Mux(initiator=initiator)
    if initiator:
        mux.open()
    with contextlib.suppress(ViolationError):
        for piece in pieces:
            mux.receive(piece)
            for stream in mux.streams:
                mux.accept(stream)
                mux.read(stream, None, 0.0)
            b"".join(mux.next_messages(1))
    assert mux.num_streams <= len(b"".join(pieces)) // 12 + 1
