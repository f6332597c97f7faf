"""Adapter parts on the client's side: those that programs put here, and how they reach the hops that lack them.

It owns the shelf and its bound. A session keeps the parts that it uses for as long as it lives, whatever is put on
the shelf or taken off it meanwhile. What is in a part is nobody's business here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import MAX_PART_BYTES, MIB
from ...protocol.partfiles import layouts
from ...protocol.passes import AdapterView
from ...protocol.steps import Hop
from ...protocol.training import NO_PART, PutPart
from ...protocol.work import ModelFacts
from ..network.seam import Network
from .hops import ask_hop

MAX_PARTS_BYTES: Final = 1024 * MIB  # of all adapters; each optimizer step makes new ones
MAX_CARRIERS: Final = 4  # parts on their way to one hop at once: its client's requests are counted there


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a session uses. names: of its parts, from the model's first block on; data: the parts by name.

    soft: the part with its virtual tokens, or nothing.
    """

    names: tuple[bytes, ...] = ()
    data: Mapping[bytes, bytes] = field(default_factory=dict)
    soft: bytes = b""

    @property
    def num_virtual(self) -> int:
        """Its virtual tokens. Raises `BAD_REQUEST` for a part that holds none."""
        try:
            return layouts(self.soft)["soft"].shape[0] if self.soft else 0
        except (ValueError, LookupError) as problem:
            raise error(
                Code.BAD_REQUEST,
                f"a part of {len(self.soft)} bytes for virtual tokens without a tensor `soft`: {problem}",
                "put the adapter's parts again",
            ) from problem

    def of(self, facts: ModelFacts, start: int, end: int) -> tuple[bytes, ...]:
        """One name for each block of [start, end), or nothing. Raises `BAD_SHAPE` if it has too many blocks."""
        if len(self.names) > facts.num_blocks:
            raise error(
                Code.BAD_SHAPE,
                f"an adapter with parts for {len(self.names)} blocks, {facts.name} has {facts.num_blocks}",
                "the adapter is for another model",
            )
        names = (*self.names, *[NO_PART] * (facts.num_blocks - len(self.names)))[start:end]
        return names if any(names) else ()


async def put_parts(
    network: Network,
    fingerprint: str,
    hop: Hop,
    wanted: Iterable[tuple[int, bytes]],
    data: Mapping[bytes, bytes],
) -> None:
    """Bring parts (block and name of each) to a hop, a few at a time.

    Raises `BAD_REQUEST` for one that is not in `data`, what the hop declines with, and as `ask_hop`.
    """
    waiting = iter(tuple(wanted))
    problems: list[CorollaError] = []

    async def carry(scope: trio.CancelScope) -> None:
        try:
            for block, name in waiting:
                put = PutPart(fingerprint, hop.worker, block, name, len(_part(data, block, name)))
                await ask_hop(network, hop.peer, put, data[name])
        except CorollaError as problem:
            problems.append(problem)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(MAX_CARRIERS):
            nursery.start_soon(carry, nursery.cancel_scope)
    if problems:
        raise problems[0]


def _part(data: Mapping[bytes, bytes], block: int, name: bytes) -> bytes:
    try:
        return data[name]
    except KeyError:
        raise error(
            Code.BAD_REQUEST,
            f"part {name.hex()[:12]} of block {block} was never put here, or was dropped since",
            "put the adapter's parts again",
        ) from None


class PartShelf(Mapping[bytes, bytes]):
    """Adapter parts by name. Least recently used ones make room; reading one is a use."""

    def __init__(self, max_bytes: int = MAX_PARTS_BYTES) -> None:
        self._max_bytes = max_bytes
        self._parts: OrderedDict[bytes, bytes] = OrderedDict()
        self._adapters: dict[bytes, str] = {}
        self._num_bytes = 0

    def put(self, name: bytes, data: bytes, adapter: str) -> None:
        """Keep a part. Raises `BAD_REQUEST` if its name is not its hash, `LIMIT_EXCEEDED`."""
        if sha256(data).digest() != name:
            raise error(
                Code.BAD_REQUEST,
                f"{len(data)} bytes named {name.hex()[:12]} have the sha256 {sha256(data).hexdigest()[:12]}",
                "name each part by the sha256 of its bytes",
            )
        if len(data) > MAX_PART_BYTES:
            raise error(
                Code.LIMIT_EXCEEDED,
                f"an adapter part of {len(data)} bytes, at most {MAX_PART_BYTES} are taken",
                "use a smaller rank, or fewer targets",
            )
        if name not in self._parts:
            self._num_bytes += len(data)
        self._parts[name] = data
        self._parts.move_to_end(name)
        self._adapters[name] = adapter
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._parts)))

    def adapter(self, names: tuple[bytes, ...], soft: bytes = NO_PART) -> Adapter:
        """The adapter of these parts. soft: name of the one with its virtual tokens.

        Raises `ADAPTER_MISSING` with the hex names of those not here in `missing`.
        """
        wanted = {name for name in (*names, soft) if name != NO_PART}
        missing = sorted(name.hex() for name in wanted if name not in self._parts)
        if missing:
            raise error(
                Code.ADAPTER_MISSING,
                f"this daemon keeps {len(wanted) - len(missing)} of the adapter's {len(wanted)} parts",
                "put the others here and ask again",
                missing=missing,
            )
        data = {name: self[name] for name in names if name != NO_PART}
        return Adapter(names, data, self[soft] if soft != NO_PART else b"")

    def remove(self, adapter: str) -> None:
        """Forget the parts of an adapter. Raises `BAD_REQUEST` for one that is not here."""
        for name in self._named(adapter):
            self._drop(name)

    def views(self) -> tuple[AdapterView, ...]:
        """The adapters kept."""
        return tuple(self._view(adapter) for adapter in dict.fromkeys(self._adapters.values()))

    def view(self, adapter: str) -> AdapterView:
        """One of them, with its parts. Raises `BAD_REQUEST` for one that is not here."""
        return self._view(adapter, tuple(name.hex() for name in self._named(adapter)))

    def __getitem__(self, name: bytes) -> bytes:
        data = self._parts[name]
        self._parts.move_to_end(name)
        return data

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def _view(self, adapter: str, listed: tuple[str, ...] = ()) -> AdapterView:
        names = self._named(adapter)
        return AdapterView(adapter, len(names), sum(len(self._parts[name]) for name in names), listed)

    def _named(self, adapter: str) -> list[bytes]:
        names = [name for name, of in self._adapters.items() if of == adapter]
        if not names:
            known = ", ".join(sorted(set(self._adapters.values()))) or "none"
            raise error(Code.BAD_REQUEST, f"no adapter {adapter!r} is kept here; kept: {known}")
        return names

    def _drop(self, name: bytes) -> None:
        self._num_bytes -= len(self._parts.pop(name))
        del self._adapters[name]
