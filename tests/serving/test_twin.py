"""The worker's twin: its hidden states tell of any wrong token, and it fails as workers do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
import trio.testing

from corolla.daemon.serving.port import Pending
from corolla.daemon.serving.twin import WorkerTwin, embedding, not_finite, whole_row
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.steps import NEW_ROW, Reply, Row
from corolla.protocol.tensors import Encoding
from corolla.protocol.work import (
    BeginGeneration,
    Begun,
    CloseCache,
    Compute,
    Done,
    EndGeneration,
    OpenCache,
    Restore,
    Restored,
    Sample,
    Sampled,
    Sampling,
    TokenRow,
)

from .stage import FACTS, NUM_BLOCKS, TOKEN_BYTES, expected, tokens

pytestmark = pytest.mark.anyio

CACHE = b"a cache"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time jumps to whatever is awaited next."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@asynccontextmanager
async def a_twin(start: int = 0, end: int = NUM_BLOCKS, **settings: Any) -> AsyncIterator[WorkerTwin]:
    """A twin that runs, with one cache open."""
    async with trio.open_nursery() as nursery:
        twin = WorkerTwin(7, FACTS, start, end, **settings)
        nursery.start_soon(twin.run)
        await twin.submit(opening(start, end)).answer()
        yield twin
        nursery.cancel_scope.cancel()


def opening(start: int = 0, end: int = NUM_BLOCKS, *, cache: bytes = CACHE, max_rows: int = 4) -> OpenCache:
    return OpenCache(0, cache, start, end, Encoding.FLOAT32, max_rows, 64)


def compute(step_id: int, rows: tuple[Row, ...], *values: int, reply: Reply = Reply.ALL) -> Compute:
    return Compute(0, CACHE, step_id, 0, rows, reply, b"".join(tokens(*values)))


async def output_of(pending: Pending) -> list[bytes]:
    payload = cast(Done, await pending.answer()).payload
    return [payload[place : place + TOKEN_BYTES] for place in range(0, len(payload), TOKEN_BYTES)]


async def code_of(pending: Pending) -> Code:
    with pytest.raises(CorollaError) as raised:
        await pending.answer()
    return raised.value.code


@pytest.mark.parametrize(
    "other",
    [(1, 2, 4), (1, 3), (2, 1, 3), (1, 2, 2, 3), (0, 2, 3)],
    ids=["another token", "one lost", "two swapped", "one repeated", "another first"],
)
def test_any_wrong_token_shows_in_the_last_hidden_state(other: tuple[int, ...]) -> None:
    assert expected(1, 2, 3)[-1] != expected(*other)[-1]


def test_blocks_differ_and_cuts_do_not_matter() -> None:
    whole = expected(1, 2, 3)
    for cut in range(1, NUM_BLOCKS):
        assert whole_row(cut, NUM_BLOCKS, expected(1, 2, 3, end=cut)) == whole
    assert expected(1, end=1) != expected(1, start=1, end=2)


async def test_steps_give_what_the_whole_row_gives() -> None:
    async with a_twin() as twin:
        first = await output_of(twin.submit(compute(1, (Row(NEW_ROW, 0, 2),), 1, 2)))
        second = await output_of(twin.submit(compute(2, (Row(0, 2, 1), Row(0, 1, 1)), 3, 4)))
        assert first + second[:1] == expected(1, 2, 3)
        assert second[1:] == expected(1, 4)[1:]
        last = await output_of(twin.submit(compute(3, (Row(0, 3, 0), Row(1, 2, 2)), 5, 6, reply=Reply.LAST)))
        assert last == expected(1, 4, 5, 6)[-1:]


async def test_rows_are_set_back() -> None:
    async with a_twin() as twin:
        await output_of(twin.submit(compute(1, (Row(NEW_ROW, 0, 3),), 1, 2, 3)))
        await output_of(twin.submit(compute(2, (Row(0, 1, 1),), 9)))
        restored = cast(Restored, await twin.submit(Restore(0, CACHE, 1, (2,))).answer())
        assert restored.held == (2,)
        assert await output_of(twin.submit(compute(2, (Row(0, 2, 1),), 4))) == expected(1, 2, 4)[2:]
        restored = cast(Restored, await twin.submit(Restore(0, CACHE, 7, (2,))).answer())
        assert restored.held == (0,)
        assert await code_of(twin.submit(compute(3, (Row(0, 0, 1),), 1))) is Code.BAD_REQUEST


async def test_a_bad_step_fails_alone_and_leaves_the_rows() -> None:
    async with a_twin() as twin:
        await output_of(twin.submit(compute(1, (Row(NEW_ROW, 0, 2),), 1, 2)))
        nan = Compute(0, CACHE, 2, 0, (Row(0, 2, 1),), payload=not_finite(TOKEN_BYTES))
        for ask, code in (
            (nan, Code.NOT_FINITE),
            (Compute(0, CACHE, 2, 0, (Row(0, 2, 1),), payload=b"short"), Code.BAD_SHAPE),
            (compute(2, (Row(0, 3, 1),), 1), Code.HISTORY_GAP),
            (compute(2, (Row(1, 0, 1),), 1), Code.BAD_REQUEST),
            (compute(2, (Row(0, 2, 63),), *range(63)), Code.TOO_LONG),
            (Compute(0, b"another", 2, 0, (Row(NEW_ROW, 0, 0),)), Code.UNKNOWN_SESSION),
        ):
            assert await code_of(twin.submit(ask)) is code
        assert await output_of(twin.submit(compute(2, (Row(0, 2, 1),), 3))) == expected(1, 2, 3)[2:]


async def test_the_cache_is_promised_at_admission() -> None:
    async with a_twin(cache_tokens=300) as twin:
        assert await code_of(twin.submit(opening(cache=b"b", max_rows=1))) is Code.BUSY
        assert await code_of(twin.submit(opening(cache=b"b", max_rows=5))) is Code.TOO_LONG
        assert await code_of(twin.submit(opening(0, NUM_BLOCKS + 1, cache=b"b"))) is Code.BLOCKS_OUT_OF_RANGE
        twin.tell(CloseCache(CACHE))
        await twin.submit(opening(cache=b"b", max_rows=1)).answer()
        assert twin.statistics().num_caches == 1


async def test_a_crash_loses_everything_and_it_comes_back() -> None:
    async with a_twin(restart_s=5.0, compute_s=1.0) as twin:
        lost: list[float] = []
        twin.on_lost(lambda: lost.append(trio.current_time()))
        under_way = twin.submit(compute(1, (Row(NEW_ROW, 0, 1),), 1))
        await trio.sleep(0.5)
        twin.crash()
        assert await code_of(under_way) is Code.WORKER_LOST
        assert await code_of(twin.submit(opening())) is Code.WORKER_LOST
        assert (lost, twin.ready) == ([0.5], None)
        await trio.sleep(5.5)
        assert twin.ready is not None
        assert twin.statistics().num_caches == 0
        await twin.submit(opening()).answer()
        assert await output_of(twin.submit(compute(1, (Row(NEW_ROW, 0, 1),), 1))) == expected(1)


async def test_a_hung_twin_answers_when_it_wakes() -> None:
    async with a_twin() as twin:
        twin.hang()
        pending = twin.submit(compute(1, (Row(NEW_ROW, 0, 1),), 1))
        progress = twin.progress
        await trio.sleep(10)
        assert (pending.is_done, twin.progress) == (False, progress)
        twin.wake()
        assert await output_of(pending) == expected(1)


async def test_a_twin_that_hangs_too_long_is_killed() -> None:
    async with a_twin(silence_s=30.0) as twin:
        twin.hang()
        pending = twin.submit(compute(1, (Row(NEW_ROW, 0, 1),), 1))
        assert await code_of(pending) is Code.WORKER_LOST
        assert trio.current_time() == pytest.approx(30.0)


async def test_a_slow_twin_shows_progress() -> None:
    async with a_twin(compute_s=4.0) as twin:
        progress = twin.progress
        pending = twin.submit(compute(1, (Row(NEW_ROW, 0, 1),), 1))
        await trio.sleep(2.5)
        assert twin.progress == progress + 2
        await pending.answer()
        assert trio.current_time() == pytest.approx(4.0)


async def test_restoring_drops_steps_that_wait() -> None:
    async with a_twin(compute_s=1.0) as twin:
        asked = [twin.submit(compute(n, (Row(NEW_ROW if n == 1 else 0, n - 1, 1),), n)) for n in (1, 2, 3)]
        await asked[0].answer()
        restored = cast(Restored, await twin.submit(Restore(0, CACHE, 1, (1,))).answer())
        assert restored.held == (1,)
        await trio.sleep(10)
        assert [pending.is_done for pending in asked] == [True, False, False]
        assert twin.statistics().num_pending == 0


async def test_an_abandoned_step_is_computed_nevertheless() -> None:
    async with a_twin() as twin:
        twin.abandon(twin.submit(compute(1, (Row(NEW_ROW, 0, 1),), 1)))
        assert twin.queue == 0
        assert await output_of(twin.submit(compute(2, (Row(0, 1, 1),), 2))) == expected(1, 2)[1:]


async def test_text_follows_from_the_hidden_states() -> None:
    async with a_twin() as twin:
        ask = BeginGeneration(
            0, 5, Sampling(), Encoding.FLOAT32, max_tokens=8, max_new_tokens=2, prompts=("ab", "c")
        )
        begun = cast(Begun, await twin.submit(ask).answer())
        assert begun.tokens == (TokenRow((97, 98)), TokenRow((99,)))
        assert begun.payload == b"".join(tokens(97, 98, 99))
        hidden = expected(97, 98)[-1]
        first = cast(Sampled, await twin.submit(Sample(0, 5, (0,), hidden)).answer())
        (chosen,) = first.chosen
        assert (chosen.row, chosen.finish) == (0, None)
        assert first.payload == embedding(chosen.token, TOKEN_BYTES)
        other = cast(Sampled, await twin.submit(Sample(0, 5, (1,), expected(99)[-1])).answer())
        assert other.chosen[0].token != chosen.token
        second = cast(Sampled, await twin.submit(Sample(0, 5, (0,), hidden)).answer())
        assert (second.chosen[0].finish, second.payload) == ("length", b"")
        assert await code_of(twin.submit(Sample(0, 5, (1,), not_finite(TOKEN_BYTES)))) is Code.NOT_FINITE
        twin.tell(EndGeneration(5))
        assert await code_of(twin.submit(Sample(0, 5, (1,), hidden))) is Code.UNKNOWN_SESSION
        assert twin.statistics().num_generations == 0
