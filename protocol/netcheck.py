"""What a daemon tells of its place in the network: `netcheck`, `ping`, and what is wrong with the remedy.

`Netcheck` is both the frozen view that the daemon judges and the answer that programs get; a `Finding` is one
result of that judgement, and of `daemonctl doctor`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from .messages import check_length, check_range
from .views import PeerView, ReachView

MAX_PINGS: Final = 100  # of one call; more of them tell nothing new
MAX_PING_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """Something worth knowing. name: a stable word; remedy: what to do about it.

    is_problem: something does not work as it should; otherwise it is only said.
    """

    name: str
    text: str
    remedy: str = ""
    is_problem: bool = True


@dataclass(frozen=True, slots=True)
class Netcheck:
    """The network as one daemon sees it.

    swarm: None outside one. swarm_problem, swarm_remedy: why it could not be entered, or why members refuse us.
    wanted: where the owner wants it to listen; listening: where it does. announced: what it tells others, best
    first. peers: members, connected or not. unreached: bootstrap addresses that failed, as `ADDRESS: REASON`.
    clock_ahead_s: of this machine against the median of num_clocks members; None if none told its time.
    has_ipv4, has_ipv6: whether this machine has a route into the world. wants_relay: whether the owner lets it
    carry others' connections; `reach.offers_relay` is whether it does.
    """

    peer: str
    swarm: str | None = None
    swarm_problem: str = ""
    swarm_remedy: str = ""
    wanted: tuple[str, ...] = ()
    listening: tuple[str, ...] = ()
    announced: tuple[str, ...] = ()
    reach: ReachView = field(default_factory=ReachView)
    peers: tuple[PeerView, ...] = ()
    unreached: tuple[str, ...] = ()
    clock_ahead_s: float | None = None
    num_clocks: int = 0
    has_ipv4: bool = True
    has_ipv6: bool = True
    wants_relay: bool = True
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class PingPeer:
    """`ping`: measure the round trip to a member. peer: its id, or an end of it that no other member's has.

    timeout_s: for the connection, and again for each answer.
    """

    peer: str
    count: int = 4
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        check_length("peer", self.peer, 128)
        check_range("count", self.count, 1, MAX_PINGS)
        check_range("timeout_s", self.timeout_s, 0.1, MAX_PING_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Pinged:
    """What came of it, over one connection. rtts_s: of each answer, in order; lost: True if then one stayed out.

    relayed, through: whether others carry it, and who (a peer id). address: the far end of the connection.
    """

    peer: str
    rtts_s: tuple[float, ...]
    min_s: float
    median_s: float
    relayed: bool = False
    through: str = ""
    address: str = ""
    lost: bool = False
