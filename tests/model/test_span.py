"""Split equals whole, in float32, for every certified family and at every block boundary.

The whole is transformers' own model, computed at once without a cache. Weights are drawn so that logits
spread by about 1; the largest difference allowed is 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from corolla.model.attention import Batch, Segment
from corolla.model.checkpoint import open_checkpoint
from corolla.model.ends import Ends
from corolla.model.families import CERTIFIED
from corolla.model.groups import grouped
from corolla.model.pages import SessionPages
from corolla.model.pool import GONE, PagePool
from corolla.model.span import Span
from corolla.model.tables import ROLLBACK_TOKENS
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import NEW_ROW, Row
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import FAMILIES, NUM_BLOCKS, VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-5
NUM_PAGES, PAGE_TOKENS = 24, 4


class Tiny(NamedTuple):
    """A tiny model: whole, and ready to be split."""

    whole: PreTrainedModel
    folder: Path
    ends: Ends

    def span(self, start: int, end: int) -> Span:
        checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(self.folder)), self.folder)
        span = Span.load(checkpoint, start, end, torch.float32, CPU)
        span.allocate(NUM_PAGES, PAGE_TOKENS)
        return span

    def windowed_span(self, start: int, end: int) -> Span:
        """One whose blocks are in groups by their windows, as a worker has it."""
        span = self.span(start, end)
        grouping = grouped(span.windows, span.cache_shapes)
        span.allocate(8 * NUM_PAGES * grouping.num_groups, PAGE_TOKENS, grouping=grouping)
        return span

    def logits(self, tokens: list[int]) -> Tensor:
        """The whole model's, (num_tokens, vocab_size), computed afresh."""
        with torch.inference_mode():
            logits: Tensor = self.whole(torch.tensor([tokens]), use_cache=False).logits
            return logits[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def make(family: str) -> Tiny:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            whole = save_tiny(folder, family)
            checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), folder)
            made[family] = Tiny(whole, folder, Ends.load(checkpoint, torch.float32, CPU))
        return made[family]

    return make


class Session:
    """Rows of tokens on a chain of spans, driven as the engine does; remembers what each row should hold."""

    def __init__(self, tiny: Tiny, spans: list[Span], length: int = 64) -> None:
        self._tiny = tiny
        self._spans = spans
        self._pages = []
        for span in spans:
            assert span.cache is not None
            pool = PagePool(span.cache.num_pages, PAGE_TOKENS)
            self._pages.append(SessionPages(pool, 4, length, span.cache.grouping.windows))
        self._segments: list[tuple[Segment, ...]] = []
        self._random = torch.Generator().manual_seed(7)
        self._step_id = 0
        self.rows: list[list[int]] = []

    def tables(self) -> list[tuple[int, ...]]:
        """The pages of every row after the last step, in every group of every span."""
        rows = [row for segments in self._segments for row in segments]
        return [pages for row in rows for pages in (row.pages, *row.others)]

    def step(self, *rows: Row) -> float:
        """The largest difference of the new tokens' logits from the whole model's."""
        self._step_id += 1
        new = [self._tokens(row.n) for row in rows]
        hidden = self._tiny.ends.embed(torch.tensor([token for tokens in new for token in tokens]))
        self._segments = []
        for span, pages in zip(self._spans, self._pages, strict=True):
            applied = pages.apply(self._step_id, self._step_id - 1, rows)
            span.copy_pages(applied.copies)
            hidden = span.forward(hidden.to(span.device), Batch(applied.segments)).cpu()
            self._segments.append(applied.segments)
        old = [self.rows[row.parent][: row.position] if row.parent != NEW_ROW else [] for row in rows]
        self.rows = [prefix + tokens for prefix, tokens in zip(old, new, strict=True)]
        expected = [
            self._tiny.logits(tokens)[row.position :] for row, tokens in zip(rows, self.rows, strict=True)
        ]
        return float((self._tiny.ends.head(hidden) - torch.cat(expected)).abs().max())

    def _tokens(self, n: int) -> list[int]:
        drawn: list[int] = torch.randint(3, VOCAB_SIZE, (n,), generator=self._random).tolist()
        return drawn


