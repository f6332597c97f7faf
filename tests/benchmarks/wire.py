"""The wire: our streams beside py-libp2p's stock Yamux and raw TCP, two processes on this machine.

The far side echoes, or swallows and answers with one byte. Each figure is the median over all rounds, and the
stacks take turns in every round, so that a busy moment hits all of them. The 50 ms round trip is a proxy in a
third process that holds every piece back for 25 ms each way.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import anyio
import structlog
import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.report import Measured, Report, arguments, median

ECHO = "/bench/echo/1"
SWALLOW = "/bench/swallow/1"
KINDS = ("raw", "stock", "ours")
KILO, MEGA = 1000, 1_000_000
SIZES = {"1 B": 1, "14 KB": 14 * KILO, "64 KB": 64 * KILO, "1 MB": MEGA}
ROUND_TRIP_S = 0.05


class Pipe(Protocol):
    """A stream of any stack."""

    async def send(self, data: bytes) -> None: ...
    async def receive(self) -> bytes: ...
    async def close(self) -> None: ...


Dial = Callable[[str], Awaitable[Pipe]]


async def echo(pipe: Pipe) -> None:
    while data := await pipe.receive():
        await pipe.send(data)
    await pipe.close()


async def swallow(pipe: Pipe) -> None:
    """Answer one byte when as many bytes have come as the first eight announce, again and again."""
    buffer = bytearray()
    while data := await pipe.receive():
        buffer += data
        while len(buffer) >= 8 and len(buffer) >= 8 + (size := int.from_bytes(buffer[:8])):
            del buffer[: 8 + size]
            await pipe.send(b".")
    await pipe.close()


HANDLERS: dict[str, Callable[[Any], Awaitable[None]]] = {ECHO: echo, SWALLOW: swallow}


# raw TCP: the first line names the handler


class RawPipe:
    def __init__(self, stream: trio.SocketStream, rest: bytes = b"") -> None:
        self._stream = stream
        self._rest = rest

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def receive(self) -> bytes:
        rest, self._rest = self._rest, b""
        return rest or await self._stream.receive_some()

    async def close(self) -> None:
        await self._stream.aclose()


async def serve_raw() -> None:
    async def handle(stream: trio.SocketStream) -> None:
        head = b""
        while b"\n" not in head:
            head += await stream.receive_some()
        name, _, rest = head.partition(b"\n")
        await HANDLERS[name.decode()](RawPipe(stream, rest))

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    announce(listener.socket.getsockname()[1], "")
    await trio.serve_listeners(handle, [listener])


@asynccontextmanager
async def dial_raw(port: int, peer: str) -> AsyncIterator[Dial]:
    async def dial(protocol: str) -> Pipe:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(protocol.encode() + b"\n")
        return RawPipe(stream)

    yield dial


# py-libp2p as it comes, with Noise only


class StockPipe:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def send(self, data: bytes) -> None:
        await self._stream.write(data)

    async def receive(self) -> bytes:
        from libp2p.network.stream.exceptions import StreamEOF

        try:
            data: bytes = await self._stream.read(MEGA)
        except StreamEOF:
            return b""
        return data

    async def close(self) -> None:
        await self._stream.close()


def stock_host() -> Any:
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_pair
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport

    keys = create_new_key_pair()
    noise = Transport(keys, noise_privkey=create_noise_pair().private_key)
    return new_host(key_pair=keys, sec_opt={PROTOCOL_ID: noise})


async def serve_stock() -> None:
    from multiaddr import Multiaddr

    host = stock_host()
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        for protocol, handler in HANDLERS.items():
            host.set_stream_handler(protocol, lambda stream, handler=handler: handler(StockPipe(stream)))
        announce(int(host.get_transport_addrs()[0].value_for_protocol("tcp")), str(host.get_id()))
        await trio.sleep_forever()


@asynccontextmanager
async def dial_stock(port: int, peer: str) -> AsyncIterator[Dial]:
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    host = stock_host()
    info = info_from_p2p_addr(Multiaddr(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"))

    async def dial(protocol: str) -> Pipe:
        return StockPipe(await host.new_stream(info.peer_id, [protocol]))

    async with host.run([]):
        await host.connect(info)
        yield dial


# ours


async def serve_ours() -> None:
    from corolla.daemon.identity import new_identity
    from corolla.daemon.network.libp2p import open_network

    async with open_network(new_identity(), listen=("/ip4/127.0.0.1/tcp/0",)) as network:
        for protocol, handler in HANDLERS.items():
            network.handle(protocol, handler)
        announce(int(network.addresses()[0].split("/")[4]), network.peer)
        await trio.sleep_forever()


@asynccontextmanager
async def dial_ours(port: int, peer: str) -> AsyncIterator[Dial]:
    from corolla.daemon.identity import new_identity
    from corolla.daemon.network.libp2p import open_network

    async with open_network(new_identity(), listen=()) as network:
        await network.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}", timeout_s=10)

        async def dial(protocol: str) -> Pipe:
            return await network.open(peer, protocol, timeout_s=60)

        yield dial


SERVERS: dict[str, Callable[[], Awaitable[None]]] = {
    "raw": serve_raw, "stock": serve_stock, "ours": serve_ours,
}  # fmt: skip
DIALLERS: dict[str, Callable[[int, str], AbstractAsyncContextManager[Dial]]] = {
    "raw": dial_raw, "stock": dial_stock, "ours": dial_ours,
}  # fmt: skip


def announce(port: int, peer: str) -> None:
    print(port, peer or "-", flush=True)


async def proxy(target: int) -> None:
    """Forward connections to a port, every piece half a round trip late."""

    async def forward(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](100_000)

        async def deliver() -> None:
            async for due, data in receive:
                await trio.sleep_until(due)
                await sink.send_all(data)
            await sink.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliver)
            async with send:
                async for data in source:
                    await send.send((trio.current_time() + ROUND_TRIP_S / 2, bytes(data)))

    async def handle(stream: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", target)
        try:
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(forward, stream, far)
                nursery.start_soon(forward, far, stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            print("the proxied connection ended", file=sys.stderr)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    announce(listener.socket.getsockname()[1], "")
    await trio.serve_listeners(handle, [listener])


@contextmanager
def other_process(*options: str) -> Iterator[tuple[int, str]]:
    """Another process of this program; gives its port and peer id."""
    child = subprocess.Popen(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert child.stdout is not None
        port, peer = child.stdout.readline().split()
        yield int(port), peer
    finally:
        child.kill()
        child.wait()


# what is measured


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


async def measure_near(kind: str, port: int, peer: str, *, quick: bool) -> dict[str, list[float]]:
    """One round on loopback."""
    found: dict[str, list[float]] = {}
    few = 3 if quick else 10
    async with DIALLERS[kind](port, peer) as dial:
        pipe = await dial(ECHO)
        await echo_ms(pipe, 14 * KILO, 20)
        for name, size in SIZES.items():
            found[name] = await echo_ms(pipe, size, few * (40 if size <= 64 * KILO else 3))
        found["open"] = await open_ms(dial, few * 5)
        found["bulk"] = [await bulk_mb_per_s(await dial(SWALLOW), (20 if quick else 50) * MEGA)]
        found["eight"] = [await messages_per_s(dial, 8, few * 10)]
        if kind == "ours":
            found["many"] = [await many_streams_s(dial, 1000)]
    return found


async def measure_far(kind: str, port: int, peer: str, *, quick: bool) -> dict[str, list[float]]:
    """One round through the slow link."""
    async with DIALLERS[kind](port, peer) as dial:
        pipe = await dial(ECHO)
        found = {"14 KB": await echo_ms(pipe, 14 * KILO, 10 if quick else 30)}
        size = (20 if quick else 50) * MEGA
        found["bulk"] = [await bulk_mb_per_s(await dial(SWALLOW), size)]
    return found


def gather(*, quick: bool) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Medians by stack and figure: on loopback, and through the slow link."""
    samples: list[dict[str, dict[str, list[float]]]] = [{kind: {} for kind in KINDS} for _ in range(2)]
    for _ in range(3 if quick else 5):
        for kind in KINDS:
            with other_process("--serve", kind) as (port, peer), other_process("--proxy", str(port)) as slow:
                for where, found in zip(
                    samples,
                    (
                        run(measure_near, kind, port, peer, quick),
                        run(measure_far, kind, slow[0], peer, quick),
                    ),
                    strict=True,
                ):
                    for name, values in found.items():
                        where[kind].setdefault(name, []).extend(values)
    near, far = ({k: {n: median(v) for n, v in f.items()} for k, f in where.items()} for where in samples)
    return near, far


