"""What happens to a session, and what it wants done: the machine's input and output. Data only.

A *wire* is one stream to one hop, by the number that the machine gave it. A hop that is opened again gets a
new wire, so that nothing late from the old one is taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ...protocol.errors import CorollaError
from ...protocol.messages import Message
from ...protocol.steps import Chain, Hop, OpenSession, Reply, Row
from .wiring import Route, RouteRequest

# events


@dataclass(frozen=True, slots=True)
class OpenRequested:
    """The user wants the session. Answered by `Ready` or `Fail`."""


@dataclass(frozen=True, slots=True)
class StepRequested:
    """The user has a step: answered by `Deliver`, `Refuse` or `Fail`, in the order asked."""

    ticket: int
    rows: tuple[Row, ...]
    payload: bytes
    reply: Reply


@dataclass(frozen=True, slots=True)
class KeepRequested:
    """Hops may keep these pages of the rows, as they stand now, for later sessions. Not answered."""

    rows: tuple[Chain, ...]


@dataclass(frozen=True, slots=True)
class Disputed:
    """The user found the last answer wrong (not finite, say). It is computed again and delivered again."""

    ticket: int
    problem: CorollaError


@dataclass(frozen=True, slots=True)
class LeaveRequested:
    """A hop that works is slow beside others: the session goes on without it. Charges nobody."""

    hop: Hop
    reason: str


@dataclass(frozen=True, slots=True)
class RouteFound:
    """The answer to `FindRoute`."""

    ticket: int
    route: Route


@dataclass(frozen=True, slots=True)
class RouteMissing:
    """The other answer to `FindRoute`."""

    ticket: int
    problem: CorollaError


@dataclass(frozen=True, slots=True)
class HopSaid:
    """A message came on a wire."""

    wire: int
    message: Message


@dataclass(frozen=True, slots=True)
class HopLost:
    """A wire could not be opened, broke, or ended."""

    wire: int
    problem: CorollaError


@dataclass(frozen=True, slots=True)
class PartsPut:
    """The answer to `PutParts`. problem: None if the hop holds them now."""

    wire: int
    problem: CorollaError | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """The user is done."""


Event = (
    OpenRequested
    | StepRequested
    | KeepRequested
    | Disputed
    | LeaveRequested
    | RouteFound
    | RouteMissing
    | HopSaid
    | HopLost
    | PartsPut
    | Tick
    | CloseRequested
)


# actions


class Kind(StrEnum):
    """Kinds of events that the user sees."""

    REPAIRING = "repairing"  # a hop or a link failed
    WAITING = "waiting"  # nobody serves the lost blocks; asking again and again
    REPAIRED = "repaired"
    BRIDGED = "bridged"  # two hops do not reach each other; what passes between them goes through the client
    PRECISION_CHANGED = "precision_changed"  # no replacement computes as the lost hop did


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """Something that the user may want to know. detail: plain values."""

    kind: Kind
    text: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FindRoute:
    """Ask the router; answer with the same ticket. Only the latest ticket matters."""

    ticket: int
    request: RouteRequest


@dataclass(frozen=True, slots=True)
class OpenHop:
    """Open a stream to a peer and send `message` on it. If that fails within `timeout_s`: `HopLost`."""

    wire: int
    peer: str
    message: OpenSession
    timeout_s: float


@dataclass(frozen=True, slots=True)
class PutParts:
    """Bring parts of the adapter to a hop, which will then be opened as `wire`. parts: block and name of each."""

    wire: int
    hop: Hop
    parts: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Send messages on a wire, in order, after everything sent there before; taken one by one, lazily."""

    wire: int
    messages: Iterable[Message]


@dataclass(frozen=True, slots=True)
class CloseHop:
    """End a wire: after a last message, or, without one, at once. Nothing of it is reported any more."""

    wire: int
    message: Message | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The session is open: route found, all hops linked."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """The answer to a step of the user."""

    ticket: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Refuse:
    """A step of the user is wrong; the session goes on."""

    ticket: int
    problem: CorollaError


@dataclass(frozen=True, slots=True)
class Charge:
    """A peer is guilty. weight: as in `swarm/blame.py`."""

    peer: str
    weight: float
    reason: str


@dataclass(frozen=True, slots=True)
class Emit:
    """Tell the user."""

    event: SessionEvent


@dataclass(frozen=True, slots=True)
class Fail:
    """The session has ended, and every step that waits ends with it."""

    problem: CorollaError


Action = FindRoute | OpenHop | PutParts | Send | CloseHop | Ready | Deliver | Refuse | Charge | Emit | Fail
