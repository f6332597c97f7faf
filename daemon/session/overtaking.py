"""A second hop beside one that is late: whichever answers first stays. Pure, a part of `machine.py`.

While a hop is late (`watch.Late`, or long in opening), somebody else is found for its blocks and opened beside it, as
if it had left. If it shows life first, nothing has happened to the session; if the other one is open first, that one
takes its place, and the repair is as ever. The late one is charged little, since it may only be busy: enough that the
next routes go round it for a while.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from ...protocol.errors import Code
from ...protocol.steps import Failure, Linked, Opened, Receipt
from ...protocol.training import missing_parts
from ..swarm.blame import SLOW
from .ascent import Ascent
from .deadlines import Settings
from .events import CloseHop, FindRoute, HopLost, HopSaid, RouteFound, RouteMissing
from .roster import Member, Standing, Terms
from .wiring import RouteRequest, covers

AWAY_S: Final = 120.0  # so long the session asks others before one that was late: it may have been busy


@dataclass(slots=True)
class Race:
    """late: who is. is_silent: not even its daemon answers. others: who is being opened beside it, in order."""

    late: Member
    is_silent: bool
    ticket: int
    request: RouteRequest
    others: list[Member] = field(default_factory=list)


class Overtaking(Ascent):
    """At most one race at a time. It ends with any change of the wiring, and whenever the late hop shows life."""

    def __init__(self, terms: Terms, settings: Settings) -> None:
        super().__init__(terms, settings)
        self._race: Race | None = None
        self._num_races = 0
        self._away: list[tuple[float, Race]] = []  # races lost; until then the late hop is not asked again

    # from being late to a race

    def _doubt(self, late: Member, *, is_silent: bool) -> None:
        """Ask for somebody else in place of a hop that is late, unless that is under way."""
        late.late_at = float("inf")
        if self._race is not None or self._search.hole is not None:
            return
        self._let_back()
        place, peers = late.place, frozenset((late.place.hop.peer,) if is_silent else ())
        request = self._roster.request(
            (place.start, place.end), self._suspicion.banned, whole=False, bridging=False
        )
        request = replace(request, precision=place.precision, avoid_peers=request.avoid_peers | peers)
        self._num_races += 1
        self._race = Race(late, is_silent, -self._num_races, request)  # no ticket of the search is negative
        self._do(FindRoute(self._race.ticket, request))

    def _on_route_found(self, event: RouteFound) -> None:
        race = self._race
        if race is None or race.ticket != event.ticket:
            super()._on_route_found(event)
            return
        request, hops = race.request, event.route.hops
        alike = all(place.precision == request.precision for place in hops)
        if race.others or not alike or not covers(event.route, request.start, request.end):
            self._end_race()
            return
        self._lateness.note_hurry(self._now)
        race.others = [self._roster.beside(place) for place in hops]
        for other in race.others:
            self._open(other, self._settings.open_timeout_s)

    def _on_route_missing(self, event: RouteMissing) -> None:
        if self._race is not None and self._race.ticket == event.ticket:
            self._end_race()  # it is late, and still the best there is
        else:
            super()._on_route_missing(event)

    # who comes first: the others

    def _beside(self, wire: int) -> Member | None:
        others = self._race.others if self._race is not None else []
        return next((other for other in others if other.wire == wire), None)

    def _on_said_beside(self, event: HopSaid) -> None:
        """Somebody said something who is not on the route, or not yet."""
        other, message = self._beside(event.wire), event.message
        if other is None:
            return
        match message:
            case Opened():
                self._admit(other, message)
                if self._race is not None and all(o.standing is Standing.OPEN for o in self._race.others):
                    self._overtake()
            case Failure() if message.problem().code is Code.ADAPTER_MISSING:
                self._overtake()  # it takes the session, and what it lacks is put there as ever
                self._put_parts(other, missing_parts(message.problem()))
            case _:
                self._roster.avoided.add(other.place.hop)
                self._end_race()

    def _on_lost_beside(self, event: HopLost) -> None:
        other = self._beside(event.wire)
        if other is not None:
            self._roster.avoided_peers.add(other.place.hop.peer)
            self._end_race()

    def _overtake(self) -> None:
        race, self._race = self._race, None
        if race is None:
            return
        late, hop = race.late, race.late.place.hop
        self._roster.swap(late, race.others)
        self._suspicion.left(late.place)
        self._away.append((self._now + AWAY_S, race))
        self._roster.avoided.add(hop)
        if race.is_silent:
            self._roster.avoided_peers.add(hop.peer)
        reason = "is late, and somebody else was there first"
        self._charge(hop.peer, SLOW, reason)
        self._do(CloseHop(late.wire, self._farewell()))
        self._disturb(f"{late.name} {reason}", late)

    def _find_missing(self) -> bool:
        self._let_back()
        return super()._find_missing()

    def _let_back(self) -> None:
        """Who was late long ago may be asked again."""
        while self._away and self._away[0][0] <= self._now:
            _, race = self._away.pop(0)
            self._roster.avoided.discard(race.late.place.hop)
            if race.is_silent:
                self._roster.avoided_peers.discard(race.late.place.hop.peer)

    # who comes first: the late one

    def _shows_life(self, member: Member) -> None:
        if self._race is not None and self._race.late is member:
            self._end_race()

    def _answers(self, member: Member) -> None:
        """A daemon that was silent is not; of a worker that is late that says nothing."""
        if self._race is not None and self._race.is_silent:
            self._shows_life(member)

    def _end_race(self) -> None:
        """The others are not needed, or cannot come."""
        race, self._race = self._race, None
        if race is not None:
            for other in race.others:
                self._do(CloseHop(other.wire, self._farewell()))

    def _on_opened(self, member: Member, message: Opened) -> None:
        self._shows_life(member)
        super()._on_opened(member, message)

    def _on_linked(self, member: Member, message: Linked) -> None:
        self._shows_life(member)
        super()._on_linked(member, message)

    def _on_receipt(self, member: Member, message: Receipt) -> None:
        self._shows_life(member)
        self._watch.sign(self._now)

    def _end(self) -> None:
        self._end_race()
        super()._end()
