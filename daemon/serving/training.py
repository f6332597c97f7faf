"""Answers peers that train: forward, backward and adapter parts on our workers. Nothing of a request is kept.

It owns which requests are under way, and bounds them: in number, by client, and in bytes before any is read.
What is computed is the worker's business; `protocol/training` says what is spoken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Final, TypeAlias, cast

import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import (
    MAX_TRAINING_REQUEST_BYTES,
    MAX_TRAINING_REQUESTS,
    MAX_TRAINING_REQUESTS_PER_CLIENT,
    OPEN_TIMEOUT_S,
    TRAINING_CHUNK_BYTES,
    WORKING_EVERY_S,
)
from ...protocol.messages import Message
from ...protocol.training import (
    TRAINING,
    TRAINING_PROTOCOL,
    Chunk,
    Computed,
    Declined,
    PutPart,
    SpanBackward,
    SpanForward,
    Working,
)
from ...protocol.work import Backward, Done, Forward, Gradients, HoldPart
from ..network.conversation import Conversation
from ..network.seam import Network, Stream
from .port import Pending, WorkerPort

CHUNK_TIMEOUT_S: Final = OPEN_TIMEOUT_S  # silence of a client amid its tensors

Asked: TypeAlias = SpanForward | SpanBackward | PutPart
FindWorker = Callable[[str, Asked], WorkerPort]


class TrainingService:
    """Serves `TRAINING_PROTOCOL` on a network.

    find_worker: given client and request, the worker that may compute it; it raises why there is none. on_work: told of
    each client's tokens that went back.
    """

    def __init__(
        self,
        network: Network,
        find_worker: FindWorker,
        on_work: Callable[[str, int], None] = lambda client, num_tokens: None,
    ) -> None:
        self._find_worker = find_worker
        self._on_work = on_work
        self._clients: Counter[str] = Counter()  # client → requests under way
        self._num_bytes = 0
        network.handle(TRAINING_PROTOCOL, self._serve)

    @property
    def num_requests(self) -> int:
        """Under way now."""
        return self._clients.total()

    async def _serve(self, stream: Stream) -> None:
        talk = Conversation.begun_by(stream, TRAINING)
        with trio.fail_after(CHUNK_TIMEOUT_S):
            asked = await talk.hear()
        if not isinstance(asked, (SpanForward, SpanBackward, PutPart)):
            raise error(Code.PROTOCOL_VIOLATION, f"{stream.peer} did not begin with a training request")
        try:
            with self._admitted(stream.peer, asked):
                talk.trust()
                await self._answer(talk, self._find_worker(stream.peer, asked), asked)
        except CorollaError as problem:
            await talk.say(Declined.of(problem))
        await stream.close()

    @contextmanager
    def _admitted(self, client: str, asked: Asked) -> Iterator[None]:
        """Count a request while it lasts. Raises `BUSY`."""
        mine = self._clients[client]
        too_many = self.num_requests >= MAX_TRAINING_REQUESTS or mine >= MAX_TRAINING_REQUESTS_PER_CLIENT
        if too_many or self._num_bytes + asked.size_bytes > MAX_TRAINING_REQUEST_BYTES:
            raise error(
                Code.BUSY,
                f"{self.num_requests} training requests of {self._num_bytes} bytes are under way here,"
                f" {mine} of them yours",
                "use another peer, or ask again later",
            )
        self._clients[client] += 1
        self._num_bytes += asked.size_bytes
        try:
            yield
        finally:
            self._num_bytes -= asked.size_bytes
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    async def _answer(self, talk: Conversation, worker: WorkerPort, asked: Asked) -> None:
        pending = worker.submit(_request(asked, await read_chunks(talk, asked.size_bytes, CHUNK_TIMEOUT_S)))
        try:
            answer = await _waited(talk, worker, pending)
        except BaseException:
            worker.abandon(pending)
            raise
        if isinstance(asked, SpanBackward):
            self._on_work(talk.stream.peer, sum(sequence.n for sequence in asked.sequences))
        sizes = answer.part_bytes if isinstance(answer, Gradients) else ()
        await talk.say(Computed(len(answer.payload), sizes))
        await send_chunks(talk, answer.payload)


async def _waited(talk: Conversation, worker: WorkerPort, pending: Pending) -> Done | Gradients:
    """The worker's answer; until then a sign of life each second. A client that is gone raises `PEER_LOST`."""
    while not pending.is_done:
        with trio.move_on_after(WORKING_EVERY_S):
            return cast(Done | Gradients, await pending.answer())
        await talk.say(Working(worker.queue))
    return cast(Done | Gradients, pending.result())


def _request(asked: Asked, payload: bytes) -> Forward | Backward | HoldPart:
    """What the worker is asked. Raises `BAD_REQUEST` for a part whose name is not its hash."""
    if isinstance(asked, PutPart):
        if sha256(payload).digest() != asked.part:
            raise error(
                Code.BAD_REQUEST,
                f"{len(payload)} bytes of an adapter part have the sha256 {sha256(payload).hexdigest()[:12]},"
                f" not {asked.part.hex()[:12]}",
                "name each part by the sha256 of its bytes",
            )
        return HoldPart(0, asked.block, asked.part, payload)
    kind = Forward if isinstance(asked, SpanForward) else Backward
    return kind(
        0, asked.start, asked.end, asked.encoding, asked.sequences, asked.parts, asked.dropout, payload
    )


async def read_chunks(talk: Conversation, size_bytes: int, timeout_s: float) -> bytes:
    """The tensors announced. Raises `PROTOCOL_VIOLATION`, `PEER_LOST`, and `TIMEOUT` after so long a silence."""
    data = bytearray()
    while len(data) < size_bytes:
        chunk = await hear_within(talk, timeout_s)
        if not isinstance(chunk, Chunk) or not chunk.payload or len(data) + len(chunk.payload) > size_bytes:
            raise error(
                Code.PROTOCOL_VIOLATION,
                f"{talk.stream.peer} announced {size_bytes} bytes of tensors and sent something else"
                f" after {len(data)}",
            )
        data += chunk.payload
    return bytes(data)


async def send_chunks(talk: Conversation, data: bytes) -> None:
    """Send tensors in pieces that a reader need not hold all at once."""
    for at in range(0, len(data), TRAINING_CHUNK_BYTES):
        await talk.say(Chunk(data[at : at + TRAINING_CHUNK_BYTES]))


async def hear_within(talk: Conversation, timeout_s: float) -> Message:
    """The next message. Raises `TIMEOUT`, `PEER_LOST` at the end, and as `Conversation.hear`."""
    with trio.move_on_after(timeout_s):
        message = await talk.hear()
        if message is None:
            raise error(Code.PEER_LOST, f"{talk.stream.peer} ended amid a training request")
        return message
    raise error(Code.TIMEOUT, f"{talk.stream.peer} was silent for {timeout_s:g} s amid a training request")
