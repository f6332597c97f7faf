"""Answers programs of this machine that train: passes by handle, and the parts of their adapters.

It owns what is kept of passes that wait for their backward, and its bounds; it ends with the program's connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from ...protocol.errors import Code, error
from ...protocol.limits import MAX_TRAINING_BYTES, MIB
from ...protocol.passes import (
    AdapterName,
    BackwardPass,
    ForwardPass,
    Passed,
    PassGradients,
    PassHandle,
    PutAdapterPart,
)
from ...protocol.tensors import is_finite
from ...protocol.training import check_micro_batch
from ...protocol.work import ModelFacts
from ..belonging.belonging import Belonging
from ..control import Ask, Connection, Handler, Reply
from ..sessions import find_model
from ..swarm.view import Span
from ..training.parts import PartShelf
from ..training.passes import Batch, Interval, Swarm

if TYPE_CHECKING:
    from ..node import Node

MAX_KEPT_BYTES: Final = 2048 * MIB  # inputs of one program's passes: their backward is on its way
FRESH_S: Final = 5.0  # so old may our knowledge of the spans be when a hop is chosen


@dataclass(frozen=True, slots=True)
class _Kept:
    """A pass that waits for its backward."""

    model: str
    swarm: Swarm
    batch: Batch
    intervals: tuple[Interval, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(interval.inputs) for interval in self.intervals)


class Programs:
    """Handlers of the training methods. parts: what programs put here, for training and for sessions."""

    def __init__(self, node: Node, parts: PartShelf) -> None:
        self._node = node
        self._parts = parts
        self._swarms: dict[str, Swarm] = {}  # by model, of the belonging below
        self._belonging: Belonging | None = None

    def handlers(self) -> Mapping[str, Handler]:
        """By method."""
        return {
            "model.forward": self.forward,
            "model.backward": self.backward,
            "model.release": self.release,
            "adapter.put": self.put,
            "adapter.list": self.adapters,
            "adapter.show": self.show,
            "adapter.remove": self.remove,
        }

    async def forward(self, ask: Ask) -> Reply:
        """Raises `BAD_SHAPE`, `NOT_FINITE`, `BLOCKS_OUT_OF_RANGE`, `LIMIT_EXCEEDED`, `ADAPTER_MISSING`, …."""
        wanted: ForwardPass = ask.arguments
        belonging = self._node.the_belonging()
        facts = await find_model(belonging, wanted.model, 0.0)
        end = facts.num_blocks if wanted.end == -1 else wanted.end
        if not 0 <= wanted.start < end <= facts.num_blocks:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks {wanted.start}:{end} of {facts.name}, which has {facts.num_blocks}",
                f"choose a range within 0:{facts.num_blocks}",
            )
        try:
            check_micro_batch(wanted.start, end, wanted.sequences, wanted.parts)
        except ValueError as problem:
            raise error(Code.BAD_REQUEST, str(problem)) from problem
        batch = Batch(
            facts.fingerprint,
            facts.hidden_size,
            wanted.start,
            end,
            wanted.encoding,
            wanted.sequences,
            wanted.parts,
            wanted.dropout,
            self._parts.adapter(wanted.parts).data,
        )
        _check(ask.payload, batch, "inputs")
        swarm = self._swarm(belonging, facts)
        outputs, intervals = await swarm.forward(batch, ask.payload)
        handle = 0
        if wanted.keep:
            kept = _Kept(facts.name, swarm, batch, intervals)
            _check_room(ask.connection, kept)
            handle = ask.connection.new_handle()
            ask.connection.opened[handle] = kept
        return Reply(Passed(handle, facts.hidden_size, len(intervals)), outputs)

    async def backward(self, ask: Ask) -> Reply:
        """Raises `UNKNOWN_SESSION`, `BAD_SHAPE`, `NOT_FINITE`; the pass is kept when it fails."""
        arguments: BackwardPass = ask.arguments
        kept = ask.connection.opened.get(arguments.handle)
        if not isinstance(kept, _Kept):
            raise error(
                Code.UNKNOWN_SESSION,
                f"this program has no pass {arguments.handle} to go back through",
                "go forward again with keep; each pass goes back once, on the connection it was made on",
            )
        _check(ask.payload, kept.batch, "gradients of the outputs")
        gradient, parts = await kept.swarm.backward(kept.batch, kept.intervals, ask.payload)
        ask.connection.opened.pop(arguments.handle, None)
        num_tokens = sum(sequence.n for sequence in kept.batch.sequences)
        self._node.jobs.note_batch(kept.model, num_tokens, trio.current_time())
        sizes = tuple(len(part) for part in parts)
        return Reply(PassGradients(sizes), gradient + b"".join(parts))

    async def release(self, ask: Ask) -> Reply:
        """A pass that is gone already is released."""
        arguments: PassHandle = ask.arguments
        if isinstance(ask.connection.opened.get(arguments.handle), _Kept):
            del ask.connection.opened[arguments.handle]
        await trio.lowlevel.checkpoint()
        return Reply()

    async def put(self, ask: Ask) -> Reply:
        arguments: PutAdapterPart = ask.arguments
        await trio.lowlevel.checkpoint()
        self._parts.put(arguments.part, ask.payload, arguments.adapter)
        return Reply()

    async def adapters(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        return Reply(self._parts.views())

    async def show(self, ask: Ask) -> Reply:
        arguments: AdapterName = ask.arguments
        await trio.lowlevel.checkpoint()
        return Reply(self._parts.view(arguments.adapter))

    async def remove(self, ask: Ask) -> Reply:
        arguments: AdapterName = ask.arguments
        await trio.lowlevel.checkpoint()
        self._parts.remove(arguments.adapter)
        return Reply()

    def _swarm(self, belonging: Belonging, facts: ModelFacts) -> Swarm:
        if belonging is not self._belonging:
            self._belonging, self._swarms = belonging, {}
        if (swarm := self._swarms.get(facts.fingerprint)) is None:
            swarm = self._swarms[facts.fingerprint] = self._new_swarm(belonging, facts)
        return swarm

    def _new_swarm(self, belonging: Belonging, facts: ModelFacts) -> Swarm:
        async def find_spans() -> tuple[Span, ...]:
            await belonging.registry.spans(facts.fingerprint, facts.num_blocks, max_age_s=FRESH_S)
            return belonging.routes.view(facts.fingerprint, facts.num_blocks).spans

        def charge(peer: str, weight: float, reason: str) -> None:
            belonging.ledger.charge(peer, weight, reason, trio.current_time())

        def used(peer: str) -> None:
            self._node.jobs.note_peer(facts.name, peer, trio.current_time())

        return Swarm(
            belonging.network,
            find_spans,
            charge,
            used=used,
            patience_s=self._node.config.replacement_wait_s,
        )


def _check(payload: bytes, batch: Batch, what: str) -> None:
    num_tokens = sum(sequence.n for sequence in batch.sequences)
    if batch.size_bytes > MAX_TRAINING_BYTES:
        raise error(
            Code.LIMIT_EXCEEDED,
            f"a micro-batch of {num_tokens} tokens is {batch.size_bytes} bytes, at most {MAX_TRAINING_BYTES}",
            "send fewer or shorter sequences in a micro-batch",
        )
    if len(payload) != batch.size_bytes:
        raise error(
            Code.BAD_SHAPE,
            f"{len(payload)} bytes of {what}, expected {batch.size_bytes} for {num_tokens} tokens of"
            f" hidden size {batch.hidden_size} in {batch.encoding}",
        )
    if not is_finite(payload, batch.encoding, batch.hidden_size):
        raise error(
            Code.NOT_FINITE,
            f"{what} with values that are NaN or infinite as {batch.encoding}",
            "look for an overflow in what computed them; float32 holds the largest numbers",
        )


def _check_room(connection: Connection, new: _Kept) -> None:
    held = sum(kept.size_bytes for kept in connection.opened.values() if isinstance(kept, _Kept))
    if held + new.size_bytes > MAX_KEPT_BYTES:
        raise error(
            Code.LIMIT_EXCEEDED,
            f"{held} bytes of passes wait for their backward, {new.size_bytes} more pass the limit"
            f" of {MAX_KEPT_BYTES}",
            "go back through some of them first, or release them",
        )
