"""Parts are read strictly, held under a limit, and lie over just the tokens of their own session."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corolla.model.adapters import Adapters, read_part, write_part
from corolla.model.checkpoint import open_checkpoint
from corolla.model.dropout import kept
from corolla.model.engine import Engine
from corolla.model.linear import packed
from corolla.model.pool import PAGE_TOKENS
from corolla.model.sessions import Capacity
from corolla.model.span import Span
from corolla.model.training import Room
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.messages import Message
from corolla.protocol.steps import NEW_ROW, Row
from corolla.protocol.tensors import Encoding
from corolla.protocol.training import NO_PART, Sequence
from corolla.protocol.work import (
    CloseCache,
    Compute,
    Done,
    Failed,
    Forward,
    HoldPart,
    ModelSource,
    OpenCache,
    SourceKind,
)

from .tiny import NUM_BLOCKS, save_tiny

CPU = torch.device("cpu")
SIZE = 64
TARGET = "self_attn.q_proj"


def part_file(
    seed: int = 0, rank: int = 2, metadata: Mapping[str, str] | None = None, **tensors: Tensor
) -> bytes:
    """A part of the tiny Llama's blocks."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        f"{TARGET}.lora_A": torch.randn(rank, SIZE, generator=generator),
        f"{TARGET}.lora_B": torch.randn(SIZE, rank, generator=generator),
        "prompt": torch.randn(3, SIZE, generator=generator),
    }
    made |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return safetensors.torch.save(made, dict(metadata or {}))


def named(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()


def code_of(attempt: Any, *args: Any) -> Code:
    with pytest.raises(CorollaError) as caught:
        attempt(*args)
    return caught.value.code


class Layers(nn.Module):
    """A block of one packed and one plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.q_proj = packed(nn.Linear(SIZE, SIZE))
        self.norm = nn.LayerNorm(SIZE)


def adapters(limit_bytes: int = 1 << 20) -> Adapters:
    return Adapters({2: Layers(), 3: Layers()}, SIZE, CPU, limit_bytes)


def test_a_part_is_read_with_its_scalings_and_dropout() -> None:
    part = read_part(part_file(metadata={f"{TARGET}.scaling": "0.5", "dropout": "0.1"}))
    assert part.scalings == {TARGET: 0.5}
    assert part.dropout == 0.1
    assert read_part(part_file()).scalings == {TARGET: 1.0}
    assert set(safetensors.torch.load(write_part(part.tensors))) == set(part.tensors)


MALFORMED = {
    "no file": (b"what is this", Code.BAD_REQUEST),
    "cut short": (part_file()[:-4], Code.BAD_REQUEST),
    "empty": (safetensors.torch.save({}), Code.BAD_REQUEST),
    "unknown tensor": (part_file(bias=torch.ones(1, SIZE)), Code.BAD_REQUEST),
    "half": (part_file(prompt=torch.ones(1, SIZE, dtype=torch.float16)), Code.BAD_REQUEST),
    "flat": (part_file(prompt=torch.ones(SIZE)), Code.BAD_SHAPE),
    "no tokens": (part_file(prompt=torch.ones(0, SIZE)), Code.BAD_SHAPE),
    "one factor": (safetensors.torch.save({f"{TARGET}.lora_A": torch.ones(2, SIZE)}), Code.BAD_SHAPE),
    "ranks": (part_file(self_attn__q_proj__lora_A=torch.ones(5, SIZE)), Code.BAD_SHAPE),
    "nan": (part_file(prompt=torch.full((1, SIZE), float("nan"))), Code.NOT_FINITE),
    "dropout": (part_file(metadata={"dropout": "1.0"}), Code.BAD_REQUEST),
    "scaling": (part_file(metadata={f"{TARGET}.scaling": "much"}), Code.BAD_REQUEST),
    "infinite": (part_file(metadata={f"{TARGET}.scaling": "inf"}), Code.BAD_REQUEST),
    "unknown note": (part_file(metadata={"use_dora": "true"}), Code.BAD_REQUEST),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_part_is_refused_by_name(case: str) -> None:
    payload, code = MALFORMED[case]
    assert code_of(read_part, payload) is code


def test_a_part_must_fit_its_block() -> None:
    held = adapters()
    wide = part_file(prompt=torch.ones(1, SIZE + 1))
    wrong_in = part_file(self_attn__q_proj__lora_A=torch.ones(2, SIZE - 1))
    wrong_out = part_file(self_attn__q_proj__lora_B=torch.ones(SIZE + 1, 2))
    elsewhere = part_file(norm__lora_A=torch.ones(1, SIZE), norm__lora_B=torch.ones(SIZE, 1))
    for payload in (wide, wrong_in, wrong_out, elsewhere):
        assert code_of(held.hold, named(payload), 2, payload) is Code.BAD_SHAPE
    payload = part_file()
    assert code_of(held.hold, named(payload), 4, payload) is Code.BLOCKS_OUT_OF_RANGE
    assert code_of(held.hold, named(payload[:-1]), 2, payload) is Code.BAD_REQUEST
    assert held.num_bytes == 0


def test_least_recently_used_parts_make_room_and_those_in_use_stay() -> None:
    files = [part_file(seed) for seed in range(4)]
    size = read_part(files[0]).num_bytes
    held = adapters(2 * size + size // 2)
    names = [named(file) for file in files]
    held.hold(names[0], 2, files[0])
    held.hold(names[1], 2, files[1])
    held.pin((2, 4), (names[0], NO_PART))
    held.unpin((names[0], NO_PART))  # used last, so the other one goes
    held.hold(names[2], 3, files[2])
    assert held.num_bytes == 2 * size
    with pytest.raises(CorollaError) as caught:
        held.pin((2, 4), (names[1], names[0]))
    assert caught.value.code is Code.ADAPTER_MISSING
    assert caught.value.details["missing"] == [names[1].hex()]
    held.pin((2, 4), (names[0], names[2]))
    assert code_of(held.hold, names[3], 2, files[3]) is Code.OUT_OF_MEMORY
    held.unpin((names[0], names[2]))
    held.hold(names[3], 2, files[3])
    assert set(held.pin((2, 4), (names[3], NO_PART))) == {2}
    assert code_of(held.pin, (2, 4), (names[3],)) is Code.BAD_REQUEST


class Desk:
    """A worker's engine over the tiny Llama."""

    def __init__(self, span: Span) -> None:
        self.answers: list[Message] = []
        self.engine = Engine(span, None, Capacity(16), self.answers.append, room=Room())
        self.request = 0

    def say(self, kind: type[Any], *args: Any, **options: Any) -> None:
        self.request += 1
        self.engine.handle(kind(self.request, *args, **options))

    def run(self) -> list[Message]:
        """All answers so far."""
        while not self.engine.is_idle:
            self.engine.run()
        answers, self.answers[:] = list(self.answers), []
        return answers

    def open(self, session: bytes, parts: tuple[bytes, ...]) -> None:
        self.say(OpenCache, session, 0, NUM_BLOCKS, Encoding.FLOAT32, max_rows=1, max_tokens=64, parts=parts)
        (answer,) = self.run()
        assert isinstance(answer, Done), answer

    def step(self, session: bytes, step: int, position: int, hidden: Tensor) -> None:
        row = Row(0 if position else NEW_ROW, position, len(hidden))
        self.say(Compute, session, step, step - 1, (row,), payload=hidden.numpy().tobytes())


@pytest.fixture
def span(tmp_path: Path) -> Span:
    save_tiny(tmp_path)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path)), tmp_path)
    span = Span.load(checkpoint, 0, NUM_BLOCKS, torch.float32, CPU)
    span.allocate(16, PAGE_TOKENS)
    return span


