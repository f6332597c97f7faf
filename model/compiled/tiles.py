"""Products of up to four rows with a piece of a layer's weights, with all sums kept in registers: instructions.

Weights of any form become float32 in a register, never in memory. Each instruction adds to the sums that are there:
sums[r, j] += rows[r, k] * weights[k, j], for so many inputs k > 0. `rows`, `piece` and `sums` are addresses; row_bytes
and sums_bytes lead from one row to the next.

Source: the LLVM language reference; Goto and van de Geijn 2008, Anatomy of High-Performance Matrix Multiplication,
for sums that stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types

from ..strips import LINE_INPUTS
from .intrinsics import instruction

LANES: Final = 16  # float32 numbers in a vector
MOST_ROWS: Final = 4  # with four vectors of sums for each, half of a processor's registers

_FLOAT: Final = ir.FloatType()
_BYTE: Final = ir.IntType(8)
_INDEX: Final = ir.IntType(32)
_WORD: Final = ir.IntType(64)
_VECTOR: Final = ir.VectorType(_FLOAT, LANES)
_BITS: Final = ir.VectorType(_INDEX, LANES)
_NUMBER_BYTES: Final = 4
_VECTOR_BYTES: Final = LANES * _NUMBER_BYTES
_NUM_VECTORS: Final = 4  # of a strip

# What a turn reads at an address: for each input that it covers, one vector for each column of vectors.
Fetch = Callable[[Any, Any], list[list[Any]]]


# Writes a product of so many rows, of the arguments behind `num_rows`.
Tile = Callable[[Any, Any, int], None]


def _product(tile: Tile) -> Callable[..., Any]:
    """The instruction that adds a tile's products, for as many rows as it is given, 1 to `MOST_ROWS`.

    A turn of its loop covers one or more inputs; turn_bytes: of weights, from one turn to the next.
    """

    @instruction
    def add(
        context: Any,
        num_rows: Any,
        rows: Any,
        row_bytes: Any,
        piece: Any,
        turn_bytes: Any,
        num_turns: Any,
        sums: Any,
        sums_bytes: Any,
    ) -> Any:
        signature = types.void(*[types.intp] * 8)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            _for_each_count(builder, values[0], lambda count: tile(builder, values[1:], count))
            return context.get_dummy_value()

        return signature, generate

    return add


def _columns(fetch: Fetch, num_vectors: int, num_inputs: int) -> Callable[..., Any]:
    """Weights that lie input after input. num_inputs: of a turn."""

    def tile(builder: Any, values: Any, count: int) -> None:
        _column_tile(builder, values, count, num_vectors, num_inputs, fetch)

    return _product(tile)


def _for_each_count(builder: Any, num_rows: Any, tile: Callable[[int], None]) -> None:
    """`tile` for as many rows as there are, 1 to `MOST_ROWS`."""
    after = builder.append_basic_block("after")
    cases = [builder.append_basic_block(f"rows.{count}") for count in range(1, MOST_ROWS + 1)]
    choice = builder.switch(num_rows, after)
    for count, case in enumerate(cases, start=1):
        choice.add_case(_WORD(count), case)
        builder.position_at_end(case)
        tile(count)
        builder.branch(after)
    builder.position_at_end(after)


def _column_tile(
    builder: Any, values: Any, num_rows: int, num_vectors: int, num_inputs: int, fetch: Fetch
) -> None:
    rows, row_bytes, piece, turn_bytes, num_turns, sums, sums_bytes = values
    tile = [(row, vector) for row in range(num_rows) for vector in range(num_vectors)]
    places = {
        (row, vector): _pointer(builder, sums, sums_bytes, row, vector * _VECTOR_BYTES, _VECTOR)
        for row, vector in tile
    }
    found = {at: builder.load(place, align=_NUMBER_BYTES) for at, place in places.items()}

    def turn(k: Any, totals: dict[Any, Any]) -> dict[Any, Any]:
        weights = fetch(builder, builder.add(piece, builder.mul(k, turn_bytes)))
        inputs = builder.add(rows, builder.mul(k, _WORD(num_inputs * _NUMBER_BYTES)))
        for i, vectors in enumerate(weights):
            for row in range(num_rows):
                place = _pointer(builder, inputs, row_bytes, row, i * _NUMBER_BYTES, _FLOAT)
                number = _spread(builder, builder.load(place, align=_NUMBER_BYTES))
                for vector in range(num_vectors):
                    totals[row, vector] = _add_product(builder, number, vectors[vector], totals[row, vector])
        return totals

    for at, total in _turns(builder, num_turns, found, turn).items():
        builder.store(total, places[at], align=_NUMBER_BYTES)


def _turns(
    builder: Any, num_turns: Any, first: dict[Any, Any], turn: Callable[[Any, dict[Any, Any]], dict[Any, Any]]
) -> dict[Any, Any]:
    """A loop over vectors of sums, which begin as `first`; what they are after it."""
    before, body = builder.block, builder.append_basic_block("turn")
    done = builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    k = builder.phi(_WORD)
    totals = {at: builder.phi(_VECTOR) for at in first}
    grown = turn(k, dict(totals))
    following = builder.add(k, _WORD(1))
    k.add_incoming(_WORD(0), before)
    k.add_incoming(following, builder.block)
    for at, total in totals.items():
        total.add_incoming(first[at], before)
        total.add_incoming(grown[at], builder.block)
    builder.cbranch(builder.icmp_signed("<", following, num_turns), body, done)
    builder.position_at_end(done)
    return grown


def _add_product(builder: Any, number: Any, weight: Any, total: Any) -> Any:
    product = builder.fmul(number, weight, flags=("contract",))
    return builder.fadd(product, total, flags=("contract",))


def _pointer(builder: Any, base: Any, step: Any, count: int, offset: int, kind: Any) -> Any:
    """To what lies `count` steps and `offset` bytes behind the address `base`."""
    address = builder.add(base, builder.add(builder.mul(step, _WORD(count)), _WORD(offset)))
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, offset: int, kind: Any, align: int) -> Any:
    place = builder.inttoptr(builder.add(address, _WORD(offset)), kind.as_pointer())
    return builder.load(place, align=align)


def _spread(builder: Any, number: Any) -> Any:
    """A vector of this number in every lane."""
    empty = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(empty, number, _INDEX(0))
    return builder.shuffle_vector(first, empty, ir.Constant(_BITS, [0] * LANES))


def _float32(num_vectors: int) -> Fetch:
    def fetch(builder: Any, line: Any) -> list[list[Any]]:
        return [[_load(builder, line, v * _VECTOR_BYTES, _VECTOR, _NUMBER_BYTES) for v in range(num_vectors)]]

    return fetch


def _bfloat16(builder: Any, line: Any) -> list[list[Any]]:
    """Two inputs' weights, in pairs: (64, 2). Shifted up, they are float32."""
    pairs = [_load(builder, line, v * _VECTOR_BYTES, _BITS, 2) for v in range(_NUM_VECTORS)]
    sixteen, upper = (ir.Constant(_BITS, [number] * LANES) for number in (16, 0xFFFF0000))
    firsts = [builder.bitcast(builder.shl(pair, sixteen), _VECTOR) for pair in pairs]
    seconds = [builder.bitcast(builder.and_(pair, upper), _VECTOR) for pair in pairs]
    return [firsts, seconds]


