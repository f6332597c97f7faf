"""The entrance: `connect()` to the daemon on this machine, ask it, and take models from it.

Owns the connection of blocking programs and its renewal after the daemon restarted; `async_client` is the
same for asynchronous ones. What a call means is said in `protocol/control`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from ..protocol.control import (
    CreateSwarm,
    Follow,
    InstallProgress,
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
from .generation import (
    RECONNECT_WITHIN_S,
    RETRY_EVERY_S,
    GenerateOptions,
    Generation,
    OnEvent,
    request,
)
from .parts import AdapterLike, as_adapter, put_lacking
from .session import Session
from .streams import Stream
from .training import Gradients, Pass, Trip, ask, forward
from .wire import Wire

if TYPE_CHECKING:
    from .async_client import AsyncDaemon


def connect(socket: str | os.PathLike[str] | None = None) -> Daemon:
    """Connect to the daemon; use the result as a context manager.

    socket: its path; None looks at `COROLLA_SOCKET`, then at your own daemon, then at the machine's.
    Raises `CorollaError`: `NO_DAEMON` says what was tried, `PERMISSION_DENIED`.
    """
    return Daemon(Wire.open(socket), socket)


async def aconnect(socket: str | os.PathLike[str] | None = None) -> AsyncDaemon:
    """As `connect`, for asyncio, and for trio where anyio is installed: `async with await aconnect() as daemon`."""
    from .async_client import AsyncDaemon

    return await AsyncDaemon.open(socket)


class Daemon:
    """A connected daemon. Threads may share it; closing it ends all that was opened through it."""

    def __init__(self, wire: Wire, socket: str | os.PathLike[str] | None = None) -> None:
        self._wire = wire
        self._wanted = socket
        self._renewing = RLock()
        self._closed = False

    @property
    def socket(self) -> Path:
        """The path of the socket in use."""
        return self._wire.path

    def status(self) -> Status:
        """The daemon in one screen."""
        return one(Status, self._call("status"))

    def swarm(self) -> SwarmView:
        """The swarm as the daemon sees it: models, and who serves which blocks."""
        return one(SwarmView, self._call("swarm"))

    def models(self) -> tuple[ModelView, ...]:
        """The models that the swarm serves."""
        return several(ModelView, self._call("models"))

    def peers(self) -> tuple[PeerView, ...]:
        """The members of the swarm that the daemon knows."""
        return several(PeerView, self._call("peers"))

    def netcheck(self) -> Netcheck:
        """How this machine is reached, through whom, and what is wrong, each with its remedy."""
        return one(Netcheck, self._call("netcheck"))

    def ping(self, peer: str, *, count: int = 4, timeout_s: float = 10.0) -> Pinged:
        """Measure the round trip to a member so many times. peer: its id, or an end of it that tells it apart.

        Raises `BAD_REQUEST` for a peer unknown here, `PEER_LOST` for one that cannot be reached, `TIMEOUT`.
        """
        return one(Pinged, self._call("ping", ping_request(peer, count, timeout_s)))

    def events(self, *, follow: bool = False) -> Iterator[DaemonEvent]:
        """What happened since the daemon started; with `follow` also what happens from now on."""
        for message in self._connection().stream("events", Follow(follow)):
            event = item(DaemonEvent, message)
            if event is not None:
                yield event

    def model(self, name: str) -> Model:
        """A model by name, `NAME@FINGERPRINT_PREFIX`, hub id or folder. Asks nothing yet."""
        return Model(self, name)

    def adapters(self) -> tuple[AdapterView, ...]:
        """The adapters whose parts the daemon keeps, for training and for sessions."""
        return several(AdapterView, self._call("adapter.list"))

    def adapter(self, name: str) -> AdapterView:
        """One of them, with the names of its parts. Raises `BAD_REQUEST` for one that is not kept."""
        return one(AdapterView, self._call("adapter.show", AdapterName(name)))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter's parts; sessions that use them go on. Raises `BAD_REQUEST` for one that is not kept."""
        self._call("adapter.remove", AdapterName(name))

    def config(self) -> dict[str, Any]:
        """The daemon's configuration."""
        return dict(self._call("config"))

    def metrics(self) -> str:
        """The daemon in numbers, in Prometheus' text format."""
        return str(self._call("metrics"))

    def set_config(self, key: str, value: Any) -> Applied:
        """Change one value of the configuration; kept over restarts. Tells what is in force at once."""
        return one(Applied, self._call("config.set", SetConfig(key, value)))

    def create_swarm(self, name: str, *, invited: bool = False) -> Joined:
        """Found a swarm and enter it: an open one, or one that others enter by `invite`'s tokens alone."""
        return one(Joined, self._call("swarm.create", CreateSwarm(name, invited)))

    def join(self, token: str) -> Joined:
        """Enter a swarm by its token, or by the multiaddress of a member."""
        return one(Joined, self._call("swarm.join", Join(token)))

    def leave(self) -> None:
        """Leave the swarm."""
        self._call("swarm.leave")

    def invite(self, *, lifetime_s: float = INVITE_LIFETIME_S, uses: int = 1) -> Invited:
        """A token by which so many machines may join our invited swarm within a time. Owners only."""
        return one(Invited, self._call("invite", Invite(lifetime_s, uses)))

    def invites(self) -> tuple[InviteView, ...]:
        """The invitations that this daemon gave, and who joined by them."""
        return several(InviteView, self._call("invites"))

    def revoke(self, name: str) -> None:
        """End the membership of a peer, or of all who joined by an invitation, for good. Owners only."""
        self._call("revoke", Revoke(name))

    def bans(self) -> tuple[str, ...]:
        """The peers with which this daemon has nothing to do."""
        return tuple(self._call("bans"))

    def ban(self, peer: str) -> None:
        """Have nothing to do with a peer, from this daemon, in any swarm, until `unban`."""
        self._call("ban", BannedPeer(peer))

    def unban(self, peer: str) -> None:
        """End a ban."""
        self._call("unban", BannedPeer(peer))

    def pull(
        self,
        model: str,
        *,
        revision: str | None = None,
        on_progress: Callable[[PullProgress], object] | None = None,
    ) -> Pulled:
        """Fetch a model's files to this machine."""
        value = None
        for message in self._connection().stream("model.pull", PullModel(model, revision)):
            progress = item(PullProgress, message)
            if progress is None:
                value = message.value
            elif on_progress is not None:
                on_progress(progress)
        return one(Pulled, value)

    def install_worker(self, on_progress: Callable[[str], object] | None = None) -> None:
        """Install what this daemon's workers need, for the device of its machine.

        on_progress: hears the installer, line by line. Raises `NOT_READY`, `DISK_FULL`.
        """
        for message in self._connection().stream("worker.install"):
            progress = item(InstallProgress, message)
            if progress is not None and on_progress is not None:
                on_progress(progress.line)

    def rebalance(
        self, *, dry_run: bool = False, to: tuple[int, int] | None = None, worker: int | None = None
    ) -> tuple[Rebalanced, ...]:
        """Move this machine's spans to where they help most, or one to blocks `to`; what that changes.

        dry_run: only say what moving would gain. worker: just this one. Moves go on after this has returned.
        """
        return several(Rebalanced, self._call("rebalance", rebalance_request(dry_run, to, worker)))

    def drain(self) -> None:
        """Take no new sessions; those of other members move or finish. `resume` ends it."""
        self._call("drain")

    def pause(self, *, for_s: float = 0.0) -> None:
        """Lend nothing for so long, or until `resume`; returns when the devices' memory is free."""
        self._call("pause", Pause(for_s))

    def resume(self) -> None:
        """Lend again."""
        self._call("resume")

    def stop(self, *, deadline_s: float = 30.0) -> None:
        """Let running sessions move or finish for at most so long, then exit."""
        self._call("stop", Stop(deadline_s))

    def close(self) -> None:
        """End the connection. May be called twice."""
        with self._renewing:
            self._closed = True
            self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, arguments: Any = None) -> Any:
        return self._connection().call(method, arguments).value

    def _connection(self, restarting: bool = False) -> Wire:
        """The connection, made anew if the daemon ended the last one.

        restarting: wait up to `RECONNECT_WITHIN_S` for a daemon that is just being started again.
        """
        if restarting:
            time.sleep(RETRY_EVERY_S)
        deadline = time.monotonic() + RECONNECT_WITHIN_S
        with self._renewing:
            while not self._wire.is_open:
                if self._closed:
                    raise error(Code.CANCELLED, "this connection was closed by the program", "connect again")
                try:
                    old, self._wire = self._wire, Wire.open(self._wanted)
                    old.close()
                except CorollaError as problem:
                    if not restarting or problem.code is not Code.NO_DAEMON or time.monotonic() > deadline:
                        raise
                    time.sleep(RETRY_EVERY_S)
            return self._wire