def test_every_certified_family_is_tested_here() -> None:
    names = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[make().model_type] for make in FAMILIES.values()}
    assert names == set(CERTIFIED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("boundary", range(1, NUM_BLOCKS))
def test_split_equals_whole(tiny: Callable[[str], Tiny], family: str, boundary: int) -> None:
    model = tiny(family)
    session = Session(model, [model.span(0, boundary), model.span(boundary, NUM_BLOCKS)])
    steps = [
        (Row(NEW_ROW, 0, 11),),  # a prompt in chunks, beyond the windows of 8
        (Row(0, 11, 2),),
        (Row(0, 13, 9),),
        (Row(0, 22, 1),),  # decode
        (Row(0, 23, 1),),
        (Row(0, 18, 3),),  # roll back within a page
        (Row(0, 21, 1), Row(0, 21, 1), Row(NEW_ROW, 0, 5)),  # fork, and a row beside
        (Row(1, 22, 1), Row(2, 5, 1), Row(0, 20, 2), Row(1, 22, 0)),  # reorder, fork again, roll one back
        (Row(2, 22, 1), Row(3, 22, 1)),  # drop two
    ]
    for rows in steps:
        assert session.step(*rows) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_at_a_time_equals_the_span(tiny: Callable[[str], Tiny], family: str) -> None:
    model = tiny(family)
    span = model.span(0, NUM_BLOCKS)
    hidden = model.ends.embed(torch.arange(3, 22))
    whole = span.forward(hidden, Batch.stateless((12, 7)))
    for start, end in pairwise(range(NUM_BLOCKS + 1)):
        hidden = span.forward(hidden, Batch.stateless((12, 7)), blocks=(start, end))
    assert torch.equal(hidden, whole)
    assert span.num_blocks_computed == 2 * NUM_BLOCKS


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_alone(tiny: Callable[[str], Tiny], family: str) -> None:
    model = tiny(family)
    together, alone = model.span(1, NUM_BLOCKS), model.span(1, NUM_BLOCKS)
    pool = PagePool(NUM_PAGES, PAGE_TOKENS)
    sessions = [SessionPages(pool, 1, 64) for _ in range(3)]
    random = torch.Generator().manual_seed(3)
    lengths = [0, 0, 0]
    for step, counts in enumerate([(13, 2, 0), (1, 9, 1), (1, 1, 6), (1, 1, 1)], start=1):
        segments, inputs = [], []
        for i, n in enumerate(counts):
            row = Row(0 if step > 1 else NEW_ROW, lengths[i], n)
            segments.append(sessions[i].apply(step, step - 1, (row,)).segments[0])
            inputs.append(torch.randn(n, together.hidden_size, generator=random))
            lengths[i] += n
        got = together.forward(torch.cat(inputs), Batch(tuple(segments)))
        apart = [alone.forward(x, Batch((s,))) for x, s in zip(inputs, segments, strict=True)]
        assert float((got - torch.cat(apart)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_stateless_pass_are_those_of_the_whole(
    tiny: Callable[[str], Tiny], family: str
) -> None:
    model = tiny(family)
    tokens = torch.arange(5, 17)[None]
    whole: Any = model.whole.base_model
    embedded = model.whole.get_input_embeddings()(tokens).detach()
    if family.startswith("bloom"):  # it norms what it is given; here a span's input is meant
        whole.word_embeddings_layernorm = nn.Identity()
    inputs = embedded.clone().requires_grad_()
    expected_output = whole(inputs_embeds=inputs, use_cache=False).last_hidden_state
    upstream = torch.randn(expected_output.shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(expected_output, inputs, upstream)
    span = model.span(0, NUM_BLOCKS)
    mine = embedded[0].clone().requires_grad_()
    # Families with scaled embeddings scale them in the embedding module, before what both are given here.
    norm = whole.get_submodule(CERTIFIED[type(model.whole).__name__].norm)
    output = norm(span.forward(mine, Batch.stateless((12,)))[None])
    (gradient,) = torch.autograd.grad(output, mine, upstream)
    assert float((output - expected_output).detach().abs().max()) < TOLERANCE
    assert float((gradient - expected[0]).abs().max()) < TOLERANCE * float(expected.abs().max())


LONG_ROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000.0,
}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "longrope": (
        "phi3",
        {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONG_ROPE},
    ),
    "yarn": (
        "qwen3",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama3": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "linear": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
}


class Scaled(NamedTuple):
    """A model whose positions are scaled beyond 16 tokens."""

    model: Tiny

    def logits(self, tokens: list[int]) -> Tensor:
        """The whole model's, of an instance that saw no other text: it remembers the longest."""
        whole = self.model.whole
        fresh = type(whole)(whole.config).train(False)
        fresh.load_state_dict(whole.state_dict())
        with torch.inference_mode():
            logits: Tensor = fresh(torch.tensor([tokens])).logits[0]
            return logits


@pytest.fixture(params=SCALED)
def scaled(request: pytest.FixtureRequest, tmp_path: Path) -> Scaled:
    family, changes = SCALED[request.param]
    whole = save_tiny(tmp_path, family, **changes)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path)), tmp_path)
    return Scaled(Tiny(whole, tmp_path, Ends.load(checkpoint, torch.float32, CPU)))


