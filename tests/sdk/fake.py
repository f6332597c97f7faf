"""A daemon in miniature: `protocol/control` over a real Unix socket, with a model made of arithmetic.

Its "blocks" add to each token's hidden state the sum of all earlier ones of its row, so that a lost, repeated
or misplaced token shows. Its "text" continues a prompt by counting: token k of a row is ` k`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from corolla.protocol.control import (
    TO_DAEMON,
    Call,
    Cancel,
    Generate,
    Generated,
    Item,
    Joined,
    OpenModelSession,
    Piece,
    Refused,
    Return,
    SessionHandle,
    SessionOpened,
    SessionStep,
)
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.framing import FrameParser
from corolla.protocol.messages import Message, encode, from_plain, to_plain
from corolla.protocol.settings import Applied
from corolla.protocol.steps import NEW_ROW, Reply
from corolla.protocol.tensors import Encoding
from corolla.protocol.views import ModelView, PeerView, Status, SwarmView
from corolla.protocol.work import Logprob, TokenRow

HIDDEN = 8
MODEL = ModelView(
    "tiny", "abcd" * 16, "LlamaForCausalLM", 4, HIDDEN, "someone/tiny", "apache-2.0", (1, 1, 2, 1)
)


class FakeDaemon:
    """Listens at `path` until closed. `handlers` may be replaced; `calls` remembers what was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls: list[Call] = []
        self.cancelled: list[int] = []
        self.noticed = threading.Condition()
        self.encoding = Encoding.FLOAT32
        self.die_after_tokens: int | None = None
        self.sessions: dict[int, list[list[np.ndarray]]] = {}
        self.opened: list[OpenModelSession] = []
        self.hold = threading.Event()  # what `slow` waits for
        self.handlers: dict[str, Callable[[Connection, Call], Any]] = {
            "status": lambda c, call: self.status(),
            "models": lambda c, call: [MODEL],
            "swarm": lambda c, call: SwarmView("home", "ab", (MODEL,), ()),
            "peers": lambda c, call: [PeerView("12D3KooWother", ("/ip4/127.0.0.1/tcp/1",), True, rtt_s=0.01)],
            "config": lambda c, call: {"blocks": "auto"},
            "metrics": lambda c, call: '# TYPE x gauge\nx{a="b c"} 2.5\ny_total 1.0\n',
            "config.set": lambda c, call: Applied(now=(call.arguments["key"],)),
            "swarm.create": lambda c, call: Joined(call.arguments["name"], "ab", "token-of-home"),
            "swarm.join": lambda c, call: Joined("home", "ab", call.arguments["token"]),
            "swarm.leave": lambda c, call: None,
            "stop": lambda c, call: None,
            "generate": self.generate,
            "session.open": self.open_session,
            "session.step": self.step,
            "session.close": lambda c, call: (
                self.sessions.pop(from_plain(SessionHandle, call.arguments).handle) and None
            ),
            "slow": lambda c, call: self.hold.wait(20) and None,
        }
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._connections: list[Connection] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.hold.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()
        self.path.unlink(missing_ok=True)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        with self.noticed:
            return self.noticed.wait_for(condition, timeout=20)

    def status(self) -> Status:
        return Status(
            version="0.1.0", state="online", peer="12D3KooWme", socket=str(self.path), state_folder="/state",
            uptime_s=61.0, swarm="home", swarm_id="ab", join_command="daemonctl join token-of-home", num_peers=1,
            addresses=("/ip4/127.0.0.1/tcp/2",), workers=(), num_sessions=len(self.sessions),
            resident_bytes=50_000_000, pid=1,
        )  # fmt: skip

    def generate(self, connection: Connection, call: Call) -> Generated:
        asked = from_plain(Generate, call.arguments)
        num_rows = max(len(asked.prompts), len(asked.tokens), 1)
        held = [row.ids for row in asked.generated] or [()] * num_rows
        given = 0
        for k in range(asked.max_new_tokens):
            for row in range(num_rows):
                if k < len(held[row]):
                    continue
                if given == 1:
                    connection.send(
                        Item(call.id, to_plain(Piece(row, -1, "", event="repairing", detail="1:2")))
                    )
                finish = "length" if k + 1 == asked.max_new_tokens else None
                top = (Logprob(k, -0.5), Logprob(k + 1, -1.5))[: asked.sampling.top_logprobs]
                piece = Piece(row, k, f" {k}", finish=finish, logprob=-0.5, top=top)
                connection.send(Item(call.id, to_plain(piece)))
                given += 1
                if given == self.die_after_tokens:
                    connection.die()
                    raise error(Code.CANCELLED, "killed")
        texts = tuple("".join(f" {k}" for k in range(asked.max_new_tokens)) for _ in range(num_rows))
        tokens = tuple(TokenRow(tuple(range(asked.max_new_tokens))) for _ in range(num_rows))
        return Generated(texts, tokens, num_prompt_tokens=5, seconds=0.5, num_repairs=1, repair_s=0.25)

    def open_session(self, connection: Connection, call: Call) -> SessionOpened:
        asked = from_plain(OpenModelSession, call.arguments)
        if asked.model not in ("tiny", "someone/tiny"):
            raise error(Code.UNKNOWN_MODEL, f"no model {asked.model!r}")
        self.opened.append(asked)
        handle = len(self.opened)
        self.sessions[handle] = []
        end = MODEL.num_blocks if asked.end == -1 else asked.end
        return SessionOpened(handle, HIDDEN, asked.encoding or self.encoding, asked.start, end)

    def close_session(self, call: Call) -> None:
        del self.sessions[from_plain(SessionHandle, call.arguments).handle]
        with self.noticed:
            self.noticed.notify_all()

    def step(self, connection: Connection, call: Call) -> Return:
        asked = from_plain(SessionStep, call.arguments)
        table = self.sessions[asked.handle]
        hidden = np.frombuffer(call.payload, "<f4").reshape(-1, HIDDEN)
        answer, new_table, at = [], [], 0
        for row in asked.rows:
            before = [] if row.parent == NEW_ROW else table[row.parent][: row.position]
            if len(before) != row.position:
                raise error(Code.HISTORY_GAP, f"position {row.position}", first_position=len(before))
            tokens = list(hidden[at : at + row.n])
            at += row.n
            total = np.sum(before, axis=0) if before else np.zeros(HIDDEN, "f4")
            outputs = list(np.cumsum(np.array([total, *tokens]), axis=0)[1:])
            answer += {Reply.ALL: outputs, Reply.LAST: outputs[-1:], Reply.NONE: []}[asked.reply]
            new_table.append(before + tokens)
        self.sessions[asked.handle] = new_table
        payload = np.array(answer, "<f4").tobytes() if answer else b""
        return Return(call.id, None, payload)

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(Connection(self, accepted))


