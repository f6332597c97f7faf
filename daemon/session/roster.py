"""The hops that take part in a session, in the order of their blocks, and who is kept off the route. Pure.

It owns the list and the wires' numbers, and knows which blocks are uncovered and what to ask the router for
them. It does not know what is said on the wires.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from ...protocol.errors import Code, error
from ...protocol.steps import Hop, Stage
from ...protocol.tensors import Encoding
from .prefix import Prefix
from .replays import Holding
from .wiring import Precision, Route, RouteHop, RouteRequest, covers, gaps

_NO_PREFIX: Final = Prefix()


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session is, from its first to its last moment.

    parts: of an adapter, one for each block, or nothing. prefix: what its rows will begin with.
    """

    session: bytes
    fingerprint: str
    start: int
    end: int
    encoding: Encoding
    token_bytes: int
    max_rows: int
    max_tokens: int
    parts: tuple[bytes, ...] = ()
    prefix: Prefix = _NO_PREFIX

    def parts_of(self, start: int, end: int) -> tuple[bytes, ...]:
        """The adapter's parts for some of the blocks; nothing if it leaves them all alone."""
        names = self.parts[start - self.start : end - self.start]
        return names if any(names) else ()


class Standing(Enum):
    """How far a hop is with its stream."""

    LACKING = auto()  # its parts of the adapter are being put there, on another stream
    NEW = auto()  # to be opened
    OPENING = auto()
    OPEN = auto()


@dataclass(slots=True)
class Member:
    """One hop on the route. Times are seconds of the machine's clock; steps are committed step ids.

    resumes: the stream broke, and is being opened again for a session that the hop should still have.
    resumed_at, struck_at: what was committed when it last had a second chance of that kind; -1 is never.
    num_puts: how often it lacked parts of the adapter since it was last linked. prefix_lengths: tokens of
    each row's prefix that it said it holds.
    """

    place: RouteHop
    wire: int
    standing: Standing = Standing.NEW
    resumes: bool = False
    linked: bool = False
    holding: Holding = field(default_factory=lambda: Holding((), (), False))
    stage: Stage | None = None  # its answer to the probe that is under way
    deadline: float = 0.0
    late_at: float = float("inf")  # before that, while it is being opened
    resumed_at: int = -1
    struck_at: int = -1
    num_puts: int = 0
    prefix_lengths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.place.hop.peer} (blocks {self.place.start}:{self.place.end})"


