"""What one peer may ask of us: bytes, frames and streams a second, streams at once, memory. No I/O, no clock.

It counts and decides. `yamux.py` reads no faster than this allows, so that whoever sends too much waits, on
its own connections alone; `host.py` refuses streams; `libp2p.py` parts with who fills our memory. The buckets
are those of Turner 1986, New directions in communications: a rate, and what may come at once after a pause.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from ...protocol.errors import Code, error
from ...protocol.limits import (
    BYTES_AT_ONCE,
    BYTES_PER_S,
    FRAMES_AT_ONCE,
    FRAMES_PER_S,
    MAX_PEERS_REMEMBERED,
    MAX_UNREAD_BYTES,
    MIB,
    OPENS_AT_ONCE,
    OPENS_PER_S,
    STRANGER_BYTES_AT_ONCE,
    STRANGER_BYTES_PER_S,
    STRANGER_FRAMES_AT_ONCE,
    STRANGER_FRAMES_PER_S,
    STRANGER_OPENS_AT_ONCE,
    STRANGER_OPENS_PER_S,
    STRANGER_UNREAD_BYTES,
    STREAMS_PER_PEER,
    STREAMS_PER_STRANGER,
)
from .room import Room

WEIGH_EVERY_BYTES: Final = 32 * MIB  # so much more than the limit may wait for its readers, for a moment


@dataclass(frozen=True, slots=True)
class Rate:
    """So much a second, and so much at once after a pause."""

    per_s: float
    at_once: float


@dataclass(frozen=True, slots=True)
class Terms:
    """What a kind of peer may. num_streams: served at once; unread_bytes: of one connection."""

    bytes: Rate
    frames: Rate
    opens: Rate
    num_streams: int
    unread_bytes: int


MEMBER: Final = Terms(
    Rate(BYTES_PER_S, BYTES_AT_ONCE),
    Rate(FRAMES_PER_S, FRAMES_AT_ONCE),
    Rate(OPENS_PER_S, OPENS_AT_ONCE),
    STREAMS_PER_PEER,
    MAX_UNREAD_BYTES,
)
STRANGER: Final = Terms(
    Rate(STRANGER_BYTES_PER_S, STRANGER_BYTES_AT_ONCE),
    Rate(STRANGER_FRAMES_PER_S, STRANGER_FRAMES_AT_ONCE),
    Rate(STRANGER_OPENS_PER_S, STRANGER_OPENS_AT_ONCE),
    STREAMS_PER_STRANGER,
    STRANGER_UNREAD_BYTES,
)


class Bucket:
    """What was taken of one thing lately, as a share of what may be taken at once."""

    __slots__ = ("_at", "_taken")

    def __init__(self) -> None:
        self._taken = 0.0
        self._at = 0.0

    def take(self, amount: float, rate: Rate, now: float) -> float:
        """Take so much. Gives how many seconds too early that is; 0.0 if it may be. `now` in seconds."""
        taken = max(0.0, self._taken - (now - self._at) * rate.per_s) + amount
        self._taken, self._at = taken, now
        return max(0.0, taken - rate.at_once) / rate.per_s


class Allowance:
    """What one peer has used, over all its connections.

    terms: asked each time, since a stranger may become a member. on_bytes: told of all that came in.
    """

    __slots__ = ("_bytes", "_frames", "_on_bytes", "_opens", "_terms", "num_streams", "room")

    def __init__(self, terms: Callable[[], Terms], on_bytes: Callable[[int], None] = lambda _: None) -> None:
        self.num_streams = 0  # served now
        self.room = Room()  # for what it has begun to say, on all its streams
        self._terms = terms
        self._on_bytes = on_bytes
        self._bytes = Bucket()
        self._frames = Bucket()
        self._opens = Bucket()

    @property
    def unread_bytes(self) -> int:
        """How much of one connection may wait for its readers."""
        return self._terms().unread_bytes

    def take(self, num_bytes: int, num_frames: int, num_opens: int, now: float) -> float:
        """Note what came in at once. Gives for how many seconds nothing more should be read from the peer."""
        self._on_bytes(num_bytes)
        terms = self._terms()
        wait_s = max(
            self._bytes.take(num_bytes, terms.bytes, now), self._frames.take(num_frames, terms.frames, now)
        )
        return max(wait_s, self._opens.take(num_opens, terms.opens, now)) if num_opens else wait_s

    @contextmanager
    def stream(self) -> Iterator[None]:
        """One of its streams is served. Raises `LIMIT_EXCEEDED` if as many are as may be."""
        limit = self._terms().num_streams
        if self.num_streams >= limit:
            raise error(
                Code.LIMIT_EXCEEDED, f"{self.num_streams} streams of one peer are served, limit {limit}"
            )
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1


class Allowances:
    """The allowance of every peer. Who reconnects finds its own again: nobody gets more by hanging up.

    is_member: whether a peer has shown that it belongs to the swarm. on_bytes: called after each
    `WEIGH_EVERY_BYTES` that came in, from whomever.
    """

    def __init__(
        self,
        is_member: Callable[[str], bool],
        *,
        on_bytes: Callable[[], None] = lambda: None,
        max_peers: int = MAX_PEERS_REMEMBERED,
    ) -> None:
        self._is_member = is_member
        self._on_bytes = on_bytes
        self._num_bytes = 0  # since it was called last
        self._max_peers = max_peers
        self._peers: OrderedDict[str, Allowance] = OrderedDict()

    def __len__(self) -> int:
        return len(self._peers)

    def of(self, peer: str) -> Allowance:
        """The peer's own."""
        allowance = self._peers.get(peer)
        if allowance is None:
            allowance = Allowance(lambda: MEMBER if self._is_member(peer) else STRANGER, self._note)
            self._peers[peer] = allowance
            while len(self._peers) > self._max_peers:
                self._peers.popitem(last=False)
        self._peers.move_to_end(peer)
        return allowance

    def _note(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes >= WEIGH_EVERY_BYTES:
            self._num_bytes = 0
            self._on_bytes()


class Paces:
    """One rate for each of many peers, such as greetings. Bounded: the one not heard of for longest is forgotten."""

    def __init__(self, rate: Rate, *, max_peers: int = MAX_PEERS_REMEMBERED) -> None:
        self._rate = rate
        self._max_peers = max_peers
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, peer: str, amount: float, now: float) -> float:
        """As `Bucket.take`."""
        bucket = self._buckets.setdefault(peer, Bucket())
        self._buckets.move_to_end(peer)
        if len(self._buckets) > self._max_peers:
            self._buckets.popitem(last=False)
        return bucket.take(amount, self._rate, now)


def heaviest(unread_bytes: Mapping[str, int], limit_bytes: int) -> str | None:
    """The peer that fills most of our memory, if all of them together fill more than they may."""
    if sum(unread_bytes.values()) <= limit_bytes:
        return None
    return max(unread_bytes, key=lambda peer: unread_bytes[peer])
