"""The wire: our streams beside py-libp2p's stock Yamux and raw TCP, two processes on this machine.

Each figure is the median over all rounds, and the stacks take turns in every round, so that a busy moment hits
all of them. The 50 ms round trip is a third process that holds every piece back for 25 ms each way. The
hardships are single trials: writes that are cancelled, a reader that sleeps, a peer that is stopped.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.report import Measured, Report, arguments, median
from tests.benchmarks.slow_link import ROUND_TRIP_S, slow_link
from tests.benchmarks.stacks import (
    DIALLERS,
    ECHO,
    KINDS,
    MEGA,
    NAP,
    NAP_S,
    SWALLOW,
    Dial,
    Far,
    Pipe,
    be_quiet,
    far_side,
)

KILO = 1000
SIZES = {"1 B": 1, "14 KB": 14 * KILO, "64 KB": 64 * KILO, "1 MB": MEGA}
PARTS = ("echo", "bulk", "streams", "far", "hardships")
NUM_CANCELLED = 100
HARM_S = 5.0  # an echo that takes longer was harmed
STOPPED_S = 20.0  # for so long a stopped peer is watched

Figures = dict[str, list[float]]


async def echo_ms(pipe: Pipe, size: int, repeats: int) -> list[float]:
    """Milliseconds of `size` bytes there and back."""
    data = bytes(size)
    times = []

    async def collect() -> None:
        left = size
        while left:
            left -= len(await pipe.receive())

    for _ in range(repeats):
        began = time.perf_counter()
        if size <= 64 * KILO:
            await pipe.send(data)
            await collect()
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(collect)
                await pipe.send(data)
        times.append((time.perf_counter() - began) * 1e3)
    return times


async def bulk_mb_per_s(pipe: Pipe, size: int) -> float:
    """Megabytes a second, one way, until the last byte is confirmed."""
    began = time.perf_counter()
    await pipe.send(size.to_bytes(8))
    block = bytes(MEGA)
    for _ in range(size // MEGA):
        await pipe.send(block)
    await pipe.receive()
    return size / MEGA / (time.perf_counter() - began)


async def open_ms(dial: Dial, repeats: int) -> list[float]:
    """Milliseconds of a new stream, its first byte and the answer."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        pipe = await dial(ECHO)
        await pipe.send(b".")
        await pipe.receive()
        times.append((time.perf_counter() - began) * 1e3)
        await pipe.close()
    return times


async def messages_per_s(dial: Dial, num_streams: int, repeats: int) -> float:
    """Messages of 14 KB a second, there and back, on several streams at once."""
    pipes = [await dial(ECHO) for _ in range(num_streams)]
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for pipe in pipes:
            nursery.start_soon(echo_ms, pipe, 14 * KILO, repeats)
    return num_streams * repeats / (time.perf_counter() - began)


async def many_streams_s(dial: Dial, num_streams: int) -> float:
    """Seconds until so many streams are open at once and each has had an answer."""

    async def one() -> None:
        pipe = await dial(ECHO)
        await pipe.send(b".")
        await pipe.receive()

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(num_streams):
            nursery.start_soon(one)
    return time.perf_counter() - began


# hardships


async def survived(dial: Dial) -> float:
    """After how many of `NUM_CANCELLED` cancelled writes a neighbour on the connection still had its echoes."""
    neighbour = await dial(ECHO)
    for number in range(NUM_CANCELLED):
        try:
            with trio.fail_after(HARM_S):
                pipe = await dial(NAP)
                with trio.move_on_after(0.002):
                    await pipe.send(bytes(4 * MEGA))
                with suppress(Exception):  # that it has ended already is no harm
                    await pipe.drop()
                await echo_ms(neighbour, 14 * KILO, 1)
        except Exception as harm:  # of any stack, in its own type
            print(f"cancelled write {number}: {harm!r}", file=sys.stderr)
            return number
    return NUM_CANCELLED


