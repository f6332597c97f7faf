"""A linear layer whose weights lie as the device's fastest kernel wants them.

On a CPU torch computes one row on one thread and reads memory at a third of its speed. oneDNN's prepacked
weights do not: rows of 1024 → 2816 in float32 take 392 µs instead of 679 for one row, 448 instead of 1094
for eight, and less for 512 too, so that one packed copy serves every number of rows and the plain weights
are not kept. On other devices, and for dtypes that oneDNN does not compute here, the layer stays as it is.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

# oneDNN's kernel for one or two rows reads memory a sixth slower than the one for four (1024 → 2816 in
# float32: 455 and 502 µs against 395; in bfloat16 219 and 241 against 191), so empty rows are added.
_FEWEST_ROWS: Final = 4


class PackedLinear(nn.Module):
    """A linear layer of a CPU: packed weights, frozen; the gradient of its input is known.

    `packed` is an opaque oneDNN tensor and deliberately neither parameter nor buffer: `state_dict` and `to`
    cannot handle it. `dense_weight` unpacks a copy.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out_features, in_features), contiguous, on the CPU."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias: Tensor | None = bias

    def forward(self, rows: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        if rows.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Product.apply(rows, self.packed, self.bias)  # type: ignore[no-untyped-call]
            return product
        return _multiply(rows, self.packed, self.bias)

    def dense_weight(self) -> Tensor:
        """A plain copy of the weights, (out_features, in_features)."""
        return self.packed.to_dense()

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.packed.dtype}"


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    num_rows = rows.numel() // rows.shape[-1]
    if num_rows >= _FEWEST_ROWS:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return product
    filled = F.pad(rows.reshape(num_rows, -1), (0, 0, 0, _FEWEST_ROWS - num_rows))
    product = torch.ops.mkldnn._linear_pointwise(filled, packed, bias, "none", [], "")
    return product[:num_rows].view(*rows.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """oneDNN's product gives no gradient, silently; this is it.

    Weights are unpacked for the moment of the backward pass: 2 ms for 1024 → 2816, a few percent of a
    micro-batch, against keeping a second copy of all weights.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        context.packed = packed
        return _multiply(rows, packed, bias)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ context.packed.to_dense(), None, None


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
