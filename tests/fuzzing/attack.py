"""A hostile neighbour of a live daemon: real traffic, changed a little, on its TCP port and its control socket.

It comes as a stranger without a handshake, as one who breaks the muxer's protocol, as a stranger and as a
member who speak nonsense on every protocol, and as a local program. It counts what it sent and keeps nothing
of the answers.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import cbor2
import trio
import varint
from google.protobuf.message import Message as Protobuf
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID

from corolla.daemon.identity import Identity, new_identity
from corolla.daemon.network.dialling import split_peer
from corolla.daemon.network.libp2p.host import key_pair
from corolla.daemon.network.libp2p.network import Libp2pNetwork, open_network
from corolla.daemon.network.members.greeting import Swarm
from corolla.daemon.network.members.membership import Membership
from corolla.daemon.network.reach import autonat, dcutr
from corolla.daemon.network.reach.autonat import DIAL_BACK_PROTOCOL, DIAL_REQUEST_PROTOCOL
from corolla.daemon.network.reach.circuits import HOP_PROTOCOL, STOP_PROTOCOL
from corolla.daemon.network.reach.dcutr import DCUTR_PROTOCOL
from corolla.daemon.network.registry.announcements import Announcements, Offer
from corolla.daemon.network.wire.multistream import agree
from corolla.daemon.network.wire.muxing import Mux
from corolla.daemon.network.wire.noise import FastNoise, NoiseOnly
from corolla.daemon.network.wire.yamux import PROTOCOL as YAMUX
from corolla.protocol.control import Call, Cancel
from corolla.protocol.errors import CorollaError
from corolla.protocol.framing import encode_frame
from corolla.protocol.messages import Message, encode
from corolla.protocol.records import SpanState, blocks_key
from corolla.protocol.registry import HELLO_PROTOCOL, REGISTRY_PROTOCOL, Find, Hello, PeerAddresses, Store
from corolla.protocol.steps import (
    PUSH_PROTOCOL,
    SESSION_PROTOCOL,
    Attach,
    CloseSession,
    LinkHop,
    OpenSession,
    Replay,
    Reply,
    Row,
    Step,
    Where,
)
from corolla.protocol.tensors import DType, Encoding
from corolla.protocol.training import TRAINING_PROTOCOL, Chunk, PutPart, Sequence, SpanBackward, SpanForward

from .hostile import mutate

NOBODY: Final = ("/ip4/127.0.0.1/tcp/9",)
IDENTIFY_PUSH: Final = "/ipfs/id/push/1.0.0"
PING: Final = "/ipfs/ping/1.0.0"
PER_STREAM: Final = 6  # messages at most
JUNK: Final[tuple[Any, ...]] = (
    None, True, -1, 0, 1 << 62, 1 << 63, -1.0, 1e300, math.nan, math.inf, "", "x" * 300, "\x00", b"", b"y" * 32,
    b"z" * 70_000, [], [[]], {}, {"": 1}, [0] * 5000, ["/ip4/127.0.0.1/tcp/1/p2p/Qm"] * 20,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A daemon under attack. door: its multiaddress. fingerprint: of the model that it serves, if any."""

    door: str
    socket: Path
    swarm: Swarm
    fingerprint: str = "f" * 64

    @property
    def peer(self) -> str:
        """Its peer id."""
        return self.door.rpartition("/")[2]

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port."""
        parts = self.door.split("/")
        return parts[2], int(parts[4])


async def attack(target: Target, num_messages: int, seed: int) -> Counter[str]:
    """Send so many messages, by all ways at once; how many went each way."""
    rng = random.Random(seed)
    sent: Counter[str] = Counter()
    identity = new_identity()
    messages = real_messages(target, identity)
    handshake = await _recorded_handshake(target)
    served = {protocol: messages[protocol] for protocol in (HELLO_PROTOCOL, IDENTIFY_PUSH, PING)}
    async with _as_member(target, identity) as (member, joined):
        ways: dict[str, tuple[float, Callable[[], Coroutine[Any, Any, int]]]] = {
            "member": (0.5, lambda: _speak(member, joined, target, messages, rng)),
            "stranger": (0.1, lambda: _intrude(target, served, rng)),
            "handshake": (0.1, lambda: _knock(target, handshake, rng)),
            "muxer": (0.1, lambda: _break_muxer(target, rng)),
            "control": (0.2, lambda: _call(target, rng)),
        }

        async def send(way: str, share: float, burst: Callable[[], Coroutine[Any, Any, int]]) -> None:
            while sent[way] < share * num_messages:
                sent[way] += await burst()

        async with trio.open_nursery() as nursery:
            for way, (share, burst) in ways.items():
                nursery.start_soon(send, way, share, burst)
    return sent


# what is said


def real_messages(target: Target, identity: Identity) -> dict[str, list[bytes]]:
    """By protocol, what a member says."""
    session, model = b"s" * 16, target.fingerprint
    row = (Row(-1, 0, 2),)
    swarm = target.swarm
    ours = Announcements(
        swarm.swarm_id, identity.private_key, stored_seq=0, save_seq=lambda seq: None, unix=time.time
    )
    ours.offer(Offer(0, model, 0, 4, SpanState.ONLINE, DType.FLOAT32))
    spoken: dict[str, list[Message]] = {
        HELLO_PROTOCOL: [
            Hello(
                swarm.swarm_id,
                swarm.name,
                "0",
                members=(PeerAddresses("12D3Koo", ("/ip4/127.0.0.1/tcp/9",)),),
            ),
            Hello("", "", ""),
            Hello("7" * 32, "tulips", "9"),
        ],
        REGISTRY_PROTOCOL: [
            Store(tuple(ours.sign_all((f"/ip4/127.0.0.1/tcp/9/p2p/{identity.peer}",)))),
            Find((blocks_key(swarm.swarm_id, model, 0),)),
        ],
        SESSION_PROTOCOL: [
            OpenSession(session, model, 0, 0, 4, Encoding.FLOAT32, 1, 64),
            LinkHop(session, 1, None, None, 0, ()),
            Step(session, 1, 1, row, 0, Reply.LAST, payload=bytes(2 * 64 * 4)),
            Replay(session, 1, 0, (0,), (2,), 1),
            Where(session, 1, 1),
            CloseSession(session),
        ],
        PUSH_PROTOCOL: [
            Attach(session, identity.peer, 1, 0, 0),
            Step(session, 1, 1, row, 0, Reply.LAST, payload=bytes(2 * 64 * 4)),
        ],
        TRAINING_PROTOCOL: [
            SpanForward(model, 0, 0, 4, Encoding.FLOAT32, (Sequence(0, 2),), 512),
            SpanBackward(model, 0, 0, 4, Encoding.FLOAT32, (Sequence(0, 2),), 1024),
            PutPart(model, 0, 1, b"p" * 32, 100),
            Chunk(bytes(512)),
        ],
    }
    key = ID.from_string(identity.peer).to_bytes()
    raw = {
        HOP_PROTOCOL: [_prefixed(b"\x08\x00"), _prefixed(b"\x08\x01\x12\x28\x0a\x26" + key)],
        STOP_PROTOCOL: [_prefixed(b"\x08\x00\x12\x28\x0a\x26" + key)],
        f"/corolla/kad/{swarm.swarm_id}/1": [_prefixed(b"\x08\x04\x12\x26" + key)],
        DCUTR_PROTOCOL: [_written(dcutr.connect(NOBODY)), _written(dcutr.sync())],
        DIAL_REQUEST_PROTOCOL: [_written(autonat.request(NOBODY, 7))],
        DIAL_BACK_PROTOCOL: [_written(autonat.dial_back(7))],
        IDENTIFY_PUSH: [_prefixed(b"\x12\x08\x04\x7f\x00\x00\x01\x06\x00\x09\x1a\x05/test")],
        PING: [bytes(32)],
        "/corolla/none/1": [b"hello"],
    }
    return {**{protocol: list(map(encode, said)) for protocol, said in spoken.items()}, **raw}


def _written(message: Protobuf) -> bytes:
    return _prefixed(message.SerializeToString())


def _prefixed(body: bytes) -> bytes:
    return bytes(varint.encode(len(body))) + body


def changed(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A message, now and then as it is; mostly with a field or some bytes changed."""
    match rng.randrange(8):
        case 0:
            return data
        case 1 | 2 | 3:
            return _with_other_field(data, rng)
        case _:
            return mutate(data, rng.getrandbits(62), others)


