"""Linear layers with packed weights against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import nn

from corolla.model.linear import PackedLinear, is_packable, packed

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
