"""Greetings and the registry's messages: their bytes of version 1, and their bounds."""

from __future__ import annotations

from typing import Any

import pytest

from corolla.protocol.errors import CorollaError
from corolla.protocol.framing import FrameParser
from corolla.protocol.limits import (
    MAX_BATCH_BYTES,
    MAX_KEYS_PER_FIND,
    MAX_MEMBERS_TOLD,
    MAX_RECORDS_PER_MESSAGE,
)
from corolla.protocol.messages import Message, Vocabulary, encode, from_plain, to_plain
from corolla.protocol.records import Signed
from corolla.protocol.registry import (
    HELLO,
    REGISTRY,
    Declined,
    Entry,
    Find,
    Found,
    Hello,
    PeerAddresses,
    Refusal,
    Store,
    Stored,
)

PEER = "12D3KooWPeer"
KEY = bytes(range(32))
SIGNED = Signed(b"\xa1body", bytes(64), KEY)
GOLDEN: list[tuple[Vocabulary, Message, str]] = [
    (
        HELLO,
        Hello(
            "5a" * 16,
            "roses",
            "0.1.0",
            (1,),
            (f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}",),
            (PeerAddresses("12D3KooWOther", ("/ip4/192.0.2.8/tcp/4001/p2p/12D3KooWOther",)),),
        ),
        "000000d400000000a6606568656c6c6f68737761726d5f69647820356135613561356135613561356135613561356135"
        "6135613561356135613561646e616d6565726f7365736776657273696f6e65302e312e30696164647265737365738178"
        "282f6970342f3139322e302e322e372f7463702f343030312f7032702f313244334b6f6f5750656572676d656d626572"
        "7381a264706565726d313244334b6f6f574f74686572696164647265737365738178292f6970342f3139322e302e322e"
        "382f7463702f343030312f7032702f313244334b6f6f574f74686572",
    ),
    (
        REGISTRY,
        Store((Entry(SIGNED, 60.0, (KEY,)),)),
        "000000db00000000a2606573746f726567656e747269657381a3667369676e6564a364626f647945a1626f6479697369"
        "676e61747572655840000000000000000000000000000000000000000000000000000000000000000000000000000000"
        "000000000000000000000000000000000000000000000000006a7075626c69635f6b6579582000010203040506070809"
        "0a0b0c0d0e0f101112131415161718191a1b1c1d1e1f6b72656d61696e696e675f73fb404e000000000000646b657973"
        "815820000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
    ),
    (
        REGISTRY,
        Stored((Refusal(0, {"code": "busy", "message": "full"}, 7),)),
        "0000003d00000000a2606673746f726564677265667573656481a365696e64657800656572726f72a264636f64656462"
        "757379676d6573736167656466756c6c6373657107",
    ),
    (
        REGISTRY,
        Find((KEY,), f"{PEER}/0"),
        "0000004400000000a3606466696e64646b657973815820000102030405060708090a0b0c0d0e0f101112131415161718"
        "191a1b1c1d1e1f6561667465726e313244334b6f6f57506565722f30",
    ),
    (
        REGISTRY,
        Found((Entry(SIGNED, 12.5),), f"{PEER}/0"),
        "000000c700000000a36065666f756e6467656e747269657381a2667369676e6564a364626f647945a1626f6479697369"
        "676e61747572655840000000000000000000000000000000000000000000000000000000000000000000000000000000"
        "000000000000000000000000000000000000000000000000006a7075626c69635f6b6579582000010203040506070809"
        "0a0b0c0d0e0f101112131415161718191a1b1c1d1e1f6b72656d61696e696e675f73fb4029000000000000646e657874"
        "6e313244334b6f6f57506565722f30",
    ),
    (
        REGISTRY,
        Declined({"code": "unsupported", "message": "unknown message"}),
        "0000003b00000000a260686465636c696e6564656572726f72a264636f64656b756e737570706f72746564676d657373"
        "6167656f756e6b6e6f776e206d657373616765",
    ),
]


@pytest.mark.parametrize(
    ("vocabulary", "message", "data"), GOLDEN, ids=lambda value: getattr(value, "KIND", "")
)
def test_messages_have_the_bytes_of_the_first_release(
    vocabulary: Vocabulary, message: Message, data: str
) -> None:
    assert encode(message).hex() == data
    parser = FrameParser()
    parser.feed(bytes.fromhex(data))
    (frame,) = parser.frames()
    assert vocabulary.decode(frame) == message


ENTRY = to_plain(Entry(SIGNED, 60.0))


@pytest.mark.parametrize(
    ("cls", "fields", "what"),
    [
        (Entry, {**ENTRY, "remaining_s": 121.0}, "remaining_s"),
        (Entry, {**ENTRY, "remaining_s": -1.0}, "remaining_s"),
        (Entry, {**ENTRY, "keys": [bytes(31)]}, "key"),
        (Store, {"entries": [ENTRY] * (MAX_RECORDS_PER_MESSAGE + 1)}, "entries"),
        (
            Store,
            {"entries": [{**ENTRY, "signed": {**ENTRY["signed"], "body": bytes(MAX_BATCH_BYTES + 1)}}]},
            "bytes of records",
        ),
        (Find, {"keys": [KEY] * (MAX_KEYS_PER_FIND + 1)}, "keys"),
        (Find, {"keys": [], "after": "x" * 1000}, "after"),
        (Hello, {"swarm_id": "s" * 257, "name": "", "version": ""}, "swarm_id"),
        (Hello, {"swarm_id": "", "name": "", "version": "", "addresses": ["/x"] * 17}, "addresses"),
        (
            Hello,
            {
                "swarm_id": "",
                "name": "",
                "version": "",
                "members": [{"peer": "p", "addresses": []}] * (MAX_MEMBERS_TOLD + 1),
            },
            "members",
        ),
        (PeerAddresses, {"peer": "p", "addresses": ["/x"] * 5}, "addresses"),
        (PeerAddresses, {"peer": "p", "addresses": ["no address"]}, "multiaddress"),
    ],
)
def test_what_exceeds_its_bounds_is_refused(cls: type[Any], fields: dict[str, Any], what: str) -> None:
    with pytest.raises(CorollaError, match=what):
        from_plain(cls, fields)
