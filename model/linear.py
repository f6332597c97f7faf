"""Linear layers whose weights lie as the device's fastest kernel wants them; nobody trains these weights.

Every layer here keeps one copy of its weights, chooses the kernel by the number of rows, and knows the gradient
of its input, which none of the fast kernels gives by itself.

On a CPU torch computes one row on one thread and reads memory at a third of its speed. oneDNN's prepacked
weights do not: rows of 1024 → 2816 in float32 take 392 µs instead of 679 for one row, 448 instead of 1094
for eight, and less for 512 too. On other devices, and for dtypes that oneDNN does not compute here, plain
layers stay as they are.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from ..protocol.errors import Code, error
from ..protocol.tensors import Quantization
from .quantization import Stored, can_hold, multiply_nf4, quantize, wide
from .strips import INT4_GROUP, LINE_INPUTS, STRIP, STRIP_INPUTS, Form, Strips

# oneDNN's kernel for one or two rows reads memory a sixth slower than the one for four (1024 → 2816 in
# float32: 455 and 502 µs against 395; in bfloat16 219 and 241 against 191), so empty rows are added.
_FEWEST_ROWS: Final = 4

# Weights of 8 and 4 bits, 1024 → 2816, µs on two shared cores. int8: 86 for one row, 164 for 4, 514 for 8: the
# kernel's tiles end at 4 rows, so more are cut into fours. Dequantized: 510 for 8, 640 for 16, 930 for 32 (1230
# in fours), 7400 for 512. int4: 112 for one row, 172 for 4, 327 for 8, 618 for 16, 1130 for 32 (3000
# dequantized), and 128 take 4300 either way; 512 take 9500.
_INT8_AT_ONCE: Final = 4
_INT8_ROWS: Final = 15
_INT4_AT_ONCE: Final = 8
_INT4_ROWS: Final = 96
_TILE_FEATURES: Final = 512  # of output, dequantized at a time: a few MB, which stay in the cache
_NF4_ROWS: Final = 64  # above about these bitsandbytes too makes weights wide, all of a layer's at once
_DEVICE_TILE: Final = 1 << 26  # weights likewise, on a GPU: 128 MB beside the model, and a few calls a layer


class FrozenLinear(nn.Module, ABC):
    """A linear layer with weights in a form of its own: neither parameters nor buffers, since `state_dict`
    and `to` could not handle most of them.

    strips: where the weights are, for kernels of our own, if those know their form. bytes: of weight and bias.
    A low-rank term is added around a layer: `layer(rows) + b(a(rows))`.
    """

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, weight_bytes: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias: Tensor | None = bias
        self.strips: Strips | None = None
        self.bytes = weight_bytes + (bias.nbytes if bias is not None else 0)

    def forward(self, rows: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features) in the dtype of `rows`; the gradient of `rows` flows."""
        if rows.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
            return product
        return self.multiply(rows)

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:
        """`rows @ weight.T + bias`, without a graph."""

    @abstractmethod
    def multiply_back(self, gradient: Tensor) -> Tensor:
        """`gradient @ weight`: (…, out_features) → (…, in_features)."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """A plain copy of the weights that the layer computes with, (out_features, in_features)."""

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.bytes:,} bytes"


class _Product(torch.autograd.Function):
    """A frozen layer's product and the gradient of its input."""

    @staticmethod
    def forward(context: Any, rows: Tensor, layer: FrozenLinear) -> Tensor:
        context.layer = layer
        return layer.multiply(rows)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return context.layer.multiply_back(gradients[0]), None


