"""The entrance for asynchronous programs; the same as `client`, with `await`."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from ..protocol.control import (
    CreateSwarm,
    Follow,
    Join,
    Joined,
    Pause,
    Pulled,
    PullModel,
    PullProgress,
    SessionOpened,
    SetConfig,
    Stop,
)
from ..protocol.errors import Code, CorollaError, error
from ..protocol.guests import BannedPeer, Invite, Invited, InviteView, Revoke
from ..protocol.limits import INVITE_LIFETIME_S
from ..protocol.netcheck import Netcheck, Pinged
from ..protocol.passes import AdapterName, AdapterView, PutAdapterPart
from ..protocol.settings import Applied
from ..protocol.tensors import Encoding
from ..protocol.training import Sequence as Run
from ..protocol.views import DaemonEvent, ModelView, PeerView, Rebalanced, Status, SwarmView
from ..protocol.work import ChatMessage
from .answers import find_model, item, one, ping_request, rebalance_request, session_request, several
from .async_wire import AsyncWire
from .generation import RECONNECT_WITHIN_S, RETRY_EVERY_S, GenerateOptions, Generation, OnEvent, request
from .parts import AdapterLike, aput_lacking, as_adapter
from .session import AsyncSession
from .streams import AsyncStream
from .training import AsyncPass, Gradients, Trip, aforward, ask


class AsyncDaemon:
    """A connected daemon; see `client.Daemon`. Tasks of one event loop may share it."""

    def __init__(self, wire: AsyncWire, socket: str | os.PathLike[str] | None = None) -> None:
        self._wire = wire
        self._wanted = socket
        self._closed = False

    @classmethod
    async def open(cls, socket: str | os.PathLike[str] | None = None) -> Self:
        """Connect; see `client.connect`."""
        return cls(await AsyncWire.open(socket), socket)

    @property
    def socket(self) -> Path:
        """The path of the socket in use."""
        return self._wire.path

    async def status(self) -> Status:
        """The daemon in one screen."""
        return one(Status, await self._call("status"))

    async def swarm(self) -> SwarmView:
        """The swarm as the daemon sees it."""
        return one(SwarmView, await self._call("swarm"))

    async def models(self) -> tuple[ModelView, ...]:
        """The models that the swarm serves."""
        return several(ModelView, await self._call("models"))

    async def peers(self) -> tuple[PeerView, ...]:
        """The members of the swarm that the daemon knows."""
        return several(PeerView, await self._call("peers"))

    async def netcheck(self) -> Netcheck:
        """How this machine is reached, through whom, and what is wrong, each with its remedy."""
        return one(Netcheck, await self._call("netcheck"))

    async def ping(self, peer: str, *, count: int = 4, timeout_s: float = 10.0) -> Pinged:
        """Measure the round trip to a member so many times. peer: its id, or an end of it that tells it apart.

        Raises `BAD_REQUEST` for a peer unknown here, `PEER_LOST` for one that cannot be reached, `TIMEOUT`.
        """
        return one(Pinged, await self._call("ping", ping_request(peer, count, timeout_s)))

    async def events(self, *, follow: bool = False) -> AsyncIterator[DaemonEvent]:
        """What happened since the daemon started; with `follow` also what happens from now on."""
        stream = (await self._connection()).stream("events", Follow(follow))
        try:
            async for message in stream:
                event = item(DaemonEvent, message)
                if event is not None:
                    yield event
        finally:
            await stream.aclose()

    def model(self, name: str) -> AsyncModel:
        """A model by name, `NAME@FINGERPRINT_PREFIX`, hub id or folder. Asks nothing yet."""
        return AsyncModel(self, name)

    async def adapters(self) -> tuple[AdapterView, ...]:
        """The adapters whose parts the daemon keeps, for training and for sessions."""
        return several(AdapterView, await self._call("adapter.list"))

    async def adapter(self, name: str) -> AdapterView:
        """One of them, with the names of its parts. Raises `BAD_REQUEST` for one that is not kept."""
        return one(AdapterView, await self._call("adapter.show", AdapterName(name)))

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter's parts; sessions that use them go on. Raises `BAD_REQUEST` for one that is not kept."""
        await self._call("adapter.remove", AdapterName(name))

    async def config(self) -> dict[str, Any]:
        """The daemon's configuration."""
        return dict(await self._call("config"))

    async def metrics(self) -> str:
        """The daemon in numbers, in Prometheus' text format."""
        return str(await self._call("metrics"))

    async def set_config(self, key: str, value: Any) -> Applied:
        """Change one value of the configuration; kept over restarts. Tells what is in force at once."""
        return one(Applied, await self._call("config.set", SetConfig(key, value)))

    async def create_swarm(self, name: str, *, invited: bool = False) -> Joined:
        """Found a swarm and enter it: an open one, or one that others enter by `invite`'s tokens alone."""
        return one(Joined, await self._call("swarm.create", CreateSwarm(name, invited)))

    async def join(self, token: str) -> Joined:
        """Enter a swarm by its token, or by the multiaddress of a member."""
        return one(Joined, await self._call("swarm.join", Join(token)))

    async def leave(self) -> None:
        """Leave the swarm."""
        await self._call("swarm.leave")

    async def invite(self, *, lifetime_s: float = INVITE_LIFETIME_S, uses: int = 1) -> Invited:
        """A token by which so many machines may join our invited swarm within a time. Owners only."""
        return one(Invited, await self._call("invite", Invite(lifetime_s, uses)))

    async def invites(self) -> tuple[InviteView, ...]:
        """The invitations that this daemon gave, and who joined by them."""
        return several(InviteView, await self._call("invites"))

    async def revoke(self, name: str) -> None:
        """End the membership of a peer, or of all who joined by an invitation, for good. Owners only."""
        await self._call("revoke", Revoke(name))

    async def bans(self) -> tuple[str, ...]:
        """The peers with which this daemon has nothing to do."""
        return tuple(await self._call("bans"))

    async def ban(self, peer: str) -> None:
        """Have nothing to do with a peer, from this daemon, in any swarm, until `unban`."""
        await self._call("ban", BannedPeer(peer))

    async def unban(self, peer: str) -> None:
        """End a ban."""
        await self._call("unban", BannedPeer(peer))

    async def pull(
        self,
        model: str,
        *,
        revision: str | None = None,
        on_progress: Callable[[PullProgress], object] | None = None,
    ) -> Pulled:
        """Fetch a model's files to this machine."""
        value = None
        stream = (await self._connection()).stream("model.pull", PullModel(model, revision))
        try:
            async for message in stream:
                progress = item(PullProgress, message)
                if progress is None:
                    value = message.value
                elif on_progress is not None:
                    on_progress(progress)
        finally:
            await stream.aclose()
        return one(Pulled, value)

    async def rebalance(
        self, *, dry_run: bool = False, to: tuple[int, int] | None = None, worker: int | None = None
    ) -> tuple[Rebalanced, ...]:
        """Move this machine's spans to where they help most, or one to blocks `to`; what that changes.

        dry_run: only say what moving would gain. worker: just this one. Moves go on after this has returned.
        """
        return several(Rebalanced, await self._call("rebalance", rebalance_request(dry_run, to, worker)))

    async def drain(self) -> None:
        """Take no new sessions; those of other members move or finish. `resume` ends it."""
        await self._call("drain")

    async def pause(self, *, for_s: float = 0.0) -> None:
        """Lend nothing for so long, or until `resume`; returns when the devices' memory is free."""
        await self._call("pause", Pause(for_s))

    async def resume(self) -> None:
        """Lend again."""
        await self._call("resume")

    async def stop(self, *, deadline_s: float = 30.0) -> None:
        """Let running sessions move or finish for at most so long, then exit."""
        await self._call("stop", Stop(deadline_s))

    async def close(self) -> None:
        """End the connection. May be called twice."""
        self._closed = True
        await self._wire.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, arguments: Any = None) -> Any:
        return (await (await self._connection()).call(method, arguments)).value

    async def _connection(self, restarting: bool = False) -> AsyncWire:
        if restarting:
            await self._wire.sleep(RETRY_EVERY_S)
        deadline = time.monotonic() + RECONNECT_WITHIN_S
        while not self._wire.is_open:
            if self._closed:
                raise error(Code.CANCELLED, "this connection was closed by the program", "connect again")
            try:
                new = await AsyncWire.open(self._wanted)
            except CorollaError as problem:
                if not restarting or problem.code is not Code.NO_DAEMON or time.monotonic() > deadline:
                    raise
                await self._wire.sleep(RETRY_EVERY_S)
                continue
            if self._wire.is_open:  # another task was faster
                await new.close()
            else:
                old, self._wire = self._wire, new
                await old.close()
        return self._wire


