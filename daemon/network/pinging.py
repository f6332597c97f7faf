"""Measures the round trip to a peer, by libp2p's own ping, which every peer of its kind answers.

It owns nothing and judges nothing. Source: https://github.com/libp2p/specs/blob/master/ping/ping.md.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

import anyio

from ...protocol.errors import Code, CorollaError, error
from .seam import Network, Stream

PING_PROTOCOL: Final = "/ipfs/ping/1.0.0"
PING_BYTES: Final = 32


async def ping(
    network: Network,
    peer: str,
    count: int,
    *,
    timeout_s: float,
    clock: Callable[[], float] = anyio.current_time,
) -> tuple[float, ...]:
    """Round trips in seconds, one after another; fewer than `count` if then one stayed unanswered.

    timeout_s: for the stream, and for each answer. Raises what opening a stream does, and `TIMEOUT` or
    `PEER_LOST` if not even the first was answered, `PROTOCOL_VIOLATION` for an answer of other bytes.
    """
    late = error(Code.TIMEOUT, f"{peer} did not answer a ping in {timeout_s:g} s")
    with anyio.move_on_after(timeout_s) as opening:  # the network would call it lost, and it may only be slow
        stream = await network.open(peer, PING_PROTOCOL, timeout_s=2 * timeout_s)
    if opening.cancelled_caught:
        raise late
    rtts: list[float] = []
    try:
        for _ in range(count):
            began = clock()
            with anyio.fail_after(timeout_s):
                await _echo(stream)
            rtts.append(clock() - began)
    except TimeoutError as problem:
        if not rtts:
            raise late from problem
    except CorollaError as problem:
        if problem.code is not Code.PEER_LOST:
            raise
        if not rtts:
            raise error(Code.PEER_LOST, f"{peer} ended a ping: {problem.message}") from problem
    finally:
        stream.reset()
    return tuple(rtts)


async def _echo(stream: Stream) -> None:
    sent = secrets.token_bytes(PING_BYTES)
    await stream.send(sent)
    heard = b""
    while len(heard) < PING_BYTES:
        more = await stream.receive()
        if not more:
            raise error(Code.PEER_LOST, "the end of the stream")
        heard += more
    if heard != sent:
        raise error(Code.PROTOCOL_VIOLATION, f"{stream.peer} answered a ping with other bytes")