def test_rotary_frequencies_follow_the_length_of_the_own_row_alone(scaled: Scaled) -> None:
    ends, span = scaled.model.ends, scaled.model.span(0, NUM_BLOCKS)
    rows = [list(range(3, 43)), list(range(50, 60)), list(range(10, 34)), [7, 8, 9]]
    lengths = tuple(len(row) for row in rows)
    hidden = ends.embed(torch.tensor([token for row in rows for token in row]))
    logits = ends.head(span.forward(hidden, Batch.stateless(lengths)))
    for got, row in zip(torch.split(logits, list(lengths)), rows, strict=True):
        assert float((got - scaled.logits(row)).abs().max()) < TOLERANCE


def test_a_session_beyond_the_original_length_beside_a_short_one(scaled: Scaled) -> None:
    """Each is computed as a text of the length that it was opened for, in any chunks, rolled back or not."""
    ends, span = scaled.model.ends, scaled.model.span(0, NUM_BLOCKS)
    texts = [list(range(3, 43)), list(range(50, 60))]
    pool = PagePool(NUM_PAGES, PAGE_TOKENS)
    sessions = [SessionPages(pool, 1, len(text)) for text in texts]
    expected = [scaled.logits(text) for text in texts]
    steps = [((0, 9), (0, 4)), ((9, 12), (4, 1)), ((21, 1), (5, 1)), ((15, 2), (3, 3)), ((17, 23), (6, 4))]
    for step_id, ranges in enumerate(steps, start=1):
        segments = [
            session.apply(step_id, step_id - 1, (Row(NEW_ROW if step_id == 1 else 0, start, n),)).segments[0]
            for session, (start, n) in zip(sessions, ranges, strict=True)
        ]
        tokens = [text[start : start + n] for text, (start, n) in zip(texts, ranges, strict=True)]
        hidden = span.forward(ends.embed(torch.tensor(tokens[0] + tokens[1])), Batch(tuple(segments)))
        whole = [logits[start : start + n] for logits, (start, n) in zip(expected, ranges, strict=True)]
        assert float((ends.head(hidden) - torch.cat(whole)).abs().max()) < TOLERANCE


WINDOWED = ["mistral", "gemma2", "gemma3", "gpt_oss", "exaone4", "olmo3", "starcoder2"]


@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("back_to", [3, 7, 8, 9, 17, 18, 19, 25])
def test_rolled_back_equals_fresh_on_both_sides_of_the_window(
    tiny: Callable[[str], Tiny], family: str, back_to: int
) -> None:
    """Windows are 8: back to where nothing was hidden yet, to just there, and to a window before the end."""
    model = tiny(family)
    assert model.whole.config.sliding_window == 8
    session = Session(model, [model.span(0, 2), model.span(2, NUM_BLOCKS)])
    assert session.step(Row(NEW_ROW, 0, 20)) < TOLERANCE
    assert session.step(Row(0, 20, 6)) < TOLERANCE
    assert session.step(Row(0, back_to, 1)) < TOLERANCE
    assert session.step(Row(0, back_to + 1, 10)) < TOLERANCE


