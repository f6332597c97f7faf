"""Whether kernels can be launched is found out by launching one, once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from corolla.model.gpu.probe import is_usable

trial = pytest.importorskip("corolla.model.gpu.trial")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    is_usable.cache_clear()
    yield
    is_usable.cache_clear()


def test_where_a_first_kernel_computes_rightly_kernels_are_usable() -> None:
    assert is_usable(CPU)  # in Triton's interpreter


def test_where_it_fails_the_log_names_the_remedy_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(numbers: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(trial, "doubled", failing)
    with caplog.at_level(logging.WARNING):
        assert not is_usable(CPU)
        assert not is_usable(CPU)
    (record,) = caplog.records
    assert "gcc" in record.message


def test_where_it_computes_wrongly_kernels_are_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "doubled", torch.zeros_like)
    assert not is_usable(CPU)