class AsyncModel:
    """A model of the swarm, seen as a whole; see `client.Model`."""

    def __init__(self, daemon: AsyncDaemon, name: str) -> None:
        self._daemon = daemon
        self.name = name

    async def view(self) -> ModelView:
        """What the swarm says of it: blocks, hidden size, replicas."""
        return find_model(self.name, await self._daemon.models())

    async def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        messages: Iterable[Mapping[str, str] | ChatMessage] | None = None,
        tokens: Any = None,
        on_event: OnEvent | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """The whole answer; arguments as in `client.Model.generate`."""
        adapter = as_adapter(options.get("adapter"))
        asked = request(self.name, prompt, messages, tokens, options, adapter)
        async with AsyncStream(self._daemon._connection, asked, adapter, on_event=on_event) as running:
            return await running.result()

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        messages: Iterable[Mapping[str, str] | ChatMessage] | None = None,
        tokens: Any = None,
        events: bool = False,
        on_event: OnEvent | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """Pieces as they come: `async with model.stream(…) as pieces: async for piece in pieces`."""
        adapter = as_adapter(options.get("adapter"))
        asked = request(self.name, prompt, messages, tokens, options, adapter)
        return AsyncStream(self._daemon._connection, asked, adapter, events=events, on_event=on_event)

    async def session(
        self,
        *,
        max_length: int = 2048,
        blocks: tuple[int, int] | None = None,
        rows: int = 1,
        encoding: Encoding | str | None = None,
        wait_s: float = 0.0,
        adapter: AdapterLike | None = None,
    ) -> AsyncSession:
        """Open a session: `async with await model.session(…) as session`; see `client.Model.session`."""
        used = as_adapter(adapter)
        asked = session_request(self.name, blocks, rows, max_length, encoding, wait_s, used)
        wire = await self._daemon._connection()
        try:
            answer = await wire.call("session.open", asked)
        except CorollaError as problem:
            await aput_lacking(wire, used, problem)
            answer = await wire.call("session.open", asked)
        opened = one(SessionOpened, answer.value)
        return AsyncSession(wire, opened, rows, max_length)

    async def forward(
        self, hidden: Any, *, blocks: tuple[int, int] | None = None, encoding: Encoding | str | None = None
    ) -> Any:
        """Hidden states after blocks [start, end), of whole rows; see `client.Model.forward`."""
        asked = ask(self.name, hidden, None, Trip(blocks, encoding))
        return (await aforward(await self._daemon._connection(), asked)).output

    async def passing(
        self, hidden: Any, trip: Trip | None = None, sequences: Sequence[Run] | None = None
    ) -> AsyncPass:
        """As `forward`, and what backward needs is kept: `async with await model.passing(…) as passed`."""
        asked = ask(self.name, hidden, sequences, replace(trip or Trip(), keep=True))
        return await aforward(await self._daemon._connection(), asked)

    async def backward(self, passed: AsyncPass, gradients: Any) -> Gradients:
        """Gradients of a pass's inputs and adapter parts, from those of its output. See `AsyncPass.backward`."""
        return await passed.backward(gradients)

    async def put_part(self, name: bytes, data: bytes) -> None:
        """Give the daemon an adapter part, a safetensors file named by its sha256, to bring where it is missing."""
        await (await self._daemon._connection()).call("adapter.put", PutAdapterPart(name, self.name), data)

    def __repr__(self) -> str:
        return f"AsyncModel({self.name!r})"
