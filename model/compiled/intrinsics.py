"""What compiled code needs of the machine and numba has no words for: memory by its address, counters that threads
share, and the product of a few rows with a strip of weights, kept in registers.

Source: the LLVM language reference, for atomic and vector instructions; Goto and van de Geijn 2008, Anatomy of
High-Performance Matrix Multiplication, for sums that stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES: Final = 16  # float32 numbers in a vector
NUMBER_BYTES: Final = 4
LINE_BYTES: Final = 64  # of the processor's caches

_FLOAT: Final = ir.FloatType()
_VECTOR: Final = ir.VectorType(_FLOAT, LANES)
_WORD: Final = ir.IntType(64)
_INDEX: Final = ir.IntType(32)


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
def of_bits(context: Any, bits: Any) -> Any:
    """The float32 that these 32 bits are."""
    signature = types.float32(types.int32)

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


def _tile(num_rows: int, num_vectors: int) -> Any:
    """The product of so many rows with a strip of so many vectors' columns, added to what is there."""

    @instruction
    def add_product(
        context: Any,
        rows: Any,
        row_bytes: Any,
        strip: Any,
        strip_bytes: Any,
        num: Any,
        sums: Any,
        sums_bytes: Any,
    ) -> Any:
        """sums[r, :] += rows[r, k] * strip[k, :] for k in [0, num), num > 0; addresses, and bytes from line to line."""
        signature = types.void(*[types.intp] * 7)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            _generate_tile(builder, values, num_rows, num_vectors)
            return context.get_dummy_value()

        return signature, generate

    return add_product


def _generate_tile(builder: Any, values: Any, num_rows: int, num_vectors: int) -> None:
    rows, row_bytes, strip, strip_bytes, num, sums, sums_bytes = values
    tile = [(row, vector) for row in range(num_rows) for vector in range(num_vectors)]
    before = builder.block
    places = {
        (row, vector): _moved(builder, sums, sums_bytes, row, vector * LANES * NUMBER_BYTES, _VECTOR)
        for row, vector in tile
    }
    found = {at: builder.load(place, align=NUMBER_BYTES) for at, place in places.items()}
    turn, after = builder.append_basic_block("turn"), builder.append_basic_block("after")
    builder.branch(turn)
    builder.position_at_end(turn)
    k = builder.phi(_WORD)
    totals = {at: builder.phi(_VECTOR) for at in tile}
    line = builder.add(strip, builder.mul(k, strip_bytes))
    vectors = [
        builder.load(
            builder.inttoptr(builder.add(line, _WORD(v * LANES * NUMBER_BYTES)), _VECTOR.as_pointer()),
            align=NUMBER_BYTES,
        )
        for v in range(num_vectors)
    ]
    column = builder.add(rows, builder.mul(k, _WORD(NUMBER_BYTES)))
    grown = {}
    for row in range(num_rows):
        number = builder.load(_moved(builder, column, row_bytes, row, 0, _FLOAT), align=NUMBER_BYTES)
        spread = _spread(builder, number)
        for vector in range(num_vectors):
            product = builder.fmul(spread, vectors[vector], flags=("contract",))
            grown[row, vector] = builder.fadd(product, totals[row, vector], flags=("contract",))
    following = builder.add(k, _WORD(1))
    k.add_incoming(_WORD(0), before)
    k.add_incoming(following, turn)
    for at in tile:
        totals[at].add_incoming(found[at], before)
        totals[at].add_incoming(grown[at], turn)
    builder.cbranch(builder.icmp_signed("<", following, num), turn, after)
    builder.position_at_end(after)
    for at, place in places.items():
        builder.store(grown[at], place, align=NUMBER_BYTES)


def _moved(builder: Any, base: Any, step: Any, count: int, offset: int, kind: Any) -> Any:
    """A pointer to what lies `count` steps and `offset` bytes behind the address `base`."""
    address = builder.add(base, builder.add(builder.mul(step, _WORD(count)), _WORD(offset)))
    return builder.inttoptr(address, kind.as_pointer())


def _spread(builder: Any, number: Any) -> Any:
    """A vector of this number in every lane."""
    empty = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(empty, number, _INDEX(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_INDEX, LANES), [0] * LANES))


add_product_1x4: Final = _tile(1, 4)
add_product_2x4: Final = _tile(2, 4)
add_product_4x4: Final = _tile(4, 4)
add_product_1x1: Final = _tile(1, 1)
add_product_4x1: Final = _tile(4, 1)
