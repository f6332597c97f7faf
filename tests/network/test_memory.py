"""What the in-memory twin adds: time, death, hanging, cut links, and that all of it repeats itself."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import trio
from trio.testing import MockClock

from corolla.daemon.network.memory import MemoryHub, MemoryStream, memory_hub, uniform_delay
from corolla.daemon.network.seam import Stream
from corolla.protocol.errors import Code, CorollaError

T = TypeVar("T")
ECHO = "/test/echo/1"


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run under a clock that jumps over every wait."""

    async def call() -> T:
        return await main()

    return trio.run(call, clock=MockClock(autojump_threshold=0))


async def echo(stream: Stream) -> None:
    while data := await stream.receive():
        await stream.send(data)
    await stream.close()


async def pair(hub: MemoryHub) -> MemoryStream:
    """A stream from `a` to an echoing `b`."""
    hub.network("b").handle(ECHO, echo)
    return await hub.network("a").open("b", ECHO, timeout_s=100)


async def lost(stream: Stream) -> str:
    """The reason why a stream broke."""
    with pytest.raises(CorollaError) as caught:
        await stream.receive()
    assert caught.value.code is Code.PEER_LOST
    return caught.value.message


def fixed(seconds: float) -> Callable[[random.Random, str, str], float]:
    return lambda rng, source, target: seconds


def test_bytes_take_their_delay_and_keep_their_order() -> None:
    async def main() -> None:
        async with memory_hub(seed=1, delay=uniform_delay(0.1, 0.9)) as hub:
            stream = await pair(hub)
            began = trio.current_time()
            for number in range(20):
                await stream.send(bytes([number]))
            got = b""
            while len(got) < 20:
                got += await stream.receive()
            assert got == bytes(range(20))
            assert 0.2 <= trio.current_time() - began < 2.0

    run(main)


def test_a_killed_peer_is_noticed_at_once_by_streams_and_listeners() -> None:
    async def main() -> None:
        async with memory_hub() as hub:
            heard: list[tuple[str, bool]] = []
            stream = await pair(hub)
            found = hub.find("a")
            assert found is not None
            found.on_peer(lambda peer, connected: heard.append((peer, connected)))
            hub.kill("b")
            assert heard == [("b", False)]
            assert "gone" in await lost(stream)
            with pytest.raises(CorollaError, match="gone"):
                await found.open("b", ECHO, timeout_s=1)

    run(main)


def test_a_killed_peers_handlers_are_cancelled() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def handler(stream: Stream) -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.append(stream.peer)

        async with memory_hub() as hub:
            hub.network("b").handle(ECHO, handler)
            await hub.network("a").open("b", ECHO, timeout_s=1)
            await trio.testing.wait_all_tasks_blocked()
            hub.kill("b")
            await trio.testing.wait_all_tasks_blocked()
            assert ended == ["a"]

    run(main)


def test_a_killed_peer_may_come_back_under_its_name() -> None:
    async def main() -> None:
        async with memory_hub() as hub:
            await pair(hub)
            hub.kill("b")
            hub.network("b").handle(ECHO, echo)
            found = hub.find("a")
            assert found is not None
            stream = await found.open("b", ECHO, timeout_s=1)
            await stream.send(b"back")
            assert await stream.receive() == b"back"

    run(main)


def test_what_was_under_way_to_a_hung_peer_arrives_when_it_wakes() -> None:
    async def main() -> None:
        async with memory_hub(delay=fixed(0.01)) as hub:
            stream = await pair(hub)
            hub.hang("b")
            await stream.send(b"late")
            with trio.move_on_after(1000) as waited:
                await stream.receive()
            assert waited.cancelled_caught
            hub.wake("b")
            assert await stream.receive() == b"late"
            assert trio.current_time() < 1001

    run(main)


def test_a_hung_peers_own_sends_stay_with_it() -> None:
    async def main() -> None:
        async with memory_hub(delay=fixed(0.01)) as hub:
            go = trio.Event()

            async def handler(stream: Stream) -> None:
                await go.wait()
                await stream.send(b"from the past")
                await stream.close()

            hub.network("b").handle(ECHO, handler)
            stream = await hub.network("a").open("b", ECHO, timeout_s=1)
            hub.hang("b")
            go.set()
            with trio.move_on_after(5) as waited:
                await stream.receive()
            assert waited.cancelled_caught
            hub.wake("b")
            assert await stream.receive() == b"from the past"

    run(main)


def test_nobody_reaches_a_hung_peer_in_time() -> None:
    async def main() -> None:
        async with memory_hub() as hub:
            hub.network("b").handle(ECHO, echo)
            network = hub.network("a")
            hub.hang("b")
            began = trio.current_time()
            with pytest.raises(CorollaError, match="no answer in 3 s") as caught:
                await network.open("b", ECHO, timeout_s=3)
            assert caught.value.code is Code.PEER_LOST
            assert trio.current_time() - began == 3

    run(main)


def test_a_cut_link_breaks_what_is_open_and_refuses_more_until_healed() -> None:
    async def main() -> None:
        async with memory_hub() as hub:
            stream = await pair(hub)
            a, c = hub.find("a"), hub.network("c")
            c.handle(ECHO, echo)
            assert a is not None
            hub.cut("b", "a")
            assert "cut" in await lost(stream)
            with pytest.raises(CorollaError, match="cut"):
                await a.open("b", ECHO, timeout_s=1)
            assert await a.connect("/memory/c", timeout_s=1) == "c"
            assert await a.closest_peers(b"key", 5) == ("c",)
            hub.heal("a", "b")
            again = await a.open("b", ECHO, timeout_s=1)
            await again.send(b"healed")
            assert await again.receive() == b"healed"

    run(main)


def test_ended_streams_are_no_longer_counted() -> None:
    async def main() -> None:
        async with memory_hub() as hub:
            stream = await pair(hub)
            assert hub.num_streams_of("a") == 1
            await stream.close()
            assert await stream.receive() == b""
            assert hub.num_streams_of("a") == hub.num_streams_of("b") == 0

    run(main)


def test_a_name_is_taken_once() -> None:
    async def main() -> None:
        async with memory_hub() as hub:
            hub.network("a")
            with pytest.raises(CorollaError) as caught:
                hub.network("a")
            assert caught.value.code is Code.STATE_IN_USE

    run(main)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_gives_the_same_times(seed: int) -> None:
    assert _course(seed) == _course(seed)


def test_other_seeds_give_other_times() -> None:
    assert _course(1) != _course(2)


def _course(seed: int) -> list[tuple[str, float]]:
    """Who received when, among three peers that talk all at once."""
    log: list[tuple[str, float]] = []

    async def main() -> None:
        async with (
            memory_hub(seed=seed, delay=uniform_delay(0.0, 0.1)) as hub,
            trio.open_nursery() as nursery,
        ):
            names = ("a", "b", "c")
            networks = {name: hub.network(name) for name in names}
            for network in networks.values():
                network.handle(ECHO, echo)

            async def talk(source: str, target: str) -> None:
                stream = await networks[source].open(target, ECHO, timeout_s=10)
                for number in range(5):
                    await stream.send(bytes([number]))
                    await stream.receive()
                    log.append((f"{source}{target}", trio.current_time()))

            for source in names:
                for target in names:
                    nursery.start_soon(talk, source, target)

    run(main)
    start = min(time for _, time in log)
    return sorted((who, round(time - start, 9)) for who, time in log)
