"""Bytes of AutoNAT v2 as its specification has them, and what is refused of what a peer may send."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message

from corolla.daemon.network.reach import autonat
from corolla.daemon.network.reach.autonat import DialRequest, DialResponse, DialStatus, Status
from corolla.daemon.network.reach.multiaddresses import packed
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import MAX_ADDRESSES_OFFERED, MAX_CIRCUIT_MESSAGE_BYTES, MAX_NAME_CHARS

HOME = "/ip4/11.0.0.9/tcp/4517"
NONCE = 0x0123456789ABCDEF


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (autonat.request((HOME,), NONCE), "0a13" + "0a08040b0000090611a5" + "11efcdab8967452301"),
        (autonat.response(DialResponse(Status.OK, 0, DialStatus.DIAL_ERROR)), "1205" + "08c801" + "1864"),
        (autonat.response(DialResponse(Status.OK, 3, DialStatus.OK)), "1208" + "08c801" + "1003" + "18c801"),
        (autonat.response(DialResponse(Status.REFUSED)), "1202" + "0865"),
        (autonat.dial_back(NONCE), "09efcdab8967452301"),
        (autonat.dial_back_response(), ""),
    ],
)
def test_messages_are_written_as_specified(message: Message, wire: str) -> None:
    assert message.SerializeToString(deterministic=True).hex() == wire


def read(body: bytes) -> Message:
    message = autonat.ENVELOPE()
    message.ParseFromString(body)
    return message


def test_a_request_and_an_answer_are_read_as_they_were_written() -> None:
    asked = autonat.request((HOME, "/ip6/2606:4700::9/tcp/1"), (1 << 64) - 1).SerializeToString()
    assert autonat.as_request(read(asked)) == DialRequest((HOME, "/ip6/2606:4700::9/tcp/1"), (1 << 64) - 1)
    for answer in (DialResponse(Status.OK, 7, DialStatus.OK), DialResponse(Status.INTERNAL_ERROR)):
        assert autonat.as_response(read(autonat.response(answer).SerializeToString())) == answer
    assert autonat.nonce_of(autonat.dial_back(5)) == 5


def test_unreadable_addresses_keep_their_place() -> None:
    strange = [b"\xff\xff", b"", b"\x04" * (MAX_NAME_CHARS + 1), *packed([HOME])]
    asked = autonat.ENVELOPE(dialRequest={"addrs": strange, "nonce": 1})
    assert autonat.as_request(asked).addresses == ("", "", "", HOME)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (autonat.ENVELOPE(), Code.PROTOCOL_VIOLATION),
        (autonat.response(DialResponse(Status.OK)), Code.PROTOCOL_VIOLATION),
        (autonat.request([HOME] * (MAX_ADDRESSES_OFFERED + 1), 1), Code.LIMIT_EXCEEDED),
    ],
    ids=["nothing", "an answer", "too many addresses"],
)
def test_what_is_no_request_is_refused(said: Message, code: Code) -> None:
    with pytest.raises(CorollaError) as caught:
        autonat.as_request(said)
    assert caught.value.code is code


@pytest.mark.parametrize(
    "said",
    [
        autonat.request((HOME,), 1),
        autonat.ENVELOPE(dialDataRequest={"addrIdx": 0, "numBytes": 30_000}),
        autonat.ENVELOPE(dialResponse={"status": 1}),
        autonat.ENVELOPE(dialResponse={"status": -1}),
        autonat.ENVELOPE(dialResponse={"status": 200, "dialStatus": 99}),
    ],
    ids=["a request", "data first", "a status unknown", "a negative one", "a dial status unknown"],
)
def test_what_is_no_answer_is_refused(said: Message) -> None:
    with pytest.raises(CorollaError) as caught:
        autonat.as_response(said)
    assert caught.value.code is Code.PROTOCOL_VIOLATION


def test_a_receipt_that_refuses_is_no_receipt() -> None:
    autonat.check_taken(autonat.dial_back_response())
    with pytest.raises(CorollaError):
        autonat.check_taken(autonat.DIAL_BACK_RESPONSE(status=1))


def test_as_many_addresses_as_are_taken_fit_a_message() -> None:
    longest = ["/ip6/2606:4700:1234:1234:1234:1234:1234:1234/tcp/65535"] * MAX_ADDRESSES_OFFERED
    assert len(autonat.request(longest, 1).SerializeToString()) <= MAX_CIRCUIT_MESSAGE_BYTES