def _with_other_field(data: bytes, rng: random.Random) -> bytes:
    """A frame of which one value, anywhere, is of another form."""
    header_bytes = int.from_bytes(data[:4], "big")
    if len(data) < 8 + header_bytes:
        return data
    try:
        fields = cbor2.loads(data[8 : 8 + header_bytes])
    except cbor2.CBORDecodeError:
        return data
    place: Any = fields
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            place[key] = rng.choice(JUNK)
            break
        place = place[key]
    return encode_frame(cbor2.dumps(fields), data[8 + header_bytes :])


# the ways


Joined = Callable[[], Coroutine[Any, Any, None]]


@asynccontextmanager
async def _as_member(target: Target, identity: Identity) -> AsyncIterator[tuple[Libp2pNetwork, Joined]]:
    """A member, and how to wait until it is one again: some of what it says makes it a stranger."""
    async with open_network(identity, listen=("/ip4/127.0.0.1/tcp/0",)) as network:
        membership = Membership(network, target.swarm, bootstrap=[target.door])

        async def joined() -> None:
            if not membership.is_member(target.peer):
                with suppress(CorollaError):
                    await network.connect(target.door, timeout_s=5)
                await membership.wait_member(target.peer, timeout_s=10)

        async with anyio.create_task_group() as tasks:
            await tasks.start(membership.run)
            await joined()
            yield network, joined
            tasks.cancel_scope.cancel()


