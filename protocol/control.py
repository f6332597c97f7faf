"""What the SDK and the daemon say to each other, over a Unix socket.

A `Call` names a method and its arguments; it is answered by any number of `Item`s and then one `Return` or
`Refused`, all with the call's `id`. Calls of one connection run side by side. `Cancel` ends one early.
Closing the connection ends everything that was opened on it. `METHODS` is the whole list, with the right
that each needs and the type of its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final

from .errors import CorollaError, error_from_wire
from .guests import BannedPeer, Invite, Revoke
from .messages import Message, Plain, Vocabulary
from .netcheck import PingPeer
from .passes import AdapterName, BackwardPass, ForwardPass, PassHandle, PutAdapterPart
from .steps import Reply, Row
from .tensors import Encoding
from .work import ChatMessage, Logprob, Sampling, TokenRow

CONTROL_VERSION: Final = 1

# Told at each join, and with the first text that a daemon generates in a swarm (DESIGN, section 4, trust).
PRIVACY: Final = (
    "This swarm is open. Its members can reconstruct your text, and a dishonest one can alter the answer. "
    "Send nothing you would not publish. Members see your IP address."
)
PRIVACY_INVITED: Final = (
    "This swarm is invited, which promises only that its members were invited. They can reconstruct your text, "
    "and a dishonest one can alter the answer. Send nothing that they must not read. They see your IP address."
)


def privacy_words(invited: bool) -> str:
    """What users are told of a swarm."""
    return PRIVACY_INVITED if invited else PRIVACY


class Right(StrEnum):
    """What a local user may do, decided by peer credentials; each includes the ones before it."""

    SEE = "see"  # every local user
    USE = "use"  # the group `corolla`, and the daemon's own user
    MANAGE = "manage"  # root, the daemon's user, configured operators


@dataclass(frozen=True, slots=True)
class Call(Message):
    """SDK → daemon. arguments: the map of the method's argument type."""

    KIND: ClassVar[str] = "call"
    id: int
    method: str
    arguments: Plain = None
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """SDK → daemon: the call `id` is no longer wanted. It is still answered."""

    KIND: ClassVar[str] = "cancel"
    id: int


@dataclass(frozen=True, slots=True)
class Item(Message):
    """Daemon → SDK: a part of an answer, such as one token or one event."""

    KIND: ClassVar[str] = "item"
    id: int
    value: Plain = None
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Return(Message):
    """Daemon → SDK: the end of an answer."""

    KIND: ClassVar[str] = "return"
    id: int
    value: Plain = None
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """Daemon → SDK: the call failed."""

    KIND: ClassVar[str] = "refused"
    id: int
    error: Plain  # CorollaError.to_wire

    @classmethod
    def of(cls, call: int, problem: CorollaError) -> Refused:
        """The message that reports an error."""
        return cls(call, problem.to_wire())

    def problem(self) -> CorollaError:
        """The error reported."""
        return error_from_wire(self.error)


TO_DAEMON: Final = Vocabulary(Call, Cancel)
FROM_DAEMON: Final = Vocabulary(Item, Return, Refused)


# arguments


@dataclass(frozen=True, slots=True)
class NoArguments:
    """Of methods that need none."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Items are `Piece`s, in the order in which tokens came; `Return.value` is a `Generated`.

    model: a name, `NAME@FINGERPRINT_PREFIX`, a hub id or a folder. Exactly one of prompts, messages, tokens.
    max_length: prompt and new tokens of one row; 0 is the prompt plus max_new_tokens.
    wait_s: how long to wait at the start for blocks that nobody serves yet.
    generated: tokens that each row already gave out (the SDK resumes after a restart of the daemon).
    parts, soft: of an adapter, as in `OpenModelSession`.
    """

    model: str
    prompts: tuple[str, ...] = ()
    messages: tuple[ChatMessage, ...] = ()
    tokens: tuple[TokenRow, ...] = ()
    max_new_tokens: int = 256
    max_length: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    encoding: Encoding | None = None
    wait_s: float = 0.0
    generated: tuple[TokenRow, ...] = ()
    parts: tuple[bytes, ...] = ()
    soft: bytes = b""


@dataclass(frozen=True, slots=True)
class Piece:
    """One new token of a row. finish: "stop" or "length" with a row's last one.

    logprob, top: of the token, and of the likeliest ones if `top_logprobs` asked for them, as in `work.Chosen`.
    """

    row: int
    token: int
    text: str
    finish: str | None = None
    logprob: float | None = None
    event: str | None = (
        None  # instead of a token: `repairing`, `waiting`, `repaired`, `notice`, … as in `events`
    )
    detail: Plain = None
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """The whole answer: each row's text and tokens, and how it went.

    num_prefix_tokens: of the prompt, that the swarm still knew from an earlier one and did not compute again.
    """

    texts: tuple[str, ...]
    tokens: tuple[TokenRow, ...]
    num_prompt_tokens: int
    seconds: float
    num_repairs: int = 0
    repair_s: float = 0.0
    num_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class OpenModelSession:
    """Open a session of hidden states on blocks [start, end); end -1 is the last block.

    `Return.value` is a `SessionOpened`. The session lives until `session.close` or the connection ends.
    parts: names of an adapter's parts, from the model's first block on, whatever `start` is; blocks beyond the last
        name are left alone. Those that the daemon does not keep are `ADAPTER_MISSING` with the hex names in
        `missing`: `adapter.put` them and ask again.
    soft: name of the part with the adapter's virtual tokens, or nothing. In a session that begins at block 0 they stand
        before each row, and neither positions nor answers count them.
    """

    model: str
    start: int = 0
    end: int = -1
    max_rows: int = 1
    max_length: int = 2048
    encoding: Encoding | None = None
    wait_s: float = 0.0
    parts: tuple[bytes, ...] = ()
    soft: bytes = b""


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """handle: names the session in later calls. encoding: of every payload of this session."""

    handle: int
    hidden_size: int
    encoding: Encoding
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SessionStep:
    """One step; hidden states are the call's payload, the answer is `Return.payload` as `reply` says."""

    handle: int
    rows: tuple[Row, ...]
    reply: Reply = Reply.ALL


