"""transformers' `Cache`, kept by the swarm: what generation does to a cache, said as rows of a session.

Owns which columns of the padded batch are real tokens, and which cached row each row of the batch continues.
The keys and values themselves lie on the hops. Beam search reorders rows, speculation crops them, left
padding is dropped before anything is sent: all three become `(parent, position, n)` of the next step.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..protocol.errors import Code, error
from ..protocol.steps import NEW_ROW, Row
from .client import Model
from .parts import Adapter
from .session import Session

DEFAULT_LENGTH: Final = 2048  # tokens of a row, when nobody said how many will come


class Sessions:
    """Opens sessions for caches, and closes those whose cache was forgotten.

    A cache may be collected at any moment, in the midst of a call too, so its session is only noted then and
    closed when the next one is opened or `sweep` is called.
    """

    def __init__(
        self,
        model: Model,
        encoding: str | None,
        wait_s: float,
        worn: Callable[[], Adapter | None] = lambda: None,
    ) -> None:
        """worn: the adapter of a session that is opened now."""
        self._worn = worn
        self._model = model
        self._encoding = encoding
        self._wait_s = wait_s
        self._forgotten: deque[Session] = deque()

    def open(self, rows: int, max_length: int) -> Session:
        """A session of all blocks, with the adapter as it is now."""
        self.sweep()
        return self._model.session(
            rows=rows,
            max_length=max_length,
            encoding=self._encoding,
            wait_s=self._wait_s,
            adapter=self._worn(),
        )

    def forget(self, session: Session) -> None:
        """Note that nobody needs this session any more; waits for nothing."""
        self._forgotten.append(session)

    def sweep(self) -> None:
        """Close what was forgotten."""
        while self._forgotten:
            self._forgotten.popleft().close()


class SwarmCache(Cache):
    """A cache for `DistributedModelForCausalLM`. Its session opens at the first step."""

    def __init__(self, sessions: Sessions, *, rows: int = 1, max_length: int = DEFAULT_LENGTH) -> None:
        """rows, max_length: at least so many; the first step may ask for more."""
        super().__init__(layers=[])
        self._sessions = sessions
        self._rows = rows
        self._max_length = max_length
        self._session: Session | None = None
        self._parents: list[int] = []
        self._is_real = torch.zeros(0, 0, dtype=torch.bool)  # (rows, columns)
        self._num_virtual = 0  # columns before the text, of which transformers does not know

    @property
    def has_begun(self) -> bool:
        """Whether it holds any column."""
        return self._is_real.shape[1] > 0

    def begin_after(self, num_virtual: int) -> None:
        """The first columns to come are so many virtual tokens."""
        self._num_virtual = num_virtual

    def step(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Run new columns through the swarm's blocks.

        hidden: (rows, n, hidden_size). mask: (rows, columns so far and new), nonzero for real tokens; None
            if all are. The columns of virtual tokens count only in the step that brings them.
        Returns (rows, n, hidden_size), zeros where there is padding.
        """
        num_rows, n = int(hidden.shape[0]), int(hidden.shape[1])
        if self._session is None:
            length = max(self._max_length + self._num_virtual, n)
            self._session = self._sessions.open(max(self._rows, num_rows), length)
            weakref.finalize(self, self._sessions.forget, self._session).atexit = False
            self._parents = [NEW_ROW] * num_rows
            self._is_real = torch.zeros(num_rows, 0, dtype=torch.bool)
        is_new = self._new_columns(num_rows, n, mask)
        positions = self._is_real.sum(1).tolist()
        counts = is_new.sum(1).tolist()
        rows = [
            Row(parent if position else NEW_ROW, position, count)
            for parent, position, count in zip(self._parents, positions, counts, strict=True)
        ]
        chosen = is_new.to(hidden.device)
        out = torch.zeros_like(hidden)
        out[chosen] = self._session.step_rows(hidden[chosen], rows)
        self._parents = list(range(num_rows))
        self._is_real = torch.cat([self._is_real, is_new], 1)
        return out

    def close(self) -> None:
        """Close the session; the cache cannot be used any more."""
        if self._session is not None:
            self._session.close()

    # what transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of text so far, padding among them."""
        return max(0, int(self._is_real.shape[1]) - self._num_virtual)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: transformers sets no bound."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns after the next step, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what was row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        chosen = [int(index) for index in indices.tolist()]
        self._parents = [self._parents[index] for index in chosen]
        self._is_real = self._is_real[chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue each row so many times."""
        self.batch_select_indices(torch.arange(len(self._parents)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back so many columns (a negative number); a positive one is how many to keep."""
        length = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        self._is_real = self._is_real[:, : self._num_virtual + max(0, min(keep, length))]

    def reset(self) -> None:
        """Take back everything."""
        self._is_real = self._is_real[:, :0]
        self._num_virtual = 0

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first step."""
        return len(self._parents) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a step was made."""
        return self._session is not None

    @property
    def is_croppable(self) -> bool:
        """Every session can be rolled back."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The swarm is no part of a graph."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """The hops know which of their blocks slide."""
        return [False]

    @property
    def is_linear(self) -> list[bool]:
        """As `is_sliding`."""
        return [False]

    @property
    def is_dummy(self) -> list[bool]:
        """As `is_sliding`."""
        return [False]

    def _new_columns(self, num_rows: int, n: int, mask: Tensor | None) -> Tensor:
        """(rows, n) bool: which of the new columns are real tokens."""
        if num_rows != len(self._parents):
            raise error(
                Code.BAD_SHAPE, f"{num_rows} rows, the cache holds {len(self._parents)}", "use a new cache"
            )
        if mask is None:
            return torch.ones(num_rows, n, dtype=torch.bool)
        expected = (num_rows, self.get_seq_length() + n)
        if mask.dim() != 2 or tuple(mask.shape) != expected:
            raise error(
                Code.BAD_SHAPE,
                f"attention_mask of shape {tuple(mask.shape)}, expected {expected}",
                "give one column for each token so far and each new one",
            )
        return mask[:, -n:].to(device="cpu", dtype=torch.bool)


OpenCache = Callable[[], SwarmCache]


def as_swarm_cache(cache: Any, make: OpenCache) -> SwarmCache:
    """The cache given, or a new one in place of None. Raises `BAD_REQUEST` for transformers' own caches."""
    if cache is None:
        return make()
    if not isinstance(cache, SwarmCache):
        raise error(
            Code.BAD_REQUEST,
            f"past_key_values is a {type(cache).__name__}, but this model's keys and values lie in the swarm",
            "leave it out, or make one with model.new_cache(max_length=…)",
        )
    return cache
