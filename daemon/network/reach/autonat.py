"""Messages of AutoNAT v2, by which a peer asks another to dial it, and what may be made of them.

On `DIAL_REQUEST` an asker names addresses of its own and a nonce. The asked one dials one of them, brings the nonce
over that connection on `DIAL_BACK`, and then answers what came of it. py-libp2p 0.8.1 has version 1 alone, so the
schema is declared here; statuses are plain numbers in it, so that one unknown to us can be read and refused.
Source: https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, TypeAlias

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import Message

from ....protocol.errors import Code, error
from ....protocol.limits import MAX_ADDRESSES_OFFERED
from .multiaddresses import packed, unpacked

DIAL_REQUEST_PROTOCOL: Final = "/libp2p/autonat/2/dial-request"
DIAL_BACK_PROTOCOL: Final = "/libp2p/autonat/2/dial-back"


class Status(IntEnum):
    """Whether a request was served."""

    INTERNAL_ERROR = 0
    REJECTED = 100  # for now: busy
    REFUSED = 101  # none of these addresses is dialled
    OK = 200


class DialStatus(IntEnum):
    """What came of the dial, of a request that was served."""

    UNUSED = 0
    DIAL_ERROR = 100  # nobody answers there
    DIAL_BACK_ERROR = 101  # somebody answers, and does not take the nonce
    OK = 200


@dataclass(frozen=True, slots=True)
class DialRequest:
    """Dial the first of these that you are willing to. "" stands for an address that cannot be read here."""

    addresses: tuple[str, ...]
    nonce: int  # of 64 bits


@dataclass(frozen=True, slots=True)
class DialResponse:
    """What came of it. index: of the address that was dialled."""

    status: Status
    index: int = 0
    dial_status: DialStatus = DialStatus.UNUSED


_BYTES: Final = FieldDescriptorProto.TYPE_BYTES
_ENUM: Final = FieldDescriptorProto.TYPE_INT32  # the same on the wire
_UINT32: Final = FieldDescriptorProto.TYPE_UINT32
_UINT64: Final = FieldDescriptorProto.TYPE_UINT64
_FIXED64: Final = FieldDescriptorProto.TYPE_FIXED64
_Field: TypeAlias = "tuple[str, FieldDescriptorProto.Type.ValueType]"
_SCHEMA: Final[Mapping[str, tuple[_Field, ...]]] = {  # fields are numbered from 1
    "DialRequest": (("addrs", _BYTES), ("nonce", _FIXED64)),
    "DialResponse": (("status", _ENUM), ("addrIdx", _UINT32), ("dialStatus", _ENUM)),
    "DialDataRequest": (("addrIdx", _UINT32), ("numBytes", _UINT64)),
    "DialDataResponse": (("data", _BYTES),),
    "DialBack": (("nonce", _FIXED64),),
    "DialBackResponse": (("status", _ENUM),),
}
_ALTERNATIVES: Final = ("dialRequest", "dialResponse", "dialDataRequest", "dialDataResponse")  # of `Message`


def _declare() -> Mapping[str, type[Message]]:
    """The schema's classes. In a pool of their own, so that a later py-libp2p may bring the same names."""
    file = FileDescriptorProto(name="autonatv2.proto", package="autonatv2", syntax="proto3")
    for name, fields in _SCHEMA.items():
        declared = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            is_list = field == "addrs"
            label = FieldDescriptorProto.LABEL_REPEATED if is_list else FieldDescriptorProto.LABEL_OPTIONAL
            declared.field.add(name=field, number=number, type=kind, label=label)
    _declare_envelope(file.message_type.add(name="Message"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [one.name for one in file.message_type]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"autonatv2.{name}"))
        for name in names
    }


def _declare_envelope(envelope: DescriptorProto) -> None:
    envelope.oneof_decl.add(name="msg")
    for number, field in enumerate(_ALTERNATIVES, 1):
        envelope.field.add(
            name=field,
            number=number,
            type=FieldDescriptorProto.TYPE_MESSAGE,
            type_name=f".autonatv2.{field[0].upper()}{field[1:]}",
            label=FieldDescriptorProto.LABEL_OPTIONAL,
            oneof_index=0,
        )


_CLASSES: Final = _declare()
ENVELOPE: Final = _CLASSES["Message"]  # of everything said on `DIAL_REQUEST_PROTOCOL`
DIAL_BACK: Final = _CLASSES["DialBack"]
DIAL_BACK_RESPONSE: Final = _CLASSES["DialBackResponse"]


def new_nonce() -> int:
    """One that nobody can guess."""
    return secrets.randbits(64)


def request(addresses: Iterable[str], nonce: int) -> Message:
    """Asker → asked, on `DIAL_REQUEST_PROTOCOL`."""
    return ENVELOPE(dialRequest={"addrs": packed(addresses), "nonce": nonce})


def response(answer: DialResponse) -> Message:
    """Asked → asker, in the end."""
    said = {"status": answer.status, "addrIdx": answer.index, "dialStatus": answer.dial_status}
    return ENVELOPE(dialResponse=said)


def dial_back(nonce: int) -> Message:
    """Asked → asker, on `DIAL_BACK_PROTOCOL` over the connection that it made."""
    return DIAL_BACK(nonce=nonce)


def dial_back_response() -> Message:
    """Asker → asked: the nonce has arrived."""
    return DIAL_BACK_RESPONSE(status=0)


def as_request(message: Message) -> DialRequest:
    """Read a request. Raises `PROTOCOL_VIOLATION`, and `LIMIT_EXCEEDED` for too many addresses."""
    told: Any = _expect(message, "dialRequest")
    if len(told.addrs) > MAX_ADDRESSES_OFFERED:
        said = f"a request to dial {len(told.addrs)} addresses"
        raise error(Code.LIMIT_EXCEEDED, f"{said}, at most {MAX_ADDRESSES_OFFERED} are taken")
    return DialRequest(tuple(map(unpacked, told.addrs)), told.nonce)


def as_response(message: Message) -> DialResponse:
    """Read an answer. Raises `PROTOCOL_VIOLATION`, also for a status that we do not know.

    We ask only for addresses at the IP from which we speak, so to be asked for data first is one too.
    """
    told: Any = _expect(message, "dialResponse")
    try:
        return DialResponse(Status(told.status), told.addrIdx, DialStatus(told.dialStatus))
    except ValueError as problem:
        raise error(Code.PROTOCOL_VIOLATION, f"an answer to a dial request with {problem}") from problem


def nonce_of(message: Message) -> int:
    """The nonce in a `DialBack`."""
    told: Any = message
    return int(told.nonce)


def check_taken(message: Message) -> None:
    """Raise `PROTOCOL_VIOLATION` if a `DialBackResponse` says anything but that the nonce was taken."""
    told: Any = message
    if told.status != 0:
        raise error(Code.PROTOCOL_VIOLATION, f"a nonce was answered with {told.status}")


def _expect(message: Message, field: str) -> Any:
    found = message.WhichOneof("msg")
    if found != field:
        raise error(Code.PROTOCOL_VIOLATION, f"AutoNAT's message holds {found or 'nothing'}, not {field}")
    return getattr(message, field)