async def _intrude(target: Target, messages: dict[str, list[bytes]], rng: random.Random) -> int:
    """A stranger, who comes with a new name each time and speaks what everybody may."""

    async def as_it_is() -> None: ...

    said = 0
    async with open_network(new_identity(), listen=()) as network:
        network.learn(target.peer, (target.door,))
        for _ in range(10):
            said += await _speak(network, as_it_is, target, messages, rng)
    return said


async def _speak(
    network: Libp2pNetwork,
    joined: Joined,
    target: Target,
    messages: dict[str, list[bytes]],
    rng: random.Random,
) -> int:
    """Open a stream and say some messages on it."""
    await joined()
    protocol = rng.choice(list(messages))
    said = 0
    try:
        stream = await network.open(target.peer, protocol, timeout_s=20)
        try:
            for _ in range(rng.randint(1, PER_STREAM)):
                data = changed(rng.choice(messages[protocol]), messages[protocol], rng)
                with trio.fail_after(10):
                    await stream.send(data)
                said += 1
        finally:
            if rng.random() < 0.5:
                await stream.close()
            else:
                stream.reset()
    except (CorollaError, trio.TooSlowError):
        await trio.lowlevel.checkpoint()
    return said


async def _recorded_handshake(target: Target) -> list[bytes]:
    """What a real dialler says until the connection is encrypted."""
    said: list[bytes] = []

    class Recorded(RawConnection):
        async def write(self, data: bytes) -> None:
            said.append(data)
            await super().write(data)

    async with await trio.open_tcp_stream(*target.endpoint) as tcp:
        noise = NoiseOnly(FastNoise(key_pair(new_identity())))
        await noise.secure_outbound(Recorded(TrioTCPStream(tcp), True), ID.from_string(target.peer))
    return said