def outputs(desk: Desk) -> list[Tensor]:
    answers = desk.run()
    assert all(isinstance(answer, Done) for answer in answers), answers
    done = sorted((answer for answer in answers if isinstance(answer, Done)), key=lambda a: a.request)
    return [torch.frombuffer(bytearray(a.payload), dtype=torch.float32).view(-1, SIZE) for a in done]


def test_sessions_with_different_adapters_in_one_batch_compute_as_alone(span: Span) -> None:
    desk = Desk(span)
    files = [part_file(seed) for seed in range(3)]
    for file in files:
        desk.say(HoldPart, 1, named(file), file)
        desk.run()
    first, second, third = map(named, files)
    adapters_of: dict[bytes, tuple[bytes, ...]] = {
        b"a" * 16: (NO_PART, first, NO_PART, second),
        b"b" * 16: (),
        b"c" * 16: (third, third, NO_PART, NO_PART),
    }
    generator = torch.Generator().manual_seed(1)
    inputs = {session: torch.randn(12, SIZE, generator=generator) for session in adapters_of}
    for session, parts in adapters_of.items():
        desk.open(session, parts)
    together: list[list[Tensor]] = []
    for step, (start, end) in enumerate(((0, 2), (2, 9), (9, 10), (10, 12)), start=1):
        before = span.num_blocks_computed
        for session, hidden in inputs.items():
            desk.step(session, step, start, hidden[start:end])
        together.append(outputs(desk))
        assert span.num_blocks_computed - before == NUM_BLOCKS  # one pass for all
    for i, (session, parts) in enumerate(adapters_of.items()):
        got = torch.cat([step[i] for step in together])
        # The same tokens as one sequence of training, which knows no cache.
        payload = inputs[session].numpy().tobytes()
        desk.say(Forward, 0, NUM_BLOCKS, Encoding.FLOAT32, (Sequence(0, 12),), parts, None, payload)
        (alone,) = outputs(desk)
        assert float((got - alone).norm() / alone.norm()) < 1e-5
    plain = torch.cat([step[1] for step in together])
    worn = torch.cat([step[0] for step in together])
    assert float((plain - worn).norm() / plain.norm()) > 0.01


