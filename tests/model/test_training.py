"""Gradients of inputs, LoRA and prompts against transformers and PEFT in one process, through a worker's messages.

B is random here, so that the gradients of A are not zero. Differences are measured as ‖g − g′‖ / ‖g′‖.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from corolla.model.batch import Policy
from corolla.model.checkpoint import open_checkpoint
from corolla.model.dropout import kept
from corolla.model.engine import Engine
from corolla.model.plain import source_of
from corolla.model.quantization import Shelf
from corolla.model.sessions import Capacity
from corolla.model.span import Span
from corolla.model.training import Room
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.messages import Message
from corolla.protocol.tensors import Encoding, Quantization
from corolla.protocol.training import NO_PART, Dropout
from corolla.protocol.training import Sequence as Run
from corolla.protocol.work import (
    Backward,
    Done,
    Failed,
    Forward,
    Gradients,
    HoldPart,
    ModelSource,
    SourceKind,
)

from .tiny import NUM_BLOCKS, save_tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-4
RANK, ALPHA = 3, 12
LENGTHS = (5, 13, 1, 20)  # beyond the windows of 8
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gemma2": ["q_proj", "o_proj", "up_proj"],
    "gemma3": ["k_proj", "v_proj", "gate_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h", "attention.dense"],
    "gpt_oss": ["q_proj", "o_proj"],
}


class Learner(NamedTuple):
    """A model under PEFT in this process: what every gradient is compared with."""

    model: Any
    layers: Any  # its blocks, an nn.ModuleList
    prompts: dict[int, nn.Parameter]

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    def parts(self, dropout: float = 0.0) -> dict[int, dict[str, Tensor]]:
        """Block → tensor name → the parameter."""
        found: dict[int, dict[str, Tensor]] = {}
        for block, layer in enumerate(self.layers):
            for name, parameter in layer.named_parameters():
                if ".lora_" in name:
                    found.setdefault(block, {})[name.removesuffix(".default.weight")] = parameter
            if block in self.prompts:
                found.setdefault(block, {})["prompt"] = self.prompts[block]
        return found

    def run(self, hidden: Tensor, sequences: Sequence[Run], blocks: tuple[int, int]) -> Tensor:
        """After these blocks, each sequence by itself; hidden: (num_tokens, hidden_size), before them."""
        outputs = []
        for x, sequence in zip(torch.split(hidden, [s.n for s in sequences]), sequences, strict=True):
            outputs.append(self._alone(x, sequence, blocks))
        return torch.cat(outputs)

    def _alone(self, x: Tensor, sequence: Run, blocks: tuple[int, int]) -> Tensor:
        """The whole base model runs; hidden states are put in before the first block and taken after the last."""
        taken: list[Tensor] = []

        def put_in(_: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
            return (x[None], *args[1:]), kwargs

        def add_prompt(block: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
                prompt, states = self.prompts[block], args[0]
                num = min(len(prompt), states.shape[1])
                return (
                    states + nn.functional.pad(prompt[:num], (0, 0, 0, states.shape[1] - num)),
                    *args[1:],
                ), kwargs

            return hook

        def take(_: nn.Module, __: Any, output: Any) -> None:
            taken.append((output[0] if isinstance(output, tuple) else output).view(x.shape))

        first, last = blocks
        handles = [self.layers[first].register_forward_pre_hook(put_in, with_kwargs=True)]
        for block in range(first, last):
            if block in self.prompts:
                handles.append(
                    self.layers[block].register_forward_pre_hook(add_prompt(block), with_kwargs=True)
                )
        handles.append(self.layers[last - 1].register_forward_hook(take))
        try:
            positions = torch.arange(sequence.position, sequence.position + sequence.n)[None]
            blank = torch.zeros(1, sequence.n, self.hidden_size)
            self.model.base_model(inputs_embeds=blank, position_ids=positions, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return taken[0]


def learner(whole: Any, targets: list[str], num_prompt: int = 0) -> Learner:
    """LoRA with random factors, and prompts before every block but the first."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(config, whole)
    generator = torch.Generator().manual_seed(5)
    layers = whole.base_model.layers
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.5 * noise * parameter.shape[-1] ** -0.5)
    size = whole.config.hidden_size
    prompts = {
        block: nn.Parameter(0.3 * torch.randn(num_prompt, size, generator=generator))
        for block in range(1, len(layers) if num_prompt else 0)
    }
    return Learner(whole, layers, prompts)


