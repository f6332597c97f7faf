"""A page by HTTP, for programs that collect metrics: one short request on a stream, one answer, and the end.

It knows as much of HTTP as such a program needs. What a page holds, its maker says.
Source: RFC 9112, sections 3 and 6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

import trio

from ..protocol.limits import KIB

BEGINS: Final = b"GET "  # as a frame of our own, it would announce a header of more than a gigabyte
MAX_REQUEST_BYTES: Final = 8 * KIB
TIMEOUT_S: Final = 10.0  # for the request, and for the answer to be taken
MAX_AT_ONCE: Final = 16
_REQUEST: Final = re.compile(rb"GET (/[^ ?#]*)(?:\?[^ ]*)? HTTP/1\.[01]\r?\n")
_HOST: Final = re.compile(rb"\r?\nhost:[ \t]*([^\r\n]*?)[ \t]*\r?\n", re.IGNORECASE)
_LOCAL_HOST: Final = re.compile(rb"(localhost|127(\.\d+){3}|\[::1\])?(:\d+)?", re.IGNORECASE)

Page = tuple[str, bytes]  # its type, and what it holds
Pages = Mapping[str, Callable[[], Page]]  # by path


def answer(request: bytes, pages: Pages) -> bytes:
    """The whole response to a whole request.

    A `Host` elsewhere is refused: it is a web page of somebody's, whose name was made to mean this machine.
    """
    found = _REQUEST.match(request)
    if found is None:
        return _response("400 Bad Request", ("text/plain", b"this is no GET of HTTP/1.1\n"))
    host = _HOST.search(request)
    if host is not None and not _LOCAL_HOST.fullmatch(host.group(1)):
        return _response("403 Forbidden", ("text/plain", b"ask by the name localhost\n"))
    make = pages.get(found.group(1).decode("ascii", "replace"))
    if make is None:
        names = ", ".join(sorted(pages))
        return _response("404 Not Found", ("text/plain", f"there is {names}\n".encode()))
    return _response("200 OK", make())


def _response(status: str, page: Page) -> bytes:
    kind, body = page
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode("ascii") + body


async def serve_page(stream: trio.abc.Stream, pages: Pages, begun: bytes = b"") -> None:
    """Answer one request. begun: what has been received of it. A stream that is slow or breaks ends unanswered."""
    request = begun
    with trio.move_on_after(TIMEOUT_S):
        while b"\r\n\r\n" not in request and b"\n\n" not in request and len(request) < MAX_REQUEST_BYTES:
            data = await stream.receive_some(MAX_REQUEST_BYTES)
            if not data:
                return
            request += data
        await stream.send_all(answer(request, pages))


class Door:
    """The pages on a port of this machine alone. port: as it is now; 0 is none."""

    def __init__(self, pages: Pages, port: Callable[[], int], on_event: Callable[[str, str], None]) -> None:
        self._pages = pages
        self._port = port
        self._on_event = on_event
        self._changed = trio.Event()
        self._limit = trio.CapacityLimiter(MAX_AT_ONCE)

    def stir(self) -> None:
        """The port may be another."""
        self._changed.set()

    async def run(self) -> None:
        """Serve until cancelled, on whichever port it is at the time. A port that is taken is told as an event."""
        while True:
            self._changed = trio.Event()
            port = self._port()
            async with trio.open_nursery() as nursery:
                if port:
                    nursery.start_soon(self._serve, port)
                while self._port() == port:
                    await self._changed.wait()
                    self._changed = trio.Event()
                nursery.cancel_scope.cancel()

    async def _serve(self, port: int) -> None:
        try:
            listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        except OSError as problem:
            self._on_event(
                "metrics_failed", f"port {port}: {problem.strerror or problem}; set another metrics_port"
            )
            return
        self._on_event("metrics", f"http://127.0.0.1:{port}/metrics")
        await trio.serve_listeners(self._answer, listeners)

    async def _answer(self, stream: trio.SocketStream) -> None:
        async with self._limit:
            try:
                async with stream:
                    await serve_page(stream, self._pages)
            except trio.BrokenResourceError:
                return  # whoever asked went away
