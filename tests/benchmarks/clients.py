"""Clients on a worker's own socket, without daemons: what the engine alone can do.

Each client is one text written greedily; all of them share one worker's socket, as the sessions of one daemon do.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import platformdirs

from corolla.model.plain import source_of
from corolla.protocol.framing import FrameParser
from corolla.protocol.limits import MAX_LOCAL_HEADER_BYTES, MAX_LOCAL_PAYLOAD_BYTES
from corolla.protocol.messages import Message, encode
from corolla.protocol.steps import NEW_ROW, Reply, Row
from corolla.protocol.tensors import DType, Encoding
from corolla.protocol.work import (
    FROM_WORKER,
    BeginGeneration,
    Begun,
    CloseCache,
    Compute,
    Configure,
    Done,
    EndGeneration,
    Failed,
    OpenCache,
    Ready,
    Sample,
    Sampled,
    Sampling,
    TokenRow,
)
from tests.benchmarks import plain

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Setup:
    """What a worker is started with. cache_tokens, memory_bytes: 0, and parked_tokens: -1, as the worker thinks
    best."""

    model: str
    threads: int
    dtype: DType = DType.FLOAT32
    quantization: str | None = None
    cache_tokens: int = 0
    parked_tokens: int = -1
    memory_bytes: int = 0
    cache_folder: Path = field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("corolla")) / "models"
    )


class ServedModel:
    """A worker with a whole model, from the daemon's side of its socket. start_s: until it was ready."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        began = time.perf_counter()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "corolla.model", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
            )
        self._socket = ours
        self._parser = FrameParser(
            max_header_bytes=MAX_LOCAL_HEADER_BYTES, max_payload_bytes=MAX_LOCAL_PAYLOAD_BYTES
        )
        self._heard: list[Message] = []
        self.say(
            Configure(
                source_of(setup.model),
                str(setup.cache_folder),
                start=0,
                end=-1,
                ends=True,
                device="cpu",
                dtype=setup.dtype,
                quantization=setup.quantization,
                threads=setup.threads,
                memory_bytes=setup.memory_bytes,
                cache_tokens=setup.cache_tokens,
                parked_tokens=setup.parked_tokens,
            )
        )
        self.ready = self._wait_ready()
        self.start_s = time.perf_counter() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.wait()

    def say(self, message: Message) -> None:
        """Send a message."""
        self._socket.sendall(encode(message))

    def hear(self) -> Message:
        """The next message of any kind."""
        while not self._heard:
            data = self._socket.recv(_READ_BYTES)
            if not data:
                raise EOFError("the worker closed its socket")
            self._parser.feed(data)
            self._heard.extend(FROM_WORKER.decode(frame) for frame in self._parser.frames())
        return self._heard.pop(0)

    def _wait_ready(self) -> Ready:
        while True:
            message = self.hear()
            if isinstance(message, Failed):
                raise message.problem()
            if isinstance(message, Ready):
                return message


@dataclass
class Client:
    """One text. times: when each token arrived; tokens: which. max_new_tokens: then it rests."""

    number: int
    prompt_tokens: int
    max_new_tokens: int
    began: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @property
    def session(self) -> bytes:
        """The id of its session."""
        return self.number.to_bytes(16, "big")

    @property
    def is_done(self) -> bool:
        """Whether it has all its tokens."""
        return len(self.tokens) >= self.max_new_tokens

    @property
    def first_s(self) -> float:
        """Seconds to its first token."""
        return self.times[0] - self.began

    def gaps_s(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Seconds between tokens; only those that ended within [since, until)."""
        return [late - early for early, late in pairwise(self.times) if since <= late < until]


class Crowd:
    """Clients of one worker, acted for as its answers arrive."""

    def __init__(self, served: ServedModel, *, seed_prompts: bool = False) -> None:
        """seed_prompts: every client has a prompt of its own."""
        self._served = served
        self._requests = count(1)
        self._numbers = count(1)
        self._asked: dict[int, Client] = {}
        self._prefills: dict[int, bytes] = {}  # client → embeddings that wait for its session
        self._resting: dict[int, bytes] = {}  # client → embedding of its last token
        self._own_prompts = seed_prompts
        self.clients: list[Client] = []
        self.is_holding = False

    def join(self, prompt_tokens: int, max_new_tokens: int) -> Client:
        """A new client, whose prompt is asked for at once."""
        client = Client(next(self._numbers), prompt_tokens, max_new_tokens, began=time.perf_counter())
        self.clients.append(client)
        ids = plain.prompt(prompt_tokens, self._served.ready.facts.vocab_size)
        if self._own_prompts:
            ids = ids[client.number % len(ids) :] + ids[: client.number % len(ids)]
        total = prompt_tokens + max_new_tokens
        request, sampling = self._request(client), Sampling(ignore_eos=True)
        rows = (TokenRow(tuple(ids)),)
        self._served.say(
            BeginGeneration(request, client.number, sampling, Encoding.FLOAT32, total, tokens=rows)
        )
        return client

    def turn(self) -> None:
        """Hear one message and act on it."""
        message = self._served.hear()
        request = getattr(message, "request", None)
        client = self._asked.pop(request, None) if request is not None else None
        if client is None:  # an answer to somebody who left
            return
        if isinstance(message, Failed):
            raise message.problem()
        if isinstance(message, Begun):
            self._prefills[client.number] = message.payload
            ready, total = self._served.ready, client.prompt_tokens + client.max_new_tokens
            request = self._request(client)
            self._served.say(
                OpenCache(request, client.session, ready.start, ready.end, Encoding.FLOAT32, 1, total)
            )
        elif isinstance(message, Done) and client.number in self._prefills:
            rows = (Row(NEW_ROW, 0, client.prompt_tokens),)
            self._compute(client, rows, 1, self._prefills.pop(client.number))
        elif isinstance(message, Done):
            self._served.say(Sample(self._request(client), client.number, (0,), message.payload))
        elif isinstance(message, Sampled):
            client.times.append(time.perf_counter())
            client.tokens.append(message.chosen[0].token)
            self._resting[client.number] = message.payload
            if not self.is_holding:
                self._continue(client)

    def run(self) -> None:
        """Until all clients are done."""
        while not all(client.is_done for client in self.clients):
            self.turn()

    def prefill(self) -> None:
        """Until every client has its first token; those that have wait for `release`."""
        self.is_holding = True
        while not all(client.tokens for client in self.clients):
            self.turn()

    def release(self) -> None:
        """Let all clients go on."""
        self.is_holding = False
        for client in self.clients:
            if client.number in self._resting:
                self._continue(client)

    def leave(self) -> None:
        """Close all sessions."""
        for client in self.clients:
            self._served.say(EndGeneration(client.number))
            self._served.say(CloseCache(client.session))
        self.clients.clear()
        self._asked.clear()

    def _continue(self, client: Client) -> None:
        payload = self._resting.pop(client.number)
        if not client.is_done and payload:
            num_tokens = len(client.tokens)
            rows = (Row(0, client.prompt_tokens + num_tokens - 1, 1),)
            self._compute(client, rows, num_tokens + 1, payload)

    def _compute(self, client: Client, rows: tuple[Row, ...], step_id: int, payload: bytes) -> None:
        request = self._request(client)
        self._served.say(Compute(request, client.session, step_id, step_id - 1, rows, Reply.LAST, payload))

    def _request(self, client: Client) -> int:
        request = next(self._requests)
        self._asked[request] = client
        return request