class Desk:
    """A worker's engine over a span, and requests in few words."""

    def __init__(self, span: Span, room: Room | None = None) -> None:
        self.answers: list[Message] = []
        self.engine = Engine(span, None, Capacity(0), self.answers.append, Policy(), room)
        self._request = 0

    def ask(self, kind: type[Any], *args: Any, **options: Any) -> Message:
        """The answer to a request."""
        self._request += 1
        self.engine.handle(kind(self._request, *args, **options))
        while not self.engine.is_idle:
            self.engine.run()
        return self.answers.pop()

    def hold(self, block: int, payload: bytes) -> bytes:
        """Put a part; its name."""
        name = hashlib.sha256(payload).digest()
        answer = self.ask(HoldPart, block, name, payload)
        assert isinstance(answer, Done), answer
        return name


def file_of(tensors: Mapping[str, Tensor], dropout: float = 0.0) -> bytes:
    targets = {name.rpartition(".")[0] for name in tensors if name != "prompt"}
    metadata = {f"{target}.scaling": str(ALPHA / RANK) for target in targets}
    if dropout:
        metadata["dropout"] = str(dropout)
    return safetensors.torch.save({k: v.detach().clone() for k, v in tensors.items()}, metadata)


def raw(*tensors: Tensor) -> bytes:
    return b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)


def read(payload: bytes, hidden_size: int) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.float32).view(-1, hidden_size)


def gap(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


class Result(NamedTuple):
    output: Tensor
    inputs: Tensor  # their gradient
    parts: dict[int, dict[str, Tensor]]


def through_workers(
    desks: Sequence[tuple[Desk, int, int]],
    parts: Mapping[int, bytes],
    hidden: Tensor,
    upstream: Tensor,
    sequences: Sequence[Run],
    dropout: Dropout | None = None,
) -> Result:
    """Forward over all of them and backward over all of them."""
    size = hidden.shape[1]
    names = {}
    for desk, start, end in desks:
        for block in range(start, end):
            names[block] = desk.hold(block, parts[block]) if block in parts else NO_PART
    inputs = []
    for desk, start, end in desks:
        inputs.append(hidden)
        asked = (
            start,
            end,
            Encoding.FLOAT32,
            tuple(sequences),
            tuple(names[b] for b in range(start, end)),
            dropout,
        )
        done = desk.ask(Forward, *asked, raw(hidden))
        assert isinstance(done, Done), done
        hidden = read(done.payload, size)
    gradient, found = upstream, {}
    for (desk, start, end), given in reversed(list(zip(desks, inputs, strict=True))):
        asked = (
            start,
            end,
            Encoding.FLOAT32,
            tuple(sequences),
            tuple(names[b] for b in range(start, end)),
            dropout,
        )
        made = desk.ask(Backward, *asked, raw(given, gradient))
        assert isinstance(made, Gradients), made
        at = len(made.payload) - sum(made.part_bytes)
        gradient = read(made.payload[:at], size)
        for block, num in zip(range(start, end), made.part_bytes, strict=True):
            if num:
                found[block] = safetensors.torch.load(made.payload[at : at + num])
            at += num
    return Result(hidden, gradient, found)


def compare(model: Learner, got: Result, hidden: Tensor, upstream: Tensor, sequences: Sequence[Run]) -> None:
    leaf = hidden.clone().requires_grad_()
    parts = model.parts()
    tensors = {(block, name): t for block, part in parts.items() for name, t in part.items()}
    output = model.run(leaf, sequences, (0, len(model.layers)))
    expected = torch.autograd.grad(output, [leaf, *tensors.values()], upstream)
    assert gap(got.output, output.detach()) < TOLERANCE
    assert gap(got.inputs, expected[0]) < TOLERANCE
    assert set(tensors) == {(block, name) for block, part in got.parts.items() for name in part}
    for (block, name), gradient in zip(tensors, expected[1:], strict=True):
        assert gap(got.parts[block][name], gradient) < TOLERANCE, (block, name)


def spans(folder: Path, bounds: Sequence[int]) -> list[tuple[int, int, Span]]:
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), folder)
    return [(a, b, Span.load(checkpoint, a, b, torch.float32, CPU)) for a, b in pairwise(bounds)]


