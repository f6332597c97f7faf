"""Who serves which protocol of a network, and how an inbound stream is served.

A handler's errors end with its stream; they never reach the network. It knows no transport.
"""

from __future__ import annotations

from typing import Final

import structlog

from ...protocol.errors import Code, CorollaError
from .seam import Guard, Handler, Stream

_log = structlog.get_logger("corolla.handlers")

# What a handler meets when the far side goes or hurries us: its weather, worth a line for debugging only.
_WEATHER: Final = (Code.PEER_LOST, Code.TIMEOUT, Code.SESSION_LOST)


class Handlers:
    """The protocols that a network serves."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._guard: Guard | None = None

    def add(self, protocol: str, handler: Handler) -> None:
        """Serve a protocol from now on."""
        self._handlers[protocol] = handler

    def restrict(self, guard: Guard | None) -> None:
        """Ask `guard(peer, protocol)` before a stream is agreed on; see `admits`."""
        self._guard = guard

    def speaks(self, protocol: str) -> bool:
        """Whether the protocol is served."""
        return protocol in self._handlers

    def admits(self, peer: str, protocol: str) -> bool:
        """Whether the guard lets a peer use a protocol."""
        return self._guard is None or self._guard(peer, protocol)

    def knows(self, peer: str) -> bool:
        """Whether the guard would let a peer use anything: it is a member."""
        return self.admits(peer, "")

    async def serve(self, stream: Stream) -> None:
        """Let the stream's handler have it. Raises nothing of the handler's."""
        handler = self._handlers.get(stream.protocol)
        if handler is None:
            stream.reset()
            return
        try:
            await handler(stream)
        except CorollaError as failure:
            log = _log.debug if failure.code in _WEATHER else _log.warning
            log("handler_ended", peer=stream.peer, protocol=stream.protocol, reason=str(failure))
            stream.reset()
        except Exception:  # a defect of the handler must not take the network with it
            _log.exception("handler_failed", peer=stream.peer, protocol=stream.protocol)
            stream.reset()
        except BaseException:  # cancelled
            stream.reset()
            raise
