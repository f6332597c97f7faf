"""The control socket: who is asking, whether they may, and the answers on their way back.

It owns connections and the calls under way on each. What a call does is a `Handler` of `methods.py`; what is
opened on a connection ends with it. Rights come from the kernel's word on the other process (SO_PEERCRED).
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import socket
import stat
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import trio

from ..protocol.control import METHODS, TO_DAEMON, Call, Cancel, Item, Refused, Return, Right
from ..protocol.errors import Code, CorollaError, error
from ..protocol.framing import FrameParser
from ..protocol.limits import (
    MAX_CALLS_PER_CONNECTION,
    MAX_HEADER_BYTES,
    MAX_LOCAL_HEADER_BYTES,
    MAX_LOCAL_PAYLOAD_BYTES,
    MAX_PROGRAMS,
    MAX_PROGRAMS_PER_GUEST,
    MIB,
)
from ..protocol.messages import Message, encode, from_plain, to_plain
from ..protocol.places import check_private, check_socket_path
from .pages import BEGINS, Pages, serve_page
from .store import unusable

GROUP: Final = "corolla"  # its members may use the daemon
MAX_UNSENT_BYTES: Final = 4 * MIB  # to a reader that is slower than its answers; then the answers wait
LAST_WORD_S: Final = 1.0  # for telling a program why its connection ends
_READ_BYTES: Final = 1 << 18
_ORDER: Final = (Right.SEE, Right.USE, Right.MANAGE)

_log = structlog.get_logger("corolla.control")


@dataclass(frozen=True, slots=True)
class Caller:
    """The local user on the other end."""

    uid: int
    right: Right


class Connection:
    """One connected program. opened: what its calls opened, by handle; it ends with the connection."""

    def __init__(self, stream: trio.SocketStream, caller: Caller, nursery: trio.Nursery) -> None:
        self.caller: Final = caller
        self.nursery: Final = nursery
        self.opened: dict[int, Any] = {}
        self._stream = stream
        self._num_handles = 0
        self._unsent: deque[bytes] = deque()
        self._num_unsent_bytes = 0
        self._has_unsent = trio.Event()
        self._sent = trio.lowlevel.ParkingLot()

    def new_handle(self) -> int:
        """A name for what a call opens, never used before on this connection."""
        self._num_handles += 1
        return self._num_handles

    def post(self, message: Message) -> None:
        """Queue a message at once."""
        data = encode(message)
        self._unsent.append(data)
        self._num_unsent_bytes += len(data)
        self._has_unsent.set()

    async def wait_room(self, max_unsent_bytes: int = MAX_UNSENT_BYTES) -> None:
        """Wait while the program is slow to read."""
        while self._num_unsent_bytes > max_unsent_bytes:
            await self._sent.park()

    async def write(self) -> None:
        """Send what is queued, for as long as the connection lasts."""
        while True:
            while self._unsent:
                data = self._unsent.popleft()
                await self._stream.send_all(data)
                self._num_unsent_bytes -= len(data)
                self._sent.unpark_all()
            self._has_unsent = trio.Event()
            await self._has_unsent.wait()


class Ask:
    """One call being answered. arguments: an instance of the method's argument type."""

    def __init__(self, connection: Connection, call: Call, arguments: Any) -> None:
        self.connection: Final = connection
        self.arguments: Final = arguments
        self.payload: Final = call.payload
        self._id = call.id

    @property
    def caller(self) -> Caller:
        """Who asks."""
        return self.connection.caller

    def post(self, value: Any, payload: bytes = b"") -> None:
        """Send a part of the answer without waiting; for what cannot wait, such as an event."""
        self.connection.post(Item(self._id, to_plain(value), payload))

    async def item(self, value: Any, payload: bytes = b"") -> None:
        """Send a part of the answer, and wait while the program is slow to read."""
        self.post(value, payload)
        await self.connection.wait_room()


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of an answer. value: a dataclass of `protocol.control` or plain."""

    value: Any = None
    payload: bytes = b""


Handler = Callable[[Ask], Awaitable[Reply]]


class ControlServer:
    """Serves calls on a Unix socket. operators: uids that may manage besides root and our own.

    pages: what is answered to who speaks HTTP instead; every local user may see them.
    """

    def __init__(
        self, handlers: Mapping[str, Handler], operators: Collection[int] = (), pages: Pages | None = None
    ) -> None:
        self._handlers = handlers
        self._pages = pages or {}
        self._operators = frozenset(operators)
        self._num_connections = 0
        self._guests: Counter[int] = Counter()  # connections by uid, of those who may only see

    def allow(self, operators: Collection[int]) -> None:
        """Let these manage from now on; connections that stand keep their rights."""
        self._operators = frozenset(operators)

    async def serve(
        self, listener: trio.SocketListener, *, task_status: Any = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept connections until cancelled."""
        await trio.serve_listeners(self._serve_contained, [listener], task_status=task_status)

    async def _serve_contained(self, stream: trio.SocketStream) -> None:
        self._num_connections += 1
        try:
            if self._num_connections > MAX_PROGRAMS:
                problem = error(Code.BUSY, f"{MAX_PROGRAMS} programs are connected", "close some of them")
                await stream.send_all(encode(Refused.of(0, problem)))
            else:
                await self._serve(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the program went away amid an answer
        finally:
            self._num_connections -= 1
            await trio.aclose_forcefully(stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        caller = self.caller_of(stream.socket)
        if caller.right is not Right.SEE:
            await self._attend(stream, caller)
            return
        if self._guests[caller.uid] >= MAX_PROGRAMS_PER_GUEST:
            said = f"{self._guests[caller.uid]} programs of uid {caller.uid} are connected"
            await stream.send_all(encode(Refused.of(0, error(Code.BUSY, said, "close some of them"))))
            return
        self._guests[caller.uid] += 1
        try:
            await self._attend(stream, caller)
        finally:
            self._guests[caller.uid] -= 1
            self._guests += Counter()  # forgets the zeros

    async def _attend(self, stream: trio.SocketStream, caller: Caller) -> None:
        opening = await _opening(stream)
        if opening == BEGINS:
            await serve_page(stream, self._pages, opening)
            return
        async with trio.open_nursery() as nursery:
            connection = Connection(stream, caller, nursery)
            nursery.start_soon(connection.write)
            try:
                await self._hear(connection, stream, opening)
            except CorollaError as problem:  # nothing that follows can be understood
                _log.info("connection_refused", uid=caller.uid, problem=str(problem))
                connection.post(Refused.of(0, problem))
                with trio.move_on_after(LAST_WORD_S):
                    await connection.wait_room(0)
            nursery.cancel_scope.cancel()

    async def _hear(self, connection: Connection, stream: trio.SocketStream, opening: bytes) -> None:
        """Start what the program asks for, until it hangs up. Raises what is wrong with its words."""
        parser = _parser_for(connection.caller.right)
        calls: dict[int, trio.CancelScope] = {}
        data = opening
        while data:
            parser.feed(bytes(data))
            for frame in parser.frames():
                match TO_DAEMON.decode(frame):
                    case Cancel(id=id_):
                        if id_ in calls:
                            calls[id_].cancel()
                    case Call() as call if len(calls) >= MAX_CALLS_PER_CONNECTION or call.id in calls:
                        problem = error(Code.LIMIT_EXCEEDED, f"call {call.id}: {len(calls)} are open")
                        connection.post(Refused.of(call.id, problem))
                    case Call() as call:
                        calls[call.id] = scope = trio.CancelScope()
                        connection.nursery.start_soon(self._answer, connection, call, scope, calls)
            data = await stream.receive_some(_READ_BYTES)

    async def _answer(
        self,
        connection: Connection,
        call: Call,
        scope: trio.CancelScope,
        calls: dict[int, trio.CancelScope],
    ) -> None:
        answer: Message = Refused.of(call.id, error(Code.CANCELLED, f"{call.method} was cancelled"))
        with scope:
            try:
                reply = await self._handle(connection, call)
                answer = Return(call.id, to_plain(reply.value), reply.payload)
            except CorollaError as problem:
                answer = Refused.of(call.id, problem)
            except Exception as problem:  # a defect of ours must not end the program's other calls
                _log.exception("call_failed", method=call.method)
                said = f"{call.method} failed: {type(problem).__name__}: {problem}"[:1000]
                answer = Refused.of(call.id, error(Code.INTERNAL, said, "see the daemon's log"))
        del calls[call.id]
        connection.post(answer)

    async def _handle(self, connection: Connection, call: Call) -> Reply:
        method = METHODS.get(call.method)
        handler = self._handlers.get(call.method)
        if method is None or handler is None:
            raise error(Code.UNSUPPORTED, f"this daemon has no method {call.method[:64]!r}", "update it")
        if _ORDER.index(connection.caller.right) < _ORDER.index(method.right):
            raise error(
                Code.PERMISSION_DENIED,
                f"{call.method} needs the right to {method.right}, and uid {connection.caller.uid}"
                f" may only {connection.caller.right}",
                f"join the group {GROUP}"
                if method.right is Right.USE
                else "ask as root, as the daemon's user, or as one of its `operators`",
            )
        try:
            arguments: Any = from_plain(method.arguments, call.arguments or {})
        except CorollaError as problem:
            raise error(Code.BAD_REQUEST, f"{call.method}: {problem.message}") from problem
        return await handler(Ask(connection, call, arguments))

    def caller_of(self, connection: trio.socket.SocketType) -> Caller:
        """Who is on the other end, as the kernel says."""
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iii"))
        _, uid, gid = struct.unpack("iii", data)
        if uid in (0, os.getuid()) or uid in self._operators:
            return Caller(uid, Right.MANAGE)
        return Caller(uid, Right.USE if _is_in_group(uid, gid) else Right.SEE)


async def _opening(stream: trio.SocketStream) -> bytes:
    """As many bytes as tell who speaks; fewer if the program hangs up before."""
    opening = b""
    while len(opening) < len(BEGINS) and (data := await stream.receive_some(len(BEGINS) - len(opening))):
        opening += data
    return opening


def _parser_for(right: Right) -> FrameParser:
    """Who may only see has nothing large to say."""
    if right is Right.SEE:
        return FrameParser(max_header_bytes=MAX_HEADER_BYTES, max_payload_bytes=0)
    return FrameParser(max_header_bytes=MAX_LOCAL_HEADER_BYTES, max_payload_bytes=MAX_LOCAL_PAYLOAD_BYTES)


def _is_in_group(uid: int, gid: int) -> bool:
    try:
        wanted = grp.getgrnam(GROUP).gr_gid
        return gid == wanted or wanted in os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:  # no such group, or a user without an entry
        return False


def uids_of(operators: Collection[str]) -> frozenset[int]:
    """The uids of configured user names. Raises `BAD_CONFIG` for a name that nobody has."""
    found = set()
    for name in operators:
        try:
            found.add(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid)
        except KeyError as problem:
            raise error(Code.BAD_CONFIG, f"operators names {name!r}, and no user is called so") from problem
    return frozenset(found)


@contextmanager
def listen(path: Path) -> Iterator[trio.SocketListener]:
    """Listen at a path, which is gone afterwards. A socket left by a daemon that died is replaced.

    Raises `STATE_IN_USE` if a live daemon listens there, `BAD_CONFIG`, `PERMISSION_DENIED`, `UNREADABLE`.
    """
    check_socket_path(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        try:
            _bind(raw, path)
            raw.listen(64)
            path.chmod(0o666)  # every local user may see; what else they may, the kernel's word decides
            inode = path.stat().st_ino
        except OSError as problem:
            raise unusable(path, problem) from problem
        raw.setblocking(False)
        try:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(raw))
        finally:
            if path.exists() and path.stat().st_ino == inode:
                path.unlink(missing_ok=True)


def _bind(raw: socket.socket, path: Path) -> None:
    if not path.parent.exists():
        path.parent.mkdir(mode=0o700, parents=True)
    elif path.parent.name == f"corolla-{os.getuid()}":
        check_private(path.parent)
    try:
        raw.bind(str(path))
        return
    except OSError as problem:
        if problem.errno != errno.EADDRINUSE:
            raise
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise error(
            Code.BAD_CONFIG,
            f"{path} exists and is no socket",
            "choose another place with --socket",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            raw.bind(str(path))
            return
        except BlockingIOError:  # it listens, and has more callers than it can take just now
            pass
    raise error(
        Code.STATE_IN_USE,
        f"another daemon listens on {path}",
        "stop it with `daemonctl stop`, or choose another socket with --socket",
    )
