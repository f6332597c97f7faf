"""What leaves a machine: counted, delayed to its owner's pace, never dropped."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from corolla.daemon.identity import new_identity
from corolla.daemon.network.libp2p.network import open_network
from corolla.daemon.network.seam import Stream
from corolla.daemon.network.traffic import (
    BURST_BYTES,
    PIECE_BYTES,
    Nearness,
    Pace,
    Remote,
    Traffic,
    nearness_of,
)

RATE = BURST_BYTES  # bytes a second: a burst is a second's worth


def timed(story: Callable[[], Awaitable[None]]) -> float:
    """Seconds that it waits, on a clock that jumps."""

    async def run() -> float:
        began = trio.current_time()
        await story()
        return trio.current_time() - began

    return trio.run(run, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    ("sizes", "waits_s"),
    [
        ([BURST_BYTES], 0.0),
        ([BURST_BYTES, RATE], 1.0),
        ([BURST_BYTES // 2] * 6, 2.0),
        ([BURST_BYTES + 3 * RATE], 3.0),
    ],
)
def test_what_exceeds_the_pace_waits(sizes: list[int], waits_s: float) -> None:
    async def story() -> None:
        traffic = Traffic()
        traffic.limit(RATE)
        for size in sizes:
            await traffic.leave(size)
        assert traffic.sent_bytes == sum(sizes)

    assert timed(story) == pytest.approx(waits_s)


def test_a_rest_is_saved_up_to_one_burst() -> None:
    async def story() -> None:
        pace = Pace(RATE, BURST_BYTES)
        await pace.wait(BURST_BYTES)
        await trio.sleep(100)
        await pace.wait(BURST_BYTES)
        await pace.wait(BURST_BYTES)

    assert timed(story) == pytest.approx(101)


def test_whoever_asked_first_goes_first() -> None:
    order: list[str] = []

    async def send(traffic: Traffic, name: str, size: int) -> None:
        await traffic.leave(size)
        order.append(name)

    async def story() -> None:
        traffic = Traffic()
        traffic.limit(RATE)
        await traffic.leave(BURST_BYTES)
        async with trio.open_nursery() as nursery:
            for name, size in (("large", 2 * RATE), ("small", 10), ("later", 10)):
                nursery.start_soon(send, traffic, name, size)
                await trio.testing.wait_all_tasks_blocked()

    timed(story)
    assert order == ["large", "small", "later"]


def test_without_a_limit_nothing_waits() -> None:
    async def story() -> None:
        traffic = Traffic()
        assert not traffic.holds(Nearness.WORLD)
        await traffic.leave(10**12)
        traffic.limit(1000.0)
        assert traffic.holds(Nearness.NEAR)
        traffic.limit(1000.0, spares_near=True)
        assert not traffic.holds(Nearness.NEAR)
        assert traffic.holds(Nearness.WORLD)
        traffic.limit(math.inf)
        await traffic.leave(10**12)

    assert timed(story) == 0.0


@pytest.mark.parametrize(
    ("remote", "nearness"),
    [
        (("127.0.0.1", 1), Nearness.HERE),
        (("::1", 1), Nearness.HERE),
        (("192.168.1.7", 1), Nearness.NEAR),
        (("9.9.9.9", 1), Nearness.WORLD),
        (("fe80::1%eth0", 1), Nearness.NEAR),
        (None, Nearness.HERE),  # a circuit; its relay's connection counts
    ],
)
def test_a_far_end_is_here_near_or_in_the_world(remote: Remote, nearness: Nearness) -> None:
    assert nearness_of(remote) is nearness
    assert (Traffic().lane(remote) is None) is (nearness is Nearness.HERE)


@pytest.mark.anyio
async def test_streams_of_a_real_network_keep_to_the_pace_and_lose_nothing() -> None:
    listen = ("/ip4/127.0.0.1/tcp/0",)
    traffic = Traffic(lambda remote: Nearness.WORLD)
    rate = 8 * BURST_BYTES
    size = BURST_BYTES + rate // 4 + PIECE_BYTES // 2
    heard, done = bytearray(), trio.Event()

    async def listen_to(stream: Stream) -> None:
        while data := await stream.receive():
            heard.extend(data)
        done.set()

    async with (
        open_network(new_identity(), listen=listen) as far,
        open_network(new_identity(), listen=listen, traffic=traffic) as near,
    ):
        far.handle("/test/sink/1", listen_to)
        peer = await near.connect(far.addresses()[0], timeout_s=30)
        stream = await near.open(peer, "/test/sink/1", timeout_s=30)
        traffic.limit(rate)
        before, sent_before = trio.current_time(), traffic.sent_bytes
        words = bytes(range(256)) * (size // 256)
        with trio.fail_after(60):
            await stream.send(words)
            waited = trio.current_time() - before
            await stream.close()
            await done.wait()
    assert bytes(heard) == words
    assert waited >= 0.24  # never sooner than the pace; how much later is the machine's affair
    assert traffic.sent_bytes - sent_before >= len(words)
