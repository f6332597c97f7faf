"""Batches as tensors: filled up to few sizes, recorded and played again, and equal to the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corolla.model import device
from corolla.model import graphs as graphs_module
from corolla.model.attention import Batch
from corolla.model.cache import Cache, CacheShape
from corolla.model.device import HAS_COMPILER, Ways, ways_of
from corolla.model.gathered import Gathering
from corolla.model.graphs import Graphs, Repeater, is_recordable
from corolla.model.groups import grouped
from corolla.model.paged import Shape, filled, groups_of, numbers_of, shape_of
from corolla.model.pages import Segment
from corolla.model.pool import GONE
from corolla.model.span import Span
from corolla.protocol.steps import NEW_ROW, Row

from .test_span import NUM_PAGES, PAGE_TOKENS, TOLERANCE, Session, Tiny, tiny
from .tiny import FAMILIES, NUM_BLOCKS

__all__ = ["tiny"]  # the fixture

CPU = torch.device("cpu")
SPARE = 99


class Unread(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Forbids what would wait for a device to know a number of it."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(self.ASKING):
            raise AssertionError(f"a pass that is to be recorded calls {name}")
        return func(*args, **(kwargs or {}))


class Unasked(Repeater):
    """One that computes without asking the device anything."""

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        def silently() -> Tensor:
            with Unread():  # type: ignore[no-untyped-call]
                return compute()

        return super().record(silently)


class Wrong(Repeater):
    """A device that plays something else than it recorded."""

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        play, output = super().record(compute)

        def play_wrongly() -> None:
            play()
            output.mul_(1.1)

        return play_wrongly, output


class Unable:
    """A device on which nothing can be recorded."""

    num_asked = 0

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.num_asked += 1
        compute()
        raise RuntimeError("operation not permitted when stream is capturing")


def test_batches_are_filled_up_to_few_sizes() -> None:
    assert [filled(count) for count in (0, 1, 2, 3, 5, 8, 9, 32, 33, 65)] == [
        1,
        1,
        2,
        4,
        8,
        8,
        16,
        32,
        64,
        96,
    ]


def test_a_batch_stands_in_numbers_as_its_segments_say() -> None:
    segments = (
        Segment((7, 8, 9), 9, 2, others=((GONE, 1, 2),)),
        Segment((4,), 0, 1, others=((5,),)),
    )
    windows = (None, 4)
    shape = shape_of(segments, windows, PAGE_TOKENS)
    assert shape == Shape(4, (4, 2))
    numbers = numbers_of(segments, shape, windows, PAGE_TOKENS, SPARE)
    positions, (whole, windowed) = groups_of(numbers, shape)
    assert positions.tolist() == [9, 10, 0, 0]
    assert whole.slots.tolist() == [9 * 4 + 1, 9 * 4 + 2, 4 * 4, SPARE * 4]
    assert whole.table.pages.tolist() == [[7, 8, 9, SPARE]] * 2 + [[4] + [SPARE] * 3, [SPARE] * 4]
    assert whole.table.firsts.tolist() == [0, 0, 0, 0]
    assert windowed.slots.tolist() == [2 * 4 + 1, 2 * 4 + 2, 5 * 4, SPARE * 4]
    assert windowed.table.pages.tolist() == [[1, 2], [1, 2], [5, SPARE], [SPARE, SPARE]]
    assert windowed.table.firsts.tolist() == [4, 4, 0, 0]
    assert windowed.table.positions.tolist() == positions.tolist()


def test_tables_are_filled_up_to_fewer_sizes_where_columns_cost_little() -> None:
    lengths = range(1, 600, 3)
    shapes = [
        {shape_of((Segment((), length - 1, 1),), (None, 9), PAGE_TOKENS, growth) for length in lengths}
        for growth in (2, 4)
    ]
    assert [sorted(shape.num_pages for shape in some) for some in shapes] == [
        [(1, 1), (2, 2), (4, 3), (8, 3), (16, 3), (32, 3), (64, 3), (128, 3), (256, 3)],
        [(1, 1), (4, 3), (16, 3), (64, 3), (256, 3)],
    ]


def test_a_window_never_takes_more_columns_than_it_reaches_over() -> None:
    for start in range(200):
        segments = (Segment(tuple(range(60)), start, 1),)
        shape = shape_of(segments, (9,), PAGE_TOKENS)
        numbers = numbers_of(segments, shape, (9,), PAGE_TOKENS, SPARE)
        _, (group,) = groups_of(numbers, shape)
        first = int(group.table.firsts[0])
        assert first <= max(0, start - 8)
        assert start < first + shape.num_pages[0] * PAGE_TOKENS


def paged_span(model: Tiny, ways: Ways) -> Span:
    span = model.span(0, NUM_BLOCKS)
    grouping = grouped(span.windows, span.cache_shapes)
    cache = span.allocate(8 * NUM_PAGES * grouping.num_groups, PAGE_TOKENS, grouping=grouping, ways=ways)
    for block in range(NUM_BLOCKS):
        cache.keys(block).fill_(torch.nan)  # what nobody wrote does not count
        cache.values(block).fill_(torch.nan)
    return span


STEPS = [
    (Row(NEW_ROW, 0, 11),),  # a prompt in chunks, beyond the windows of 8
    (Row(0, 11, 2),),
    (Row(0, 13, 9),),
    *((Row(0, position, 1),) for position in range(22, 26)),
    (Row(0, 18, 3),),  # roll back within a page
    (Row(0, 21, 1), Row(0, 21, 2), Row(NEW_ROW, 0, 9)),  # fork, and a long row beside
    (Row(1, 23, 1), Row(2, 9, 1), Row(0, 20, 2)),
    (Row(0, 24, 1), Row(1, 10, 1), Row(2, 22, 1)),  # three rows, filled up to four
    (Row(0, 25, 1), Row(1, 11, 1), Row(2, 23, 1)),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_and_played_again_equals_whole(tiny: Callable[[str], Tiny], family: str) -> None:
    model = tiny(family)
    span = paged_span(model, Ways(Gathering(), recorder=Unasked()))
    session = Session(model, [span])
    for rows in STEPS:
        assert session.step(*rows) < TOLERANCE
    assert span.num_blocks_computed >= NUM_BLOCKS * len(STEPS)
    long = Segment((0, 1, 2), 0, 11, others=((0, 1, 2),) * 7)
    with Unread():  # type: ignore[no-untyped-call]
        span.forward(torch.ones(11, span.hidden_size), Batch((long,)))


def test_where_nothing_can_be_recorded_all_is_computed_as_it_is(tiny: Callable[[str], Tiny]) -> None:
    model, unable = tiny("llama"), Unable()
    session = Session(model, [paged_span(model, Ways(Gathering(), recorder=unable))])
    for rows in STEPS:
        assert session.step(*rows) < TOLERANCE
    assert unable.num_asked == 2  # sizes, and then no more


def test_a_size_is_recorded_when_it_comes_again_and_played_from_then_on() -> None:
    cache = Cache({0: CacheShape(1, 2, 2)}, 4, torch.float32, CPU, PAGE_TOKENS, tabled=Gathering())
    num_computed = 0

    def compute(hidden: Tensor, placement: object, blocks: range) -> Tensor:
        nonlocal num_computed
        num_computed += 1
        return hidden * 2

    graphs = Graphs(Repeater(), cache, compute)
    batch = Batch((Segment((0,), 0, 1), Segment((1,), 0, 1), Segment((2,), 0, 1)))
    hidden = torch.ones(3, 2)
    assert graphs.forward(hidden, batch, range(1)) is None
    first = graphs.forward(hidden, batch, range(1))
    second = graphs.forward(hidden * 3, batch, range(1))
    assert first is not None
    assert torch.equal(first, hidden * 2)
    assert second is not None
    assert torch.equal(second, hidden * 6)
    assert graphs.num_recordings == 1
    assert num_computed == 5  # to record, to hold the first play against, and for each play


def test_a_recording_that_plays_something_else_is_not_trusted() -> None:
    cache = Cache({0: CacheShape(1, 2, 2)}, 4, torch.float32, CPU, PAGE_TOKENS, tabled=Gathering())
    graphs = Graphs(Wrong(), cache, lambda hidden, placement, blocks: hidden * 2)
    batch = Batch((Segment((0,), 0, 1),))
    assert [graphs.forward(torch.ones(1, 2), batch, range(1)) for _ in range(4)] == [None] * 4
    assert graphs.num_recordings == 0


def test_long_stateless_and_large_passes_are_not_recorded() -> None:
    decode = Segment((0,), 3, 1)
    assert is_recordable(Batch((decode, decode)))
    assert not is_recordable(Batch((decode, Segment((1, 2, 3), 0, 9))))
    assert not is_recordable(Batch.stateless((1,)))
    assert not is_recordable(Batch((decode,) * 129))


def test_a_cpu_reads_pages_in_place_and_everything_else_by_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ways_of(CPU) == Ways(is_compiled=HAS_COMPILER)
    monkeypatch.setattr(device, "is_usable", lambda _: False)
    assert isinstance(ways_of(torch.device("cuda")).tabled, Gathering)


def test_of_many_recordings_the_one_played_longest_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "_MOST_RECORDINGS", 2)
    cache = Cache({0: CacheShape(1, 2, 2)}, 4, torch.float32, CPU, PAGE_TOKENS, tabled=Gathering())
    graphs = Graphs(Repeater(), cache, lambda hidden, placement, blocks: hidden * 2)

    def is_played(num_tokens: int) -> bool:
        batch = Batch((Segment((0,), 0, 1),) * num_tokens)
        return graphs.forward(torch.ones(num_tokens, 2), batch, range(1)) is not None

    assert [is_played(1), is_played(1), is_played(2), is_played(2)] == [False, True, False, True]
    assert is_played(1)
    assert [is_played(4), is_played(4)] == [False, True]  # instead of that of two
    assert graphs.num_recordings == 2
    assert is_played(1)
    assert not is_played(2)
    assert is_played(2)
