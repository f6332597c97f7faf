"""Experts apart from each other: the same sums as transformers', in every scheme, of the chosen ones alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corolla.model.attention import Batch
from corolla.model.checkpoint import Checkpoint, open_checkpoint
from corolla.model.experts import STACKED, Experts
from corolla.model.families import Skeleton
from corolla.model.linear import FrozenLinear
from corolla.model.quantization import Shelf, dequantize, quantize
from corolla.model.span import Span
from corolla.protocol.tensors import Quantization
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import NUM_BLOCKS, save_tiny

CPU = torch.device("cpu")
# Sizes that every scheme takes.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 128},
    "qwen3_moe": {"moe_intermediate_size": 64, "intermediate_size": 128},
    "gpt_oss": {"intermediate_size": 64},
}
BLOCK = 2
# Quantized layers on a CPU round rows and products to bfloat16, and there are two behind one another.
ROUNDING = 2**-6


class Mixture:
    """A tiny model, whole and as a checkpoint."""

    def __init__(self, folder: Path, family: str) -> None:
        self.whole = save_tiny(folder / "model", family, **FAMILIES[family])
        source = ModelSource(SourceKind.FOLDER, str(folder / "model"))
        self.checkpoint: Checkpoint = open_checkpoint(source, folder / "cache")

    def span(self, shelf: Shelf | None) -> Span:
        return Span.load(self.checkpoint, 0, NUM_BLOCKS, torch.float32, CPU, shelf=shelf)

    def plain(self, scheme: Quantization | None) -> nn.Module:
        """transformers' experts of one block, with the weights that the scheme stands for."""
        block: Any = self.whole.base_model.get_submodule(f"layers.{BLOCK}.mlp")
        plain: Any = type(block.experts)(self.whole.config)
        plain.load_state_dict(block.experts.state_dict())
        for leaf in STACKED:
            stack = getattr(plain, leaf)
            for expert in range(stack.shape[0]):
                weight = stack.data[expert].T if plain.is_transposed else stack.data[expert]
                if scheme is not None:
                    weight.copy_(dequantize(quantize(weight, scheme)))
        return plain.requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=FAMILIES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture(tmp_path_factory.mktemp("mixture"), request.param)


def experts_of(span: Span) -> Experts:
    found: Any = span.modules[BLOCK].get_submodule("mlp.experts")
    assert isinstance(found, Experts)
    return found


def routed(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and two different experts of four for each, with their weights."""
    random = torch.Generator().manual_seed(4)
    chosen = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(num_tokens)])
    return (
        torch.randn(num_tokens, 64, generator=random),
        chosen,
        torch.rand(num_tokens, 2, generator=random),
    )


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


SCHEMES = pytest.mark.parametrize("scheme", [None, *Quantization])


@SCHEMES
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_experts_give_what_transformers_gives_with_the_same_weights(
    mixture: Mixture, tmp_path: Path, scheme: Quantization | None, num_tokens: int
) -> None:
    span = mixture.span(Shelf(tmp_path, scheme) if scheme else None)
    hidden, chosen, weights = routed(num_tokens)
    got = experts_of(span)(hidden, chosen, weights)
    expected = mixture.plain(scheme)(hidden, chosen, weights)
    assert distance(got, expected) < (ROUNDING if scheme else 1e-5)


@SCHEMES
def test_the_gradients_of_inputs_and_of_routing_weights_are_those_of_the_plain_experts(
    mixture: Mixture, tmp_path: Path, scheme: Quantization | None
) -> None:
    span = mixture.span(Shelf(tmp_path, scheme) if scheme else None)
    upstream = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    gradients = []
    for experts in (experts_of(span), mixture.plain(scheme)):
        hidden, chosen, weights = routed(40)
        inputs = (hidden.requires_grad_(), weights.requires_grad_())
        gradients.append(torch.autograd.grad(experts(hidden, chosen, weights), inputs, upstream))
    for got, expected in zip(*gradients, strict=True):
        assert distance(got, expected) < (ROUNDING if scheme else 1e-5)


def test_only_the_experts_that_a_token_was_sent_to_are_computed(mixture: Mixture) -> None:
    experts = experts_of(mixture.span(None))
    called: list[int] = []
    for index, layer in enumerate(experts._down):
        layer.register_forward_hook(lambda *_, index=index: called.append(index))
    hidden, _, weights = routed(1)
    experts(hidden, torch.tensor([[3, 1]]), weights)
    assert called == [1, 3]


@pytest.mark.parametrize("scheme", Quantization)
def test_a_span_of_quantized_experts_is_as_light_as_planned_and_kept(
    mixture: Mixture, tmp_path: Path, scheme: Quantization
) -> None:
    shelf = Shelf(tmp_path, scheme)
    first = mixture.span(shelf)
    experts = experts_of(first)
    layers = [layer for layer in (*experts._gate_up, *experts._down) if isinstance(layer, FrozenLinear)]
    assert len(layers) == 8
    skeleton = Skeleton(mixture.checkpoint.config)
    prefix = f"model.layers.{BLOCK}.mlp.experts."
    planned = skeleton._bytes(prefix, torch.float32, scheme)
    biases = sum(4 * skeleton.tensors[name].numel() for name in skeleton.tensors if "experts" in name)
    assert sum(layer.bytes for layer in layers) <= planned < biases / 3
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = mixture.span(shelf)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    hidden, batch = routed(9)[0], Batch.stateless((9,))
    assert torch.equal(first.forward(hidden, batch), second.forward(hidden, batch))


def test_an_older_shelf_without_experts_is_filled_up(mixture: Mixture, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, Quantization.INT8)
    first = mixture.span(shelf)
    part = f"model.layers.{BLOCK}."
    kept = shelf.read(part)
    shelf.write(part, {name: weight for name, weight in kept.items() if not name.endswith("gate_up_proj.2")})
    second = mixture.span(shelf)
    assert shelf.read(part).keys() == kept.keys()
    hidden, batch = routed(9)[0], Batch.stateless((9,))
    assert torch.equal(first.forward(hidden, batch), second.forward(hidden, batch))
