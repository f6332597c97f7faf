"""Training on one span: what waits, what travels together, and the memory that it takes.

Owns the adapter parts held for the span and every training request that is on its way; `turns` computes. Each turn
is one block, so that decodes may run in between; the engine chooses when.

Small requests that wait together, whosever they are, go through the blocks side by side: the weights are read once
for all of them. Large ones keep the device busy by themselves and would only wait for each other.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..protocol.errors import Code, error
from ..protocol.work import Backward, Forward
from .adapters import Adapters
from .attention import Batch
from .turns import Blocks, Ended, Rider, Work, work_of

logger = logging.getLogger(__name__)

# Tokens of the first measurement of what a block's graph takes; enough that what is per pass vanishes.
_PROBE_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Room:
    """Memory beside weights and cache. adapters: for parts held; activations: of the running micro-batches.

    together: tokens of requests that travel side by side; 0 is what suits the device.
    """

    adapters: int = 1 << 28
    activations: int = 1 << 30
    together: int = 0


# A CPU is as busy as can be with so many tokens, a GPU with these; more would only make the first one wait.
_TOGETHER_CPU: Final = 256
_TOGETHER_GPU: Final = 4096


class Trainer:
    """Requests of one span, from when they come to when they are answered."""

    def __init__(self, blocks: Blocks, room: Room) -> None:
        self.adapters = Adapters(blocks.modules, blocks.hidden_size, blocks.device, room.adapters)
        self._blocks = blocks
        self._room = room
        on_cpu = blocks.device.type == "cpu"
        self._together = room.together or (_TOGETHER_CPU if on_cpu else _TOGETHER_GPU)
        self._riders: dict[int, Rider] = {}  # by request, in the order in which they came
        self._works: dict[int, Work] = {}  # by request, of those that have begun
        self._bytes_per_token = 0  # of one block's graph; 0 until it was measured

    def begin(self, ask: Forward | Backward) -> None:
        """Take a request, to be computed by `turn`.

        Raises `BAD_SHAPE`, `NOT_FINITE`, `BLOCKS_OUT_OF_RANGE`, `ADAPTER_MISSING`, `OUT_OF_MEMORY`.
        """
        span = self._blocks
        if not span.start <= ask.start < ask.end <= span.end:
            raise error(
                Code.BLOCKS_OUT_OF_RANGE,
                f"blocks {ask.start}:{ask.end} asked of a worker that serves {span.start}:{span.end}",
                "choose a range within the worker's span",
            )
        parts = self.adapters.pin((ask.start, ask.end), ask.parts)
        try:
            rider = Rider(span, ask, parts)
            self._check_room(rider)
        except Exception:
            self.adapters.unpin(ask.parts)
            raise
        self._riders[ask.request] = rider

    def turn(self, request: int) -> tuple[Ended, ...]:
        """Compute one block of a request and of those that travel with it; those that are through.

        Raises what `Work.turn` raises for a request that travels alone; it is then over. Those that fail beside
        others begin again, each by itself.
        """
        work = self._works.get(request) or self._begun(request)
        try:
            ended = work.turn()
        except Exception as problem:
            if len(work.riders) == 1:
                self._finish(request)
                raise
            logger.warning("%d requests failed together, each runs alone: %s", len(work.riders), problem)
            for rider in work.riders:
                rider.is_alone = True
                del self._works[rider.ask.request]
            return ()
        for one in ended:
            self._finish(one.request)
        return ended

    def _begun(self, request: int) -> Work:
        """The request on its way, with all that wait and fit beside it."""
        leader = self._riders[request]
        riders, num_tokens = [leader], leader.num_tokens
        for rider in self._riders.values():
            total = num_tokens + rider.num_tokens
            is_free = rider is not leader and rider.ask.request not in self._works
            if not is_free or total > self._together or not rider.goes_with(leader):
                continue
            if self._needed(leader.ask, total) <= self._room.activations:
                riders.append(rider)
                num_tokens = total
        graph = self._graph_bytes(leader.ask.start, num_tokens)
        num_kept = (self._room.activations - self._needed(leader.ask, num_tokens)) // graph
        work = work_of(self._blocks, riders, num_kept)
        self._works |= {rider.ask.request: work for rider in riders}
        return work

    def _finish(self, request: int) -> None:
        self._works.pop(request, None)
        self.adapters.unpin(self._riders.pop(request).ask.parts)

    def _needed(self, ask: Forward | Backward, num_tokens: int) -> int:
        """Bytes without which so many tokens cannot take this way: inputs of all blocks, and the graph of one."""
        span, graph = self._blocks, self._graph_bytes(ask.start, num_tokens)
        if isinstance(ask, Forward):
            return graph
        return graph + (ask.end - ask.start + 2) * num_tokens * span.hidden_size * span.dtype.itemsize

    def _check_room(self, rider: Rider) -> None:
        num_tokens = rider.num_tokens
        num_bytes = self._needed(rider.ask, num_tokens)
        if num_bytes > self._room.activations:
            raise error(
                Code.OUT_OF_MEMORY,
                f"a micro-batch of {num_tokens} tokens takes about {num_bytes:,} bytes of activations,"
                f" {self._room.activations:,} are there",
                "send fewer or shorter sequences in a micro-batch",
                max_tokens=num_tokens * self._room.activations // num_bytes,
            )

    def _graph_bytes(self, block: int, num_tokens: int) -> int:
        """About what backward keeps of one block."""
        if not self._bytes_per_token:
            self._bytes_per_token = max(1, _graph_bytes(self._blocks, block) // _PROBE_TOKENS)
        return self._bytes_per_token * num_tokens


def _graph_bytes(blocks: Blocks, block: int) -> int:
    """Bytes that autograd saves in one block for a sequence of `_PROBE_TOKENS`, its weights aside."""
    sizes: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in blocks.modules[block].parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    shape = (_PROBE_TOKENS, blocks.hidden_size)
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(shape, generator=generator).to(blocks.device, blocks.dtype).requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, _same):
        output = blocks.forward(leaf, Batch.stateless((_PROBE_TOKENS,)), (block, block + 1))
        # While the graph is alive, so that no address comes twice.
        return sum(sizes.values()) + output.nbytes


def _same(tensor: Tensor) -> Tensor:
    return tensor
