"""What a hostile far side sends: bytes at random, real bytes changed a little, and maps with fields of any form.

Strategies for hypothesis. A message's fields are drawn by its own type hints, so that a message added to a
vocabulary is fuzzed without a line here.
"""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import cbor2
from hypothesis import settings
from hypothesis import strategies as st

from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.limits import MAX_POSITION, SESSION_ID_BYTES
from corolla.protocol.messages import Message

# Time is bounded by pytest's timeout: a deadline for each example would measure the machine.
FUZZ = settings(max_examples=60, deadline=None)

INTERESTING_INTS = (
    -(1 << 63), -(1 << 31) - 1, -1, 0, 1, 2, 255, 256, 65_535, (1 << 31) - 1, 1 << 32, MAX_POSITION,
    MAX_POSITION + 1, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 70),
)  # fmt: skip
INTERESTING_FLOATS = (0.0, -0.0, -1.0, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan"))

ints = st.integers() | st.sampled_from(INTERESTING_INTS)
floats = st.floats() | st.sampled_from(INTERESTING_FLOATS)
atoms = st.none() | st.booleans() | ints | floats | st.text(max_size=20) | st.binary(max_size=40)
junk: st.SearchStrategy[Any] = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
"""Any value that CBOR can hold."""


@contextmanager
def may_refuse(*codes: Code) -> Iterator[None]:
    """The block may end with an error of these codes, and with no other exception."""
    try:
        yield
    except CorollaError as problem:
        if problem.code not in codes:
            raise


def mutate(data: bytes, seed: int, others: Sequence[bytes] = ()) -> bytes:
    """The bytes with one to four changes: flips, cuts, repeats, swaps, noise, a piece of another."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 1, 2, 4, 16, 64)))
        match rng.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del changed[at:end]
            case 3:
                changed[at:at] = changed[at:end] * rng.choice((1, 2, 8))
            case 4:
                changed[at:at] = rng.randbytes(rng.choice((1, 2, 4, 32)))
            case 5 if others:
                other = rng.choice(others)
                cut = rng.randrange(len(other) + 1)
                changed[at:end] = other[cut : cut + rng.choice((1, 8, 64))]
            case _:
                del changed[at:]
    return bytes(changed)


def mutations(samples: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Real bytes, changed."""
    return st.builds(
        lambda data, seed: mutate(data, seed, samples), st.sampled_from(samples), st.integers(0, 1 << 62)
    )


def hostile_bytes(samples: Sequence[bytes] = (b"",), max_size: int = 300) -> st.SearchStrategy[bytes]:
    """Bytes at random, or real ones changed."""
    return st.binary(max_size=max_size) | mutations(samples)


def fields_of(cls: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Maps that look like a dataclass: each field right, or wrong, or missing; and perhaps one too many."""
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    right = {field.name: form(hints[field.name]) for field in fields}
    wrong = {name: strategy | strategy | strategy | junk for name, strategy in right.items()}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    optional = {name: strategy for name, strategy in right.items() if name not in needed}
    return (
        st.fixed_dictionaries({n: s for n, s in right.items() if n in needed}, optional=optional)
        | st.fixed_dictionaries(wrong)
        | st.fixed_dictionaries({}, optional={**wrong, "tomorrow": junk})
    )


def headers_of(*classes: type[Message]) -> st.SearchStrategy[bytes]:
    """CBOR headers of such messages, of the right kind and sometimes of another."""
    kinds = st.sampled_from(sorted(cls.KIND for cls in classes)) | junk
    return st.one_of(
        *(
            st.builds(
                lambda kind, fields: cbor2.dumps({"": kind, **fields}),
                st.just(cls.KIND) | st.just(cls.KIND) | st.just(cls.KIND) | kinds,
                fields_of(cls),
            )
            for cls in classes
        )
    )


def form(hint: Any) -> st.SearchStrategy[Any]:
    """Plain values of the form that a field of this type is sent in."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return junk
    if origin in (typing.Union, types.UnionType):
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
        return st.none() | form(inner)
    if origin is tuple:
        return st.lists(form(typing.get_args(hint)[0]), max_size=5)
    if origin is dict:
        return st.dictionaries(st.text(max_size=8), form(typing.get_args(hint)[1]), max_size=3)
    if hint in _ATOMS:
        return _ATOMS[hint]()
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return st.sampled_from([member.value for member in hint])
    if isinstance(hint, type) and issubclass(hint, tuple):
        return st.tuples(*(form(inner) for inner in typing.get_type_hints(hint).values()))
    return st.deferred(lambda: fields_of(hint))


_ATOMS: dict[Any, Callable[[], st.SearchStrategy[Any]]] = {
    int: lambda: st.integers(0, 300) | ints,
    float: lambda: st.floats(0, 60) | floats,
    bool: st.booleans,
    str: lambda: st.text(max_size=12) | st.sampled_from(("/ip4/192.0.2.7/tcp/4517", "x" * 300)),
    bytes: lambda: (
        st.binary(min_size=SESSION_ID_BYTES, max_size=SESSION_ID_BYTES)
        | st.binary(min_size=32, max_size=32)
        | st.binary(max_size=70)
    ),
}
