"""Passes that are recorded once and played again: a device is then asked once for a whole span, not a thousand times.

Owns the recordings, one for each size that batches are filled up to, and the buffers that they read. What is
recorded are passes in which every row brings a few tokens; whatever else comes is computed as it is, and so is all
where recording fails. Numbers change between plays, shapes never.

Source: NVIDIA, CUDA graphs; vLLM's and nano-vllm's capture of one graph for each batch size.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from .attention import Batch, Placement
from .cache import Cache
from .paged import FEW_TOKENS, Shape, filled, groups_of, numbers_of, shape_of
from .transfers import to_device

logger = logging.getLogger(__name__)

_MOST_TOKENS: Final = 128  # larger passes keep the device busy however they are asked for
_MOST_RECORDINGS: Final = (
    64  # each keeps some MB on the device; of more, the one played longest ago is forgotten
)
_MOST_FAILURES: Final = 2  # of a device or of a family that cannot be recorded at all
_CLOSE: Final = 0.02  # of a pass's result, in the lowest precision

Compute = Callable[[Tensor, Placement, range], Tensor]


class Recorder(Protocol):
    """How a device records and plays."""

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """Run `compute`, perhaps several times; what plays it again, and the tensor that it then writes.

        Raises RuntimeError where it cannot be recorded.
        """


class CudaRecorder:
    """CUDA graphs, which share one pool of memory, since one is played at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """One run beside, for kernels to be chosen and memory to be allotted, and the recording."""
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            compute()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()
        if self._pool is None:
            self._pool = graph.pool()
        return graph.replay, output


class Repeater:
    """The twin without a device that records: computes again into the same tensor."""

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """As `Recorder.record`; never fails."""
        output = compute()
        return lambda: output.copy_(compute()), output


class _Recording(NamedTuple):
    """hidden, numbers: what it reads; output: what it writes."""

    hidden: Tensor
    numbers: Tensor
    play: Callable[[], object]
    output: Tensor


class Graphs:
    """The recordings of one span with its cache."""

    def __init__(self, recorder: Recorder, cache: Cache, compute: Compute) -> None:
        """compute: (hidden, placement, blocks) → hidden states after these blocks."""
        self._recorder = recorder
        self._cache = cache
        self._compute = compute
        self._recordings: dict[tuple[range, Shape], _Recording] = {}  # in the order in which they were played
        self._num_asked: Counter[tuple[range, Shape]] = Counter()
        self._failed: set[tuple[range, Shape]] = set()

    @property
    def num_recordings(self) -> int:
        """Sizes that can be played."""
        return len(self._recordings)

    def forward(self, hidden: Tensor, batch: Batch, blocks: range) -> Tensor | None:
        """Hidden states (num_tokens, hidden_size) after these blocks; None if the caller has to compute them.

        A size is recorded when it comes for the second time: many never do.
        """
        if not is_recordable(batch):
            return None
        windows, page_tokens = self._cache.grouping.windows, self._cache.page_tokens
        key = blocks, shape_of(batch.segments, windows, page_tokens, self._cache.growth)
        if key not in self._recordings and not self._is_due(key):
            return None
        shape = key[1]
        numbers = numbers_of(batch.segments, shape, windows, page_tokens, self._cache.spare_page)
        recording = self._recordings.pop(key, None) or self._recorded(key, hidden, numbers)
        if recording is None:
            return None
        self._recordings[key] = recording  # behind all that were played longer ago
        recording.hidden[: len(hidden)].copy_(hidden)
        recording.numbers.copy_(to_device(numbers, hidden.device))
        recording.play()
        return recording.output[: len(hidden)].clone()  # the next play writes over it

    def _is_due(self, key: tuple[range, Shape]) -> bool:
        self._num_asked[key] += 1
        is_able = len(self._failed) < _MOST_FAILURES and key not in self._failed
        return is_able and self._num_asked[key] > 1

    def _recorded(self, key: tuple[range, Shape], hidden: Tensor, numbers: Tensor) -> _Recording | None:
        blocks, shape = key
        while len(self._recordings) >= _MOST_RECORDINGS:
            self._forget(next(iter(self._recordings)))
        own_hidden = hidden.new_zeros((shape.num_tokens, hidden.shape[1]))
        own_hidden[: len(hidden)].copy_(hidden)
        own_numbers = to_device(numbers, hidden.device).clone()
        positions, groups = groups_of(own_numbers, shape)
        placement = Placement.recorded(self._cache, positions, groups)
        try:
            play, output = self._recorder.record(lambda: self._compute(own_hidden, placement, blocks))
            play()
            _check(output[: len(hidden)], self._compute(own_hidden, placement, blocks)[: len(hidden)])
        except RuntimeError as problem:
            logger.warning("passes of %d tokens are not recorded: %s", shape.num_tokens, problem)
            self._failed.add(key)
            return None
        return _Recording(own_hidden, own_numbers, play, output)

    def _forget(self, key: tuple[range, Shape]) -> None:
        """It has to come twice again. What it holds on the device is free for the next one."""
        del self._recordings[key], self._num_asked[key]


def _check(played: Tensor, computed: Tensor) -> None:
    """Raise RuntimeError unless both are the same but for rounding: a recording is not trusted with texts unseen."""
    distance = float((played - computed).float().norm() / computed.float().norm())
    if not distance < _CLOSE:
        raise RuntimeError(f"what is played is off by {distance:.3f} from what is computed")


def is_recordable(batch: Batch) -> bool:
    """Whether each row brings so few tokens that all look for their keys alike, and not too many together."""
    if batch.is_stateless or filled(batch.num_tokens) > _MOST_TOKENS:
        return False
    return all(segment.pages and segment.n <= FEW_TOKENS for segment in batch.segments if segment.n)
