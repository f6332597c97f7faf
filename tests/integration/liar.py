"""A `corollad` that misbehaves when a test asks: `python liar.py FOLDER ARGUMENTS of corollad`.

FOLDER/lie: what to do to the next step or result that it sends, once: `short` (bytes are missing), `nan` (a
number that is none), `shifted` (one position too far). FOLDER/unreachable: peer ids, one a line, to whom no
step gets through, as if the cable between the two were cut. FOLDER/hold: while it is there no step is sent, and
FOLDER/held says that one waits. FOLDER/stall: requests of the kind that it names
(`forward`, `backward`) are taken, said to be worked on, and never answered; FOLDER/stalled appears once
there is one.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import trio

from corolla.daemon.__main__ import main
from corolla.daemon.network.libp2p.network import Libp2pNetwork
from corolla.daemon.serving.served import Served
from corolla.daemon.serving.training import CHUNK_TIMEOUT_S, TrainingService, read_chunks
from corolla.protocol.errors import Code, error
from corolla.protocol.limits import WORKING_EVERY_S
from corolla.protocol.steps import PUSH_PROTOCOL, Result, Step
from corolla.protocol.training import Working

HELD_POLL_S = 0.01
NAN = b"\x00\x00\xc0\x7f"  # float32, little endian


def misbehave(folder: Path) -> None:
    """Put the lies and the cut cables between the daemon and its network."""
    lie, unreachable = folder / "lie", folder / "unreachable"
    hold, held = folder / "hold", folder / "held"
    stall, stalled = folder / "stall", folder / "stalled"
    honest_send, honest_open = Served._send, Libp2pNetwork.open
    honest_answer = TrainingService._answer

    def is_cut(peer: str) -> bool:
        return unreachable.exists() and peer in unreachable.read_text().split()

    async def send(self: Served, message: Any) -> bool:
        while isinstance(message, (Step, Result)) and hold.exists():
            held.touch()
            await trio.sleep(HELD_POLL_S)
        held.unlink(missing_ok=True)
        if isinstance(message, (Step, Result)) and lie.exists():
            message = spoiled(message, lie.read_text())
            lie.unlink()
        if isinstance(message, Step) and self._push is not None and is_cut(self._push.target.peer):
            self._push.reset()
            return False
        return await honest_send(self, message)

    async def open_(self: Libp2pNetwork, peer: str, protocol: str, *, timeout_s: float) -> Any:
        if protocol == PUSH_PROTOCOL and is_cut(peer):
            raise error(Code.PEER_LOST, f"no way to {peer}")
        return await honest_open(self, peer, protocol, timeout_s=timeout_s)

    async def answer(self: TrainingService, talk: Any, worker: Any, asked: Any) -> None:
        if not (stall.exists() and stall.read_text() == asked.KIND):
            return await honest_answer(self, talk, worker, asked)
        await read_chunks(talk, asked.size_bytes, CHUNK_TIMEOUT_S)
        while True:
            await talk.say(Working(worker.queue))
            stalled.touch()
            await trio.sleep(WORKING_EVERY_S)

    Served._send = send  # type: ignore[method-assign]
    Libp2pNetwork.open = open_  # type: ignore[method-assign]
    TrainingService._answer = answer  # type: ignore[method-assign]


def spoiled(message: Step | Result, kind: str) -> Step | Result:
    """The same message with one thing wrong."""
    if kind == "short":
        return dataclasses.replace(message, payload=message.payload[:-4])
    if kind == "nan":
        return dataclasses.replace(message, payload=NAN + message.payload[4:])
    if isinstance(message, Step):
        rows = tuple(row._replace(position=row.position + 1) for row in message.rows)
        return dataclasses.replace(message, rows=rows)
    raise SystemExit(f"a result cannot be {kind}")


if __name__ == "__main__":
    misbehave(Path(sys.argv[1]))
    main(sys.argv[2:])
