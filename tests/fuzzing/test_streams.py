"""Parsers that read from a stream: whatever arrives, cut anywhere, they end with a value or the documented error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import trio
import varint
from hypothesis import given
from hypothesis import strategies as st
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from corolla.daemon.identity import identity_from_seed
from corolla.daemon.network.conversation import Conversation
from corolla.daemon.network.dialling import Reach, reach_of
from corolla.daemon.network.libp2p.host import key_pair
from corolla.daemon.network.reach import autonat, dcutr
from corolla.daemon.network.reach.circuits import peer_of
from corolla.daemon.network.reach.identifying import Told, read_identify
from corolla.daemon.network.reach.observations import endpoint_of
from corolla.daemon.network.reach.preamble import Preamble
from corolla.daemon.network.room import Room
from corolla.daemon.network.wire.multistream import agree, answer
from corolla.daemon.network.wire.noise import FastNoise, NoiseOnly
from corolla.protocol.errors import Code
from corolla.protocol.limits import MAX_ADDRESSES_OFFERED, MAX_CIRCUIT_MESSAGE_BYTES, MIB
from corolla.protocol.messages import encode
from corolla.protocol.registry import KEY_BYTES, REGISTRY, Find

from .hostile import FUZZ, hostile_bytes, may_refuse, mutations

pytestmark = pytest.mark.timeout(120)

T = TypeVar("T")
PEER = identity_from_seed(b"p" * 32).peer
OURS = key_pair(identity_from_seed(b"o" * 32))


class Scripted:
    """A stream from which pieces come, and then the end; also where a connection is wanted."""

    peer = PEER
    protocol = "/test/1"
    is_initiator = False

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.room = Room()
        self.asked = 0

    async def send(self, data: bytes) -> None: ...
    async def write(self, data: bytes) -> None: ...
    async def close(self) -> None: ...
    def reset(self) -> None: ...

    async def receive(self, limit: int = MIB) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def read(self, n: int | None = None) -> bytes:
        self.asked = max(self.asked, n or 0)
        data = await self.receive()
        if n is not None and len(data) > n:
            self._pieces.insert(0, data[n:])
            data = data[:n]
        return data


def now(awaitable: Awaitable[T]) -> T:
    """Run what has nothing to wait for."""

    async def run() -> T:
        return await awaitable

    return trio.run(run)


@st.composite
def pieces(draw: st.DrawFn, *samples: bytes) -> list[bytes]:
    whole = b"".join(draw(st.lists(hostile_bytes(samples) | st.sampled_from(samples), max_size=4)))
    at = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    return [whole[a:b] for a, b in zip([0, *at], [*at, len(whole)], strict=True)]


@FUZZ
@given(pieces(encode(Find((bytes(KEY_BYTES),))), encode(Find((), "after"))))
def test_a_conversation_hears_messages_or_says_what_is_wrong(data: list[bytes]) -> None:
    talk = Conversation(Scripted(data), REGISTRY, max_header_bytes=200, max_payload_bytes=0)

    async def listen() -> None:
        while await talk.hear() is not None:
            pass

    with may_refuse(Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED, Code.UNSUPPORTED):
        now(listen())


def token(text: str) -> bytes:
    data = text.encode() + b"\n"
    return bytes(varint.encode(len(data))) + data


TOKENS = (token("/multistream/1.0.0"), token("/noise"), token("na"), token("ls"), token("/x" * 500))


@FUZZ
@given(pieces(*TOKENS), st.sampled_from((agree, answer)))
def test_a_negotiation_ends_with_a_protocol_or_says_why_not(
    data: list[bytes], side: Callable[..., Awaitable[object]]
) -> None:
    wire = Scripted(data)
    arguments = (PEER, "/noise") if side is agree else (lambda protocol: protocol == "/noise",)
    with may_refuse(Code.PROTOCOL_VIOLATION, Code.UNSUPPORTED, Code.PEER_LOST):
        now(side(wire, *arguments))
    assert wire.asked <= 1024  # nobody makes us wait for more, or keep it


def prefixed(body: bytes) -> bytes:
    return bytes(varint.encode(len(body))) + body


HOP = HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=ID.from_string(PEER).to_bytes())).SerializeToString()


@FUZZ
@given(pieces(prefixed(HOP), b"\xff\xff\x7f", varint.encode(5000)))
def test_a_circuit_message_is_read_or_refused(data: list[bytes]) -> None:
    stream = Scripted(data)

    async def listen() -> None:
        talk = Preamble(stream)
        for kind in (HopMessage, StopMessage):
            message: Any = await talk.hear(kind)
            assert message.ByteSize() <= MAX_CIRCUIT_MESSAGE_BYTES
            assert isinstance(peer_of(message.peer), str)

    with may_refuse(Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED, Code.PEER_LOST):
        now(listen())


IDENTIFY = Identify(
    public_key=OURS.public_key.serialize(),
    observed_addr=Multiaddr("/ip4/192.0.2.7/tcp/4517").to_bytes(),
    listen_addrs=[Multiaddr(f"/ip4/192.0.2.7/tcp/4517/p2p/{PEER}/p2p-circuit").to_bytes()],
    protocols=["/x"],
).SerializeToString()


@FUZZ
@given(hostile_bytes((IDENTIFY, varint.encode(len(IDENTIFY)) + IDENTIFY)))
def test_an_identify_is_read_or_refused(data: bytes) -> None:
    with may_refuse(Code.PROTOCOL_VIOLATION):
        told = read_identify(data)
        assert isinstance(told, Told)
        assert "" not in told.listens


@FUZZ
@given(st.binary(max_size=60) | mutations((Multiaddr("/ip4/1.2.3.4/tcp/5/p2p-circuit").to_bytes(),)))
def test_addresses_in_an_identify_are_read_or_passed_over(told: bytes) -> None:
    identify = Identify(public_key=b"k", observed_addr=told, listen_addrs=[told, told])
    found = read_identify(identify.SerializeToString())
    assert found.listens == ((found.observed,) * 2 if found.observed else ())


ADDRESSES = ("/ip4/11.0.0.9/tcp/4517", "/ip6/2606:4700::9/tcp/1")
AUTONAT = [
    prefixed(message.SerializeToString())
    for message in (
        autonat.request(ADDRESSES, 1 << 63),
        autonat.response(autonat.DialResponse(autonat.Status.OK, 1, autonat.DialStatus.DIAL_ERROR)),
        autonat.ENVELOPE(dialDataRequest={"addrIdx": 1, "numBytes": 100_000}),
        autonat.ENVELOPE(dialDataResponse={"data": bytes(500)}),
    )
]
NONCES = [prefixed(autonat.dial_back(7).SerializeToString()), prefixed(b"\x08\x07"), prefixed(b"")]
PUNCHES = [prefixed(message.SerializeToString()) for message in (dcutr.connect(ADDRESSES), dcutr.sync())]


@FUZZ
@given(pieces(*AUTONAT))
def test_what_is_said_of_dialling_back_is_read_or_refused(data: list[bytes]) -> None:
    async def listen() -> None:
        talk = Preamble(Scripted(data))
        while True:
            message = await talk.hear(autonat.ENVELOPE)
            assert message.ByteSize() <= MAX_CIRCUIT_MESSAGE_BYTES
            with may_refuse(Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED):
                assert len(autonat.as_request(message).addresses) <= MAX_ADDRESSES_OFFERED
            with may_refuse(Code.PROTOCOL_VIOLATION):
                assert isinstance(autonat.as_response(message), autonat.DialResponse)

    with may_refuse(Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED, Code.PEER_LOST):
        now(listen())


@FUZZ
@given(pieces(*NONCES), st.sampled_from((autonat.DIAL_BACK, autonat.DIAL_BACK_RESPONSE)))
def test_a_nonce_and_its_receipt_are_read_or_refused(data: list[bytes], kind: Any) -> None:
    async def listen() -> None:
        message = await Preamble(Scripted(data)).hear(kind)
        if kind is autonat.DIAL_BACK:
            assert 0 <= autonat.nonce_of(message) < 1 << 64
        else:
            autonat.check_taken(message)

    with may_refuse(Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED, Code.PEER_LOST):
        now(listen())


@FUZZ
@given(pieces(*PUNCHES))
def test_a_punch_names_doors_of_the_world_or_is_refused(data: list[bytes]) -> None:
    async def listen() -> None:
        talk = Preamble(Scripted(data))
        while True:
            message = await talk.hear(HolePunch)
            with may_refuse(Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED):
                doors = dcutr.doors_of(message)
                assert len(doors) <= MAX_ADDRESSES_OFFERED
                assert all(endpoint_of(d) and reach_of(d) is Reach.PUBLIC for d in doors)
            with may_refuse(Code.PROTOCOL_VIOLATION):
                dcutr.check_sync(message)

    with may_refuse(Code.PROTOCOL_VIOLATION, Code.LIMIT_EXCEEDED, Code.PEER_LOST):
        now(listen())


class ScriptedConnection(Scripted, IRawConnection):
    """As the library wants a connection."""

    def get_remote_address(self) -> tuple[str, int] | None:
        return None

    def get_transport_addresses(self) -> list[Multiaddr]:
        return []

    def get_connection_type(self) -> ConnectionType:
        return ConnectionType.DIRECT


HANDSHAKE = (token("/multistream/1.0.0") + token("/noise"), b"\x00\x20" + b"e" * 32, b"\x00\x60" + b"s" * 96)


@FUZZ
@given(pieces(*HANDSHAKE))
def test_a_handshake_fails_without_waiting_for_more_than_a_noise_message(data: list[bytes]) -> None:
    wire = ScriptedConnection([HANDSHAKE[0], *data])
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of Noise and cryptography; the host takes all
        now(NoiseOnly(FastNoise(OURS)).secure_inbound(wire))
    assert isinstance(caught.value, Exception)
    assert wire.asked <= 65_535