def micro_batch(hidden_size: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden, upstream = torch.randn(2, sum(lengths), hidden_size, generator=generator)
    return hidden, upstream


@pytest.mark.parametrize("family", TARGETS)
def test_gradients_are_those_of_transformers_and_peft(tmp_path: Path, family: str) -> None:
    model = learner(save_tiny(tmp_path, family), TARGETS[family], num_prompt=3)
    desks = [(Desk(span), a, b) for a, b, span in spans(tmp_path, (0, 1, NUM_BLOCKS))]
    sequences = [Run(0, n) for n in LENGTHS]
    hidden, upstream = micro_batch(model.hidden_size, LENGTHS)
    parts = {block: file_of(tensors) for block, tensors in model.parts().items()}
    compare(model, through_workers(desks, parts, hidden, upstream, sequences), hidden, upstream, sequences)


def test_any_cut_into_spans_gives_the_same_gradients_at_any_positions(tmp_path: Path) -> None:
    model = learner(save_tiny(tmp_path, "mistral"), TARGETS["mistral"])
    sequences = [Run(0, 9), Run(4, 12), Run(100, 2)]
    hidden, upstream = micro_batch(model.hidden_size, [9, 12, 2])
    parts = {block: file_of(tensors) for block, tensors in model.parts().items() if block != 2}
    for bounds in ((0, NUM_BLOCKS), range(NUM_BLOCKS + 1)):
        desks = [(Desk(span), a, b) for a, b, span in spans(tmp_path, tuple(bounds))]
        got = through_workers(desks, parts, hidden, upstream, sequences)
        assert set(got.parts) == {0, 1, 3}
        leaf = hidden.clone().requires_grad_()
        with torch.no_grad():
            for parameter in model.parts()[2].values():
                parameter.zero_()
        output = model.run(leaf, sequences, (0, NUM_BLOCKS))
        (expected,) = torch.autograd.grad(output, leaf, upstream)
        assert gap(got.output, output.detach()) < TOLERANCE
        assert gap(got.inputs, expected) < TOLERANCE


def test_blocks_computed_twice_give_the_same_gradients_as_those_kept(tmp_path: Path) -> None:
    model = learner(save_tiny(tmp_path), ["q_proj", "v_proj"])
    ((_, _, span),) = spans(tmp_path, (0, NUM_BLOCKS))
    sequences = [Run(0, 20)]
    hidden, upstream = micro_batch(model.hidden_size, [20])
    parts = {block: file_of(tensors) for block, tensors in model.parts().items()}
    results, counts = [], []
    for room in (Room(), Room(activations=150_000)):
        desk = Desk(span, room)
        desk.hold(0, parts[0])
        desk.ask(Forward, 0, 1, Encoding.FLOAT32, (Run(0, 1),), (), None, raw(hidden[:1]))  # measures
        before = span.num_blocks_computed
        results.append(through_workers([(desk, 0, NUM_BLOCKS)], parts, hidden, upstream, sequences))
        counts.append(span.num_blocks_computed - before - NUM_BLOCKS)
    assert counts[0] == NUM_BLOCKS
    assert NUM_BLOCKS < counts[1] <= 2 * NUM_BLOCKS - 1
    assert torch.equal(results[0].inputs, results[1].inputs)
    for block, tensors in results[0].parts.items():
        assert all(torch.equal(results[1].parts[block][name], tensor) for name, tensor in tensors.items())


def test_dropout_is_that_of_the_published_masks(tmp_path: Path) -> None:
    p, seed, step, first = 0.25, 11, 3, 40
    model = learner(save_tiny(tmp_path), ["q_proj", "down_proj"])
    sequences = [Run(0, 6), Run(2, 9)]
    hidden, upstream = micro_batch(model.hidden_size, [6, 9])
    samples = torch.tensor([first] * 6 + [first + 1] * 9)
    positions = torch.tensor([*range(6), *range(2, 11)])
    turn = {"row": 0}

    class Masked(nn.Module):
        """In place of PEFT's dropout: our mask for the sequence that runs now."""

        def __init__(self, block: int, target: str) -> None:
            super().__init__()
            self.block, self.target = block, target

        def forward(self, x: Tensor) -> Tensor:
            mask = kept((seed, step), self.block, self.target, samples, positions, (x.shape[-1], p))
            mine = mask[:6] if turn["row"] == 0 else mask[6:]
            return x * mine / (1 - p)

    for block, layer in enumerate(model.layers):
        for target in ("self_attn.q_proj", "mlp.down_proj"):
            masks: Any = layer.get_submodule(target).lora_dropout
            masks["default"] = Masked(block, target)
    alone = model._alone

    def counted(x: Tensor, sequence: Run, blocks: tuple[int, int]) -> Tensor:
        turn["row"] = sequences.index(sequence)
        return alone(x, sequence, blocks)

    parts = {block: file_of(tensors, p) for block, tensors in model.parts().items()}
    desks = [(Desk(span), a, b) for a, b, span in spans(tmp_path, (0, 2, NUM_BLOCKS))]
    got = through_workers(desks, parts, hidden, upstream, sequences, Dropout(seed, step, first))
    leaf = hidden.clone().requires_grad_()
    halves = torch.split(leaf, [6, 9])
    output = torch.cat([counted(x, s, (0, NUM_BLOCKS)) for x, s in zip(halves, sequences, strict=True)])
    tensors = {(block, name): t for block, part in model.parts().items() for name, t in part.items()}
    expected = torch.autograd.grad(output, [leaf, *tensors.values()], upstream)
    assert gap(got.output, output.detach()) < TOLERANCE
    assert gap(got.inputs, expected[0]) < TOLERANCE
    for (block, name), gradient in zip(tensors, expected[1:], strict=True):
        assert gap(got.parts[block][name], gradient) < TOLERANCE, (block, name)
    without = through_workers(desks, parts, hidden, upstream, sequences)
    assert gap(without.output, output.detach()) > 10 * TOLERANCE


class Crowd(NamedTuple):
    """Requests of several clients to one span, and what each is answered alone. size: of hidden states."""

    desk: Desk
    span: Span
    size: int
    asks: list[tuple[Any, ...]]
    alone: list[Message]

    def together(self, *kinds: type[Any]) -> list[Message]:
        """The answers where all wait before the first is computed; of kinds[i] for the i-th."""
        self.desk.answers.clear()
        for number, (kind, ask) in enumerate(zip(kinds, self.asks, strict=True)):
            payload = ask[-1] if kind is Backward else ask[-1][: len(ask[-1]) // 2]
            self.desk.engine.handle(kind(1000 + number, *ask[:-1], payload))
        while not self.desk.engine.is_idle:
            self.desk.engine.run()
        return sorted(self.desk.answers, key=lambda answer: getattr(answer, "request", 0))

    def tensors(self, answer: Message) -> list[Tensor]:
        """The numbers of an answer."""
        assert isinstance(answer, (Done, Gradients)), answer
        sizes = answer.part_bytes if isinstance(answer, Gradients) else ()
        at = len(answer.payload) - sum(sizes)
        found = [read(answer.payload[:at], self.size)]
        for num in sizes:
            if num:
                made = safetensors.torch.load(answer.payload[at : at + num])
                found += [made[name] for name in sorted(made)]
            at += num
        return found


@pytest.fixture
def crowd(tmp_path: Path) -> Crowd:
    """Two clients with an adapter each, one with dropout and one with prompts, and one without any."""
    targets = TARGETS["llama"]
    first, second = (learner(save_tiny(tmp_path / str(n), "llama"), targets, n) for n in range(2))
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(-1.5)
    ((_, _, span),) = spans(tmp_path / "0", (0, NUM_BLOCKS))
    desk = Desk(span)
    hidden, upstream = micro_batch(first.hidden_size, [28])
    asks, at = [], 0
    for n, (adapted, dropout) in enumerate([(first, Dropout(1, 2, 3)), (second, None), (None, None)]):
        lengths = (4 + n, 3)
        names = []
        for block in range(NUM_BLOCKS if adapted is not None else 0):
            tensors = adapted.parts()[block] if adapted is not None else {}
            names.append(desk.hold(block, file_of(tensors, 0.5 if dropout else 0.0)))
        end = at + sum(lengths)
        payload = raw(hidden[at:end], upstream[at:end])
        runs = tuple(Run(0, length) for length in lengths)
        asks.append((0, NUM_BLOCKS, Encoding.FLOAT32, runs, tuple(names), dropout, payload))
        at = end
    alone = [desk.ask(Backward, *ask) for ask in asks]
    return Crowd(desk, span, first.hidden_size, asks, alone)


def test_small_requests_of_different_clients_travel_together_and_are_answered_as_alone(crowd: Crowd) -> None:
    before = crowd.span.num_blocks_computed
    found = crowd.together(Backward, Backward, Backward)
    assert crowd.span.num_blocks_computed - before == NUM_BLOCKS  # once for all of them
    for one, other in zip(found, crowd.alone, strict=True):
        for tensor, expected in zip(crowd.tensors(one), crowd.tensors(other), strict=True):
            assert gap(tensor, expected) < 1e-5
    before = crowd.span.num_blocks_computed
    crowd.together(Forward, Backward, Forward)
    assert crowd.span.num_blocks_computed - before == 2 * NUM_BLOCKS  # both ways do not mix


def test_what_fails_in_one_request_fails_it_alone(crowd: Crowd) -> None:
    start, end, encoding, runs, names, dropout, payload = crowd.asks[1]
    huge = (read(payload, crowd.size) * 1e37).clamp(-3e38, 3e38)
    crowd.asks[1] = (start, end, encoding, runs, names, dropout, raw(huge))
    found = crowd.together(Backward, Backward, Backward)
    assert isinstance(found[1], Failed)
    assert found[1].problem().details["not_finite"]
    for place in (0, 2):
        for tensor, expected in zip(
            crowd.tensors(found[place]), crowd.tensors(crowd.alone[place]), strict=True
        ):
            assert gap(tensor, expected) < 1e-5


def test_requests_that_have_no_room_together_run_each_alone(
    crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, sizes = crowd.span.forward, []

    def crowded(hidden: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(hidden))
        if len(hidden) > 10:
            raise torch.OutOfMemoryError("no room")
        return forward(hidden, *rest)

    monkeypatch.setattr(crowd.span, "forward", crowded)
    found = crowd.together(Backward, Backward, Backward)
    assert sizes[0] == 24
    for one, other in zip(found, crowd.alone, strict=True):
        for tensor, expected in zip(crowd.tensors(one), crowd.tensors(other), strict=True):
            assert gap(tensor, expected) < 1e-6


@pytest.mark.parametrize("scheme", [Quantization.NF4, Quantization.INT8])
def test_adapters_learn_on_quantized_weights(tmp_path: Path, scheme: Quantization) -> None:
    whole = save_tiny(tmp_path)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path)), tmp_path)
    shelf = Shelf.of(tmp_path / "shelf", "f" * 64, scheme)
    span = Span.load(checkpoint, 0, NUM_BLOCKS, torch.float32, CPU, shelf=shelf)
    layers: Any = whole.base_model.layers
    with torch.no_grad():  # the local model computes with the same rounded weights
        for block, layer in enumerate(layers):
            for name, linear in layer.named_modules():
                if isinstance(linear, nn.Linear):
                    rounded: Any = span.modules[block].get_submodule(name)
                    linear.weight.copy_(rounded.dense_weight())
    model = learner(whole, ["q_proj", "down_proj"])
    hidden, upstream = micro_batch(model.hidden_size, [24])
    sequences = [Run(0, 24)]
    parts = {block: file_of(tensors) for block, tensors in model.parts().items()}
    got = through_workers([(Desk(span), 0, NUM_BLOCKS)], parts, hidden, upstream, sequences)
    leaf = hidden.clone().requires_grad_()
    tensors = {(block, name): t for block, part in model.parts().items() for name, t in part.items()}
    output = model.run(leaf, sequences, (0, NUM_BLOCKS))
    expected = torch.autograd.grad(output, [leaf, *tensors.values()], upstream)
    # int8 products round their inputs to bfloat16; its gradients are those of the weights that it stands for.
    tolerance = TOLERANCE if scheme is Quantization.NF4 else 0.03
    assert gap(got.inputs, expected[0]) < tolerance
    for (block, name), gradient in zip(tensors, expected[1:], strict=True):
        assert gap(got.parts[block][name], gradient) < tolerance, (block, name)


