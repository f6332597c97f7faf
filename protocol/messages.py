"""Messages as frozen dataclasses, and their frames.

A message class lists its fields with types; this module checks and converts by these types, so that a
message that came out of `Vocabulary.decode` has the declared form, all the way down. A `Vocabulary` is the
set of messages that may be said on one kind of connection. Unknown keys of a map are ignored and an unknown
kind is `UNSUPPORTED`, which is how later versions may say more (DESIGN: versions).

Field types: int, float, bool, str, bytes, StrEnum, other such dataclasses, NamedTuples of these, `X | None`,
`tuple[X, ...]`, `dict[str, X]` and `Plain` (any CBOR value within the header's limits). A field named
`payload` travels behind the header, as raw bytes.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sized
from enum import StrEnum
from functools import cache
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

import cbor2

from .errors import Code, CorollaError, error
from .framing import Frame, encode_frame
from .limits import MAX_CBOR_DEPTH

T = TypeVar("T")
Plain: TypeAlias = Any  # a CBOR value of the caller's own form: maps, lists, strings, numbers

_KIND: Final = ""  # the header's key of the message's kind; no field can have this name
_INT_LIMIT: Final = 1 << 63


class Message:
    """Base of everything that is said. Subclasses are frozen dataclasses with a `KIND`."""

    KIND: ClassVar[str]
    __slots__ = ()


class Vocabulary:
    """The messages that may be said on one kind of connection."""

    def __init__(self, *classes: type[Message]) -> None:
        self._classes: dict[str, type[Message]] = {}
        for cls in classes:
            if cls.KIND in self._classes:
                raise ValueError(f"two messages are called {cls.KIND!r}")
            self._classes[cls.KIND] = cls

    @property
    def classes(self) -> tuple[type[Message], ...]:
        """The messages, in the order given."""
        return tuple(self._classes.values())

    def decode(self, frame: Frame) -> Message:
        """The message in a frame.

        Raises `PROTOCOL_VIOLATION` if the frame is malformed (the sender's fault) and `UNSUPPORTED` if it
        is a message of a kind unknown here (nobody's: the sender may be newer).
        """
        fields = load_map(frame.header)
        kind = fields.pop(_KIND, None)
        cls = self._classes.get(kind) if isinstance(kind, str) else None
        if cls is None:
            raise error(Code.UNSUPPORTED, f"unknown message {str(kind)[:64]!r}")
        if "payload" in _converters(cls):
            fields["payload"] = frame.payload
        elif frame.payload:
            raise error(Code.PROTOCOL_VIOLATION, f"{kind}: a payload where none belongs")
        return from_plain(cls, fields)


def encode(message: Message) -> bytes:
    """One whole frame for a message."""
    header = {_KIND: message.KIND}
    header.update(_plain_fields(message))
    payload = header.pop("payload", b"")
    return encode_frame(cbor2.dumps(header), payload)  # type: ignore[arg-type]


class _NoTags(Mapping[int, Any]):
    """Refuses every tag of CBOR: no message of ours has one.

    The decoder would otherwise make of them what is costly or surprising elsewhere: numbers of a thousand
    digits, patterns to be compiled, lists that contain themselves.
    """

    def __getitem__(self, tag: int) -> Any:
        raise ValueError(f"tag {tag}, and no tag may be used")

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 1  # an empty one would be taken for none


_NO_TAGS: Final = _NoTags()


def load_map(data: bytes) -> dict[str, Any]:
    """Decode a CBOR map with string keys, strictly. Raises `PROTOCOL_VIOLATION`."""
    try:
        value = cbor2.loads(
            data,
            max_depth=MAX_CBOR_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
            semantic_decoders=_NO_TAGS,
        )
    except Exception as problem:  # the decoder raises many types on hostile input; all mean the same here
        raise error(Code.PROTOCOL_VIOLATION, f"unreadable CBOR: {problem}"[:200]) from problem
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise error(Code.PROTOCOL_VIOLATION, "expected a map with string keys")
    return value


def to_plain(value: Any) -> Any:
    """A dataclass, tuple or plain value as what CBOR can hold; fields equal to their default are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_fields(value)
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(cls: type[T], fields: object) -> T:
    """The dataclass that `to_plain` described. Raises `PROTOCOL_VIOLATION` naming the field."""
    if not isinstance(fields, dict):
        raise error(Code.PROTOCOL_VIOLATION, f"{cls.__name__}: expected a map")
    arguments = {}
    name = ""
    try:
        for name, convert in _converters(cls).items():
            if name in fields:
                arguments[name] = convert(fields[name])
        name = ""
        return cls(**arguments)
    except CorollaError as problem:
        where = f"{cls.__name__}.{name}" if name else cls.__name__
        raise error(Code.PROTOCOL_VIOLATION, f"{where}: {problem.message}"[:400]) from problem
    except (TypeError, ValueError, OverflowError) as problem:
        where = f"{cls.__name__}.{name}" if name else cls.__name__
        raise error(Code.PROTOCOL_VIOLATION, f"{where}: {problem}"[:400]) from problem


def _plain_fields(value: Any) -> dict[str, Any]:
    plain = {}
    for name, default in _defaults(type(value)).items():
        item = getattr(value, name)
        if item is not default and item != default:
            plain[name] = item if type(item) in _ATOMS else to_plain(item)
    return plain


_ATOMS: Final = frozenset((int, float, bool, str, bytes, type(None)))


def _defaults(cls: Any) -> dict[str, Any]:
    return _cached_defaults(cls)


@cache
def _cached_defaults(cls: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _converters(cls: Any) -> dict[str, Callable[[Any], Any]]:
    return _cached_converters(cls)


@cache
def _cached_converters(cls: Any) -> dict[str, Callable[[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return {field.name: _converter(hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _converter(hint: Any) -> Callable[[Any], Any]:
    """A function from a plain value to one of type `hint`, raising ValueError or TypeError."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return lambda value: value
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
        convert = _converter(inner)
        return lambda value: None if value is None else convert(value)
    if origin is tuple:
        return _tuple_converter(_converter(typing.get_args(hint)[0]))
    if origin is dict:
        return _dict_converter(_converter(typing.get_args(hint)[1]))
    if hint in _ATOM_CONVERTERS:
        return _ATOM_CONVERTERS[hint]
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return _named_tuple_converter(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return lambda value: from_plain(hint, value)
    raise TypeError(f"no message may hold a {hint}")


def _tuple_converter(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def items(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise TypeError("expected a list")
        return tuple(convert(item) for item in value)

    return items


def _dict_converter(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def items(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise TypeError("expected a map with string keys")
        return {key: convert(item) for key, item in value.items()}

    return items


def _named_tuple_converter(hint: Any) -> Callable[[Any], Any]:
    converts = [_converter(inner) for inner in typing.get_type_hints(hint).values()]

    def named(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) != len(converts):
            raise TypeError(f"expected {len(converts)} values")
        return hint(*(convert(item) for convert, item in zip(converts, value, strict=True)))

    return named


def _int(value: Any) -> int:
    if type(value) is not int or not -_INT_LIMIT <= value < _INT_LIMIT:
        raise TypeError("expected an integer of 64 bits")
    return value


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError("expected a finite number")
    return float(value)


def _of_type(expected: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not expected:
            raise TypeError(f"expected {expected.__name__}, not {type(value).__name__}")
        return value

    return check


_ATOM_CONVERTERS: Final[dict[Any, Callable[[Any], Any]]] = {
    int: _int,
    float: _float,
    bool: _of_type(bool),
    str: _of_type(str),
    bytes: _of_type(bytes),
}


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low ≤ value ≤ high; for the `__post_init__` of messages."""
    if not low <= value <= high:
        raise ValueError(f"{name} {value}, expected {low} to {high}")


def check_length(name: str, value: Sized, high: int) -> None:
    """Raise ValueError if a string, bytes or tuple is longer than `high`."""
    if len(value) > high:
        raise ValueError(f"{name} has {len(value)} items, limit {high}")