def _codes4(builder: Any, line: Any) -> list[list[Any]]:
    """One input's codes, 0 to 15, as numbers: in a byte those of outputs j and j + 32."""
    half = LANES * 2
    kind = ir.VectorType(_BYTE, half)
    both = _load(builder, line, 0, kind, 1)
    low = builder.and_(both, ir.Constant(kind, [15] * half))
    high = builder.lshr(both, ir.Constant(kind, [4] * half))
    vectors = []
    for codes in (low, high):
        for first in (0, LANES):
            lanes = ir.Constant(_BITS, [first + lane for lane in range(LANES)])
            some = builder.shuffle_vector(codes, ir.Constant(kind, ir.Undefined), lanes)
            vectors.append(builder.uitofp(builder.zext(some, _BITS), _VECTOR))
    return [vectors]


def _line_tile(builder: Any, values: Any, num_rows: int) -> None:
    """Weights that lie output after output: one output's, as signed codes of 8 bits, read from end to end.

    A turn is of `LINE_INPUTS` inputs. Four outputs side by side, a line of each, took twice as long out of memory.
    """
    rows, row_bytes, piece, turn_bytes, num_turns, sums, sums_bytes = values
    kind = ir.VectorType(_BYTE, LANES)
    tile = [(row, vector) for row in range(num_rows) for vector in range(_NUM_VECTORS)]

    def turn(k: Any, totals: dict[Any, Any]) -> dict[Any, Any]:
        codes = builder.add(piece, builder.mul(k, turn_bytes))
        inputs = builder.add(rows, builder.mul(k, _WORD(LINE_INPUTS * _NUMBER_BYTES)))
        for vector in range(_NUM_VECTORS):
            some = builder.sext(_load(builder, codes, vector * LANES, kind, 1), _BITS)
            weights = builder.sitofp(some, _VECTOR)
            for row in range(num_rows):
                place = _pointer(builder, inputs, row_bytes, row, vector * _VECTOR_BYTES, _VECTOR)
                numbers = builder.load(place, align=_NUMBER_BYTES)
                totals[row, vector] = _add_product(builder, numbers, weights, totals[row, vector])
        return totals

    nothing = {at: ir.Constant(_VECTOR, [0.0] * LANES) for at in tile}
    totals = _turns(builder, num_turns, nothing, turn)
    for row in range(num_rows):
        low, high = (builder.fadd(totals[row, v], totals[row, v + 1]) for v in (0, 2))
        place = _pointer(builder, sums, sums_bytes, row, 0, _FLOAT)
        before = builder.load(place, align=_NUMBER_BYTES)
        total = _lane_sum(builder, builder.fadd(low, high))
        builder.store(builder.fadd(before, total), place, align=_NUMBER_BYTES)


def _lane_sum(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, halves upon halves."""
    empty = ir.Constant(_VECTOR, ir.Undefined)
    width = LANES // 2
    while width:
        lanes = [(lane + width) % LANES for lane in range(LANES)]
        vector = builder.fadd(
            vector, builder.shuffle_vector(vector, empty, ir.Constant(_BITS, lanes)), flags=("contract",)
        )
        width //= 2
    return builder.extract_element(vector, _INDEX(0))


add_float32: Final = _columns(_float32(_NUM_VECTORS), _NUM_VECTORS, 1)
add_narrow_float32: Final = _columns(_float32(1), 1, 1)
add_bfloat16: Final = _columns(_bfloat16, _NUM_VECTORS, 2)
add_codes4: Final = _columns(_codes4, _NUM_VECTORS, 1)
add_codes8: Final = _product(_line_tile)