def run(measure: Callable[..., Awaitable[Any]], kind: str, port: int, peer: str, quick: bool) -> Any:
    async def main() -> Any:
        return await measure(kind, port, peer, quick=quick)

    return anyio.run(main, backend="trio")


def report(near: dict[str, dict[str, float]], far: dict[str, dict[str, float]]) -> Report:
    out = Report()
    for name in SIZES:
        target = 1 / 2.5 if name == "14 KB" else None
        ours, stock, raw = (near[kind][name] for kind in ("ours", "stock", "raw"))
        out.add(Measured(f"echo {name}, beside stock", ours, "ms", stock, target=target, at_most=True))
        out.add(Measured(f"echo {name}, beside raw TCP", ours, "ms", raw))
    ours, stock, raw = (near[kind]["bulk"] for kind in ("ours", "stock", "raw"))
    out.add(Measured("bulk, beside stock", ours, "MB/s", stock, target=2.5))
    out.add(Measured("bulk, beside raw TCP", ours, "MB/s", raw))
    out.add(Measured("new stream, beside stock", near["ours"]["open"], "ms", near["stock"]["open"]))
    out.add(
        Measured(
            "8 streams of 14 KB, beside stock", near["ours"]["eight"], "echoes/s", near["stock"]["eight"]
        )
    )
    out.add(Measured("1000 streams opened at once", near["ours"]["many"], "s"))
    for other in ("stock", "raw"):
        beside = "stock" if other == "stock" else "raw TCP"
        slow = f"{ROUND_TRIP_S * 1e3:.0f} ms round trip"
        out.add(
            Measured(f"{slow}: echo 14 KB, beside {beside}", far["ours"]["14 KB"], "ms", far[other]["14 KB"])
        )
        out.add(Measured(f"{slow}: bulk, beside {beside}", far["ours"]["bulk"], "MB/s", far[other]["bulk"]))
    return out


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--proxy", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR)
    )  # stdout is a pipe
    if options.serve:
        anyio.run(SERVERS[options.serve], backend="trio")
    elif options.proxy:
        anyio.run(proxy, options.proxy, backend="trio")
    else:
        near, far = gather(quick=options.quick)
        report(near, far).finish(options.json)


if __name__ == "__main__":
    main()
