"""One model as the swarm serves it, frozen at one moment. Pure: placement, routing and `swarm` read it.

It knows nothing of where its facts came from; `daemon/belonging/routes.py` gathers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...protocol.records import SpanState
from ...protocol.steps import Hop
from ...protocol.tensors import DType, Encoding

DEFAULT_RTT_S: Final = 0.1  # of a peer never measured: a continent away, so that measured ones come first


@dataclass(frozen=True, slots=True)
class Span:
    """A worker's span, with what we know of its speed. It serves blocks [start, end).

    tokens_per_s: of decoding one row through the whole span; 0 if unknown.
    rtt_s: round trip from us to its peer; None if never measured. queue: requests waiting there.
    penalty_s: what routing adds for past failures. suspect: our connection to its peer broke just now.
    movable: may placement send it elsewhere, or did its owner fix its blocks?
    """

    peer: str
    worker: int
    start: int
    end: int
    state: SpanState
    dtype: DType
    quantization: str | None = None
    encodings: tuple[Encoding, ...] = (Encoding.FLOAT32,)
    tokens_per_s: float = 0.0
    cache_tokens: int = 0
    majors: tuple[int, ...] = (1,)
    rtt_s: float | None = None
    queue: int = 0
    penalty_s: float = 0.0
    suspect: bool = False
    mine: bool = False
    movable: bool = False

    @property
    def num_blocks(self) -> int:
        """How many blocks it serves."""
        return self.end - self.start

    @property
    def hop(self) -> Hop:
        """Its address in a route."""
        return Hop(self.peer, self.worker)

    @property
    def is_online(self) -> bool:
        """Does it take new sessions, as far as we know?"""
        return self.state is SpanState.ONLINE and not self.suspect


@dataclass(frozen=True, slots=True)
class SwarmView:
    """All spans of one model. The order of `spans` means nothing."""

    fingerprint: str
    num_blocks: int
    spans: tuple[Span, ...]

    def replicas(self) -> tuple[int, ...]:
        """How many online spans serve each block."""
        counts = [0] * self.num_blocks
        for span in self.spans:
            if span.is_online:
                for block in range(span.start, min(span.end, self.num_blocks)):
                    counts[block] += 1
        return tuple(counts)

    def gaps(self, start: int = 0, end: int | None = None) -> tuple[tuple[int, int], ...]:
        """The intervals within [start, end) that no online span serves."""
        return gaps_in(self.replicas(), start, self.num_blocks if end is None else end)

    def coverage(self) -> float:
        """The share of blocks that are served, 0 to 1."""
        return sum(count > 0 for count in self.replicas()) / self.num_blocks

    def rtt_s(self, peer: str | None) -> float:
        """The round trip to a peer, guessed if not known; to ourselves (None) it is 0."""
        if peer is None:
            return 0.0
        known = [span.rtt_s for span in self.spans if span.peer == peer and span.rtt_s is not None]
        return known[0] if known else DEFAULT_RTT_S


def gaps_in(counts: tuple[int, ...], start: int, end: int) -> tuple[tuple[int, int], ...]:
    """The maximal intervals within [start, end) where `counts` is 0; beyond its length it is."""
    gaps: list[tuple[int, int]] = []
    for block in range(start, end):
        if block < len(counts) and counts[block]:
            continue
        if gaps and gaps[-1][1] == block:
            gaps[-1] = (gaps[-1][0], block + 1)
        else:
            gaps.append((block, block + 1))
    return tuple(gaps)