async def beside_a_sleeper(dial: Dial) -> tuple[float, float]:
    """The slowest echo in ms while a reader on the connection sleeps, and the share of its bytes that it got.

    An echo that does not come in `HARM_S` counts as that long, and ends the trial.
    """
    neighbour, sleeper = await dial(ECHO), await dial(NAP)
    slowest_ms, arrived = 0.0, 0.0

    async def fill() -> None:
        nonlocal arrived
        size = 4 * MEGA
        try:
            await sleeper.send(size.to_bytes(8) + bytes(size))
            arrived = float(bool(await sleeper.receive()))
        except Exception as harm:  # as in `survived`
            print(f"to the sleeper: {harm!r}", file=sys.stderr)

    async def look_on() -> None:
        nonlocal slowest_ms
        until = trio.current_time() + NAP_S
        while trio.current_time() < until:
            slowest_ms = max(slowest_ms, HARM_S * 1e3)
            with trio.fail_after(HARM_S):
                (ms,) = await echo_ms(neighbour, 14 * KILO, 1)
            slowest_ms = max(ms, 0.0 if slowest_ms == HARM_S * 1e3 else slowest_ms)
            await trio.sleep(0.1)

    with suppress(ExceptionGroup), trio.move_on_after(NAP_S + HARM_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            nursery.start_soon(look_on)
    return slowest_ms, arrived


async def noticed_s(dial: Dial, far: Far) -> float:
    """Seconds until a reader hears that its peer was stopped; at most `STOPPED_S`."""
    pipe = await dial(ECHO)
    await echo_ms(pipe, 1, 1)
    far.process.send_signal(signal.SIGSTOP)
    began = time.perf_counter()
    with trio.move_on_after(STOPPED_S), suppress(Exception):
        await pipe.receive()
    return time.perf_counter() - began


# one stack's round


async def measure_near(kind: str, far: Far, *, parts: set[str], quick: bool) -> Figures:
    """On loopback."""
    found: Figures = {}
    few = 3 if quick else 10
    async with DIALLERS[kind](far.port, far.peer) as dial:
        pipe = await dial(ECHO)
        await echo_ms(pipe, 14 * KILO, 20)
        for name, size in SIZES.items() if "echo" in parts else ():
            found[name] = await echo_ms(pipe, size, few * (40 if size <= 64 * KILO else 3))
        if "bulk" in parts:
            found["bulk"] = [await bulk_mb_per_s(await dial(SWALLOW), 50 * MEGA)]
        if "streams" in parts:
            found["open"] = await open_ms(dial, few * 5)
            found["eight"] = [await messages_per_s(dial, 8, few * 10)]
            if kind == "ours":
                found["many"] = [await many_streams_s(dial, 1000)]
    return found


async def measure_far(kind: str, far: Far, *, quick: bool) -> Figures:
    """Through the slow link."""
    with slow_link(far.port) as port:
        async with DIALLERS[kind](port, far.peer) as dial:
            pipe = await dial(ECHO)
            found = {"far 14 KB": await echo_ms(pipe, 14 * KILO, 10 if quick else 30)}
            found["far bulk"] = [await bulk_mb_per_s(await dial(SWALLOW), 50 * MEGA)]
    return found


async def measure_hardship(kind: str, far: Far, *, name: str) -> Figures:
    """One trial."""
    async with DIALLERS[kind](far.port, far.peer) as dial:
        match name:
            case "survived":
                return {name: [await survived(dial)]}
            case "noticed":
                return {name: [await noticed_s(dial, far)]}
            case _:
                slowest_ms, arrived = await beside_a_sleeper(dial)
                return {"slowest": [slowest_ms], "arrived": [arrived]}


def gather(parts: set[str], *, quick: bool) -> dict[str, dict[str, float]]:
    """Medians by stack and figure."""
    samples: dict[str, Figures] = {kind: {} for kind in KINDS}

    def keep(kind: str, measure: Callable[[str, Far], Awaitable[Figures]]) -> None:
        with far_side(kind) as far:
            for name, values in anyio.run(measure, kind, far, backend="trio").items():
                samples[kind].setdefault(name, []).extend(values)

    for _ in range(3 if quick else 5):
        for kind in KINDS:
            if parts & {"echo", "bulk", "streams"}:
                keep(kind, partial(measure_near, parts=parts, quick=quick))
            if "far" in parts:
                keep(kind, partial(measure_far, quick=quick))
    for kind in ("stock", "ours") if "hardships" in parts else ():
        for name in (
            "survived",
            "slowest",
            "noticed",
        ):  # each with a far side of its own, lest one harm the next
            keep(kind, partial(measure_hardship, name=name))
    return {kind: {name: median(values) for name, values in of.items()} for kind, of in samples.items()}


def report(found: dict[str, dict[str, float]], parts: set[str]) -> Report:
    """What was measured, ours beside each other stack."""
    out = Report()
    ours = found["ours"]

    def beside(
        name: str, what: str, unit: str, *, target: float | None = None, at_most: bool = False
    ) -> None:
        for kind, called in (("stock", "stock"), ("raw", "raw TCP")):
            held = target if kind == "stock" else None
            out.add(
                Measured(
                    f"{what}, beside {called}", ours[name], unit, found[kind][name], held, at_most=at_most
                )
            )

    for name in SIZES if "echo" in parts else ():
        beside(name, f"echo {name}", "ms", target=1 / 2.5 if name == "14 KB" else None, at_most=True)
    if "bulk" in parts:
        beside("bulk", "bulk", "MB/s", target=2.5)
    if "streams" in parts:
        beside("open", "new stream", "ms")
        beside("eight", "8 streams of 14 KB", "echoes/s")
        out.add(Measured("1000 streams opened at once", ours["many"], "s"))
    if "far" in parts:
        slow = f"{ROUND_TRIP_S * 1e3:.0f} ms round trip"
        beside("far 14 KB", f"{slow}: echo 14 KB", "ms")
        beside("far bulk", f"{slow}: bulk", "MB/s", target=2.5)
    if "hardships" in parts:
        report_hardships(out, found)
    return out


def report_hardships(out: Report, found: dict[str, dict[str, float]]) -> None:
    """Add the hardships, the stock muxer's first; only ours are held to a target."""
    for kind in ("stock", "ours"):
        of = found[kind]
        held = kind == "ours"
        out.add(
            Measured(
                f"{kind}: cancelled writes survived", of["survived"], "of 100", target=100 * held or None
            )
        )
        slow = HARM_S * 1e3 / 5 if held else None
        out.add(
            Measured(f"{kind}: slowest echo beside a sleeper", of["slowest"], "ms", target=slow, at_most=True)
        )
        out.add(Measured(f"{kind}: the sleeper got all, late", of["arrived"], "yes/no", target=held or None))
        out.add(
            Measured(
                f"{kind}: a stopped peer is noticed",
                of["noticed"],
                "s",
                target=10 if held else None,
                at_most=True,
            )
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args()
    be_quiet()
    parts = set(options.only or PARTS)
    report(gather(parts, quick=options.quick), parts).finish(options.json)


if __name__ == "__main__":
    main()