class Connection:
    """One client: a thread that reads, and one for each call."""

    def __init__(self, daemon: FakeDaemon, accepted: socket.socket) -> None:
        self._daemon = daemon
        self._socket = accepted
        self._sending = threading.Lock()
        self._threads = [threading.Thread(target=self._read)]
        self._threads[0].start()

    def send(self, message: Message) -> None:
        with self._sending:
            try:
                self._socket.sendall(encode(message))
            except OSError:
                return  # the client left

    def die(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.die()
        for thread in self._threads:
            thread.join()
        self._socket.close()

    def _read(self) -> None:
        parser = FrameParser(max_header_bytes=1 << 24, max_payload_bytes=1 << 28)
        while True:
            try:
                received = self._socket.recv(1 << 16)
            except OSError:
                return
            if not received:
                return
            parser.feed(received)
            for frame in parser.frames():
                message = TO_DAEMON.decode(frame)
                with self._daemon.noticed:
                    if isinstance(message, Call):
                        self._daemon.calls.append(message)
                        thread = threading.Thread(target=self._answer, args=(message,))
                        self._threads.append(thread)
                        thread.start()
                    elif isinstance(message, Cancel):
                        self._daemon.cancelled.append(message.id)
                    self._daemon.noticed.notify_all()

    def _answer(self, call: Call) -> None:
        try:
            handler = self._daemon.handlers.get(call.method)
            if handler is None:
                raise error(Code.UNSUPPORTED, f"no method {call.method!r}")
            answer = handler(self, call)
        except CorollaError as problem:
            self.send(Refused.of(call.id, problem))
            return
        self.send(answer if isinstance(answer, Return) else Return(call.id, to_plain(answer)))
