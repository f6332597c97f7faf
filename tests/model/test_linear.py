"""Linear layers with packed weights against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import nn

from corolla.model.linear import PackedLinear, is_packable, packed
from corolla.model.siblings import PartLinear, joined

CPU = torch.device("cpu")


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias).requires_grad_(False).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 200])
def test_one_packed_copy_serves_every_number_of_rows(rows: int, bias: bool) -> None:
    plain = layer(bias)
    fast = packed(plain)
    assert isinstance(fast, PackedLinear)
    inputs = torch.randn(1, rows, 48)
    assert torch.allclose(fast(inputs), plain(inputs), atol=1e-5)
    assert torch.allclose(fast(inputs[0]), plain(inputs[0]), atol=1e-5)


def test_a_row_alone_equals_the_same_row_among_others() -> None:
    fast = packed(layer())
    inputs = torch.randn(9, 48)
    alone = torch.cat([fast(row[None]) for row in inputs])
    assert torch.allclose(fast(inputs), alone, atol=1e-6)


def test_gradients_of_the_input_are_those_of_the_plain_layer() -> None:
    plain = layer()
    fast = packed(plain)
    inputs = torch.randn(2, 5, 48, requires_grad=True)
    upstream = torch.randn(2, 5, 80)
    (expected,) = torch.autograd.grad(plain(inputs), inputs, upstream)
    (gradient,) = torch.autograd.grad(fast(inputs), inputs, upstream)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    fast = packed(layer())
    assert not fast(torch.randn(2, 48)).requires_grad
    with torch.no_grad():
        assert not fast(torch.randn(2, 48, requires_grad=True)).requires_grad


def test_the_plain_weights_are_not_kept() -> None:
    plain = layer()
    fast = packed(plain)
    assert isinstance(fast, PackedLinear)
    assert not list(fast.parameters())
    assert not list(fast.buffers())
    assert torch.equal(fast.dense_weight(), plain.weight)
    assert fast.bytes == plain.weight.nbytes + plain.bias.nbytes


@pytest.mark.skipif(not is_packable(torch.bfloat16, CPU), reason="this CPU computes no bfloat16")
def test_bfloat16_is_packed_too() -> None:
    plain = layer(dtype=torch.bfloat16)
    inputs = torch.randn(3, 48, dtype=torch.bfloat16, requires_grad=True)
    fast = packed(plain)
    assert isinstance(fast, PackedLinear)
    output = fast(inputs)
    assert output.dtype is torch.bfloat16
    exact = F.linear(inputs.float(), plain.weight.float(), plain.bias.float())
    assert torch.allclose(output.float(), exact, atol=2e-2)
    output.sum().backward()
    assert inputs.grad is not None
    assert torch.allclose(inputs.grad[0].float(), plain.weight.float().sum(0), atol=5e-2)


def test_what_is_no_plain_linear_layer_stays_as_it_is() -> None:
    norm = nn.LayerNorm(8)
    assert packed(norm) is norm
    doubles = nn.Linear(4, 4).double()
    assert packed(doubles) is doubles
    assert not is_packable(torch.float32, torch.device("cuda"))


# layers in one piece


def siblings(*, bias: bool = True) -> tuple[list[PartLinear], list[nn.Linear]]:
    """Three layers that share a product, and the plain ones that they stand for."""
    plain = [nn.Linear(24, size, bias=bias).requires_grad_(False) for size in (16, 8, 8)]
    weight = torch.cat([layer.weight for layer in plain])
    added = torch.cat([layer.bias for layer in plain]) if bias else None
    return joined(PackedLinear(weight, added), [16, 8, 8]), plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 9])
def test_siblings_share_one_product_and_give_what_each_gives(bias: bool, num_rows: int) -> None:
    parts, plain = siblings(bias=bias)
    whole: Any = parts[0]._joint.layer
    products: list[int] = []
    whole.register_forward_hook(lambda *_: products.append(1))
    rows = torch.randn(1, num_rows, 24)
    for index in (1, 0, 2):  # in any order
        assert torch.allclose(parts[index](rows), plain[index](rows), atol=1e-6)
    assert len(products) == 1
    assert parts[0]._joint._rows is None  # and nothing is kept
    assert torch.allclose(parts[0](rows), plain[0](rows), atol=1e-6)
    other = torch.randn(1, num_rows, 24)  # one that broke off leaves nothing to the next
    for part, layer in zip(parts, plain, strict=True):
        assert torch.allclose(part(other), layer(other), atol=1e-6)
        assert torch.allclose(part.dense_weight(), layer.weight)
        assert (part.in_features, part.out_features) == (layer.in_features, layer.out_features)
    assert sum(part.bytes for part in parts) == whole.bytes


def test_gradients_flow_through_siblings() -> None:
    parts, plain = siblings()
    rows = torch.randn(5, 24, requires_grad=True)
    upstream = [torch.randn(5, part.out_features) for part in parts]
    gradients = [
        torch.autograd.grad([layer(rows) for layer in layers], rows, upstream)[0] for layers in (parts, plain)
    ]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)
    assert torch.allclose(parts[1].multiply_back(upstream[1]), upstream[1] @ plain[1].weight, atol=1e-5)
