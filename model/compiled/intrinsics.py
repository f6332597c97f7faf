"""What compiled code needs of the machine and numba has no words for: memory by its address, the bits of a number,
and counters that threads share.

Source: the LLVM language reference, for atomic instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLOAT: Final = ir.FloatType()
_WORD: Final = ir.IntType(64)


def instruction(function: Callable[..., Any]) -> Callable[..., Any]:
    """What compiled code calls under the function's name, as the function's `generate` writes it."""
    made: Callable[..., Any] = intrinsic(function)
    return made


@instruction
def numbers_at(context: Any, address: Any) -> Any:
    """A pointer to float32 numbers, for `numba.carray`."""
    signature = types.CPointer(types.float32)(types.intp)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], _FLOAT.as_pointer())

    return signature, generate


@instruction
def halves_at(context: Any, address: Any) -> Any:
    """A pointer to bfloat16 numbers, as uint16."""
    signature = types.CPointer(types.uint16)(types.intp)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(16).as_pointer())

    return signature, generate


@instruction
def pairs_at(context: Any, address: Any) -> Any:
    """A pointer to pairs of bfloat16 numbers, as uint32: the first of each in the low half."""
    signature = types.CPointer(types.uint32)(types.intp)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(32).as_pointer())

    return signature, generate


@instruction
def bits_of(context: Any, number: Any) -> Any:
    """The bits of a float32."""
    signature = types.uint32(types.float32)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.IntType(32))

    return signature, generate


@instruction
def of_bits(context: Any, bits: Any) -> Any:
    """The float32 that these 32 bits are."""
    signature = types.float32(types.uint32)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], _FLOAT)

    return signature, generate


@instruction
def claim(context: Any, address: Any) -> Any:
    """Add one to a shared 64-bit counter; what it was before."""
    signature = types.intp(types.intp)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", place, _WORD(1), "acq_rel")

    return signature, generate


@instruction
def peek(context: Any, address: Any) -> Any:
    """A shared 64-bit counter, with all that was written before it was set."""
    signature = types.intp(types.intp)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], _WORD.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return signature, generate


@instruction
def clear(context: Any, address: Any) -> Any:
    """Set a shared 64-bit counter to 0."""
    signature = types.void(types.intp)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], _WORD.as_pointer())
        builder.store_atomic(_WORD(0), place, "release", 8)
        return context.get_dummy_value()

    return signature, generate


@instruction
def give_way(context: Any) -> Any:
    """Let another thread have this processor, if one wants it. POSIX, sched_yield."""
    signature = types.void()

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(_declared(builder.module, "sched_yield", kind), [])
        return context.get_dummy_value()

    return signature, generate


def _declared(module: Any, name: str, kind: Any) -> Any:
    return module.globals.get(name) or ir.Function(module, kind, name)
