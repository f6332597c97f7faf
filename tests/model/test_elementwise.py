"""What lies between two products: the same whether it is compiled or not, and compiled for few sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from corolla.model.elementwise import Elementwise, fused
from corolla.model.norms import RootMeanSquareNorm

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 16, 48
SIZES = (1, 2, 3, 40)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block:
    """The modules that differ from block to block."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.norms = [
            RootMeanSquareNorm(
                nn.Parameter(torch.randn(size, generator=generator), requires_grad=False), 1e-6
            )
            for size in (SIZE, DIM, DIM)
        ]
        self.other_norm = nn.LayerNorm(SIZE).requires_grad_(False)
        self.activation = nn.SiLU()


@torch.inference_mode()
def everything(pieces: Elementwise, block: Block, num_tokens: int) -> list[Tensor]:
    """Each piece on the same random numbers, in every form that it has."""
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads = random(num_tokens, HEADS + 2 * KV_HEADS, DIM)[:, : HEADS + KV_HEADS]  # a part of a wider product
    cosines, sines = random(num_tokens, 1, DIM), random(num_tokens, 1, DIM)
    norm, *head_norms = block.norms
    return [
        pieces.turned(heads, cosines, sines, HEADS, (None, None)),
        pieces.turned(heads, cosines, sines, HEADS, (head_norms[0], head_norms[1])),
        *pieces.added_and_normed(random(num_tokens, SIZE), random(num_tokens, SIZE), norm),
        *pieces.added_and_normed(random(num_tokens, SIZE), random(num_tokens, SIZE), block.other_norm),
        pieces.gated(random(num_tokens, 2 * SIZE), block.activation),
    ]


def assert_equal_to_plain(fuse: Callable[..., Any], sizes: tuple[int, ...], tolerance: float) -> None:
    pieces = Elementwise(fuse)
    for num_tokens in sizes:
        for block in (Block(1), Block(2), Block(3)):
            ours = everything(pieces, block, num_tokens)
            plain = everything(Elementwise(), block, num_tokens)
            for one, other in zip(ours, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_pieces_are_compiled_for_one_token_and_for_many_and_for_no_block_by_itself() -> None:
    counters = []

    def fuse(piece: Callable[..., Any]) -> Callable[..., Any]:
        counters.append(CompileCounter())
        return torch.compile(piece, fullgraph=True, backend=counters[-1])

    assert_equal_to_plain(fuse, SIZES, 0.0)
    assert len(counters) == 4
    assert all(1 <= counter.frame_count <= 3 for counter in counters)  # one token, two, and any number


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_fused_kernels_compute_the_same() -> None:
    """By the compiler for this machine's CPU, which makes other kernels than a GPU's of the same pieces."""
    assert_equal_to_plain(fused, (1, 3, 8), 1e-5)