def test_a_span_of_bfloat16_gives_float32_gradients_of_adapters(tmp_path: Path) -> None:
    model = learner(save_tiny(tmp_path), ["q_proj", "down_proj"])
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path)), tmp_path)
    rough = Desk(Span.load(checkpoint, 0, NUM_BLOCKS, torch.bfloat16, CPU))
    exact = Desk(Span.load(checkpoint, 0, NUM_BLOCKS, torch.float32, CPU))
    hidden, upstream = micro_batch(model.hidden_size, [24])
    parts = {block: file_of(tensors) for block, tensors in model.parts().items()}
    got, expected = (
        through_workers([(desk, 0, NUM_BLOCKS)], parts, hidden, upstream, [Run(0, 24)])
        for desk in (rough, exact)
    )
    assert gap(got.inputs, expected.inputs) < 0.05
    for block, tensors in expected.parts.items():
        for name, gradient in tensors.items():
            assert got.parts[block][name].dtype is torch.float32
            assert gap(got.parts[block][name], gradient) < 0.05, (block, name)


def refused(desk: Desk, *args: Any) -> CorollaError:
    answer = desk.ask(*args)
    assert isinstance(answer, Failed), answer
    return answer.problem()


def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    ((_, _, span),) = spans(tmp_path, (1, 3))
    desk = Desk(span)
    hidden, upstream = micro_batch(64, [4])
    runs, form = (Run(0, 4),), Encoding.FLOAT32
    missing = hashlib.sha256(b"elsewhere").digest()
    problem = refused(desk, Forward, 1, 3, form, runs, (missing, NO_PART), None, raw(hidden))
    assert problem.code is Code.ADAPTER_MISSING
    assert problem.details["missing"] == [missing.hex()]
    assert refused(desk, Forward, 0, 3, form, runs, (), None, raw(hidden)).code is Code.BLOCKS_OUT_OF_RANGE
    assert refused(desk, Forward, 1, 3, form, runs, (), None, raw(hidden[:3])).code is Code.BAD_SHAPE
    problem = refused(desk, Backward, 1, 3, form, runs, (), None, raw(hidden))
    assert problem.code is Code.BAD_SHAPE
    upstream[2, 5] = float("nan")
    problem = refused(desk, Backward, 1, 3, form, runs, (), None, raw(hidden, upstream))
    assert problem.code is Code.NOT_FINITE
    assert "gradients of the outputs" in problem.message
    assert problem.details["token"] == 2
    huge = torch.full_like(hidden, 3e38)
    problem = refused(desk, Backward, 1, 3, form, runs, (), None, raw(hidden, huge))
    assert problem.code is Code.INTERNAL
    assert "gradients" in problem.details["not_finite"]


