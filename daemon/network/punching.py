"""Direct connections through NATs, made from relayed ones. See `protocol/punch.py` for how.

It owns no connection: it is told to dial, and whether a direct connection stands. Addresses that a peer sends
us are dialled only if they are public, so that nobody makes us knock at doors in our own network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

import structlog
import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import MAX_HEADER_BYTES
from ...protocol.messages import Message
from ...protocol.punch import PUNCH, PUNCH_PROTOCOL, Doors, Tried, YourTurn
from .conversation import Conversation
from .dialling import Reach, reach_of
from .seam import Network, Stream

DIAL_S: Final = 1.5  # for a SYN through two NATs, and a repetition of it
TALK_S: Final = 10.0  # one attempt, with both sides' dials
MAX_DOORS: Final = 4  # dialled of what a peer names
AGAIN_S: Final = (1.0, 5.0, 30.0, 300.0)  # after the relayed connection stood, and after each failure

M = TypeVar("M", bound=Message)

_log = structlog.get_logger("corolla.punching")


class Dial(Protocol):
    """Makes a direct connection to a peer at an address. Raises `PEER_LOST`."""

    async def __call__(self, address: str, peer: str) -> object: ...


class Punching:
    """Serves `PUNCH_PROTOCOL` on a network.

    doors: where others might see us. is_direct: whether a direct connection with a peer stands.
    """

    def __init__(
        self,
        network: Network,
        dial: Dial,
        doors: Callable[[], Sequence[str]],
        is_direct: Callable[[str], bool],
    ) -> None:
        self._network = network
        self._dial = dial
        self._doors = doors
        self._is_direct = is_direct

    def serve(self) -> None:
        """Answer callers from now on."""
        self._network.handle(PUNCH_PROTOCOL, self._answer)

    async def pursue(self, peer: str, is_wanted: Callable[[], bool]) -> bool:
        """Try now and again, while it is wanted; whether a direct connection stands at the end."""
        for pause_s in AGAIN_S:
            await trio.sleep(pause_s)
            if not is_wanted() or self._is_direct(peer):
                break
            try:
                with trio.fail_after(TALK_S):
                    if await self._attempt(peer):
                        _log.info("direct", peer=peer)
                        return True
            except trio.TooSlowError:
                _log.debug("punch_slow", peer=peer)
            except CorollaError as problem:
                _log.debug("punch_failed", peer=peer, reason=problem.message)
        return self._is_direct(peer)

    async def _attempt(self, peer: str) -> bool:
        stream = await self._network.open(peer, PUNCH_PROTOCOL, timeout_s=TALK_S)
        talk = Conversation(stream, PUNCH, max_header_bytes=MAX_HEADER_BYTES, max_payload_bytes=0)
        try:
            theirs = await talk.ask(Doors(tuple(self._doors())), timeout_s=TALK_S)
            if await self._knock(peer, _expect(Doors, theirs).addresses):
                return True
            tried = await talk.ask(YourTurn(), timeout_s=TALK_S)
            return _expect(Tried, tried).connected or self._is_direct(peer)
        finally:
            stream.reset()

    async def _answer(self, stream: Stream) -> None:
        talk = Conversation(stream, PUNCH, max_header_bytes=MAX_HEADER_BYTES, max_payload_bytes=0)
        with trio.move_on_after(TALK_S):
            theirs = _expect(Doors, await talk.hear())
            await talk.say(Doors(tuple(self._doors())))
            if await talk.hear() is None:  # it came through, or gave up
                return
            await talk.say(Tried(await self._knock(stream.peer, theirs.addresses)))
            await stream.close()
            return
        stream.reset()

    async def _knock(self, peer: str, addresses: Sequence[str]) -> bool:
        """Dial the public ones of these addresses, all at once; whether a direct connection stands."""
        public = [a for a in addresses if reach_of(a) is Reach.PUBLIC][:MAX_DOORS]

        async def dial(address: str, scope: trio.CancelScope) -> None:
            try:
                await self._dial(address, peer)
            except CorollaError as problem:
                _log.debug("door_closed", peer=peer, address=address, reason=problem.message)
            else:
                scope.cancel()

        with trio.move_on_after(DIAL_S):
            async with trio.open_nursery() as nursery:
                for address in public:
                    nursery.start_soon(dial, address, nursery.cancel_scope)
        return self._is_direct(peer)


def _expect(kind: type[M], message: Message | None) -> M:
    if not isinstance(message, kind):
        raise error(Code.PROTOCOL_VIOLATION, f"a punch without {kind.KIND}")
    return message