@dataclass(frozen=True, slots=True)
class SessionHandle:
    """A session."""

    handle: int


@dataclass(frozen=True, slots=True)
class CreateSwarm:
    """Found a swarm and enter it: an open one, or one that others enter by invitation alone."""

    name: str
    invited: bool = False


@dataclass(frozen=True, slots=True)
class Join:
    """Enter a swarm by its token, or by the multiaddress of a member of an open one."""

    token: str


@dataclass(frozen=True, slots=True)
class PullModel:
    """Fetch the files of a model's ends to this machine; items tell the progress.

    model: a folder, GGUF file or hub id, or the name of a model of the swarm that this machine has.
    """

    model: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class PullProgress:
    """An item of `model.pull`. stage: as in `work.Loading`."""

    stage: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Pulled:
    """Where the files lie now: a Hugging Face folder that transformers can load the ends from."""

    folder: str


@dataclass(frozen=True, slots=True)
class InstallProgress:
    """An item of `worker.install`: what the installer says."""

    line: str


@dataclass(frozen=True, slots=True)
class Joined:
    """The answer of `swarm.create` and `swarm.join`. token: what others paste after `daemonctl join`; "" of an
    invited swarm, where `invite` makes one for each newcomer.

    notice: what users have to know of this swarm.
    """

    name: str
    swarm_id: str
    token: str
    notice: str = ""


@dataclass(frozen=True, slots=True)
class Follow:
    """Events since the daemon started; with `follow`, the call does not end."""

    follow: bool = True


@dataclass(frozen=True, slots=True)
class Stop:
    """Drain for at most deadline_s, then exit."""

    deadline_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Move this daemon's spans to where they help most, or one to [start, end); end 0 is: where it helps.

    dry_run: only say what moving would gain. worker: just this one; -1 is all.
    """

    dry_run: bool = False
    start: int = 0
    end: int = 0
    worker: int = -1


@dataclass(frozen=True, slots=True)
class Pause:
    """Stop lending: sessions move, workers exit. for_s: until then; 0 is until `resume`. Kept over restarts."""

    for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SetConfig:
    """Change one value of the configuration, in force at once where it can be; kept over restarts."""

    key: str
    value: Plain


# What the methods return: status `Status`, swarm `SwarmView`, models a list of `ModelView`, peers a list of
# `PeerView`, metrics a text in Prometheus' format, config a map of keys to values, generate `Generated`,
# session.open `SessionOpened`, model.pull `Pulled`, swarm.create and swarm.join `Joined`, invite `Invited`,
# invites a list of `InviteView`, bans a list of peer ids, rebalance a list of `Rebalanced`, config.set
# `settings.Applied`, netcheck `netcheck.Netcheck`, ping `netcheck.Pinged`; events sends items of `DaemonEvent`.
# Those of `views` are there. The others return None.


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the list: what a call is called, the right it needs, the type of its arguments."""

    name: str
    right: Right
    arguments: type


METHODS: Final[dict[str, Method]] = {
    method.name: method
    for method in (
        Method("status", Right.SEE, NoArguments),
        Method("swarm", Right.SEE, NoArguments),
        Method("models", Right.SEE, NoArguments),
        Method("peers", Right.SEE, NoArguments),
        Method("netcheck", Right.SEE, NoArguments),
        Method("ping", Right.USE, PingPeer),
        Method("events", Right.SEE, Follow),
        Method("config", Right.SEE, NoArguments),
        Method("metrics", Right.SEE, NoArguments),
        Method("generate", Right.USE, Generate),
        Method("session.open", Right.USE, OpenModelSession),
        Method("session.step", Right.USE, SessionStep),
        Method("session.close", Right.USE, SessionHandle),
        Method("model.forward", Right.USE, ForwardPass),
        Method("model.backward", Right.USE, BackwardPass),
        Method("model.release", Right.USE, PassHandle),
        Method("adapter.put", Right.USE, PutAdapterPart),
        Method("adapter.list", Right.USE, NoArguments),
        Method("adapter.show", Right.USE, AdapterName),
        Method("adapter.remove", Right.USE, AdapterName),
        Method("model.pull", Right.MANAGE, PullModel),
        Method("config.set", Right.MANAGE, SetConfig),
        Method("worker.install", Right.MANAGE, NoArguments),
        Method("swarm.create", Right.MANAGE, CreateSwarm),
        Method("swarm.join", Right.MANAGE, Join),
        Method("swarm.leave", Right.MANAGE, NoArguments),
        Method("invite", Right.MANAGE, Invite),
        Method("invites", Right.SEE, NoArguments),
        Method("bans", Right.SEE, NoArguments),
        Method("ban", Right.MANAGE, BannedPeer),
        Method("unban", Right.MANAGE, BannedPeer),
        Method("revoke", Right.MANAGE, Revoke),
        Method("rebalance", Right.MANAGE, Rebalance),
        Method("drain", Right.MANAGE, NoArguments),
        Method("pause", Right.MANAGE, Pause),
        Method("resume", Right.MANAGE, NoArguments),
        Method("stop", Right.MANAGE, Stop),
    )
}