class PackedLinear(FrozenLinear):
    """Weights as oneDNN packs them, on a CPU. `packed` is an opaque oneDNN tensor.

    Backward unpacks them for a moment: 2 ms for 1024 → 2816, a few percent of a micro-batch, against keeping
    a second copy of all weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out_features, in_features), contiguous, on the CPU."""
        super().__init__(weight.shape[1], weight.shape[0], bias, weight.nbytes)
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.strips = _strips_of(self.packed, weight)

    def multiply(self, rows: Tensor) -> Tensor:
        num_rows = rows.numel() // rows.shape[-1]
        if num_rows >= _FEWEST_ROWS:
            return self._product(rows)
        flat = rows.reshape(num_rows, -1)
        missing = (0, 0, 0, _FEWEST_ROWS - num_rows)
        # One row is taken four times, in half the time of adding zeros.
        filled = flat.expand(_FEWEST_ROWS, -1) if num_rows == 1 else F.pad(flat, missing)
        return self._product(filled)[:num_rows].view(*rows.shape[:-1], -1)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        return gradient @ self.packed.to_dense()

    def dense_weight(self) -> Tensor:
        return self.packed.to_dense()

    def _product(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return product


def _strips_of(packed: Tensor, weight: Tensor) -> Strips | None:
    """How oneDNN lays out its weights is found by looking at both ends of them."""
    forms = {torch.float32: (Form.FLOAT32, 1), torch.bfloat16: (Form.BFLOAT16, 2)}
    num_strips, is_odd = divmod(weight.shape[0], STRIP)
    if not num_strips or is_odd or weight.dtype not in forms or weight.shape[1] % STRIP_INPUTS:
        return None
    if torch.ops.mkldnn._nbytes(packed) != weight.nbytes:
        return None
    form, together = forms[weight.dtype]
    address = int(torch.ops.mkldnn.data_ptr(packed))
    numbers = (ctypes.c_byte * weight.nbytes).from_address(address)
    lying = torch.frombuffer(numbers, dtype=weight.dtype)
    strips = lying.view(num_strips, weight.shape[1] // together, STRIP, together).transpose(1, 2).flatten(2)
    ends = ((strips[0], weight[:STRIP]), (strips[-1], weight[-STRIP:]))
    return Strips(form, address) if all(torch.equal(*end) for end in ends) else None


class RoundedLinear(FrozenLinear):
    """What int8 and int4 on a CPU share: rows are rounded to bfloat16, each by itself, and so are products.

    Only with bfloat16 rows are torch's kernels fast (a hundred times). Sums are kept in float32. Above `_rows`
    rows the weights are dequantized tile by tile into a matrix product. Gradients keep the dtype they come in.
    """

    _rows: int
    _at_once: int

    def multiply(self, rows: Tensor) -> Tensor:
        flat = rows.reshape(-1, self.in_features).to(torch.bfloat16)  # (num_rows, in_features)
        if flat.shape[0] <= self._rows:
            parts = [self._multiply_few(part) for part in torch.split(flat, self._at_once)]
            product = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            product = self._multiply_many(flat)
        product = product.to(rows.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*rows.shape[:-1], self.out_features)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        flat = gradient.reshape(-1, self.out_features)
        back = flat.new_zeros((flat.shape[0], self.in_features))
        for first in range(0, self.out_features, _TILE_FEATURES):
            last = min(first + _TILE_FEATURES, self.out_features)
            back.addmm_(flat[:, first:last], self._tile(first, last, gradient.dtype))
        return back.view(*gradient.shape[:-1], self.in_features)

    def dense_weight(self) -> Tensor:
        return self._tile(0, self.out_features, torch.float32)

    def _multiply_many(self, rows: Tensor) -> Tensor:
        """(num_rows, out_features) in bfloat16, or in float32 where the CPU knows no bfloat16."""
        wide = rows if is_packable(torch.bfloat16, rows.device) else rows.float()
        product = wide.new_empty((rows.shape[0], self.out_features))
        for first in range(0, self.out_features, _TILE_FEATURES):
            last = min(first + _TILE_FEATURES, self.out_features)
            product[:, first:last] = wide @ self._tile(first, last, wide.dtype).T
        return product.to(torch.bfloat16)

    @abstractmethod
    def _multiply_few(self, rows: Tensor) -> Tensor:
        """(num_rows, in_features) → (num_rows, out_features), both bfloat16."""

    @abstractmethod
    def _tile(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Weights of outputs [first, last), a multiple of `_TILE_FEATURES` first: (last - first, in_features)."""


class Int8Linear(RoundedLinear):
    """8 bits a weight and one scale a row, on a CPU."""

    _rows = _INT8_ROWS
    _at_once = _INT8_AT_ONCE

    def __init__(self, stored: Stored, bias: Tensor | None) -> None:
        codes, scales = stored.tensors["codes"], stored.tensors["scales"]
        super().__init__(stored.shape[1], stored.shape[0], bias, codes.nbytes + scales.nbytes)
        self._codes, self._scales = codes, scales
        if self.out_features % STRIP == 0 and self.in_features % LINE_INPUTS == 0:
            self.strips = Strips(Form.INT8, codes.data_ptr(), scales.float(), self.out_features)

    def _multiply_few(self, rows: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(rows, self._codes, self._scales)

    def _multiply_many(self, rows: Tensor) -> Tensor:
        wide = rows if is_packable(torch.bfloat16, rows.device) else rows.float()
        product = wide.new_empty((rows.shape[0], self.out_features))
        for first in range(0, self.out_features, _TILE_FEATURES):
            tile = self._codes[first : first + _TILE_FEATURES].to(wide.dtype)  # exact: codes are small
            product[:, first : first + _TILE_FEATURES] = wide @ tile.T
        return product.mul_(self._scales).to(torch.bfloat16)

    def _tile(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return (self._codes[first:last].float() * self._scales[first:last, None].float()).to(dtype)


class Int4Linear(RoundedLinear):
    """4 bits a weight, a step and a middle for each 32 weights of a row, on a CPU that torch has a kernel for.

    Codes lie as `_convert_weight_to_int4pack_for_cpu` puts them: blocks of output features, in each of them
    input after input, and in a byte two outputs half a block apart. Outputs are filled up to whole blocks.
    """

    _rows = _INT4_ROWS
    _at_once = _INT4_AT_ONCE

    def __init__(self, stored: Stored, bias: Tensor | None) -> None:
        out_features, in_features = stored.shape
        codes, scales = stored.tensors["codes"], stored.tensors["scales"]
        self._block = int4_block()
        missing = -out_features % self._block
        wide = torch.stack([codes & 15, codes >> 4], dim=-1).view(stored.shape).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(wide, (0, 0, 0, missing)), 1)
        super().__init__(in_features, out_features, bias, packed.nbytes + scales.nbytes)
        self._packed: Tensor = packed  # (filled outputs, in_features / 2) uint8, by name
        self._scales = F.pad(scales, (0, 0, 0, missing)).contiguous()  # (in / group, filled outputs, 2)
        self._group = in_features // scales.shape[0]
        if self._block == STRIP and not missing and self._group == INT4_GROUP:
            self.strips = Strips(Form.INT4, packed.data_ptr(), self._scales, out_features)

    def _multiply_few(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self._packed, self._group, self._scales
        )
        return product[:, : self.out_features]

    def _tile(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        filled = first + -(-(last - first) // self._block) * self._block
        half = self._block // 2
        pairs = self._packed.view(-1, half)[first // self._block * self.in_features :]
        pairs = pairs[: (filled - first) // self._block * self.in_features].view(-1, self.in_features, half)
        codes = torch.cat([pairs & 15, pairs >> 4], dim=-1)  # (blocks, in_features, block)
        steps, middles = self._scales[:, first:filled].permute(2, 1, 0)[..., None]  # (outputs, groups, 1)
        by_output = codes.transpose(1, 2).reshape(filled - first, -1, self._group)
        weights = (by_output.float() - 8).mul_(steps).add_(middles)
        return weights.view(filled - first, -1)[: last - first].to(dtype)


class Products(Protocol):
    """Kernels for products with small weights as they lie on a device, such as those of `gpu.products`."""

    def takes(self, rows: Tensor, scheme: Quantization) -> bool:
        """Whether so many rows (…, in_features) of this dtype are better multiplied by them."""

    def take_experts(self, device: torch.device, scheme: Quantization | None, dtype: torch.dtype) -> bool:
        """Whether tokens of this dtype are better multiplied by them by experts' weights; None is plain ones."""

    def multiply(self, rows: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
        """(…, in_features) → (…, out_features) in the dtype of `rows`."""


def products_of(device: torch.device) -> Products | None:
    """The kernels for small weights on this device; None where there are none, or none that can be launched."""
    if device.type != "cuda":
        return None
    from .gpu.probe import is_usable

    if not is_usable(device):
        return None
    from .gpu import products  # here, because Triton may be missing

    return products


class SmallLinear(FrozenLinear):
    """Weights in one of the forms of `Stored`, on any device: NF4, and int8 where torch has no kernel for it.

    products: for as many rows as they take; others are multiplied by weights made wide again, tile by tile.
    """

    def __init__(
        self, stored: Stored, bias: Tensor | None, device: torch.device, products: Products | None = None
    ) -> None:
        self._stored = stored.to(device)
        super().__init__(stored.shape[1], stored.shape[0], bias, self._stored.nbytes)
        self._products = products
        self._tile = _TILE_FEATURES
        if device.type != "cpu":  # where a tile should keep the device busy
            self._tile = max(_DEVICE_TILE // self.in_features, 1)

    def multiply(self, rows: Tensor) -> Tensor:
        if self._products is not None and self._products.takes(rows, self._stored.scheme):
            return self._products.multiply(rows, self._stored, self.bias)
        return self._multiply_wide(rows)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        back = gradient.new_zeros((*gradient.shape[:-1], self.in_features))
        for first, last in self._tiles():
            back += gradient[..., first:last] @ wide(self._stored.outputs(first, last), gradient.dtype)
        return back

    def dense_weight(self) -> Tensor:
        return wide(self._stored, torch.float32)

    def _multiply_wide(self, rows: Tensor) -> Tensor:
        product = rows.new_empty((*rows.shape[:-1], self.out_features))
        for first, last in self._tiles():
            product[..., first:last] = self._part(rows, self._stored.outputs(first, last))
        return product if self.bias is None else product.add_(self.bias)

    def _tiles(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.out_features, self._tile):
            yield first, min(first + self._tile, self.out_features)

    def _part(self, rows: Tensor, weight: Stored) -> Tensor:
        return F.linear(rows, wide(weight, rows.dtype))


class Nf4Linear(SmallLinear):
    """NF4 as bitsandbytes keeps it, which multiplies a few rows on a GPU where kernels of ours do not."""

    def _multiply_wide(self, rows: Tensor) -> Tensor:
        if rows.device.type == "cpu" or rows.numel() > _NF4_ROWS * self.in_features:
            return super()._multiply_wide(rows)
        codes, scales = self._stored.tensors["codes"], self._stored.tensors["scales"]
        return multiply_nf4(rows, codes, scales, self._stored.shape, self.bias)


class PlainInt8Linear(SmallLinear):
    """int8 where torch has no kernel for it. Codes are exact in every dtype, scales come after the product."""

    def _part(self, rows: Tensor, weight: Stored) -> Tensor:
        codes, scales = weight.tensors["codes"], weight.tensors["scales"]
        return F.linear(rows, codes.to(rows.dtype)) * scales.to(rows.dtype)


class DenseLinear(FrozenLinear):
    """Plain weights, as torch multiplies by them: those of siblings in one piece."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out_features, in_features)."""
        super().__init__(weight.shape[1], weight.shape[0], bias, weight.nbytes)
        self._weight = weight

    def multiply(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self._weight, self.bias)

    def multiply_back(self, gradient: Tensor) -> Tensor:
        return gradient @ self._weight

    def dense_weight(self) -> Tensor:
        return self._weight.clone()


def check_scheme(scheme: Quantization | None, device: torch.device) -> None:
    """Raise `BAD_CONFIG` unless this device computes with weights of this scheme."""
    if scheme is Quantization.INT4 and (device.type != "cpu" or not int4_block()):
        raise error(
            Code.BAD_CONFIG,
            f"quantization int4 needs a CPU with AVX2 or AVX-512, the device is {device}"
            f" ({torch.backends.cpu.get_cpu_capability()})",
            "choose int8 or nf4",
        )


def int4_block() -> int:
    """Output features in a block of torch's packed int4 weights here; 0 if their layout is not known."""
    size = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 0)
    if not size:
        return 0
    codes = torch.arange(size, dtype=torch.int32)[:, None].expand(-1, 2).contiguous() % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).view(2, size // 2)
    back = torch.cat([packed & 15, packed >> 4], dim=-1)  # (2, size)
    return size if torch.equal(back.T.to(torch.int32), codes) else 0


def is_packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN computes this dtype on this device faster than the plain layer."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def packed(layer: nn.Module) -> nn.Module:
    """`layer` itself, or its packed form if it is a plain linear layer that can be packed.

    The caller drops `layer`, and with it the plain weights.
    """
    if type(layer) is not nn.Linear:
        return layer
    weight = layer.weight.detach()
    if not is_packable(weight.dtype, weight.device):
        return layer
    bias = layer.bias.detach() if layer.bias is not None else None
    return PackedLinear(weight.contiguous(), bias)


def shrunk(layer: nn.Module, scheme: Quantization) -> nn.Module:
    """`layer` packed, or quantized if it is a plain linear layer of a shape that the scheme takes."""
    if type(layer) is not nn.Linear or not can_hold(scheme, layer.out_features, layer.in_features):
        return packed(layer)
    weight = layer.weight.detach()
    bias = layer.bias.detach() if layer.bias is not None else None
    return quantized(quantize(weight, scheme), bias, weight.device)


def quantized(
    stored: Stored, bias: Tensor | None, device: torch.device, products: Products | None = None
) -> FrozenLinear:
    """The layer that computes with these weights on this device; bias: there already.

    products: other kernels than the device's own.
    """
    kernels = products or products_of(device)
    match stored.scheme:
        case Quantization.NF4:
            return Nf4Linear(stored, bias, device, kernels)
        case Quantization.INT8 if device.type == "cpu" and kernels is None:
            return Int8Linear(stored, bias)
        case Quantization.INT8:
            return PlainInt8Linear(stored, bias, device, kernels)
        case Quantization.INT4:
            return Int4Linear(stored, bias)
