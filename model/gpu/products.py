"""Rows times small weights on a GPU, straight from their codes.

A few rows times a large weight take as long as the weight takes to be read, so it is read as it lies, in 4.5 or 8
bits, and made wide in registers only. A program multiplies a tile of outputs by some rows. Where these are few, each of
its warps has every eighth (or fourth) slice of 64 inputs, and they add up at the end: that keeps a device busy whose
processors are more than a layer has tiles, in a fixed order, without a second pass. Weights are the left operand of
tensor cores, whose right one may be as narrow as 8 rows.

What bounds it was worked out, not measured: compiled for compute capability 9.0, one row times NF4 takes 5.0
instructions a weight, 3.3 of them on the integer pipe, which gives out 64 a clock and processor. At 132 processors and
1.7 GHz that is 4.4e12 weights a second; memory of 3.35 TB/s brings 5.9e12. So a row should take 1.4 times what reading
the codes takes, and reading bfloat16 takes 3.6 times that. With 108 processors at 1.4 GHz and 2.0 TB/s (8.0) it is 1.2
times.

Plain weights are multiplied here only where they are those of experts, whose tiles torch has no product for.

Knows of weights, rows and the tiles of sorted rows; nothing of layers and experts.

Source: Dettmers et al. 2023, QLoRA, for NF4; Frantar et al. 2024, MARLIN, for codes made wide beside tensor cores.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...protocol.tensors import Quantization
from ..quantization import Stored, dequantize, quantize
from .tiles import Tiles, tiles_of

logger = logging.getLogger(__name__)

# Worked out, not measured: tiles of the same outputs run side by side and share what is read, so more rows cost the
# making wide again: for each 64 rows 1.4 times the reading of NF4 with 9.0, and 2.1 times with 8.0. To dequantize,
# write and read bfloat16 again costs eight times that reading before anything is multiplied, for int8 five times.
MOST_ROWS: Final = 256

_SLICE: Final = tl.constexpr(64)  # inputs that share a scale in NF4
_NF4: Final = tl.constexpr(0)
_INT8: Final = tl.constexpr(1)
_PLAIN: Final = tl.constexpr(2)
_FORMS: Final = {Quantization.NF4: _NF4.value, Quantization.INT8: _INT8.value, None: _PLAIN.value}
_CLOSE: Final = 0.02  # of a trial's result, where rows and weights are rounded to half precision

# Source: QLoRA, appendix E, as bitsandbytes has them.
_VALUES: Final = tl.constexpr(
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )
)  # fmt: skip


def _words(dtype: torch.dtype) -> tuple[int, ...]:
    """The sixteen values in half precision as words of four bytes: their low bytes, then their high ones."""
    bits = torch.tensor(_VALUES.value).to(dtype).view(torch.int16)
    parts = bits.view(torch.uint8).view(16, 2).T.contiguous()  # (2, 16), low bytes first
    return tuple(parts.view(torch.int32).flatten().tolist())


_BFLOAT16_WORDS: Final = tl.constexpr(_words(torch.bfloat16))
_FLOAT16_WORDS: Final = tl.constexpr(_words(torch.float16))


def _looking_up() -> str:
    """PTX that looks up eight codes at once.

    `prmt` picks four bytes out of eight by four numbers of 3 bits, and so it looks up four codes in half a table;
    the fourth bit of each code says which half. Low and high bytes are looked up apart and put together at the end.
    Of four bytes ($4) with two codes each, $0 and $1 are the values of the high codes, and $2 and $3 of the low ones.
    $5, $9, … are the words of the table; each comes four times, as Triton has it for four numbers together.
    """

    def word(index: int) -> str:
        return f"${5 + 4 * index}"

    lines = [
        ".reg .b32 code, upper, mask, low, high, other;",
        "and.b32 code, $4, 0x77777777;",
        "shr.u32 upper, $4, 3;",
        "and.b32 upper, upper, 0x11111111;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 code, code, 16;", "shr.u32 upper, upper, 16;"]
        lines.append(f"prmt.b32 mask, {word(8)}, {word(8)}, upper;")
        for part, first in (("low", 0), ("high", 4)):
            lines += [
                f"prmt.b32 {part}, {word(first)}, {word(first + 1)}, code;",
                f"prmt.b32 other, {word(first + 2)}, {word(first + 3)}, code;",
                f"lop3.b32 {part}, mask, other, {part}, 0xca;",  # mask ? other : part
            ]
        lines += [f"prmt.b32 ${half}, low, high, 0x7351;", f"prmt.b32 ${2 + half}, low, high, 0x6240;"]
    return "{\n" + "\n".join(lines) + "\n}"


_LOOKING_UP: Final = tl.constexpr(_looking_up())
_OPERANDS: Final = tl.constexpr("=r,=r,=r,=r,r" + ",r" * 36)


@triton.jit
def _word(value: tl.constexpr, known):
    """A constant that the compiler does not know for one: it would load it again for each use."""
    return tl.where(known, value, 0)


@triton.jit
def _looked_up(codes, known, words: tl.constexpr):
    return tl.inline_asm_elementwise(
        _LOOKING_UP,
        _OPERANDS,
        [
            codes,
            _word(words[0], known),
            _word(words[1], known),
            _word(words[2], known),
            _word(words[3], known),
            _word(words[4], known),
            _word(words[5], known),
            _word(words[6], known),
            _word(words[7], known),
            _word(0xFF00, known),
        ],
        dtype=(tl.bfloat16, tl.bfloat16),  # or what else has 16 bits
        is_pure=True,
        pack=4,
    )


@triton.jit
def _chosen(codes, dtype: tl.constexpr):
    """The values of codes below 16, slowly, for what has no bytes to be looked up."""
    values = tl.full(codes.shape, _VALUES[0], tl.float32)
    for code in tl.static_range(1, 16):
        values = tl.where(codes == code, _VALUES[code], values)
    return values.to(dtype)


@triton.jit
def _pairs(codes, known, dtype: tl.constexpr, is_quick: tl.constexpr):
    """Values of the even weights and of the odd ones: of two in a byte the first lies in the high bits."""
    if is_quick:
        if dtype == tl.bfloat16:
            even, odd = _looked_up(codes, known, _BFLOAT16_WORDS)
        else:
            even, odd = _looked_up(codes, known, _FLOAT16_WORDS)
            even, odd = even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True)
    else:
        even, odd = _chosen(codes >> 4, dtype), _chosen(codes & 15, dtype)
    return even, odd


@triton.jit
def _dot(weights, rows, total):
    """`total` and each slice of weights (num_slices, outputs, inputs) times that of rows (num_slices, rows, inputs).

    Triton gives each warp slices of its own; where there is but one, all warps share its outputs and rows.
    """
    if total.shape[0] == 1:
        outputs: tl.constexpr = weights.shape[1]
        taken: tl.constexpr = rows.shape[1]
        inputs: tl.constexpr = rows.shape[2]
        flat = tl.reshape(rows, (taken, inputs))
        product = tl.dot(
            tl.reshape(weights, (outputs, inputs)),
            tl.trans(flat),
            tl.reshape(total, (outputs, taken)),
            input_precision="ieee",
        )
        return tl.reshape(product, (1, outputs, taken))
    return tl.dot(weights, tl.trans(rows, 0, 2, 1), total, input_precision="ieee")


# Compiled once for all numbers of rows, and wherever the tiles' numbers begin.
@triton.jit(
    do_not_specialize=["num_rows", "num_chosen"],
    do_not_specialize_on_alignment=["order", "firsts", "ends", "experts"],
)
def _multiply(
    rows,
    codes,
    scales,
    bias,
    output,
    order,
    firsts,
    ends,
    experts,
    num_rows,
    num_outputs,
    num_inputs,
    num_chosen,
    form: tl.constexpr,
    is_sorted: tl.constexpr,
    gathers: tl.constexpr,
    scatters: tl.constexpr,
    has_bias: tl.constexpr,
    is_even: tl.constexpr,
    is_quick: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    num_slices: tl.constexpr,
    stages: tl.constexpr,
):
    """One tile of rows times one of outputs.

    rows: (num_rows, num_inputs). codes: NF4 (…, num_outputs, num_inputs / 2) uint8 with scales (…, num_outputs,
    num_inputs / 64) float32; INT8 (…, num_outputs, num_inputs) int8 with scales (…, num_outputs) bfloat16; plain
    weights likewise, in the rows' dtype and without scales. bias: (num_outputs,), or unused. output: (num_rows,
    num_outputs) in the rows' dtype.

    is_sorted: rows are entries of `Tiles`, each tile has the weights and the bias of one expert; without it tiles are
    cut from all rows. gathers: an entry's row is that of its token, so rows: (num_rows / num_chosen, num_inputs); else
    rows lie in the order of entries. scatters: results go where the entries are, else they lie in their order.
    is_even: inputs fill whole steps of all slices. is_quick: codes are looked up in registers, for rows in half
    precision.
    """
    tile = tl.program_id(0)
    if is_sorted:
        first = tl.load(firsts + tile)
        end = tl.load(ends + tile)
        if first >= end:
            return
        expert = tl.load(experts + tile).to(tl.int64)
    else:
        first = tile * tile_rows
        end = num_rows
        expert = tl.full((), 0, tl.int64)
    dtype: tl.constexpr = rows.dtype.element_ty
    taken = first + tl.arange(0, tile_rows)
    sources, targets = taken, taken
    if gathers or scatters:
        entries = tl.load(order + taken, mask=taken < end, other=0)
        if gathers:
            sources = entries // num_chosen
        else:
            targets = entries
    outputs = tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)
    lines = expert * num_outputs + tl.minimum(outputs, num_outputs - 1)  # those beyond are not written
    slices = tl.arange(0, num_slices)
    inputs = slices[:, None] * _SLICE + tl.arange(0, _SLICE)[None, :]  # (num_slices, 64)
    from_rows = rows + sources[None, :, None].to(tl.int64) * num_inputs + inputs[:, None, :]
    is_row = taken[None, :, None] < end
    if form == _NF4:
        at = slices[:, None] * (_SLICE // 2) + tl.arange(0, _SLICE // 2)[None, :]
        from_codes = codes + lines[None, :, None] * (num_inputs // 2) + at[:, None, :]
        from_scales = scales + lines[None, :] * (num_inputs // _SLICE) + slices[:, None]
    else:
        from_codes = codes + lines[None, :, None] * num_inputs + inputs[:, None, :]
    known = (slices < num_outputs)[:, None, None]
    total = tl.zeros((num_slices, tile_outputs, tile_rows), tl.float32)
    for step in tl.range(0, num_inputs, _SLICE * num_slices, num_stages=stages):
        is_there = is_row if is_even else is_row & (step + inputs[:, None, :] < num_inputs)
        part = tl.load(from_rows + step, mask=is_there, other=0.0)  # (num_slices, tile_rows, 64)
        if form == _NF4:
            if is_even:
                pairs = tl.load(from_codes + step // 2)  # (num_slices, tile_outputs, 32)
                scale = tl.load(from_scales + step // _SLICE)  # (num_slices, tile_outputs)
            else:
                left = (num_inputs - step) // _SLICE  # whole slices: groups are not cut
                pairs = tl.load(from_codes + step // 2, mask=slices[:, None, None] < left, other=0)
                scale = tl.load(from_scales + step // _SLICE, mask=slices[:, None] < left, other=0.0)
            even, odd = _pairs(pairs, known, dtype, is_quick)
            first_ones, second_ones = tl.split(tl.reshape(part, (num_slices, tile_rows, _SLICE // 2, 2)))
            product = _dot(even, first_ones, tl.zeros_like(total))
            total += _dot(odd, second_ones, product) * scale[:, :, None]
        else:
            if is_even:
                weights = tl.load(from_codes + step)  # (num_slices, tile_outputs, 64)
            else:
                weights = tl.load(from_codes + step, mask=step + inputs[:, None, :] < num_inputs, other=0)
            total = _dot(weights.to(dtype), part, total)
    result = tl.sum(total, 0)  # (tile_outputs, tile_rows)
    if form == _INT8:
        result *= tl.load(scales + lines).to(tl.float32)[:, None]
    if has_bias:
        result += tl.load(bias + lines).to(tl.float32)[:, None]
    to = output + targets[None, :].to(tl.int64) * num_outputs + outputs[:, None]
    tl.store(to, result.to(dtype), mask=(taken[None, :] < end) & (outputs[:, None] < num_outputs))


class Cut(NamedTuple):
    """How a product is cut: a program's rows and outputs, its slices of inputs, how many steps are read ahead of the
    multiplying, and its warps, which have a slice each or share the only one."""

    rows: int
    outputs: int
    slices: int
    stages: int
    warps: int


def cut_of(num_rows: int, *, is_plain: bool = False, is_wide: bool = False) -> Cut:
    """The cut for so many rows, or for so many an expert. is_plain: weights take four times the room of NF4. is_wide:
    rows are float32, which tensor cores do not multiply exactly, and registers hold half as many.

    As found by compiling for 8.0, 9.0 and 12.0: none of them spills, and all keep within the 99 KB that a program has
    on smaller devices. Slices are for few rows: with many there are tiles enough.
    """
    if is_wide:
        return next(cut for cut in _WIDE_CUTS if num_rows <= cut.rows or cut is _WIDE_CUTS[-1])
    if num_rows <= 8:
        return Cut(8, 32, 4, 3, 4) if is_plain else Cut(8, 32, 8, 3, 8)
    if num_rows <= 16:
        return Cut(16, 32 if is_plain else 64, 4, 3, 4)
    if num_rows <= 32:
        return Cut(32, 32 if is_plain else 64, 4, 3, 4)
    return Cut(64, 128, 1, 3, 8)


_WIDE_CUTS: Final = (
    Cut(8, 16, 4, 2, 4),
    Cut(16, 32, 1, 2, 4),
    Cut(32, 32, 1, 2, 4),
    Cut(64, 64, 1, 2, 8),
)


def takes(rows: Tensor, scheme: Quantization) -> bool:
    """Whether so many rows (…, num_inputs) of this dtype are better multiplied here."""
    if rows.numel() > MOST_ROWS * rows.shape[-1]:
        return False
    if rows.device.type != "cpu" and rows.dtype.itemsize != 2:
        return False  # without bytes to be looked up; on a CPU there is the interpreter, for tests
    return scheme in _FORMS and is_right(rows.device, scheme, rows.dtype, is_sorted=False)


def take_experts(device: torch.device, scheme: Quantization | None, dtype: torch.dtype) -> bool:
    """Whether tokens of this dtype are better multiplied here by experts' weights; without a scheme these are plain."""
    return scheme in _FORMS and dtype.itemsize <= 4 and is_right(device, scheme, dtype, is_sorted=True)


