"""Direct connections through NATs, made from relayed ones. See `protocol/punch.py` for how.

It owns no connection: it is told how to dial, and whether a direct connection stands. Addresses that a peer
sends us are dialled only if they are public, so that nobody makes us knock at doors in our own network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import structlog
import trio

from ....protocol.errors import Code, CorollaError, error
from ....protocol.messages import Message
from ....protocol.punch import PUNCH, PUNCH_PROTOCOL, Doors, Now
from ..conversation import Conversation
from ..dialling import Reach, reach_of
from ..seam import Network, Stream

DIAL_S: Final = 4.0  # for a SYN through two NATs, and two repetitions of it
TALK_S: Final = 10.0  # one attempt, with both sides' dials
LOOK_EVERY_S: Final = 0.05  # whether the other's dial came through
MAX_DOORS: Final = 4  # dialled of what a peer names
AGAIN_S: Final = (1.0, 5.0, 15.0, 30.0, 60.0, 300.0)  # after relayed connection and each failure

M = TypeVar("M", bound=Message)
Dial: TypeAlias = Callable[[str, str], Awaitable[object]]  # address, peer; raises `PEER_LOST`

_log = structlog.get_logger("corolla.punching")


@dataclass(frozen=True, slots=True)
class Ways:
    """What punching needs of a network. call: dials as a client; meet: dials as the server of what is made.

    near: dials a peer at the private addresses that it told, lest it is in our own network; raises `PEER_LOST`.
    doors: where others see us. is_direct: whether a direct connection with a peer stands.
    """

    call: Dial
    meet: Dial
    near: Callable[[str], Awaitable[None]]
    doors: Callable[[], Doors]
    is_direct: Callable[[str], bool]


class Punching:
    """Serves `PUNCH_PROTOCOL` on a network."""

    def __init__(self, network: Network, ways: Ways) -> None:
        self._network = network
        self._ways = ways

    def serve(self) -> None:
        """Answer callers from now on."""
        self._network.handle(PUNCH_PROTOCOL, self._answer)

    async def pursue(self, peer: str, is_wanted: Callable[[], bool]) -> bool:
        """Try now and again, while it is wanted; whether a direct connection stands at the end."""
        for pause_s in AGAIN_S:
            await trio.sleep(pause_s)
            if not is_wanted() or self._ways.is_direct(peer):
                break
            with trio.move_on_after(TALK_S):
                async with trio.open_nursery() as nursery:
                    for way in (self._ways.near, self._attempt):
                        nursery.start_soon(self._try, way, peer, nursery.cancel_scope)
        is_direct = self._ways.is_direct(peer)
        _log.info("direct" if is_direct else "stays_relayed", peer=peer)
        return is_direct

    async def _try(self, way: Callable[[str], Awaitable[None]], peer: str, others: trio.CancelScope) -> None:
        """One of the ways at once; the first that leads there ends the others."""
        try:
            await way(peer)
        except CorollaError as problem:
            _log.debug("punch_failed", peer=peer, reason=problem.message)
        if self._ways.is_direct(peer):
            others.cancel()

    async def _attempt(self, peer: str) -> None:
        stream = await self._network.open(peer, PUNCH_PROTOCOL, timeout_s=TALK_S)
        talk = _talk(stream)
        ours = self._ways.doors()
        try:
            theirs = _expect(Doors, await talk.ask(ours, timeout_s=TALK_S))
            if ours.is_open:
                await self._come_through(peer)
                return
            await talk.say(Now())
            await self._knock(peer, theirs.addresses, self._ways.call)
        finally:
            stream.reset()

    async def _answer(self, stream: Stream) -> None:
        talk, peer = _talk(stream), stream.peer
        with trio.move_on_after(TALK_S):
            theirs = _expect(Doors, await talk.hear())
            await talk.say(self._ways.doors())
            if theirs.is_open:
                await self._knock(peer, theirs.addresses, self._ways.call)
            else:
                _expect(Now, await talk.hear())
                await self._knock(peer, theirs.addresses, self._ways.meet)
        stream.reset()

    async def _knock(self, peer: str, addresses: Sequence[str], dial: Dial) -> None:
        """Dial the public ones of these addresses, all at once, until a direct connection stands."""

        async def one(address: str) -> None:
            try:
                await dial(address, peer)
            except CorollaError as problem:
                _log.debug("door_closed", peer=peer, address=address, reason=problem.message)

        public = [address for address in addresses if reach_of(address) is Reach.PUBLIC]
        async with trio.open_nursery() as nursery:
            for address in public[:MAX_DOORS]:
                nursery.start_soon(one, address)
            await self._come_through(peer)
            nursery.cancel_scope.cancel()

    async def _come_through(self, peer: str) -> None:
        """Wait a while for a direct connection, whoever makes it."""
        with trio.move_on_after(DIAL_S):
            while not self._ways.is_direct(peer):  # noqa: ASYNC110 - it may come by any of several dials
                await trio.sleep(LOOK_EVERY_S)


def _talk(stream: Stream) -> Conversation:
    return Conversation(stream, PUNCH, max_payload_bytes=0)


def _expect(kind: type[M], message: Message | None) -> M:
    if not isinstance(message, kind):
        raise error(Code.PROTOCOL_VIOLATION, f"a punch without {kind.KIND}")
    return message
