"""Which weights leave a disk that holds too many."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from corolla.daemon.lending.weights import GONE, MARK, RECENT_S, Folder, Weights, survey, to_evict

NOW = 1_000_000.0
OLD, OLDER, OLDEST = NOW - RECENT_S - 1, NOW - RECENT_S - 2, NOW - RECENT_S - 3


def folder(name: str, size: int, used: float) -> Folder:
    return Folder(Path("/cache") / name, size, used)


@pytest.mark.parametrize(
    ("folders", "in_use", "gone"),
    [
        ([("a", 6, OLD), ("b", 4, OLDER)], (), []),  # just full
        ([("a", 6, OLD), ("b", 5, OLDER)], (), ["b"]),
        ([("a", 6, OLD), ("b", 5, OLDER), ("c", 20, OLDEST)], (), ["c", "b"]),
        ([("a", 6, OLD), ("b", 5, OLDER)], ("/cache/b/",), ["a"]),
        ([("a", 6, OLD), ("b", 5, OLDER)], ("/cache/b/snapshots/1/",), ["a"]),
        ([("a", 6, OLD), ("quantized/bb-int8-1", 5, OLDER)], ("bb",), ["a"]),
        ([("a", 6, NOW - 1), ("b", 5, NOW - 2)], (), []),  # somebody may be loading them
        ([("a", 60, OLD)], ("/cache/a/",), []),
        ([], (), []),
    ],
)
def test_the_least_recently_used_go_and_none_in_use(
    folders: list[tuple[str, int, float]], in_use: tuple[str, ...], gone: list[str]
) -> None:
    found = to_evict([folder(*one) for one in folders], 10, in_use, NOW)
    assert [str(one.path.relative_to("/cache")) for one in found] == gone


def make(path: Path, age_s: float) -> Path:
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes(100_000))
    (path / MARK).write_text("{}")
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


@pytest.mark.anyio
async def test_a_full_cache_is_cleared_and_what_is_no_weight_stays(tmp_path: Path) -> None:
    used, old = make(tmp_path / "used", 9 * RECENT_S), make(tmp_path / "old", 8 * RECENT_S)
    older = make(tmp_path / "quantized" / "ffff-int8-1", 9 * RECENT_S)
    hub = make(tmp_path / "hub" / "models--a--b", 7 * RECENT_S)
    foreign = tmp_path / "models"
    foreign.mkdir()
    (foreign / "weights").write_bytes(bytes(100_000))
    (tmp_path / f"{GONE}half").mkdir()
    told: list[str] = []
    weights = Weights(tmp_path, lambda: 250_000, lambda: (f"{used}/",), lambda kind, text: told.append(text))
    await weights.look()
    assert used.exists()
    assert foreign.exists()
    assert hub.exists()
    assert not old.exists()
    assert not older.exists()
    assert not (tmp_path / f"{GONE}half").exists()
    assert [text.partition(",")[0] for text in told] == ["ffff-int8-1", "old"]
    assert 200_000 <= weights.size_bytes <= 250_000


@pytest.mark.anyio
async def test_nothing_goes_while_a_worker_loads(tmp_path: Path) -> None:
    old = make(tmp_path / "old", 9 * RECENT_S)
    await Weights(tmp_path, lambda: 1, lambda: None, lambda kind, text: None).look()
    assert old.exists()


@pytest.mark.anyio
async def test_weights_in_use_beyond_the_limit_are_told_once(tmp_path: Path) -> None:
    used, told = make(tmp_path / "used", 0), list[str]()
    weights = Weights(tmp_path, lambda: 1, lambda: (f"{used}/",), lambda kind, text: told.append(kind))
    await weights.look()
    await weights.look()
    assert told == ["disk_limit"]
    assert used.exists()


def test_use_is_noted(tmp_path: Path) -> None:
    old = make(tmp_path / "old", 9 * RECENT_S)
    (seen,) = survey(tmp_path, (f"{old}/",))
    assert time.time() - seen.used_unix_s < RECENT_S