class Roster:
    """The members of one session, and whom not to ask for."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._members: list[Member] = []
        self._next_wire = 1
        self._lost_precision: dict[tuple[int, int], Precision] = {}
        self.avoided: set[Hop] = set()
        self.avoided_peers: set[str] = set()
        self.bad_links: set[tuple[str, str]] = set()
        self._bridges: set[tuple[str, str]] = set()  # bad links whose steps pass through the client

    def __iter__(self) -> Iterator[Member]:
        return iter(tuple(self._members))

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Member:
        return self._members[index]

    def by_wire(self, wire: int) -> Member | None:
        """Who is on a wire; None for one that is no longer used."""
        return next((member for member in self._members if member.wire == wire), None)

    def of(self, hop: Hop) -> Member | None:
        """The member that is a hop."""
        return next((member for member in self._members if member.place.hop == hop), None)

    def index(self, member: Member) -> int:
        """Its place in the order, from 0."""
        return next(i for i, other in enumerate(self._members) if other is member)

    def upstream(self, member: Member) -> Member | None:
        """The member before; None is the client."""
        index = self.index(member)
        return self._members[index - 1] if index else None

    def neighbour(self, member: Member, hop: Hop) -> Member | None:
        """The one next to `member` that is `hop`; None if neither is."""
        index = self.index(member)
        near = self._members[max(0, index - 1) : index] + self._members[index + 1 : index + 2]
        return next((other for other in near if other.place.hop == hop), None)

    def link_of(self, index: int) -> tuple[Hop | None, Hop | None]:
        """The hops before and after member `index`."""
        before = self._members[index - 1].place.hop if index else None
        after = self._members[index + 1].place.hop if index + 1 < len(self._members) else None
        return before, after

    def is_bridged(self, index: int) -> bool:
        """Whether what member `index` sends to the next one passes through the client."""
        return 0 <= index < len(self._members) - 1 and self._pair(index) in self._bridges

    def bridge(self) -> list[tuple[Member, Member]]:
        """Bridge every bad link that the route contains all the same. Returns what was not bridged before."""
        fresh = []
        for index in range(len(self._members) - 1):
            pair = self._pair(index)
            if pair in self.bad_links and pair not in self._bridges:
                self._bridges.add(pair)
                fresh.append((self._members[index], self._members[index + 1]))
        return fresh

    @property
    def has_bad_links(self) -> bool:
        """Whether a search that would bridge them could find more."""
        return bool(self.bad_links or self._bridges)

    def new_wire(self) -> int:
        """A number that no wire had before."""
        self._next_wire += 1
        return self._next_wire - 1

    def remove(self, member: Member) -> None:
        """Take a member off; its blocks are uncovered."""
        self._members.remove(member)
        blocks = (member.place.start, member.place.end)
        self._lost_precision.pop(blocks, None)  # so that the latest comes last
        self._lost_precision[blocks] = member.place.precision

    def reopen(self, member: Member) -> None:
        """Its stream is gone: it gets a new wire, to be opened."""
        member.wire = self.new_wire()
        member.standing = Standing.NEW
        member.linked = False

    def beside(self, place: RouteHop) -> Member:
        """Somebody with a wire who is not on the route."""
        return Member(place, self.new_wire())

    def swap(self, member: Member, others: list[Member]) -> None:
        """Others take over a member's blocks, with the streams that they have."""
        self._members = [one for one in self._members if one is not member] + others
        self._members.sort(key=lambda one: one.place.start)

    def put_back(self, place: RouteHop) -> list[Member]:
        """A place taken by others is its own again, if they can be cleared off without cutting one.

        Returns who was cleared off. If they would have to be cut, or the hop is on the route elsewhere,
        nothing changes.
        """
        inside = [m for m in self._members if m.place.start < place.end and m.place.end > place.start]
        fits = all(place.start <= m.place.start and m.place.end <= place.end for m in inside)
        if not fits or any(m.place.hop == place.hop for m in self._members):
            return []
        for member in inside:
            self.remove(member)
        self._insert(place)
        return inside

    def hole(self) -> tuple[int, int] | None:
        """The first uncovered interval."""
        covered = [(member.place.start, member.place.end) for member in self._members]
        holes = gaps(self._terms.start, self._terms.end, covered)
        return holes[0] if holes else None

    def request(
        self, hole: tuple[int, int], banned: frozenset[Hop], *, whole: bool, bridging: bool
    ) -> RouteRequest:
        """What to ask for a hole, between its neighbours; or, `whole`, for all of the blocks anew.

        bridging: over bad links too, which then lead through the client.
        """
        start, end = hole
        taken: frozenset[Hop] = frozenset()
        upstream = downstream = None
        if whole:
            start, end = self._terms.start, self._terms.end
        else:
            taken = frozenset(member.place.hop for member in self._members)
            upstream = next((m.place.hop for m in self._members if m.place.end == start), None)
            downstream = next((m.place.hop for m in self._members if m.place.start == end), None)
        return RouteRequest(
            self._terms.fingerprint,
            start,
            end,
            self._terms.encoding,
            self._terms.max_rows,
            self._terms.max_tokens,
            upstream,
            downstream,
            taken | self.avoided | banned,
            frozenset(self.avoided_peers),
            frozenset() if bridging else frozenset(self.bad_links | self._bridges),
            self._precision_of(*hole),
        )

    def admit(self, route: Route, request: RouteRequest) -> list[Member]:
        """Put a route's hops in. Members whose place is in the route stay, others make room.

        Returns who had to go. Raises `BAD_REQUEST` if the route is not what was asked for.
        """
        if not covers(route, request.start, request.end):
            raise error(Code.BAD_REQUEST, f"a route that does not cover {request.start}:{request.end}")
        places = set(route.hops)
        overlapping = [
            member
            for member in self._members
            if member.place.start < request.end and member.place.end > request.start
        ]
        leaving = [member for member in overlapping if member.place not in places]
        for member in leaving:
            self._members.remove(member)
        kept = {member.place for member in self._members}
        others = {member.place.hop for member in self._members}
        fresh = [place for place in route.hops if place not in kept]
        if any(place.hop in others for place in fresh):
            raise error(Code.BAD_REQUEST, "a route that names a hop twice")
        for place in fresh:
            self._insert(place)
        return leaving

    def precision_changed(self, route: Route, request: RouteRequest) -> bool:
        """Whether a route computes otherwise than what it replaces."""
        wanted = request.precision
        return wanted is not None and any(hop.precision != wanted for hop in route.hops)

    def forgive(self) -> None:
        """Ask again for those who were lost, busy or unreachable: they may be back."""
        self.avoided.clear()
        self.avoided_peers.clear()
        self.bad_links.clear()

    def _pair(self, index: int) -> tuple[str, str]:
        """The peers of the link below member `index`."""
        return self._members[index].place.hop.peer, self._members[index + 1].place.hop.peer

    def _insert(self, place: RouteHop) -> None:
        self._members.append(self.beside(place))
        self._members.sort(key=lambda member: member.place.start)

    def _precision_of(self, start: int, end: int) -> Precision | None:
        """Of the latest lost hop that served blocks of an interval."""
        for (first, last), precision in reversed(self._lost_precision.items()):
            if first < end and last > start:
                return precision
        return None
