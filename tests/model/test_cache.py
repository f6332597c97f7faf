"""The tensors behind the pages."""

from __future__ import annotations

import pytest
import torch

from corolla.model.cache import Cache, CacheShape, page_bytes
from corolla.model.pool import Memory, PageMove
from corolla.protocol.errors import Code, CorollaError

CPU = torch.device("cpu")
SHAPES = {2: CacheShape(2, 4, 4), 3: CacheShape(1, 6, 8)}


def test_a_page_counts_keys_and_values_of_every_block() -> None:
    numbers = 2 * (4 + 4) + 1 * (6 + 8)
    assert page_bytes(SHAPES.values(), torch.bfloat16, 16) == numbers * 2 * 16
    assert Cache(SHAPES, 3, torch.float32, CPU, 16).page_bytes == numbers * 4 * 16


def test_tokens_stand_in_their_slots_and_nowhere_else() -> None:
    cache = Cache(SHAPES, 4, torch.float32, CPU, 2)
    cache.keys(3).zero_()
    keys, values = torch.randn(1, 2, 6), torch.randn(1, 2, 8)
    cache.write(3, torch.tensor([5, 2]), keys, values)
    assert torch.equal(cache.keys(3)[:, [5, 2]], keys)
    assert torch.equal(cache.values(3)[:, [5, 2]], values)
    assert int((cache.keys(3) != 0).any(dim=(0, 2)).sum()) == 2


def test_a_copied_page_holds_the_same_in_every_block() -> None:
    cache = Cache(SHAPES, 4, torch.float32, CPU, 2)
    for block in SHAPES:
        cache.keys(block).normal_()
        cache.values(block).normal_()
    before = cache.keys(2).clone()
    cache.copy_page(1, 3)
    for block in SHAPES:
        assert torch.equal(cache.keys(block)[:, 6:8], cache.keys(block)[:, 2:4])
        assert torch.equal(cache.values(block)[:, 6:8], cache.values(block)[:, 2:4])
    assert torch.equal(cache.keys(2)[:, :6], before[:, :6])


def test_a_cache_larger_than_memory_is_an_error_that_names_its_size() -> None:
    with pytest.raises(CorollaError) as caught:
        Cache({0: CacheShape(1024, 1024, 1024)}, 1 << 40, torch.float32, CPU)
    assert caught.value.code is Code.OUT_OF_MEMORY
    assert str(1 << 40) in caught.value.message


def test_pages_go_to_host_memory_change_places_and_come_back_unchanged() -> None:
    cache = Cache(SHAPES, 4, torch.float32, CPU, 2, num_host_pages=2)
    for block in SHAPES:
        cache.keys(block).normal_()
        cache.values(block).normal_()
    before = {block: (cache.keys(block).clone(), cache.values(block).clone()) for block in SHAPES}
    device, host, between = Memory.DEVICE, Memory.HOST, Memory.BETWEEN
    cache.move_pages([PageMove(device, 1, host, 0), PageMove(device, 2, host, 1)])
    for block in SHAPES:
        cache.keys(block)[:, 2:6] = 0
        cache.values(block)[:, 2:6] = 0
    cache.move_pages([PageMove(host, 0, between, 0), PageMove(host, 1, between, 1)])
    cache.move_pages([PageMove(device, 0, host, 1), PageMove(device, 3, host, 0)])
    cache.move_pages([PageMove(between, 0, device, 0), PageMove(between, 1, device, 3)])
    cache.move_pages([PageMove(host, 1, device, 1), PageMove(host, 0, device, 2)])
    order = [2, 3, 0, 1, 6, 7, 4, 5]  # pages 1, 0, 3, 2
    for block, (keys, values) in before.items():
        assert torch.equal(cache.keys(block), keys[:, order])
        assert torch.equal(cache.values(block), values[:, order])