async def _knock(target: Target, handshake: list[bytes], rng: random.Random) -> int:
    """A connection that never becomes one."""
    data = mutate(b"".join(handshake[: rng.randint(1, len(handshake))]), rng.getrandbits(62), handshake)
    try:
        async with await trio.open_tcp_stream(*target.endpoint) as tcp:
            await tcp.send_all(data)
            if rng.random() < 0.1:
                with trio.move_on_after(0.2):
                    await tcp.receive_some()
    except (OSError, trio.BrokenResourceError):
        await trio.lowlevel.checkpoint()
    return 1


async def _break_muxer(target: Target, rng: random.Random) -> int:
    """A stranger with a real handshake, whose frames are wrong."""
    host, peer, said = target.endpoint, ID.from_string(target.peer), 0
    try:
        async with await trio.open_tcp_stream(*host) as tcp:
            with trio.move_on_after(10):
                noise = NoiseOnly(FastNoise(key_pair(new_identity())))
                secured = await noise.secure_outbound(RawConnection(TrioTCPStream(tcp), True), peer)
                await agree(secured, target.peer, YAMUX)
                frames = _muxed_traffic()
                for _ in range(rng.randint(1, 20)):
                    await secured.write(mutate(rng.choice(frames), rng.getrandbits(62), frames))
                    said += 1
    except Exception:  # it hung up on us, which a dozen layers say in their own words
        await trio.lowlevel.checkpoint()
    return said


def _muxed_traffic() -> list[bytes]:
    one = Mux(initiator=True)
    frames = []
    for protocol in (HELLO_PROTOCOL, IDENTIFY_PUSH, PING):
        stream = one.open()
        one.send(stream, memoryview(b"\x13/multistream/1.0.0\n" + _prefixed(protocol.encode() + b"\n")))
        frames.append(b"".join(one.next_messages(1)))
        one.send(stream, memoryview(bytes(32)))
        one.finish(stream)
        frames.append(b"".join(one.next_messages(1)))
    one.ping(5)
    return [*frames, b"".join(one.next_messages(1))]


CALLS: Final = [
    encode(Call(1, method, arguments, payload))
    for method, arguments, payload in (
        ("status", None, b""),
        ("swarm", {}, b""),
        ("peers", None, b""),
        ("config", None, b""),
        ("models", None, b""),
        ("events", {"follow": True}, b""),
        ("generate", {"model": "none", "prompts": ["a"], "max_new_tokens": 2, "wait_s": 0.0}, b""),
        ("session.open", {"model": "none", "max_length": 8}, b""),
        ("session.step", {"session": 1}, bytes(64)),
        ("session.close", {"session": 1}, b""),
        ("model.forward", {"model": "none", "start": 0, "end": 2}, bytes(64)),
        ("adapter.list", None, b""),
        ("adapter.remove", {"name": "none"}, b""),
    )
]
CALLS.append(encode(Cancel(1)))


async def _call(target: Target, rng: random.Random) -> int:
    """A program on the same machine."""
    said = 0
    try:
        async with await trio.open_unix_socket(str(target.socket)) as program:
            for _ in range(rng.randint(1, 12)):
                data = changed(rng.choice(CALLS), CALLS, rng)
                with trio.fail_after(10):
                    await program.send_all(data)
                said += 1
            if rng.random() < 0.5:
                with trio.move_on_after(0.05):
                    await program.receive_some()
    except (OSError, trio.BrokenResourceError, trio.TooSlowError):
        await trio.lowlevel.checkpoint()
    return said


def door_of(addresses: tuple[str, ...], peer: str) -> str:
    """The address of a daemon on this machine."""
    for address in addresses:
        bare, _ = split_peer(address)
        if bare.startswith("/ip4/127.0.0.1/"):
            return f"{bare}/p2p/{peer}"
    raise ValueError(f"no address on this machine among {addresses}")