def test_a_session_whose_adapter_is_not_here_is_told_which_parts(span: Span) -> None:
    desk = Desk(span)
    file = part_file()
    parts = (named(file), *[NO_PART] * (NUM_BLOCKS - 1))
    ask = (b"a" * 16, 0, NUM_BLOCKS, Encoding.FLOAT32, 1, 64, parts)
    desk.say(OpenCache, *ask)
    (answer,) = desk.run()
    assert isinstance(answer, Failed)
    assert answer.problem().code is Code.ADAPTER_MISSING
    assert answer.problem().details["missing"] == [named(file).hex()]
    desk.say(HoldPart, 0, named(file), file)
    desk.say(OpenCache, *ask)
    assert all(isinstance(answer, Done) for answer in desk.run())
    desk.engine.handle(CloseCache(b"a" * 16))


def test_decodes_go_on_between_the_blocks_of_a_training_request(span: Span) -> None:
    desk = Desk(span)
    desk.open(b"a" * 16, ())
    hidden = torch.randn(20, SIZE, generator=torch.Generator().manual_seed(3))
    desk.say(Forward, 0, NUM_BLOCKS, Encoding.FLOAT32, (Sequence(0, 20),), payload=hidden.numpy().tobytes())
    training = desk.request
    desk.engine.run()  # its first block, since nothing else waits
    for step in (1, 2, 3):
        desk.step(b"a" * 16, step, step - 1, hidden[:1])
    order = [answer.request for answer in desk.run() if isinstance(answer, Done)]
    assert order == [training + 1, training + 2, training + 3, training]


def test_training_has_a_turn_however_busy_the_sessions_are(span: Span) -> None:
    desk = Desk(span)
    desk.open(b"a" * 16, ())
    hidden = torch.randn(20, SIZE, generator=torch.Generator().manual_seed(3))
    desk.say(Forward, 0, NUM_BLOCKS, Encoding.FLOAT32, (Sequence(0, 20),), payload=hidden.numpy().tobytes())
    training = desk.request
    for step in range(1, 60):
        desk.step(b"a" * 16, step, step - 1, hidden[:1])
        desk.engine.run()
    assert training in {answer.request for answer in desk.answers if isinstance(answer, Done)}


def test_the_masks_of_dropout_follow_the_published_formula() -> None:
    samples, positions = torch.tensor([4, 4, 5]), torch.tensor([0, 1, 0])
    mask = kept((2**63 + 7, 3), 9, TARGET, samples, positions, (50, 0.3))
    wrap = (1 << 64) - 1
    target = int.from_bytes(hashlib.sha256(TARGET.encode()).digest()[:8], "little")
    for token in range(3):
        for feature in range(50):
            h = 0
            for word in (2**63 + 7, 3, 9, target, int(samples[token]), int(positions[token]), feature):
                h = ((h ^ word) + 0x9E3779B97F4A7C15) & wrap
                h = ((h ^ h >> 30) * 0xBF58476D1CE4E5B9) & wrap
                h = ((h ^ h >> 27) * 0x94D049BB133111EB) & wrap
                h ^= h >> 31
            assert bool(mask[token, feature]) == (h >> 40 >= round(0.3 * 2**24))


class Kinds(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The dtypes of all tensors that are computed within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        self.seen |= {tensor.dtype for tensor in tree_leaves(answer) if isinstance(tensor, Tensor)}
        return answer


def test_the_masks_of_dropout_are_computed_in_integers_which_no_device_rounds() -> None:
    samples, positions = torch.tensor([4, 4, 2**62]), torch.tensor([0, 2**40, 7])
    with Kinds() as kinds:
        kept((-5, 3), 9, TARGET, samples, positions, (50, 0.3))
    assert kinds.seen == {torch.int64, torch.bool}


def test_the_masks_of_dropout_are_the_same_however_the_work_is_cut() -> None:
    samples, positions = torch.arange(300) // 7, torch.arange(300) % 7
    whole = kept((3, 1), 2, TARGET, samples, positions, (600, 0.3))
    threads = torch.get_num_threads()
    try:
        for num_threads, size in ((1, 300), (4, 300), (2, 41)):
            torch.set_num_threads(num_threads)
            pieces = zip(torch.split(samples, size), torch.split(positions, size), strict=True)
            cut = [kept((3, 1), 2, TARGET, *piece, (600, 0.3)) for piece in pieces]
            assert torch.cat(cut).equal(whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_has_the_same_masks_of_dropout() -> None:
    samples, positions = torch.arange(300) // 7, torch.arange(300) % 7
    there = kept((3, 1), 2, TARGET, samples.cuda(), positions.cuda(), (600, 0.3))
    assert there.cpu().equal(kept((3, 1), 2, TARGET, samples, positions, (600, 0.3)))


def test_as_many_inputs_are_dropped_as_asked() -> None:
    samples, positions = torch.zeros(400, dtype=torch.int64), torch.arange(400)
    masks = [kept((1, step), 0, TARGET, samples, positions, (500, 0.2)) for step in (0, 1)]
    assert abs(float(masks[0].float().mean()) - 0.8) < 0.005
    agreeing = float((masks[0] == masks[1]).float().mean())
    assert abs(agreeing - (0.8**2 + 0.2**2)) < 0.005  # steps are independent of each other
