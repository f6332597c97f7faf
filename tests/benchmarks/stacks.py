"""The stacks to be measured: raw TCP, py-libp2p as it comes, and ours, each as a server and as its dialler.

Run as a program it is the far side, in a process of its own: it prints its port and peer id, and then echoes,
or swallows and answers with one byte.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import anyio
import structlog
import trio

sys.path.insert(0, str(Path(__file__).parents[2]))

if TYPE_CHECKING:
    from corolla.daemon.network.seam import Stream

ECHO = "/bench/echo/1"
SWALLOW = "/bench/swallow/1"
NAP = "/bench/nap/1"
NAP_S = 30.0
KINDS = ("raw", "stock", "ours")
MEGA = 1_000_000


class Pipe(Protocol):
    """A stream of any stack."""

    async def send(self, data: bytes) -> None: ...
    async def receive(self) -> bytes: ...
    async def close(self) -> None: ...
    async def drop(self) -> None: ...


Dial = Callable[[str], Awaitable[Pipe]]


async def echo(pipe: Pipe) -> None:
    while data := await pipe.receive():
        await pipe.send(data)
    await pipe.close()


async def swallow(pipe: Pipe) -> None:
    """Answer one byte when as many bytes have come as the first eight announce; keep none of them."""
    head = b""
    while len(head) < 8:
        head += await pipe.receive()
    left = int.from_bytes(head[:8]) - len(head[8:])
    while left:
        left -= len(await pipe.receive())
    await pipe.send(b".")
    await pipe.close()


async def nap(pipe: Pipe) -> None:
    """`swallow`, later, unless the stream was dropped meanwhile."""
    await trio.sleep(NAP_S)
    with suppress(Exception):  # of any stack, in its own type
        await swallow(pipe)


HANDLERS: dict[str, Callable[[Any], Awaitable[None]]] = {ECHO: echo, SWALLOW: swallow, NAP: nap}


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

    async def drop(self) -> None:
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

    async def drop(self) -> None:
        await self._stream.reset()


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


class OurPipe:
    def __init__(self, stream: Stream) -> None:
        self.send = stream.send
        self.receive = stream.receive
        self.close = stream.close
        self._stream = stream

    async def drop(self) -> None:
        self._stream.reset()


async def serve_pipe(handler: Callable[[Any], Awaitable[None]], stream: Stream) -> None:
    await handler(OurPipe(stream))


async def serve_ours() -> None:
    from corolla.daemon.identity import new_identity
    from corolla.daemon.network.libp2p.network import open_network

    async with open_network(new_identity(), listen=("/ip4/127.0.0.1/tcp/0",)) as network:
        for protocol, handler in HANDLERS.items():
            network.handle(protocol, partial(serve_pipe, handler))
        announce(int(network.addresses()[0].split("/")[4]), network.peer)
        await trio.sleep_forever()


@asynccontextmanager
async def dial_ours(port: int, peer: str) -> AsyncIterator[Dial]:
    from corolla.daemon.identity import new_identity
    from corolla.daemon.network.libp2p.network import open_network

    async with open_network(new_identity(), listen=()) as network:
        await network.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}", timeout_s=10)

        async def dial(protocol: str) -> Pipe:
            return OurPipe(await network.open(peer, protocol, timeout_s=60))

        yield dial


SERVERS: dict[str, Callable[[], Awaitable[None]]] = {
    "raw": serve_raw, "stock": serve_stock, "ours": serve_ours,
}  # fmt: skip
DIALLERS: dict[str, Callable[[int, str], AbstractAsyncContextManager[Dial]]] = {
    "raw": dial_raw, "stock": dial_stock, "ours": dial_ours,
}  # fmt: skip


def announce(port: int, peer: str) -> None:
    print(port, peer or "-", flush=True)


class Far(NamedTuple):
    """A far side that runs. peer: its id, "-" if it has none."""

    port: int
    peer: str
    process: subprocess.Popen[str]


@contextmanager
def far_side(kind: str) -> Iterator[Far]:
    """The stack's server, in another process; killed in the end, also when it was stopped."""
    with other_process(__file__, kind) as far:
        yield far


@contextmanager
def other_process(program: str, *options: str) -> Iterator[Far]:
    """A program of ours that announces a port."""
    child = subprocess.Popen(
        [sys.executable, program, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert child.stdout is not None
        port, peer = child.stdout.readline().split()
        yield Far(int(port), peer, child)
    finally:
        child.kill()
        child.wait()


def be_quiet() -> None:
    """Log errors only: a program's output is read by another."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


if __name__ == "__main__":
    be_quiet()
    anyio.run(SERVERS[sys.argv[1]], backend="trio")
