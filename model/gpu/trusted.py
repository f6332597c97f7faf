"""Attention by tables whose kernels are trusted once they have been right on this very device.

Before something is attended in a new way a small text of random numbers is, by the kernel and by torch in float32: no
test has seen every device and driver. Where they differ, or a kernel does not fit the device, torch's way serves from
then on. The first time comes before anything is recorded, so the device may be asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Final

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ..alibi import Alibi
from ..form import Form
from ..gathered import Gathering
from ..paged import RowTable, TableAttention, TokenTable
from .tabled import BlockTables, Plan

logger = logging.getLogger(__name__)

_UNFIT: Final = (CompilationError, OutOfResources, PTXASError)
_CLOSE: Final = 0.02  # of a token's numbers: more than bfloat16 rounds, less than a key too many makes
_NUM_PAGES: Final = 5  # of the text
_NUM_NEW: Final = 21  # of its tokens, where a row brings many


class Trusted:
    """See `paged.TableAttention`: by kernels, or else by gathering."""

    def __init__(self, kernels: BlockTables) -> None:
        self.growth = kernels.growth
        self._kernels = kernels
        self._otherwise: TableAttention = Gathering()
        self._tried: set[Hashable] = set()
        self._is_fit = True

    @property
    def is_fit(self) -> bool:
        """Whether all kernels have been right so far."""
        return self._is_fit

    def write(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """By a kernel."""
        kind = keys.shape[2], values.shape[2]
        is_fit = self._passes(kind, lambda: distance_written(self._kernels, keys, values))
        (self._kernels if is_fit else self._otherwise).write(key, value, keys, values, slots)

    def attend_lines(
        self, query: Tensor, keys: Tensor, values: Tensor, table: TokenTable, form: Form, page_tokens: int
    ) -> Tensor:
        """Each token over the pages in its line."""
        found = self._attended(query, keys, values, table, form, page_tokens, is_chunk=False)
        if found is None:
            return self._otherwise.attend_lines(query, keys, values, table, form, page_tokens)
        return found

    def attend_row(
        self, query: Tensor, keys: Tensor, values: Tensor, row: RowTable, form: Form, page_tokens: int
    ) -> Tensor:
        """The tokens of one row over its pages."""
        found = self._attended(query, keys, values, row.table, form, page_tokens, is_chunk=True)
        if found is None:
            return self._otherwise.attend_row(query, keys, values, row, form, page_tokens)
        return found

    def _attended(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: TokenTable,
        form: Form,
        page_tokens: int,
        *,
        is_chunk: bool,
    ) -> Tensor | None:
        """(num_tokens, num_heads, value_dim), by a kernel; None if none is to be had for it."""
        if not self._takes(form):
            return None
        plan = self._kernels.plan(query, keys, values, table, form, page_tokens, is_chunk=is_chunk)
        if not self._passes_as(plan, query, keys, values, form):
            return None
        return self._kernels.attend(query, keys, values, table, form, plan)

    def _takes(self, form: Form) -> bool:
        return self._is_fit and (form.bias is None or isinstance(form.bias, Alibi))

    def _passes_as(self, plan: Plan, query: Tensor, keys: Tensor, values: Tensor, form: Form) -> bool:
        kind = plan.kind, form.sinks is None, form.bias is None
        return self._passes(
            kind, lambda: distance_attended(self._kernels, query.shape[1], keys, values, form, plan)
        )

    def _passes(self, kind: Hashable, distance_of: Callable[[], float]) -> bool:
        if not self._is_fit or kind in self._tried:
            return self._is_fit
        self._tried.add(kind)
        try:
            distance = distance_of()
            problem = f"a kernel is off by {distance:.3f} from what torch computes"
            is_right = distance < _CLOSE
        except _UNFIT as unfit:
            problem, is_right = str(unfit), False
        if not is_right:
            self._is_fit = False
            logger.warning("pages are gathered from now on, which is slower: %s", problem)
        return self._is_fit


def distance_attended(
    kernels: BlockTables, num_heads: int, keys: Tensor, values: Tensor, form: Form, plan: Plan
) -> float:
    """How far a kernel is from torch in float32, in parts of a token's numbers. keys, values: like which they are."""
    page_tokens, tokens = plan.constants["PAGE"], plan.constants["TOKENS"]
    length = _NUM_PAGES * page_tokens - 1
    random = torch.Generator().manual_seed(0)
    own_keys, own_values = (
        _drawn(random, (_NUM_PAGES * page_tokens, of.shape[0], of.shape[2]), of).transpose(0, 1)
        for of in (keys, values)
    )
    own_page = [3, 0, 4, 1, 2]
    positions = [0, page_tokens, length // 2, length - 1]
    pages = [own_page] * len(positions)
    if plan.is_chunk:
        positions, pages = list(range(max(0, length - _NUM_NEW), length)), [own_page]
    query = _drawn(random, (len(positions), num_heads, keys.shape[2]), keys)
    on_device = [
        torch.tensor(numbers, device=keys.device) for numbers in (pages, [0] * len(pages), positions)
    ]
    table = TokenTable(*on_device)
    grid = -(-len(positions) // tokens), keys.shape[0], 2 if plan.grid[2] > 1 else 1
    got = kernels.attend(query, own_keys, own_values, table, form, plan._replace(grid=grid)).float()
    each = TokenTable(
        table.pages.expand(len(positions), -1), table.firsts.expand(len(positions)), table.positions
    )
    wide = query.float(), own_keys.float(), own_values.float()
    expected = Gathering().attend_lines(*wide, each, form, page_tokens)
    return _distance(got, expected)


def distance_written(kernels: BlockTables, keys: Tensor, values: Tensor) -> float:
    """How far what is read is from what was written, likewise."""
    random = torch.Generator().manual_seed(0)
    key, value = (_drawn(random, (4, of.shape[0], of.shape[2]), of).transpose(0, 1) for of in (keys, values))
    own_keys, own_values = (
        of.new_zeros((9, of.shape[0], of.shape[2])).transpose(0, 1) for of in (keys, values)
    )
    slots = torch.tensor([7, 0, 3, 4], device=keys.device)
    kernels.write(key, value, own_keys, own_values, slots)
    got = torch.cat([own_keys[:, slots], own_values[:, slots]], dim=2).float()
    expected = torch.cat([key, value], dim=2).float()
    return _distance(got, expected)


def _distance(got: Tensor, expected: Tensor) -> float:
    """Of the first dimension's part that is farthest off."""
    off, whole = (got - expected).flatten(1).norm(dim=1), expected.flatten(1).norm(dim=1)
    return float((off / whole).max())


def _drawn(random: torch.Generator, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=random).to(like.device, like.dtype)
