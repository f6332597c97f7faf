"""One connection to the daemon for asynchronous code: asyncio, and trio where anyio is installed.

As in `wire`, whoever waits for an answer reads for all the others, so that no task of our own runs in the
background. State changes between two awaits, which needs no locks.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Final, Protocol

from ..protocol.control import Item, Return
from ..protocol.errors import Code, CorollaError, error
from .calls import Calls
from .sockets import connected_socket

_CHUNK_BYTES: Final = 1 << 18


class Flag(Protocol):
    """What asyncio's and anyio's events have in common."""

    def set(self) -> Any: ...
    async def wait(self) -> Any: ...


class Transport(Protocol):
    """Bytes over a connected socket in one of the asynchronous libraries."""

    async def send(self, frame: bytes) -> None:
        """Send all of it, also when several tasks do so at once. Raises OSError."""

    async def send_last(self, frame: bytes) -> None:
        """Like `send`, and not to be interrupted when the task is being cancelled."""

    async def receive(self) -> bytes:
        """Some bytes; b"" at the end. Cancelling it loses nothing. Raises OSError."""

    async def close(self) -> None:
        """End it; whoever receives gets b""."""

    async def sleep(self, seconds: float) -> None:
        """Wait; works after `close` too."""

    def flag(self) -> Flag:
        """A new event of this library."""


class AsyncWire:
    """Owns one connected socket. Closing it ends everything that was opened on it."""

    def __init__(self, transport: Transport, path: Path) -> None:
        self.path: Final = path
        self._transport = transport
        self._calls = Calls()
        self._reading = False
        self._changed = transport.flag()

    @classmethod
    async def open(cls, path: str | os.PathLike[str] | None = None) -> AsyncWire:
        """Connect to the daemon; see `sockets.connected_socket`."""
        connection, found = connected_socket(path)  # a local socket answers at once or refuses
        connection.setblocking(False)
        try:
            transport: Transport
            if _library() == "asyncio":
                transport = _Asyncio(*await asyncio.open_unix_connection(sock=connection))
            else:
                transport = await _with_anyio(connection)
        except BaseException:
            connection.close()
            raise
        return cls(transport, found)

    @property
    def is_open(self) -> bool:
        """Whether calls can still be made."""
        return self._calls.ended is None

    async def call(self, method: str, arguments: Any = None, payload: bytes = b"") -> Return:
        """Ask, and wait for the end of the answer; items on the way are dropped."""
        stream = self.stream(method, arguments, payload)
        try:
            async for message in stream:
                if isinstance(message, Return):
                    return message
        finally:
            await stream.aclose()
        raise error(Code.PROTOCOL_VIOLATION, f"{method} was never answered")

    async def stream(
        self, method: str, arguments: Any = None, payload: bytes = b""
    ) -> AsyncGenerator[Item | Return, None]:
        """Ask when first iterated, and give the parts of the answer as they come, `Return` last.

        Close it (`aclose`) when leaving early: that cancels the call.
        """
        call, frame = self._calls.open(method, arguments, payload)
        try:
            await self._send(frame)
            while True:
                message = await self._next(call)
                yield message
                if isinstance(message, Return):
                    return
        finally:
            if farewell := self._calls.leave(call):
                await self._send_last(farewell)

    async def tell(self, method: str, arguments: Any = None) -> None:
        """Ask for something whose answer nobody waits for; not to be interrupted by cancellation."""
        await self._send_last(self._calls.tell(method, arguments))

    async def sleep(self, seconds: float) -> None:
        """Wait, in the library of this connection; works on a closed one too."""
        await self._transport.sleep(seconds)

    async def close(self) -> None:
        """End the connection; whoever waits gets an error. May be called twice."""
        self._calls.end(error(Code.CANCELLED, "this connection was closed by the program", "connect again"))
        self._wake()
        await self._transport.close()

    async def _next(self, call: int) -> Item | Return:
        """Wait for the call's next message, reading for everybody if nobody else does."""
        while True:
            message = self._calls.take(call)
            if message is not None:
                return message
            if self._reading:
                await self._changed.wait()
                continue
            self._reading = True
            try:
                received = await self._receive()
                self._calls.feed(received)
            finally:
                self._reading = False
                self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = self._transport.flag()

    async def _receive(self) -> bytes:
        try:
            return await self._transport.receive()
        except OSError:
            return b""  # reset: the end, like any other

    async def _send(self, frame: bytes) -> None:
        try:
            await self._transport.send(frame)
        except OSError as problem:
            self._end(problem)

    async def _send_last(self, frame: bytes) -> None:
        try:
            await self._transport.send_last(frame)
        except OSError as problem:
            self._end(problem)

    def _end(self, problem: OSError) -> None:
        self._calls.end(_closed(problem))
        self._wake()


def _closed(problem: OSError) -> CorollaError:
    return error(
        Code.NO_DAEMON,
        f"the daemon closed the connection ({problem.strerror or problem})",
        "see its log; start it with: corollad",
    )


def _library() -> str:
    """The asynchronous library that runs this task."""
    sniffio = sys.modules.get("sniffio")  # whoever runs trio has it loaded
    if sniffio is None:
        return "asyncio"
    try:
        return str(sniffio.current_async_library())
    except sniffio.AsyncLibraryNotFoundError:
        return "asyncio"


class _Asyncio:
    """asyncio's streams. A frame is handed over whole before anything waits, so it cannot be torn."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.flag: Callable[[], Flag] = asyncio.Event

    async def send(self, frame: bytes) -> None:
        self._writer.write(frame)
        await self._writer.drain()

    async def send_last(self, frame: bytes) -> None:
        self._writer.write(frame)

    async def receive(self) -> bytes:
        return await self._reader.read(_CHUNK_BYTES)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return  # it broke before we closed it


async def _with_anyio(connection: Any) -> Transport:
    """A transport over anyio, for trio. A send that is cancelled midway ends the connection."""
    try:
        import anyio
        from anyio.abc import UNIXSocketStream
    except ImportError as problem:
        raise error(
            Code.UNSUPPORTED, "aconnect under trio needs anyio", "install it: pip install anyio"
        ) from problem
    stream = await UNIXSocketStream.from_socket(connection)

    class OverAnyio:
        """anyio's Unix stream; sends take turns."""

        def __init__(self) -> None:
            self._turn = anyio.Lock()
            self.flag: Callable[[], Flag] = anyio.Event

        async def send(self, frame: bytes) -> None:
            async with self._turn:
                finished = False
                try:
                    await stream.send(frame)
                    finished = True
                except (anyio.BrokenResourceError, anyio.ClosedResourceError) as problem:
                    raise ConnectionResetError("connection lost") from problem
                finally:
                    if not finished:
                        await anyio.aclose_forcefully(stream)

        async def send_last(self, frame: bytes) -> None:
            with anyio.CancelScope(shield=True):
                await self.send(frame)

        async def receive(self) -> bytes:
            try:
                return await stream.receive(_CHUNK_BYTES)
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                return b""
            except anyio.BrokenResourceError as problem:
                raise ConnectionResetError("connection lost") from problem

        async def sleep(self, seconds: float) -> None:
            await anyio.sleep(seconds)

        async def close(self) -> None:
            await anyio.aclose_forcefully(stream)

    return OverAnyio()
