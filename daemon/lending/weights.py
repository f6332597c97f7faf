"""The weights in this daemon's cache folder: how much disk they take, and which go when that is too much.

Those least recently used go first; never one that a worker of ours uses, nor one that any daemon used within the
hour, since daemons of one user share the folder. Only folders that are recognised as weights are touched. A hub
cache that lies elsewhere belongs to its user's other programs too, and is left alone.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

EVERY_S: Final = 300.0  # a look takes milliseconds: weights are few large files
RECENT_S: Final = 3600.0  # somebody may be loading it
MARK: Final = "corolla.json"  # in a folder that a worker converted
GONE: Final = ".gone-"  # what a folder is called while it is deleted


@dataclass(frozen=True, slots=True)
class Folder:
    """Weights of one model in one form. used_unix_s: when a worker last took them up."""

    path: Path
    size_bytes: int
    used_unix_s: float


def to_evict(
    folders: Iterable[Folder], limit_bytes: int, in_use: Collection[str], now_unix_s: float
) -> tuple[Folder, ...]:
    """Which folders go so that the rest takes no more than the limit, as far as that is possible.

    in_use: paths within folders, and beginnings of their names. Pure.
    """
    known = sorted(folders, key=lambda folder: folder.used_unix_s)
    excess = sum(folder.size_bytes for folder in known) - limit_bytes
    gone = []
    for folder in known:
        if excess <= 0:
            break
        if now_unix_s - folder.used_unix_s >= RECENT_S and not is_used(folder.path, in_use):
            gone.append(folder)
            excess -= folder.size_bytes
    return tuple(gone)


def is_used(path: Path, in_use: Collection[str]) -> bool:
    """Whether one of these lies in this folder, or gives it its name."""
    return any(
        Path(used).is_relative_to(path) if "/" in used else path.name.startswith(used) for used in in_use
    )


class Weights:
    """Keeps one cache folder within its owner's limit. limit_bytes: as it is now.

    in_use: what our workers use, as `to_evict` wants it; None while one is loading, when nothing is deleted.
    """

    def __init__(
        self,
        cache_folder: Path,
        limit_bytes: Callable[[], int],
        in_use: Callable[[], Collection[str] | None],
        on_event: Callable[[str, str], None],
    ) -> None:
        self._cache_folder = cache_folder
        self._limit_bytes = limit_bytes
        self._in_use = in_use
        self._on_event = on_event
        self._stirred = trio.Event()
        self.excess: str | None = None  # in words, if weights in use take more than they may
        self.size_bytes = 0  # at the last look

    async def run(self) -> None:
        """Look now and then, and whenever stirred, until cancelled."""
        while True:
            self._stirred = trio.Event()
            await self.look()
            with trio.move_on_after(EVERY_S):
                await self._stirred.wait()

    def stir(self) -> None:
        """Look at once: the limit is another."""
        self._stirred.set()

    async def look(self) -> None:
        """Note what is used, and delete what is too much."""
        in_use, limit = self._in_use(), self._limit_bytes()
        if in_use is None:
            return
        folders = await trio.to_thread.run_sync(survey, self._cache_folder, tuple(in_use))
        gone = to_evict(folders, limit, in_use, time.time())
        for folder in gone:
            await trio.to_thread.run_sync(delete, self._cache_folder, folder.path)
            told = f"{folder.path.name}, {folder.size_bytes / 1e9:.1f} GB, was least recently used"
            self._on_event("weights_evicted", told)
        self.size_bytes = sum(folder.size_bytes for folder in folders if folder not in gone)
        was_over, self.excess = self.excess is not None, None
        if self.size_bytes > limit:
            size, allowed = f"{self.size_bytes / 1e9:.1f} GB", f"{limit / 1e9:.1f}"
            self.excess = f"weights in use take {size}, {allowed} are allowed: disk_bytes"
        if self.excess is not None and not was_over:
            self._on_event("disk_limit", self.excess)


def survey(cache_folder: Path, in_use: Collection[str] = ()) -> tuple[Folder, ...]:
    """The weights in a cache folder; those in use are marked as used now."""
    found = []
    for path in _weights(cache_folder):
        try:
            if is_used(path, in_use):
                os.utime(path)
            found.append(Folder(path, _size_bytes(path), path.stat().st_mtime))
        except OSError:  # it goes at this moment, or is not ours to see: then it is not ours to delete
            continue
    return tuple(found)


def delete(cache_folder: Path, path: Path) -> None:
    """Delete a folder of weights: in one move for all who look for it, then file by file."""
    gone = cache_folder / f"{GONE}{path.name}"
    try:
        path.rename(gone)
    except OSError:  # another daemon was faster
        return
    shutil.rmtree(gone, ignore_errors=True)


def _weights(cache_folder: Path) -> Iterable[Path]:
    """Converted models, quantized ones, those of a hub cache that lies here. Clears what was half deleted."""
    for gone in cache_folder.glob(f"{GONE}*"):
        shutil.rmtree(gone, ignore_errors=True)
    yield from (mark.parent for mark in cache_folder.glob(f"*/{MARK}"))
    yield from (path for path in cache_folder.glob("quantized/*") if path.is_dir())
    yield from (path for path in cache_folder.glob("hub/models--*") if path.is_dir())


def _size_bytes(folder: Path) -> int:
    """What a folder takes on the disk. Links of the hub's cache count nothing, its blobs do."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            size += os.lstat(os.path.join(root, name)).st_blocks * 512
    return size
