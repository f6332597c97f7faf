"""How two peers greet: one `Hello` each way, on a stream of its own. And which swarm one belongs to.

It judges nobody: what a greeting means for who is a member, `membership.py` decides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog

from ....protocol.errors import Code, CorollaError, error
from ....protocol.invitations import Charter
from ....protocol.limits import HELLO_TIMEOUT_S, MAX_HELLO_BYTES
from ....protocol.messages import Message
from ....protocol.records import swarm_id_of
from ....protocol.registry import HELLO, HELLO_PROTOCOL, Hello
from ..conversation import Conversation
from ..seam import Network, Stream

PROTOCOL_MAJORS: Final = (1,)  # of the peer protocols that this program speaks

_log = structlog.get_logger("corolla.greeting")


@dataclass(frozen=True, slots=True)
class Swarm:
    """Which swarm. The id never changes; the name is for people."""

    swarm_id: str
    name: str


def found_swarm(name: str, founder_key: bytes, nonce: bytes) -> Swarm:
    """A new swarm. founder_key: raw public key, 32 bytes; nonce: random, so that names may be used again."""
    return Swarm(swarm_id_of(name, founder_key, nonce), name)


async def discover_swarm(
    network: Network, address: str, *, charter: Charter | None = None, timeout_s: float = HELLO_TIMEOUT_S
) -> Swarm:
    """The swarm of the member at a multiaddress, asked before joining it.

    charter: of the invited swarm whose membership we have; another one is entered by a token alone.
    Raises `PEER_LOST` (unreachable), `TIMEOUT`, `NO_SWARM` (it has none itself), `NOT_INVITED`, or `UNSUPPORTED`.
    """
    peer = await network.connect(address, timeout_s=timeout_s)
    asking = Hello("", "", "", PROTOCOL_MAJORS)
    async with greet_with(network, peer, asking, timeout_s=timeout_s) as hello:
        pass
    if not hello.swarm_id:
        raise error(
            Code.NO_SWARM,
            f"the daemon at {address} is not in a swarm itself",
            "run `daemonctl swarm create NAME` there, or join a member of a swarm",
        )
    if hello.charter is not None and hello.charter != charter:
        raise error(
            Code.NOT_INVITED,
            f"{hello.charter.name}, the swarm of the daemon at {address}, is entered by invitation alone",
            "ask its owner for a token (daemonctl invite), and give that in place of the address",
        )
    return Swarm(hello.swarm_id, hello.name)


@asynccontextmanager
async def greet_with(network: Network, peer: str, hello: Hello, *, timeout_s: float) -> AsyncIterator[Hello]:
    """Say hello on a new stream and give the other's; the far side hears the end when the block is left.

    Raises `PEER_LOST`, `TIMEOUT`, `UNSUPPORTED`, …
    """
    stream = await network.open(peer, HELLO_PROTOCOL, timeout_s=timeout_s)
    conversation = converse(stream)
    try:
        yield as_hello(await conversation.ask(hello, timeout_s=timeout_s), peer)
    except BaseException:
        stream.reset()
        raise
    await stream.close()


def converse(stream: Stream) -> Conversation:
    """A stream on which greetings are said and heard, within their bounds."""
    return Conversation(stream, HELLO, max_header_bytes=MAX_HELLO_BYTES, max_payload_bytes=0)


def as_hello(message: Message | None, peer: str) -> Hello:
    """What was heard, if it is a greeting. Raises `PROTOCOL_VIOLATION`."""
    if not isinstance(message, Hello):
        raise error(Code.PROTOCOL_VIOLATION, f"{peer} did not greet")
    return message


async def let_it_hear(stream: Stream) -> None:
    """Wait for the far side's end: a stranger has heard why, and a member has admitted us.

    Only then may we part with the one, and open streams to the other.
    """
    try:
        while await stream.receive():
            pass
    except CorollaError as problem:
        _log.debug("greeter_left", peer=stream.peer, problem=str(problem))


def another_swarm(peer: str, hello: Hello, ours: Swarm) -> CorollaError:
    """Why one who greets so is none of ours."""
    return error(
        Code.WRONG_SWARM,
        f"{peer} belongs to swarm {hello.name} ({hello.swarm_id[:8]}), we to {ours.name} ({ours.swarm_id[:8]})",
        "ask for a token of the right swarm",
    )