def multiply(rows: Tensor, weight: Stored | Tensor, bias: Tensor | None) -> Tensor:
    """`rows @ weights.T + bias`: (…, num_inputs) → (…, num_outputs) in the dtype of `rows`; sums in float32.

    weight: small, or plain in the rows' dtype.
    """
    num_outputs, num_inputs = weight.shape
    flat = rows.reshape(-1, num_inputs)
    return _product(flat, weight, num_outputs, bias, None).view(*rows.shape[:-1], num_outputs)


def gather_multiply(tokens: Tensor, weights: Stored | Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Each token by the weights of all its experts: (num_tokens, num_inputs) → (num_entries, num_outputs), sorted.

    weights: of all experts, one after the other. bias: (num_experts, num_outputs).
    """
    return _product(tokens, weights, weights.shape[0] // tiles.num_experts, bias, tiles, gathers=True)


def multiply_scatter(rows: Tensor, weights: Stored | Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Sorted rows by the weights of their experts, back in the order of the tokens and what they have chosen.

    (num_entries, num_inputs) → (num_entries, num_outputs); otherwise as `gather_multiply`.
    """
    return _product(rows, weights, weights.shape[0] // tiles.num_experts, bias, tiles)


def _product(
    rows: Tensor,
    weight: Stored | Tensor,
    num_outputs: int,
    bias: Tensor | None,
    tiles: Tiles | None,
    *,
    gathers: bool = False,
) -> Tensor:
    num_rows = rows.shape[0] if tiles is None else len(tiles.order)
    output = rows.new_empty((num_rows, num_outputs))
    if not num_rows:
        return output
    if isinstance(weight, Tensor):
        scheme, codes, scales = None, weight, weight
    else:
        scheme, codes, scales = weight.scheme, weight.tensors["codes"], weight.tensors["scales"]
    is_wide = rows.dtype.itemsize > 2
    count = num_rows if tiles is None else tiles.num_rows
    cut = cut_of(count, is_plain=scheme is None, is_wide=is_wide)
    num_tiles = -(-num_rows // cut.rows) if tiles is None else len(tiles.firsts)
    num_inputs = rows.shape[1]
    with torch.cuda.device_of(rows):
        _multiply[(num_tiles, -(-num_outputs // cut.outputs))](
            rows.contiguous(),
            codes,
            scales,
            scales if bias is None else bias,
            output,
            *((codes,) * 4 if tiles is None else (tiles.order, tiles.firsts, tiles.ends, tiles.experts)),
            num_rows,
            num_outputs,
            num_inputs,
            1 if tiles is None else tiles.num_chosen,
            form=_FORMS[scheme],
            is_sorted=tiles is not None,
            gathers=gathers,
            scatters=tiles is not None and not gathers,
            has_bias=bias is not None,
            is_even=num_inputs % (_SLICE.value * cut.slices) == 0,
            is_quick=not is_wide and rows.device.type == "cuda" and torch.version.hip is None,
            tile_rows=cut.rows,
            tile_outputs=cut.outputs,
            num_slices=cut.slices,
            stages=cut.stages,
            num_warps=cut.warps,
            enable_fp_fusion=True,
        )
    return output


@cache
def is_right(
    device: torch.device, scheme: Quantization | None, dtype: torch.dtype, *, is_sorted: bool
) -> bool:
    """Whether rows of this dtype, or tokens by experts, are multiplied rightly; tried once, and why not is logged.

    No two devices are compiled for alike, so none is trusted with a model before it has multiplied small numbers.
    """
    try:
        for expected, got in (_experts_tried if is_sorted else _rows_tried)(device, scheme, dtype):
            distance = float((got.float().cpu() - expected).norm() / expected.norm())
            if not distance < _CLOSE:
                raise ArithmeticError(f"a product of {len(expected)} rows is off by {distance:.3f}")
    except Exception as failure:  # a compiler's, a linker's or a driver's own, of any kind
        kind = f"{scheme or 'plain'} weights{' of experts' if is_sorted else ''}"
        logger.warning(
            "%s multiplies by %s without kernels of our own, and slower: %s", device, kind, failure
        )
        return False
    return True


def _rows_tried(
    device: torch.device, scheme: Quantization | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """What some rows should give, and what they do."""
    weight, plain = _drawn(80, 512, scheme, dtype)
    for num_rows in (1, 9, 20, 40):  # one for each cut
        rows = torch.randn(num_rows, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
        yield rows.float() @ plain.T, multiply(rows.to(device), weight.to(device), None)


def _experts_tried(
    device: torch.device, scheme: Quantization | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """What some tokens should give by two of three experts, and what they do."""
    weights, plain = _drawn(3 * 64, 512, scheme, dtype)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0]])  # one of them has none
    tiles = tiles_of(chosen.to(device), 3)
    tokens = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    each = torch.stack([token.float() @ plain.T for token in tokens]).view(4, 3, 64)
    expected = each[torch.arange(4)[:, None], chosen].flatten(0, 1)  # (entries, 64), as chosen
    order = tiles.order.cpu().long()
    yield expected[order], gather_multiply(tokens.to(device), weights.to(device), None, tiles)
    rows = tokens[order // 2]
    yield expected, multiply_scatter(rows.to(device), weights.to(device), None, tiles)


def _drawn(
    num_outputs: int, num_inputs: int, scheme: Quantization | None, dtype: torch.dtype
) -> tuple[Stored | Tensor, Tensor]:
    """A weight of small numbers, and what it stands for in float32."""
    drawn = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    if scheme is None:
        return drawn, drawn.float()
    weight = quantize(drawn, scheme)
    return weight, dequantize(weight)
