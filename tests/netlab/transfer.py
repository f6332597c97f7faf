"""Two ends of a transfer between hosts: `transfer.py sink`, `transfer.py send ADDRESS SIZE PIECE [LIMIT]`.

`send` prints what its meter found of the line, in bytes a second, and the seconds that sending took, as JSON.
"""

from __future__ import annotations

import json
import sys

import trio

from corolla.daemon.identity import new_identity
from corolla.daemon.network.libp2p.network import open_network
from corolla.daemon.network.seam import Stream
from corolla.daemon.network.traffic import Traffic

PROTOCOL = "/test/sink/1"
PAUSE_S = 0.02  # between pieces: what computes in between sends no faster


async def sink(stream: Stream) -> None:
    while await stream.receive():
        pass
    await stream.send(b"all")
    await stream.close()


async def serve() -> None:
    async with open_network(new_identity(), listen=("/ip4/0.0.0.0/tcp/4517",)) as network:
        network.handle(PROTOCOL, sink)
        print("up", flush=True)
        await trio.sleep_forever()


async def send(address: str, size: int, piece: int, limit: float) -> None:
    traffic, best = Traffic(), 0.0
    if limit:
        traffic.limit(limit)

    async def look() -> None:
        nonlocal best
        while True:
            best = max(best, traffic.meter.read(trio.current_time()).up_bytes_per_s)
            await trio.sleep(0.5)

    async with (
        open_network(new_identity(), listen=(), traffic=traffic) as network,
        trio.open_nursery() as nursery,
    ):
        peer = await network.connect(address, timeout_s=10)
        nursery.start_soon(look)
        stream = await network.open(peer, PROTOCOL, timeout_s=10)
        began = trio.current_time()
        for _ in range(size // piece):
            await stream.send(bytes(piece))
            await trio.sleep(PAUSE_S if piece < size else 0.0)
        await stream.close()
        await stream.receive()
        print(json.dumps({"up_bytes_per_s": best, "took_s": trio.current_time() - began}), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        trio.run(serve)
    else:
        address, size, piece, *limit = sys.argv[2:]
        trio.run(send, address, int(size), int(piece), float(limit[0]) if limit else 0.0)
