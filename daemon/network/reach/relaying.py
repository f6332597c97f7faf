"""Carries the connections of members who cannot be reached: reservations, and circuits within limits.

It owns who may be called through us and how much flows. It reads nothing of what it carries. Everything is
bounded: by number, per peer, by time and by bytes a second, so that relaying never takes what the owner needs.
Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md, with limits fit for tensors.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Reservation, Status, StopMessage

from ....protocol.errors import Code, CorollaError, error
from ....protocol.limits import (
    CIRCUIT_TIMEOUT_S,
    MAX_CIRCUITS,
    MAX_CIRCUITS_PER_PEER,
    MAX_RESERVATIONS,
    MIB,
    RELAY_BYTES_PER_S,
    RELAY_CIRCUIT_BYTES,
    RELAY_CIRCUIT_S,
    RESERVATION_S,
)
from ..seam import Network, Stream
from ..traffic import Pace
from .circuits import HOP_PROTOCOL, STOP_PROTOCOL, hop_status, peer_of
from .preamble import Preamble

BURST_BYTES: Final = 4 * MIB  # may pass at once after a pause: a decode step never waits

_log = structlog.get_logger("corolla.relaying")


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives. circuit_bytes: both ways together; bytes_per_s: of all circuits together.
    is_wanted: whether our owner lets us relay, at the moment; without it nothing more is carried."""

    reservations: int = MAX_RESERVATIONS
    circuits: int = MAX_CIRCUITS
    circuits_per_peer: int = MAX_CIRCUITS_PER_PEER
    circuit_s: float = RELAY_CIRCUIT_S
    circuit_bytes: int = RELAY_CIRCUIT_BYTES
    bytes_per_s: float = RELAY_BYTES_PER_S
    reservation_s: float = RESERVATION_S
    is_wanted: Callable[[], bool] = lambda: True