def test_a_micro_batch_too_large_for_memory_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    ((_, _, span),) = spans(tmp_path, (0, NUM_BLOCKS))
    desk = Desk(span, Room(activations=100_000))
    hidden, upstream = micro_batch(64, [40])
    problem = refused(
        desk, Backward, 0, NUM_BLOCKS, Encoding.FLOAT32, (Run(0, 40),), (), None, raw(hidden, upstream)
    )
    assert problem.code is Code.OUT_OF_MEMORY
    fitting = problem.details["max_tokens"]
    assert 0 < fitting < 40
    payload = raw(hidden[:fitting], upstream[:fitting])
    answer = desk.ask(Backward, 0, NUM_BLOCKS, Encoding.FLOAT32, (Run(0, fitting),), (), None, payload)
    assert isinstance(answer, Gradients)


@pytest.mark.skipif("COROLLA_TEST_MODEL" not in os.environ, reason="COROLLA_TEST_MODEL names no GGUF file")
def test_gradients_on_a_real_model_are_those_of_peft(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(source_of(os.environ["COROLLA_TEST_MODEL"]), tmp_path)
    whole: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    model = learner(whole.train(False).requires_grad_(False), ["q_proj", "v_proj", "down_proj"], num_prompt=2)
    num = len(model.layers)
    lengths = [7, 40]
    tokens = torch.arange(100, 100 + sum(lengths))
    hidden = whole.get_input_embeddings()(tokens).detach()
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    parts = {block: file_of(tensors) for block, tensors in model.parts().items()}
    desks = [
        (Desk(Span.load(checkpoint, a, b, torch.float32, CPU)), a, b)
        for a, b in ((0, num // 2), (num // 2, num))
    ]
    sequences = [Run(0, n) for n in lengths]
    compare(model, through_workers(desks, parts, hidden, upstream, sequences), hidden, upstream, sequences)
