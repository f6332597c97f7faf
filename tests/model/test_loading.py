"""What a worker decides before it serves: device, dtype, how many blocks, how large a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.model.checkpoint import Checkpoint, open_checkpoint
from corolla.model.families import Skeleton
from corolla.model.loading import choose_device, fitting, free_bytes, load, make_plan
from corolla.model.pool import PAGE_TOKENS
from corolla.model.profile import Speed, Watch, measure
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.tensors import DType
from corolla.protocol.work import Configure, ModelSource, SourceKind

from .tiny import NUM_BLOCKS, save_tiny

CPU = torch.device("cpu")
# Keys and values of one page in one block: 2 heads of 16 numbers each, float32.
BLOCK_PAGE_BYTES = 2 * 2 * 16 * 4 * PAGE_TOKENS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), folder / "cache")


@pytest.fixture(scope="module")
def block_bytes(checkpoint: Checkpoint) -> int:
    return Skeleton(checkpoint.config).block_bytes(0, torch.float32)


def configure(checkpoint: Checkpoint, **changes: Any) -> Configure:
    return Configure(
        ModelSource(SourceKind.FOLDER, str(checkpoint.folder)),
        str(checkpoint.cache_folder),
        **{"end": NUM_BLOCKS, "device": "cpu", **changes},
    )


def plan(checkpoint: Checkpoint, **changes: Any) -> tuple[int, int, int]:
    """Start, end and pages of cache."""
    made = make_plan(configure(checkpoint, **changes), checkpoint, torch.float32, CPU)
    return made.start, made.end, made.num_pages


def refusal(checkpoint: Checkpoint, **changes: Any) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        load(configure(checkpoint, **changes), lambda stage, done, total: None)
    return caught.value


def test_blocks_asked_for_get_the_cache_asked_for(checkpoint: Checkpoint) -> None:
    assert plan(checkpoint, start=1, end=3, cache_tokens=100) == (1, 3, 2)


def test_an_open_range_takes_as_many_blocks_as_fit(checkpoint: Checkpoint, block_bytes: int) -> None:
    each = block_bytes + BLOCK_PAGE_BYTES
    for num_blocks in (1, 2, 3):
        memory = num_blocks * each + each - 1
        assert plan(checkpoint, end=-1, cache_tokens=64, memory_bytes=memory) == (0, num_blocks, 1)
    assert plan(checkpoint, end=-1, cache_tokens=64, memory_bytes=100 * each) == (0, NUM_BLOCKS, 1)


def test_the_ends_take_their_share_of_the_memory(checkpoint: Checkpoint, block_bytes: int) -> None:
    ends = Skeleton(checkpoint.config).ends_bytes(torch.float32)
    memory = 2 * (block_bytes + BLOCK_PAGE_BYTES) + ends
    assert plan(checkpoint, end=-1, cache_tokens=64, memory_bytes=memory, ends=True)[1] == 2
    assert plan(checkpoint, end=-1, cache_tokens=64, memory_bytes=memory - 1, ends=True)[1] == 1


def test_a_cache_without_a_size_takes_what_is_left_within_reason(
    checkpoint: Checkpoint, block_bytes: int
) -> None:
    memory = NUM_BLOCKS * (block_bytes + 40 * BLOCK_PAGE_BYTES)
    memory += -(-memory // 15)  # of all memory, a sixteenth stays for adapters and training
    assert plan(checkpoint, memory_bytes=memory) == (0, NUM_BLOCKS, 40)
    assert plan(checkpoint, memory_bytes=100 * memory) == (0, NUM_BLOCKS, 65536 // PAGE_TOKENS)


def test_idle_sessions_get_host_memory_as_asked_or_out_of_what_is_left(
    checkpoint: Checkpoint, block_bytes: int
) -> None:
    def num_host_pages(**changes: Any) -> int:
        asked = configure(checkpoint, **changes)
        return make_plan(asked, checkpoint, torch.float32, CPU).num_host_pages

    assert num_host_pages(cache_tokens=640, parked_tokens=0) == 0
    assert num_host_pages(cache_tokens=640, parked_tokens=130) == 3
    assert num_host_pages(cache_tokens=640) == 20
    tight = NUM_BLOCKS * (block_bytes + 10 * BLOCK_PAGE_BYTES)
    assert num_host_pages(cache_tokens=640, memory_bytes=tight) == 0


def test_blocks_with_windows_have_tables_of_their_own_and_the_cache_holds_as_much(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gemma3")
    gemma = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path)), tmp_path / "cache")
    loaded = load(configure(gemma, cache_tokens=640, parked_tokens=0), lambda stage, done, total: None)
    assert loaded.grouping.windows == (None, 8, 8, 8)  # the one that attends everything is one block
    assert loaded.num_pages == 4 * 10
    assert loaded.ready().cache_tokens == 640
    assert loaded.span is not None
    assert loaded.span.cache is not None
    assert loaded.span.cache.page_bytes * 4 == NUM_BLOCKS * BLOCK_PAGE_BYTES
    assert loaded.speed.decode_tokens_per_s > 0


def test_blocks_that_do_not_fit_are_refused_with_those_that_do(
    checkpoint: Checkpoint, block_bytes: int
) -> None:
    memory = 2 * (block_bytes + BLOCK_PAGE_BYTES)
    refused = refusal(checkpoint, start=1, cache_tokens=64, memory_bytes=memory)
    assert refused.code is Code.DOES_NOT_FIT
    assert refused.details == {"num_fitting": 2}
    assert "choose blocks 1:3" in refused.remedy
    assert f"{memory:,} bytes are there" in refused.message


def test_memory_for_not_even_a_block_is_refused(checkpoint: Checkpoint) -> None:
    assert refusal(checkpoint, end=-1, memory_bytes=1000).code is Code.DOES_NOT_FIT
    assert refusal(checkpoint, end=0, ends=True, memory_bytes=1000).code is Code.DOES_NOT_FIT


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"end": NUM_BLOCKS + 1}, Code.BLOCKS_OUT_OF_RANGE),
        ({"start": 3, "end": 2}, Code.BLOCKS_OUT_OF_RANGE),
        ({"quantization": "int9"}, Code.BAD_CONFIG),
        ({"device": "abacus"}, Code.BAD_CONFIG),
        ({"device": "cuda:99"}, Code.DEVICE_LOST),
        ({"device": "meta"}, Code.BAD_CONFIG),
    ],
)
def test_what_cannot_be_configured_is_refused(
    checkpoint: Checkpoint, changes: dict[str, Any], code: Code
) -> None:
    refused = refusal(checkpoint, **changes)
    assert refused.code is code
    assert refused.remedy


def test_ends_alone_need_no_cache(checkpoint: Checkpoint) -> None:
    loaded = load(configure(checkpoint, end=0, ends=True), lambda stage, done, total: None)
    ready = loaded.ready()
    assert (ready.start, ready.end, ready.cache_tokens) == (0, 0, 0)
    assert loaded.span is None
    assert loaded.ends is not None
    assert ready.weight_bytes == loaded.ends.bytes
    assert loaded.end_tokens == {2}


def test_progress_is_reported_up_to_the_end(checkpoint: Checkpoint) -> None:
    reports: list[tuple[str, int, int]] = []
    loaded = load(
        configure(checkpoint, cache_tokens=64, dtype=DType.BFLOAT16), lambda *report: reports.append(report)
    )
    loading = [(done, total) for stage, done, total in reports if stage == "loading"]
    assert len(loading) == NUM_BLOCKS
    assert loading[-1][0] == loading[-1][1] == loaded.ready().weight_bytes
    assert loaded.ready().dtype is DType.BFLOAT16


def test_auto_is_a_device_that_is_there() -> None:
    assert choose_device("auto").type in ("cpu", "cuda")
    assert choose_device("cpu") == CPU


def test_some_memory_is_free() -> None:
    assert 1 << 20 < free_bytes(CPU) < 1 << 50


def test_fitting_counts_from_the_first_block() -> None:
    assert fitting((10, 20, 5), (1, 1, 1), 2, 34) == 2
    assert fitting((10, 20, 5), (1, 1, 1), 2, 33) == 1
    assert fitting((), (), 1, 100) == 0


class Ticks:
    """A clock on which a pass takes as long as it has tokens."""

    def __init__(self, seconds_per_pass: float) -> None:
        self._seconds = seconds_per_pass
        self._now = 0.0

    def __call__(self) -> float:
        self._now += self._seconds
        return self._now


def test_a_slow_span_is_measured_by_one_pass(checkpoint: Checkpoint) -> None:
    span = load(configure(checkpoint, cache_tokens=256), lambda stage, done, total: None).span
    assert span is not None
    before = span.num_blocks_computed
    speed = measure(span, Ticks(10.0))
    assert speed == Speed(0.1, 12.8, loaded_tokens_per_s=0.8, launches_per_s=100)
    assert span.num_blocks_computed == before + 3 * NUM_BLOCKS


def test_a_fast_span_is_measured_for_a_moment_only(checkpoint: Checkpoint) -> None:
    span = load(configure(checkpoint, cache_tokens=64), lambda stage, done, total: None).span
    assert span is not None
    before = span.num_blocks_computed
    speed = measure(span, Ticks(0.01))
    assert speed.decode_tokens_per_s == pytest.approx(100)
    assert speed.prefill_tokens_per_s == pytest.approx(6400)
    assert speed.loaded_tokens_per_s == pytest.approx(800)
    assert span.num_blocks_computed - before < 3 * NUM_BLOCKS * 40


def test_a_speed_that_drifts_is_measured_again() -> None:
    watch = Watch(100.0)

    def passes(took_s: float, context: int = 10) -> list[float]:
        told = [watch.note(took_s, context) for _ in range(256)]
        return [speed for speed in told if speed is not None]

    assert passes(0.011) == []  # with what a pass costs beyond its blocks: the yardstick
    assert passes(0.012) == []
    assert passes(0.05, context=4000) == []  # a long text takes longer by itself
    assert passes(0.022) == [50.0]
    assert passes(0.022) == []
    assert passes(0.011) == [100.0]


def test_files_that_change_while_they_are_loaded_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", seed=1)
    save_tiny(tmp_path / "other", seed=2)
    loaded = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path / "model")), tmp_path / "cache")
    weights = "model.safetensors"

    def swap(stage: str, done: int, total: int) -> None:
        if (tmp_path / "other" / weights).exists() and 0 < done < total:
            (tmp_path / "other" / weights).replace(tmp_path / "model" / weights)

    with pytest.raises(CorollaError, match="changed while") as caught:
        load(configure(loaded), swap)
    assert caught.value.code is Code.DAMAGED_WEIGHTS
    assert "reload" in caught.value.remedy
