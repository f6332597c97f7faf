"""Round trips to a peer, over the network in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio.testing

from corolla.daemon.network.memory import MemoryNetwork, memory_hub
from corolla.daemon.network.pinging import PING_BYTES, PING_PROTOCOL, ping
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, CorollaError

pytestmark = pytest.mark.anyio
ONE_WAY_S = 0.05


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Time passes as soon as everybody waits for it."""
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


class Echo:
    """Answers pings, the first so many of them; then as told."""

    def __init__(self, answers: int = 100, then: str = "silence") -> None:
        self.answers = answers
        self.then = then

    async def __call__(self, stream: Stream) -> None:
        while data := await stream.receive():
            if self.answers:
                self.answers -= 1
                await stream.send(data)
            elif self.then == "lies":
                await stream.send(bytes(len(data)))
            elif self.then == "end":
                stream.reset()
                return


@asynccontextmanager
async def peers(echo: Echo) -> AsyncIterator[MemoryNetwork]:
    async with memory_hub(delay=lambda rng, source, target: ONE_WAY_S) as hub:
        hub.network("bob").handle(PING_PROTOCOL, echo)
        yield hub.network("ada")


async def test_a_ping_takes_a_round_trip() -> None:
    async with peers(Echo()) as ada:
        rtts = await ping(ada, "bob", 3, timeout_s=5.0)
        assert rtts == pytest.approx([2 * ONE_WAY_S] * 3)


@pytest.mark.parametrize("then", ["silence", "end"])
async def test_what_was_measured_is_kept_when_an_answer_stays_out(then: str) -> None:
    async with peers(Echo(2, then)) as ada:
        assert len(await ping(ada, "bob", 4, timeout_s=5.0)) == 2


@pytest.mark.parametrize(
    ("then", "code"),
    [("silence", Code.TIMEOUT), ("end", Code.PEER_LOST), ("lies", Code.PROTOCOL_VIOLATION)],
)
async def test_a_peer_that_never_answers_rightly_is_an_error(then: str, code: Code) -> None:
    async with peers(Echo(0, then)) as ada:
        with pytest.raises(CorollaError) as caught:
            await ping(ada, "bob", 4, timeout_s=5.0)
        assert caught.value.code is code
        assert "bob" in caught.value.message


async def test_other_bytes_are_never_an_answer() -> None:
    async with peers(Echo(1, "lies")) as ada:
        with pytest.raises(CorollaError) as caught:
            await ping(ada, "bob", 4, timeout_s=5.0)
        assert caught.value.code is Code.PROTOCOL_VIOLATION
    assert PING_BYTES == 32  # as the specification says
