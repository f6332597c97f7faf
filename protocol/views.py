"""What the daemon tells of itself and of its swarm: the answers of methods that only look.

`daemonctl status --json` and friends print them inside `{"version": 1, …}`; fields are added, never renamed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .messages import Plain
from .tensors import DType


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker of this daemon. state: loading, online, failed or stopped.

    As it measured itself on its own blocks: tokens_per_s of decoding one row, loaded_tokens_per_s of several rows
    together, prefill_tokens_per_s; launches_per_s: so many operations its host can give the device; 0 is unknown.
    now_tokens_per_s: what it computes at the moment.
    """

    worker: int
    state: str
    model: str
    start: int
    end: int
    dtype: DType | None = None
    quantization: str | None = None
    device: str = ""
    ends: bool = False
    sessions: int = 0
    queue: int = 0
    tokens_per_s: float = 0.0
    cache_tokens: int = 0
    free_tokens: int = 0
    weight_bytes: int = 0
    restarts: int = 0
    progress: float = 1.0  # of loading, 0 to 1
    error: Plain = None
    stage: str = ""  # of loading: `installing …` what workers run in, `fetching`, `converting`, `loading`
    now_tokens_per_s: float = 0.0
    loaded_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    launches_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Contribution:
    """What this daemon did for others, by its own count, in all its runs.

    block_tokens: tokens computed, times blocks. lending_s: seconds with a span online in a swarm.
    training_tokens: that went back through our blocks. relayed_bytes: carried between others.
    """

    block_tokens: int = 0
    lending_s: float = 0.0
    training_tokens: int = 0
    relayed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TrainingView:
    """A model that programs of this machine train. num_tokens: that went back so far; peers: of the last minute."""

    model: str
    micro_batches_per_s: float
    num_tokens: int
    peers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LineView:
    """This machine's line into the world. Bytes a second, 0 while unknown: up was measured, down is the most seen.

    limit_bytes_per_s: what may leave; 0 is no limit. sent_bytes, received_bytes: since the daemon started.
    """

    up_bytes_per_s: float = 0.0
    down_bytes_per_s: float = 0.0
    limit_bytes_per_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """The daemon in one screen. state: idle (no swarm), joining, online or stopping.

    num_sessions: of this machine's users; num_users_served: other members who have a session on our workers now.
    reach: how others come to us, in words. health: what is wrong, in words; nothing if all is well.
    """

    version: str
    state: str
    peer: str
    socket: str
    state_folder: str
    uptime_s: float
    swarm: str | None
    swarm_id: str | None
    join_command: str | None
    num_peers: int
    addresses: tuple[str, ...]
    workers: tuple[WorkerStatus, ...]
    num_sessions: int
    resident_bytes: int
    pid: int
    hint: str | None = None  # what to do next, if anything
    lending: str = "yes"  # or why not: `draining`, `paused`, `outside hours`, `not idle`, `gpu in use`
    contribution: Contribution | None = None
    line: LineView | None = None
    invited: bool = False  # whether others enter the swarm by invitation alone
    owner: bool = False  # whether this daemon makes these invitations
    training: tuple[TrainingView, ...] = ()
    num_users_served: int = 0
    reach: str = ""
    health: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rebalanced:
    """What became, or would become, of one span of this daemon: from [start, end) to [to_start, to_end).

    moves: whether it moves (or would). Pairs are before and after: tokens per second of the model's slowest
    block, blocks that nobody serves, blocks that only one serves.
    """

    worker: int
    model: str
    start: int
    end: int
    to_start: int
    to_end: int
    moves: bool
    tokens_per_s: tuple[float, float]
    num_gaps: tuple[int, int]
    num_single: tuple[int, int]


@dataclass(frozen=True, slots=True)
class SpanView:
    """A span that somebody serves, as this daemon sees it."""

    peer: str
    worker: int
    model: str
    fingerprint: str
    start: int
    end: int
    state: str
    dtype: DType
    quantization: str | None
    tokens_per_s: float
    expires_in_s: float
    mine: bool = False


@dataclass(frozen=True, slots=True)
class PeerView:
    """A member of the swarm that this daemon knows. rtt_s: None until measured. relayed: through others alone.

    addresses: where it says that it can be reached. connection: the far end of each live connection.
    through: the peer that carries a relayed one. inbound: whether it dialled us. clock_ahead_s: its clock
    against ours at its last greeting; None if it told no time. unseen_s: for how long one that is not connected was
    not, or since it was heard of; after ten minutes it is forgotten.
    """

    peer: str
    addresses: tuple[str, ...] = ()
    connected: bool = False
    relayed: bool = False
    rtt_s: float | None = None
    version: str = ""
    spans: tuple[str, ...] = ()  # `NAME START:END STATE`, for people
    connection: tuple[str, ...] = ()
    through: str = ""
    inbound: bool = False
    clock_ahead_s: float | None = None
    unseen_s: float | None = None


@dataclass(frozen=True, slots=True)
class RelayUse:
    """A relay where this daemon holds a reservation. address: where others find it; rtt_s: None until measured."""

    peer: str
    address: str
    rtt_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReachView:
    """Where this daemon can be reached, as far as it knows. Addresses are multiaddresses without `/p2p/…`.

    reachability: `public` (others can dial it), `private` (they come through relays) or `unknown`.
    configured: whether the owner said so, or announced an address; else it was found out.
    nat: what stands between it and the world: `none`; `endpoint-independent` (one mapped port for all, so that
    direct connections can be made); `symmetric` (another port for each, so that they mostly cannot);
    `unknown` while fewer than two peers have told. observed: where several peers see it.
    proven: of its addresses, those at which others lately dialled it back. mapped: what a router forwards to it.
    relays: where it holds reservations. offers_relay: whether it carries others' connections, and how many.
    listening: where it takes connections on this machine, with real ports.
    """

    reachability: str = "unknown"
    configured: bool = False
    nat: str = "unknown"
    observed: tuple[str, ...] = ()
    proven: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    relays: tuple[RelayUse, ...] = ()
    offers_relay: bool = False
    num_reservations: int = 0
    num_circuits: int = 0
    listening: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model that the swarm serves. replicas: of each block."""

    name: str
    fingerprint: str
    architecture: str
    num_blocks: int
    hidden_size: int
    hub_id: str | None
    licence: str | None
    replicas: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwarmView:
    """The swarm as this daemon sees it."""

    name: str | None
    swarm_id: str | None
    models: tuple[ModelView, ...]
    spans: tuple[SpanView, ...]


@dataclass(frozen=True, slots=True)
class DaemonEvent:
    """Something that happened. kind: see the daemon's `events`; unix_s is the wall clock."""

    kind: str
    unix_s: float
    text: str
    detail: Plain = None
