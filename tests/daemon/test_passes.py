"""Micro-batches over hops that lie, lack memory or take no adapter: elsewhere, or one error that says why."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from corolla.daemon.network.memory import memory_hub
from corolla.daemon.serving.port import ANSWERS, Pending
from corolla.daemon.serving.training import TrainingService
from corolla.daemon.swarm.blame import HEAVY
from corolla.daemon.swarm.view import Span
from corolla.daemon.training.pace import LEAST_S, UNKNOWN_S
from corolla.daemon.training.passes import Batch, Interval, Swarm
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.records import SpanState
from corolla.protocol.tensors import DType, Encoding
from corolla.protocol.training import Sequence
from corolla.protocol.work import Backward, Done, Forward, Gradients, HoldPart

from ..protocol.test_partfiles import file_of

pytestmark = pytest.mark.anyio
FACTORS = {"q.lora_A": ((1, 2), [1.0, 2.0]), "q.lora_B": ((2, 1), [3.0, 4.0])}
PART = file_of(FACTORS)
NAME = sha256(PART).digest()
BATCH = Batch("model", 2, 0, 2, Encoding.FLOAT32, (Sequence(0, 3),), (NAME, b""), data={NAME: PART})
PATIENCE_S = 60.0  # with blocks that nobody serves
HIDDEN = struct.pack("<6f", *range(6))
Spoil = Callable[[Gradients], Gradients]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


def honest(answer: Gradients) -> Gradients:
    return answer


@dataclass
class Worker:
    """Its blocks give back what they get, and their parts' gradients are the parts.

    problem: instead of all. is_stuck: it works on what it is asked for ever.
    """

    spoil: Spoil = honest
    problem: CorollaError | None = None
    refuses_parts: CorollaError | None = None
    held: set[bytes] = field(default_factory=set)
    asked: list[Any] = field(default_factory=list)
    queue: int = 0
    is_stuck: bool = False
    num_abandoned: int = 0

    def submit(self, request: Any) -> Pending:
        self.asked.append(request)
        pending = Pending(1, ANSWERS[type(request)])
        if self.is_stuck:
            return pending
        try:
            pending.resolve(self._answer(request))
        except CorollaError as problem:
            pending.fail(problem)
        return pending

    def abandon(self, pending: Pending) -> None:
        self.num_abandoned += 1
        pending.fail(error(Code.CANCELLED, "nobody wants it"))

    def _answer(self, request: Any) -> Done | Gradients:
        if isinstance(request, HoldPart):
            if self.refuses_parts is not None:
                raise self.refuses_parts
            self.held.add(request.part)
            return Done(1)
        if self.problem is not None:
            raise self.problem
        missing = [part.hex() for part in request.parts if part and part not in self.held]
        if missing:
            raise error(Code.ADAPTER_MISSING, "put them here", missing=missing)
        if isinstance(request, Forward):
            return Done(1, request.payload)
        files = [PART if part else b"" for part in request.parts]
        half = request.payload[len(request.payload) // 2 :]
        return self.spoil(Gradients(1, tuple(map(len, files)), half + b"".join(files)))


@dataclass
class Field:
    """A client of workers that all hold both blocks; the first ones listed are much faster, and asked first."""

    swarm: Swarm
    workers: dict[str, Worker]
    charges: list[tuple[str, float]]
    spans: list[Span]

    async def back(self) -> tuple[bytes, tuple[bytes, ...]]:
        return await self.swarm.backward(BATCH, (Interval(0, 2, HIDDEN),), HIDDEN)


@asynccontextmanager
async def field_of(*workers: Worker) -> AsyncIterator[Field]:
    charges: list[tuple[str, float]] = []
    async with memory_hub() as hub:
        named = {f"peer{number}": worker for number, worker in enumerate(workers)}
        for peer, worker in named.items():
            TrainingService(hub.network(peer), lambda client, asked, worker=worker: worker)  # type: ignore[misc]
        spans = [
            Span(peer, 0, 0, 2, SpanState.ONLINE, DType.FLOAT32, tokens_per_s=1e9 / 1e6**number, rtt_s=0.0)
            for number, peer in enumerate(named)
        ]

        async def find_spans() -> tuple[Span, ...]:
            await trio.lowlevel.checkpoint()
            return tuple(spans)

        swarm = Swarm(
            hub.network("client"),
            find_spans,
            lambda peer, weight, reason: charges.append((peer, weight)),
            used=lambda peer: None,
            patience_s=PATIENCE_S,
            rng=Random(0),
        )
        yield Field(swarm, named, charges, spans)


def gradients(hidden: bytes = HIDDEN, part: bytes = PART) -> Gradients:
    return Gradients(1, (len(part), 0), hidden + part)


LIES = {
    "short hidden states": gradients(hidden=HIDDEN[:-4]),
    "hidden states that are not finite": gradients(hidden=HIDDEN[:-4] + struct.pack("<f", float("nan"))),
    "a tensor too few": gradients(part=file_of({"q.lora_A": FACTORS["q.lora_A"]})),
    "another shape": gradients(part=file_of({**FACTORS, "q.lora_B": ((1, 2), [3.0, 4.0])})),
    "numbers that are not finite": gradients(
        part=file_of({**FACTORS, "q.lora_A": ((1, 2), [1.0, float("inf")])})
    ),
    "no file at all": gradients(part=b"nothing of the kind"),
    "gradients of a block without a part": Gradients(1, (len(PART), 3), HIDDEN + PART + b"abc"),
    "too few parts": Gradients(1, (), HIDDEN),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_a_peer_that_gives_wrong_gradients_is_charged_and_another_asked(lie: Gradients) -> None:
    async with field_of(Worker(spoil=lambda _: lie), Worker()) as field_:
        assert await field_.back() == (HIDDEN, (PART, b""))
        assert field_.charges == [("peer0", HEAVY)]


async def test_where_all_give_wrong_gradients_one_error_names_the_values() -> None:
    lie = LIES["another shape"]
    async with field_of(Worker(spoil=lambda _: lie), Worker(spoil=lambda _: lie)) as field_:
        with pytest.raises(
            CorollaError, match=r"block 0: the gradient of q.lora_B has the shape \(1, 2\)"
        ) as caught:
            await field_.back()
        assert caught.value.code is Code.BAD_ANSWER


def too_large(max_tokens: int) -> CorollaError:
    return error(
        Code.OUT_OF_MEMORY, f"a micro-batch of 3 tokens, room for {max_tokens}", max_tokens=max_tokens
    )


async def test_a_micro_batch_too_large_for_one_hop_goes_to_another() -> None:
    async with field_of(Worker(problem=too_large(1)), Worker()) as field_:
        assert (await field_.swarm.forward(BATCH, HIDDEN))[0] == HIDDEN
        assert field_.charges == []


async def test_a_micro_batch_too_large_for_all_hops_is_told_at_once() -> None:
    async with field_of(Worker(problem=too_large(1)), Worker(problem=too_large(2))) as field_:
        began = trio.current_time()
        with pytest.raises(CorollaError, match="a micro-batch of 3 tokens, room for 2") as caught:
            await field_.swarm.forward(BATCH, HIDDEN)
        assert (caught.value.code, caught.value.details["max_tokens"]) == (Code.OUT_OF_MEMORY, 2)
        assert trio.current_time() == began
        assert field_.charges == []


def for_another_model() -> CorollaError:
    return error(Code.BAD_SHAPE, "q.lora_A has the shape (1, 2), block 0 wants 64", "for another model")


async def test_an_adapter_for_another_model_is_told_once_every_hop_has_said_so() -> None:
    workers = [Worker(refuses_parts=for_another_model()) for _ in range(2)]
    async with field_of(*workers) as field_:
        with pytest.raises(CorollaError, match="block 0 wants 64") as caught:
            await field_.swarm.forward(BATCH, HIDDEN)
        assert caught.value.code is Code.BAD_SHAPE
        assert [sum(isinstance(a, HoldPart) for a in worker.asked) for worker in workers] == [1, 1]
        assert field_.charges == []


async def test_a_hop_that_wrongly_refuses_an_adapter_stops_nobody() -> None:
    async with field_of(Worker(refuses_parts=for_another_model()), Worker()) as field_:
        assert await field_.back() == (HIDDEN, (PART, b""))


async def test_parts_go_to_each_hop_once() -> None:
    async with field_of(Worker()) as field_:
        for _ in range(3):
            await field_.back()
        (worker,) = field_.workers.values()
        assert [type(asked) for asked in worker.asked] == [Backward, HoldPart, Backward, Backward, Backward]


async def test_a_slow_peer_costs_only_the_rerun_of_its_micro_batch() -> None:
    slow = Worker()
    async with field_of(slow, Worker()) as field_:
        await field_.back()  # by the one that is going to be slow, so that it is known what is usual
        slow.is_stuck = True
        began = trio.current_time()
        assert await field_.back() == (HIDDEN, (PART, b""))
        assert trio.current_time() - began == LEAST_S
        assert await field_.back() == (HIDDEN, (PART, b""))
        assert trio.current_time() - began == LEAST_S  # and the next one is not sent there
        assert (field_.charges, len(slow.asked)) == ([], 4)  # twice before it held the part
        await trio.testing.wait_all_tasks_blocked()
        assert slow.num_abandoned == 1


async def test_where_one_peer_is_slow_and_one_refuses_a_third_is_asked() -> None:
    async with field_of(Worker(is_stuck=True), Worker(problem=too_large(1)), Worker()) as field_:
        began = trio.current_time()
        assert (await field_.swarm.forward(BATCH, HIDDEN))[0] == HIDDEN
        assert trio.current_time() - began == UNKNOWN_S
        assert field_.charges == []


async def test_a_job_keeps_its_precision_until_it_is_over() -> None:
    async with field_of(Worker()) as field_:
        await field_.swarm.forward(BATCH, HIDDEN)
        field_.spans[:] = [replace(span, dtype=DType.BFLOAT16) for span in field_.spans]
        with pytest.raises(CorollaError, match="nobody serves block 0") as caught:
            await field_.swarm.forward(BATCH, HIDDEN)
        assert caught.value.code is Code.BLOCKS_UNSERVED
        assert (await field_.swarm.forward(BATCH, HIDDEN))[0] == HIDDEN