class RelayService:
    """Serves `HOP_PROTOCOL` on a network. on_bytes: told of what was carried.

    is_offering: whether others could come to us at all; a relay that nobody can dial helps nobody.
    own_bytes: how many the owner's own streams have sent so far; what is relayed gives way to them.
    """

    def __init__(
        self,
        network: Network,
        limits: RelayLimits | None = None,
        on_bytes: Callable[[int], None] = lambda _: None,
        *,
        is_offering: Callable[[], bool] = lambda: True,
        own_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._network = network
        self._limits = limits or RelayLimits()
        self._on_bytes = on_bytes
        self._is_offering = is_offering
        self._own_bytes = own_bytes
        self._num_own = own_bytes()
        self._reserved: dict[str, float] = {}  # peer → until when, on trio's clock
        self._circuits: Counter[str] = Counter()  # by each of the two peers of each
        self._num_circuits = 0
        self._pace = Pace(self._limits.bytes_per_s, BURST_BYTES)

    def serve(self) -> None:
        """Relay from now on."""
        self._network.handle(HOP_PROTOCOL, self._serve)

    @property
    def num_reservations(self) -> int:
        """Peers that may be called through us now."""
        self._forget_expired()
        return len(self._reserved)

    @property
    def num_circuits(self) -> int:
        """Circuits that stand."""
        return self._num_circuits

    async def _serve(self, stream: Stream) -> None:
        talk = Preamble(stream)
        with trio.move_on_after(CIRCUIT_TIMEOUT_S) as patience:
            message = await talk.hear(HopMessage)
        if patience.cancelled_caught:
            stream.reset()
            return
        if message.type == HopMessage.RESERVE:
            await talk.say(self._reserve(stream.peer))
            await stream.close()
        elif message.type == HopMessage.CONNECT:
            await self._connect(stream, talk, peer_of(message.peer))
        else:
            await talk.say(hop_status(Status.UNEXPECTED_MESSAGE))
            await stream.close()

    def _reserve(self, peer: str) -> HopMessage:
        self._forget_expired()
        if not self._is_offering():
            self._reserved.pop(peer, None)
            return hop_status(Status.RESERVATION_REFUSED)
        if peer not in self._reserved and len(self._reserved) >= self._limits.reservations:
            return hop_status(Status.RESERVATION_REFUSED)
        self._reserved[peer] = trio.current_time() + self._limits.reservation_s
        answer = hop_status(Status.OK)
        answer.reservation.CopyFrom(Reservation(expire=int(time.time() + self._limits.reservation_s)))
        answer.limit.CopyFrom(self._limit())
        return answer

    async def _connect(self, stream: Stream, talk: Preamble, target: str) -> None:
        """Join the stream with one to `target`, until either ends or the limits do."""
        self._forget_expired()
        refusal = self._refusal(stream.peer, target)
        far: Stream | None = None
        if refusal is None:
            try:
                far, rest = await self._knock(stream.peer, target)
            except CorollaError as problem:
                _log.debug("circuit_failed", source=stream.peer, target=target, reason=problem.message)
                refusal = Status.CONNECTION_FAILED
        if far is None:
            await talk.say(hop_status(Status.CONNECTION_FAILED if refusal is None else refusal))
            await stream.close()
            return
        answer = hop_status(Status.OK)
        answer.limit.CopyFrom(self._limit())
        both = (stream.peer, target)
        self._circuits.update(both)
        self._num_circuits += 1
        try:
            await talk.say(answer)
            await self._carry(stream, talk.rest, far, rest)
        finally:
            stream.reset()
            far.reset()
            self._num_circuits -= 1
            self._circuits.subtract(both)
            self._circuits += Counter()  # forgets the zeros

    def _refusal(self, source: str, target: str) -> Status.ValueType | None:
        if target not in self._reserved or not self._limits.is_wanted():
            return Status.NO_RESERVATION
        limits = self._limits
        busiest = max(self._circuits[source], self._circuits[target])
        if self._num_circuits >= limits.circuits or busiest >= limits.circuits_per_peer:
            return Status.RESOURCE_LIMIT_EXCEEDED
        return None

    async def _knock(self, source: str, target: str) -> tuple[Stream, bytes]:
        """A stream to the target that it took as a circuit from `source`. Raises `PEER_LOST` and the like."""
        far = await self._network.open(target, STOP_PROTOCOL, timeout_s=CIRCUIT_TIMEOUT_S)
        try:
            with trio.fail_after(CIRCUIT_TIMEOUT_S):
                talk = Preamble(far)
                peer = PeerId(id=ID.from_string(source).to_bytes())
                await talk.say(StopMessage(type=StopMessage.CONNECT, peer=peer, limit=self._limit()))
                answer = await talk.hear(StopMessage)
            if answer.type != StopMessage.STATUS or answer.status != Status.OK:
                raise error(Code.PEER_LOST, f"{target} did not take the circuit")
        except trio.TooSlowError as problem:
            far.reset()
            raise error(Code.PEER_LOST, f"{target} did not answer") from problem
        except BaseException:
            far.reset()
            raise
        return far, talk.rest

    async def _carry(self, near: Stream, near_rest: bytes, far: Stream, far_rest: bytes) -> None:
        budget = _Budget(self._limits.circuit_bytes)
        with trio.move_on_after(self._limits.circuit_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass_on, near, near_rest, far, budget, nursery.cancel_scope)
                nursery.start_soon(self._pass_on, far, far_rest, near, budget, nursery.cancel_scope)

    async def _pass_on(
        self, source: Stream, data: bytes, target: Stream, budget: _Budget, scope: trio.CancelScope
    ) -> None:
        try:
            while True:
                if data:
                    if not (self._limits.is_wanted() and budget.take(len(data))):
                        break
                    self._give_way()
                    await self._pace.wait(len(data))
                    await target.send(data)
                    self._on_bytes(len(data))
                data = await source.receive()
                if not data:
                    break
        except CorollaError:
            pass  # either side went: that is how circuits end
        scope.cancel()

    def _give_way(self) -> None:
        num_own = max(self._num_own, self._own_bytes())
        self._pace.give_way(num_own - self._num_own)
        self._num_own = num_own

    def _limit(self) -> Limit:
        return Limit(duration=int(self._limits.circuit_s), data=self._limits.circuit_bytes)

    def _forget_expired(self) -> None:
        now = trio.current_time()
        self._reserved = {peer: until for peer, until in self._reserved.items() if until > now}


class _Budget:
    """Bytes that a circuit may still carry."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        self._left -= size
        return self._left >= 0
