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


def _pointer(kind: Any, made_of: Any) -> Callable[..., Any]:
    """An address as a pointer to numbers of this kind, for `numba.carray`."""

    @instruction
    def at(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], made_of.as_pointer())

        return types.CPointer(kind)(types.intp), generate  # type: ignore[no-untyped-call]

    return at


def _same_bits(of: Any, to: Any, made_of: Any) -> Callable[..., Any]:
    """A number of one kind as what its bits are in another of the same size."""

    @instruction
    def cast(context: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], made_of)

        return to(of), generate

    return cast


numbers_at: Final = _pointer(types.float32, _FLOAT)
halves_at: Final = _pointer(types.uint16, ir.IntType(16))  # bfloat16 numbers
pairs_at: Final = _pointer(types.uint32, ir.IntType(32))  # two bfloat16 numbers, the first in the low half
bits_of: Final = _same_bits(types.float32, types.uint32, ir.IntType(32))
of_bits: Final = _same_bits(types.uint32, types.float32, _FLOAT)


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