@pytest.mark.parametrize("family", WINDOWED)
def test_pages_let_go_of_behind_the_window_change_nothing(tiny: Callable[[str], Tiny], family: str) -> None:
    model = tiny(family)
    session = Session(model, [model.windowed_span(0, 3), model.windowed_span(3, NUM_BLOCKS)], length=200)
    assert session.step(Row(NEW_ROW, 0, 70)) < TOLERANCE
    for position in (70, 110):
        assert session.step(Row(0, position, 40)) < TOLERANCE
    assert session.step(Row(0, 150, 1)) < TOLERANCE
    assert any(GONE in pages for pages in session.tables())
    assert session.step(Row(0, 151 - ROLLBACK_TOKENS, 3)) < TOLERANCE
    assert session.step(Row(0, 154 - ROLLBACK_TOKENS, 60), Row(0, 153 - ROLLBACK_TOKENS, 60)) < TOLERANCE
    assert session.step(Row(1, 213 - ROLLBACK_TOKENS, 1), Row(0, 214 - ROLLBACK_TOKENS, 9)) < TOLERANCE


def test_a_step_without_tokens_is_no_work(tiny: Callable[[str], Tiny]) -> None:
    span = tiny("llama").span(0, 2)
    assert span.forward(torch.empty(0, 64), Batch(())).shape == (0, 64)
    assert span.num_blocks_computed == 0


def refusals(tiny: Tiny) -> Iterator[tuple[Code, Callable[[], object]]]:
    span = tiny.span(1, 3)
    one = Batch.stateless((1,))
    yield Code.BLOCKS_OUT_OF_RANGE, lambda: tiny.span(2, NUM_BLOCKS + 1)
    yield Code.BLOCKS_OUT_OF_RANGE, lambda: tiny.span(2, 2)
    yield Code.BLOCKS_OUT_OF_RANGE, lambda: span.forward(torch.zeros(1, 64), one, (0, 2))
    yield Code.BAD_SHAPE, lambda: span.forward(torch.zeros(1, 65), one)
    yield Code.BAD_SHAPE, lambda: span.forward(torch.zeros(2, 64), one)


def test_what_does_not_fit_the_span_is_refused_by_name(tiny: Callable[[str], Tiny]) -> None:
    for code, attempt in refusals(tiny("llama")):
        with pytest.raises(CorollaError) as caught:
            attempt()
        assert caught.value.code is code


def test_blocks_that_do_not_fit_are_refused_with_those_that_do(tiny: Callable[[str], Tiny]) -> None:
    model = tiny("llama")
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(model.folder)), model.folder)
    size = model.span(0, 2).bytes
    with pytest.raises(CorollaError) as caught:
        Span.load(checkpoint, 1, 4, torch.float32, CPU, memory_bytes=size)
    assert caught.value.code is Code.DOES_NOT_FIT
    assert "1:3" in caught.value.remedy
    assert Span.load(checkpoint, 1, 3, torch.float32, CPU, memory_bytes=size).bytes == size
    assert Span.load(checkpoint, 1, 4, torch.bfloat16, CPU, memory_bytes=size).bytes <= size


def test_a_span_of_bfloat16_computes_in_it(tiny: Callable[[str], Tiny]) -> None:
    model = tiny("llama")
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(model.folder)), model.folder)
    span = Span.load(checkpoint, 0, NUM_BLOCKS, torch.bfloat16, CPU)
    hidden = model.ends.embed(torch.arange(3, 20))
    exact = model.span(0, NUM_BLOCKS).forward(hidden, Batch.stateless((17,)))
    rough = span.forward(hidden.to(torch.bfloat16), Batch.stateless((17,)))
    assert rough.dtype is torch.bfloat16
    assert float((rough.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_checkpoint_of_the_base_model_loads_as_the_whole_one(tmp_path: Path) -> None:
    """Those of BLOOM on the hub are such: their tensors lack the base model's name, and the head is tied."""
    whole: Any = save_tiny(tmp_path / "whole", "bloom")
    whole.base_model.save_pretrained(tmp_path / "base")
    config = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(config)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path / "base")), tmp_path)
    assert not any(name.startswith("transformer.") for name in checkpoint.tensors)
    model = Tiny(whole, tmp_path / "base", Ends.load(checkpoint, torch.float32, CPU))
    assert Session(model, [model.span(0, NUM_BLOCKS)]).step(Row(NEW_ROW, 0, 9)) < TOLERANCE
