"""One request to one hop, over a stream of its own: forward, backward or an adapter part, and its answer.

It checks all that an answer promises. Whom to ask, and what to do when it fails, is `passes`' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import structlog
import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import OPEN_TIMEOUT_S, STEP_TIMEOUT_S
from ...protocol.training import (
    TRAINING,
    TRAINING_PROTOCOL,
    Computed,
    Declined,
    PutPart,
    SpanBackward,
    SpanForward,
    Working,
)
from ..network.conversation import Conversation
from ..network.seam import Network
from ..serving.training import hear_within, read_chunks, send_chunks

HARD_TIMEOUT_S: Final = 900.0  # of one request, however much progress its hop reports

_log = structlog.get_logger("corolla.training")


@dataclass(frozen=True, slots=True)
class Answer:
    """hidden: outputs, or the inputs' gradients. parts: gradients of each part, empty without parts."""

    hidden: bytes
    parts: tuple[bytes, ...] = ()


async def ask_hop(
    network: Network, peer: str, request: SpanForward | SpanBackward | PutPart, payload: bytes
) -> Answer:
    """Ask, and hear the whole answer.

    Raises what the hop declined with; `PEER_LOST`, `TIMEOUT` after a long silence, `PROTOCOL_VIOLATION`, and
    `BAD_ANSWER` for an answer of another size.
    """
    with trio.move_on_after(HARD_TIMEOUT_S):
        stream = await network.open(peer, TRAINING_PROTOCOL, timeout_s=OPEN_TIMEOUT_S)
        try:
            return await _talk(Conversation(stream, TRAINING), request, payload)
        finally:
            stream.reset()
    raise error(Code.TIMEOUT, f"{peer} did not finish {request.KIND} in {HARD_TIMEOUT_S:g} s")


async def _talk(talk: Conversation, request: SpanForward | SpanBackward | PutPart, payload: bytes) -> Answer:
    """Ask and hear at once: a hop may decline before it has heard all."""
    problems: list[CorollaError] = []
    answers: list[Answer] = []

    async def hear(scope: trio.CancelScope) -> None:
        try:
            answers.append(await _hear(talk, request, len(payload)))
        except CorollaError as problem:
            problems.append(problem)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hear, nursery.cancel_scope)
        try:
            await talk.say(request)
            await send_chunks(talk, payload)
        except CorollaError as problem:
            _log.debug("training_request_cut", reason=problem.message)  # what is heard tells more
    if problems:
        raise problems[0]
    return answers[0]


async def _hear(talk: Conversation, request: SpanForward | SpanBackward | PutPart, num_sent: int) -> Answer:
    peer = talk.stream.peer
    while True:
        message = await hear_within(talk, STEP_TIMEOUT_S)
        if isinstance(message, Declined):
            raise message.problem()
        if isinstance(message, Computed):
            break
        if not isinstance(message, Working):
            raise error(Code.PROTOCOL_VIOLATION, f"{peer} answered {request.KIND} with {message.KIND}")
    expected = 0 if isinstance(request, PutPart) else num_sent
    num_parts = 0
    if isinstance(request, SpanBackward):
        expected //= 2
        num_parts = len(request.parts)
    found = message.size_bytes - sum(message.part_bytes)
    if found != expected or len(message.part_bytes) != num_parts:
        raise error(
            Code.BAD_ANSWER,
            f"{peer} announced {found} bytes of hidden states and {len(message.part_bytes)} parts,"
            f" expected {expected} and {num_parts}",
        )
    data = await read_chunks(talk, message.size_bytes, STEP_TIMEOUT_S)
    parts, at = [], found
    for size in message.part_bytes:
        parts.append(data[at : at + size])
        at += size
    return Answer(data[:found], tuple(parts))
