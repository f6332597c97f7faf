"""The search for hops that cover lost blocks: whom to ask for, what next if there is nobody, how long. Pure.

First just the lost interval is asked for, between the hops that stay; then all blocks anew, of which those that
fit the present hops stay too; then both again over links known to be bad, which then lead through the client;
then a suspect is given back its place; then it waits and asks again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from ...protocol.errors import Code, CorollaError, Fault, error, error_from_wire
from .deadlines import Settings
from .events import FindRoute
from .roster import Roster
from .suspicion import Replace, Suspicion
from .wiring import RouteRequest


class Standstill(Enum):
    """Nothing can be done now. WAITS is said once; WAITS_ON whenever the router had nothing again."""

    WAITS = auto()
    WAITS_ON = auto()


@dataclass(slots=True)
class _Ask:
    """What the router was asked. deadline: of its answer. again_at: it had nothing; when to ask anew."""

    ticket: int
    hole: tuple[int, int]
    request: RouteRequest
    whole: bool
    bridging: bool
    deadline: float
    again_at: float | None = None


class Search:
    """The one question that is open, and the patience that is left.

    is_ready, is_idle (arguments below): whether the session was open already, and has nothing to compute.
    """

    def __init__(self, settings: Settings, roster: Roster, suspicion: Suspicion) -> None:
        self._settings = settings
        self._roster = roster
        self._suspicion = suspicion
        self._num_asks = 0
        self._ask: _Ask | None = None
        self._waiting_since: float | None = None
        self._refusal: CorollaError | None = None

    def note_refusal(self, problem: CorollaError) -> None:
        """A hop that was found does not take the session; if no other does, that is what the user wants to know."""
        self._refusal = problem

    @property
    def hole(self) -> tuple[int, int] | None:
        """The blocks that are looked for."""
        return self._ask.hole if self._ask is not None else None

    def look(self, now_s: float) -> FindRoute | None:
        """The question to ask for the first uncovered blocks; None if none are, or it is asked already."""
        hole = self._roster.hole()
        if hole is None:
            self._ask = None
            return None
        whole = self._ask is not None and self._ask.whole and self._ask.hole == hole
        bridging = self._ask is not None and self._ask.bridging and self._ask.hole == hole
        request = self._request(hole, whole=whole, bridging=bridging)
        if self._ask is not None and self._ask.request == request:
            return None
        return self._question(hole, request, now_s, whole=whole, bridging=bridging)

    def answered(self, ticket: int) -> RouteRequest | None:
        """The request that an answer belongs to; None if nobody waits for it any more."""
        ask = self._ask
        return ask.request if ask is not None and ask.ticket == ticket and ask.again_at is None else None

    def succeed(self) -> None:
        """The answer was good."""
        self._ask = None

    def end(self, *, patient: bool) -> None:
        """No search is needed now. patient: the wiring works, so that the next search has its full time."""
        self._ask = None
        if patient:
            self._waiting_since = None

    def begin_waiting_anew(self, now_s: float) -> None:
        """Until now nobody waited for the answer."""
        if self._waiting_since is not None:
            self._waiting_since = now_s

    def fail(
        self, problem: CorollaError, now_s: float, *, is_ready: bool, is_idle: bool
    ) -> FindRoute | Replace | Standstill | CorollaError:
        """What to do when the router has nothing; an error ends the session."""
        ask = self._ask
        if ask is None:
            return Standstill.WAITS_ON
        if problem.fault is Fault.USER and (not is_ready or problem.code is Code.NOT_INVITED):
            return problem  # of one put out of the swarm nobody takes a session over, however long it waits
        wider: tuple[bool, bool] | None = None
        if not ask.whole and len(self._roster):
            wider = True, ask.bridging
        elif not ask.bridging and self._roster.has_bad_links:
            wider = not len(self._roster), True
        if wider is not None:
            whole, bridging = wider
            request = self._request(ask.hole, whole=whole, bridging=bridging)
            return self._question(ask.hole, request, now_s, whole=whole, bridging=bridging)
        other = self._suspicion.nobody_replaces()
        if other is not None:
            return other
        begins = self._waiting_since is None
        if self._waiting_since is None:
            self._waiting_since = now_s
        give_up_at = self._give_up_at(is_ready=is_ready, is_idle=is_idle)
        if now_s >= give_up_at:
            return self._given_up(ask, problem, is_ready=is_ready)
        ask.again_at = now_s + self._settings.route_retry_s
        return Standstill.WAITS if begins else Standstill.WAITS_ON

    def wait_s(self, *, is_ready: bool) -> float:
        """How long the search goes on in vain."""
        return self._settings.replacement_wait_s if is_ready else self._settings.open_wait_s

    def deadline(self, *, is_ready: bool, is_idle: bool) -> float | None:
        """When to call `tick`."""
        if self._ask is None:
            return None
        if self._ask.again_at is None:
            return self._ask.deadline
        return min(self._ask.again_at, self._give_up_at(is_ready=is_ready, is_idle=is_idle))

    def tick(
        self, now_s: float, *, is_ready: bool, is_idle: bool
    ) -> FindRoute | Replace | Standstill | CorollaError | None:
        """What to do at the deadline: as `fail` says, or None to look again, with others forgiven."""
        ask = self._ask
        if ask is None:
            return Standstill.WAITS_ON
        timeout = error(Code.TIMEOUT, "no route was found in time", "try again later")
        if ask.again_at is None:
            return self.fail(timeout, now_s, is_ready=is_ready, is_idle=is_idle)
        if now_s >= self._give_up_at(is_ready=is_ready, is_idle=is_idle):
            return self._given_up(ask, timeout, is_ready=is_ready)
        self._roster.forgive()
        self._suspicion.forgive()
        self._ask = None
        away = self._suspicion.banned
        return next((Replace(member.place) for member in self._roster if member.place.hop in away), None)

    def _request(self, hole: tuple[int, int], *, whole: bool, bridging: bool) -> RouteRequest:
        return self._roster.request(hole, self._suspicion.banned, whole=whole, bridging=bridging)

    def _question(
        self, hole: tuple[int, int], request: RouteRequest, now_s: float, *, whole: bool, bridging: bool
    ) -> FindRoute:
        self._num_asks += 1
        deadline = now_s + self._settings.route_timeout_s
        self._ask = _Ask(self._num_asks, hole, request, whole, bridging, deadline)
        return FindRoute(self._num_asks, request)

    def _give_up_at(self, *, is_ready: bool, is_idle: bool) -> float:
        """When waiting ends. A session without work waits for as long as it lives."""
        if self._waiting_since is None or (is_ready and is_idle):
            return float("inf")
        return self._waiting_since + self.wait_s(is_ready=is_ready)

    def _given_up(self, ask: _Ask, problem: CorollaError, *, is_ready: bool) -> CorollaError:
        if not is_ready:
            return problem if self._refusal is None else _because(problem, self._refusal)
        start, end = ask.hole
        wait_s = self.wait_s(is_ready=True)
        return error(
            Code.SESSION_LOST,
            f"blocks {start}:{end} were lost, and no replacement came in {wait_s:g} s: {problem.message}",
            "serve these blocks, or try again later",
            start=start,
            end=end,
        )


def _because(problem: CorollaError, refusal: CorollaError) -> CorollaError:
    """The problem, with what a hop said before."""
    told = problem.to_wire()
    return error_from_wire({**told, "message": f"{problem.message}; the last one asked: {refusal.message}"})