class Model:
    """A model of the swarm, seen as a whole."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self._daemon = daemon
        self.name = name

    def view(self) -> ModelView:
        """What the swarm says of it: blocks, hidden size, replicas. Raises `UNKNOWN_MODEL`, `AMBIGUOUS_MODEL`."""
        return find_model(self.name, self._daemon.models())

    @overload
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        stream: Literal[False] = False,
        messages: Iterable[Mapping[str, str] | ChatMessage] | None = None,
        tokens: Any = None,
        on_event: OnEvent | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        stream: Literal[True],
        messages: Iterable[Mapping[str, str] | ChatMessage] | None = None,
        tokens: Any = None,
        events: bool = False,
        on_event: OnEvent | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream: ...
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        stream: bool = False,
        messages: Iterable[Mapping[str, str] | ChatMessage] | None = None,
        tokens: Any = None,
        events: bool = False,
        on_event: OnEvent | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation | Stream:
        """Write on after a prompt (or several: one row each), a chat, or token ids.

        stream: give pieces as they come, each with .text, .row, .token and .finish ("stop", "length" or
            None); otherwise the whole `Generation` (.text, .texts, .tokens).
        messages: a chat as {"role": …, "content": …}, for the model's own template.
        events: let pieces with .event (`repairing`, `repaired`, `waiting`, …) into the stream.
        on_event: called with each of these.
        options: see `GenerateOptions`: max_new_tokens, temperature, top_p, seed, stop, ….
        When the daemon is restarted meanwhile, the text goes on, once. Raises `CorollaError`; its details
        hold what was generated so far.
        """
        adapter = as_adapter(options.get("adapter"))
        asked = request(self.name, prompt, messages, tokens, options, adapter)
        running = Stream(self._daemon._connection, asked, adapter, events=events, on_event=on_event)
        return running if stream else running.result()

    def session(
        self,
        *,
        max_length: int = 2048,
        blocks: tuple[int, int] | None = None,
        rows: int = 1,
        encoding: Encoding | str | None = None,
        wait_s: float = 0.0,
        adapter: AdapterLike | None = None,
    ) -> Session:
        """Open a session of hidden states; use it as a context manager.

        max_length: tokens of one row. rows: how many at most. blocks: [start, end) of them; None is all.
        encoding: of hidden states on the wire ("float32", "bfloat16", "float16", "int8"); None: the daemon chooses.
        wait_s: how long to wait for blocks that nobody serves yet.
        adapter: LoRA or prompts: a folder that PEFT or `corolla.sdk.torch` wrote, or a `parts.Adapter`. Virtual
            tokens stand before each row of a session from block 0 on; neither positions nor answers count them.
        """
        used = as_adapter(adapter)
        asked = session_request(self.name, blocks, rows, max_length, encoding, wait_s, used)
        wire = self._daemon._connection()
        try:
            answer = wire.call("session.open", asked)
        except CorollaError as problem:
            put_lacking(wire, used, problem)
            answer = wire.call("session.open", asked)
        opened = one(SessionOpened, answer.value)
        return Session(wire, opened, rows, max_length)

    def forward(
        self, hidden: Any, *, blocks: tuple[int, int] | None = None, encoding: Encoding | str | None = None
    ) -> Any:
        """Hidden states after blocks [start, end), of whole rows from position 0; nothing is kept of them.

        hidden: (rows, n, hidden_size), numpy or torch; the answer is alike. Raises as `training.ask`.
        """
        asked = ask(self.name, hidden, None, Trip(blocks, encoding))
        return forward(self._daemon._connection(), asked).output

    def passing(self, hidden: Any, trip: Trip | None = None, sequences: Sequence[Run] | None = None) -> Pass:
        """As `forward`, and what backward needs is kept: `passed.output`, then `model.backward(passed, …)`."""
        asked = ask(self.name, hidden, sequences, replace(trip or Trip(), keep=True))
        return forward(self._daemon._connection(), asked)

    def put_part(self, name: bytes, data: bytes) -> None:
        """Give the daemon an adapter part, a safetensors file named by its sha256, to bring where it is missing."""
        self._daemon._connection().call("adapter.put", PutAdapterPart(name, self.name), data)

    def backward(self, passed: Pass, gradients: Any) -> Gradients:
        """Gradients of a pass's inputs and adapter parts, from those of its output. See `Pass.backward`."""
        return passed.backward(gradients)

    def __repr__(self) -> str:
        return f"Model({self.name!r})"
