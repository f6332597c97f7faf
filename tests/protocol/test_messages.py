"""What comes out of a vocabulary has the declared form; everything else is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corolla.protocol import control, steps, work
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.framing import Frame, FrameParser
from corolla.protocol.messages import Message, Vocabulary, encode, from_plain, to_plain
from corolla.protocol.steps import Hop, LinkHop, OpenSession, Reply, Row, Step
from corolla.protocol.tensors import DType, Encoding

SESSION = bytes(range(16))
VOCABULARIES = [
    steps.SESSION,
    steps.PUSH,
    work.TO_WORKER,
    work.FROM_WORKER,
    control.TO_DAEMON,
    control.FROM_DAEMON,
]

EXAMPLES: list[tuple[Vocabulary, Message]] = [
    (steps.SESSION, OpenSession(SESSION, "ab" * 32, 1, 4, 12, Encoding.BFLOAT16, 3, 2048)),
    (steps.SESSION, LinkHop(SESSION, 2, None, Hop("12D3KooW", 1), 7, (5, 9))),
    (steps.SESSION, Step(SESSION, 2, 8, (Row(0, 5, 1), Row(0, 9, 1)), 7, Reply.LAST, payload=b"\0" * 16)),
    (steps.SESSION, steps.Linked(SESSION, 2, (5, 9), (0, 0))),
    (steps.SESSION, steps.Receipt(SESSION, 2, 8, steps.Stage.WORKING)),
    (steps.PUSH, steps.Attach(SESSION, "12D3KooW", 2, 0, 1)),
    (
        work.TO_WORKER,
        work.Configure(
            work.ModelSource(work.SourceKind.HUB, "owner/name", "main"),
            "/cache",
            3,
            9,
            True,
            "cpu",
            DType.FLOAT32,
        ),
    ),
    (
        work.FROM_WORKER,
        work.Sampled(4, (work.Chosen(1, 42, " Paris", "stop", -0.5, (work.Logprob(42, -0.5),)),), b"1234"),
    ),
    (control.TO_DAEMON, control.Call(1, "generate", {"model": "m", "prompts": ["a"]}, b"")),
    (control.FROM_DAEMON, control.Item(1, to_plain(control.Piece(0, 7, "x")))),
]


def frame_of(message: Message) -> Frame:
    parser = FrameParser()
    parser.feed(encode(message))
    (frame,) = parser.frames()
    return frame


@pytest.mark.parametrize(("vocabulary", "message"), EXAMPLES, ids=lambda value: getattr(value, "KIND", ""))
def test_a_message_comes_back_equal(vocabulary: Vocabulary, message: Message) -> None:
    assert vocabulary.decode(frame_of(message)) == message


def test_fields_at_their_default_are_not_sent() -> None:
    header = cbor2.loads(frame_of(steps.Result(SESSION, 1, 1)).header)
    assert header == {"": "result", "session": SESSION, "epoch": 1, "step_id": 1}


def test_unknown_keys_are_ignored_so_that_newer_peers_are_understood() -> None:
    header = cbor2.dumps({"": "close", "session": SESSION, "in a later version": [1, 2]})
    assert steps.SESSION.decode(Frame(header)) == steps.CloseSession(SESSION)


def test_an_unknown_message_is_unsupported_and_blames_nobody() -> None:
    with pytest.raises(CorollaError) as caught:
        steps.SESSION.decode(Frame(cbor2.dumps({"": "teleport"})))
    assert caught.value.code is Code.UNSUPPORTED


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epoch": "two"}, "epoch"),
        ({"epoch": 1 << 63}, "epoch"),
        ({"epoch": True}, "epoch"),
        ({"rows": [[0, 5]]}, "rows"),
        ({"rows": [[0, 5, -1]]}, "n -1"),
        ({"rows": [[-1, 5, 1]]}, "new row at position 5"),
        ({"rows": []}, "number of rows"),
        ({"rows": [[0, 1, 1]] * 257}, "number of rows"),
        ({"reply": "some"}, "reply"),
        ({"session": b"short"}, "session id of 5 bytes"),
        ({"session": None}, "session"),
    ],
)
def test_a_field_of_the_wrong_form_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    fields = {"": "step", "session": SESSION, "epoch": 1, "step_id": 1, "rows": [[0, 5, 1]], **change}
    with pytest.raises(CorollaError, match=named) as caught:
        steps.SESSION.decode(Frame(cbor2.dumps(fields)))
    assert caught.value.code is Code.PROTOCOL_VIOLATION


def test_a_missing_field_is_refused() -> None:
    with pytest.raises(CorollaError, match="session"):
        steps.SESSION.decode(Frame(cbor2.dumps({"": "close"})))


def test_a_payload_where_none_belongs_is_refused() -> None:
    header = cbor2.dumps({"": "close", "session": SESSION})
    with pytest.raises(CorollaError, match="payload"):
        steps.SESSION.decode(Frame(header, b"x"))


MALFORMED = {
    "empty": b"",
    "break": b"\xff",
    "no map": cbor2.dumps([1]),
    "integer key": cbor2.dumps({1: 2}),
    "deep": b"\x81" * 100 + b"\x00",
    "indefinite": b"\xbf\xff",
    "double key": b"\xa2\x61a\x01\x61a\x02",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_cbor_that_is_no_strict_map_is_refused(data: bytes) -> None:
    with pytest.raises(CorollaError) as caught:
        steps.SESSION.decode(Frame(data))
    assert caught.value.code is Code.PROTOCOL_VIOLATION


@given(st.binary(max_size=200), st.binary(max_size=20))
def test_random_bytes_never_raise_anything_else(header: bytes, payload: bytes) -> None:
    for vocabulary in VOCABULARIES:
        with pytest.raises(CorollaError):
            vocabulary.decode(Frame(header, payload))


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(
    st.sampled_from(EXAMPLES),
    st.data(),
)
def test_mutated_messages_are_decoded_or_refused(
    example: tuple[Vocabulary, Message], data: st.DataObject
) -> None:
    vocabulary, message = example
    frame = frame_of(message)
    fields = cbor2.loads(frame.header)
    name = data.draw(st.sampled_from(sorted(field.name for field in dataclasses.fields(message))))  # type: ignore[arg-type]
    fields[name] = data.draw(_PLAIN)
    code, decoded = None, None
    try:
        decoded = vocabulary.decode(Frame(cbor2.dumps(fields), frame.payload))
    except CorollaError as problem:
        code = problem.code
    assert code is Code.PROTOCOL_VIOLATION or type(decoded) is type(message)


def test_arguments_of_every_method_can_be_read_from_a_map() -> None:
    examples = {
        "str": "x",
        "int": 1,
        "bytes": b"x",
        "tuple[Row, ...]": [[0, 0, 1]],
        "tuple[Sequence, ...]": [[0, 1]],
        "Plain": 1,
    }
    for method in control.METHODS.values():
        required = {
            field.name: examples[str(field.type)]
            for field in dataclasses.fields(method.arguments)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        assert isinstance(from_plain(method.arguments, required), method.arguments)


def test_two_messages_of_one_kind_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="close"):
        Vocabulary(steps.CloseSession, work.CloseCache)


def test_an_error_inside_a_message_keeps_code_and_details() -> None:
    problem = error(Code.HISTORY_GAP, "position 9, holds 4", "replay", first_position=4)
    failure = steps.SESSION.decode(frame_of(steps.Failure.of(SESSION, 3, problem, 8, Hop("p", 0))))
    assert isinstance(failure, steps.Failure)
    assert failure.about == Hop("p", 0)
    assert failure.problem().code is Code.HISTORY_GAP
    assert failure.problem().details == {"first_position": 4}
