"""Sessions in the simulated swarm: routed and repaired by the daemon's own routing, moved when a hop drains.

A session is its route. When a hop dies it looks for others for just the lost blocks, then for all, once a second,
and is lost after a minute; when a hop drains it does the same while the hop still serves.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from corolla.daemon.swarm.routing import Leg, Wanted, find_path
from corolla.daemon.swarm.view import SwarmView
from corolla.protocol.errors import CorollaError
from corolla.protocol.steps import Hop

from .swarm_world import Machine, World, rtt_s

MEAN_SESSION_S = 300.0
PATIENCE_S = 60.0  # of a session without some of its blocks
RETRY_S = 1.0
MAX_TRIES = 3  # of routes with hops that turn out to be dead; the next after `RETRY_S`


@dataclass
class Outcome:
    """What became of the sessions. waits_s: of repairs, from the loss of a hop to a whole route again."""

    num_opened: int = 0
    num_refused: int = 0
    num_lost: int = 0
    num_moved: int = 0  # ahead of time
    waits_s: list[float] = field(default_factory=list)


@dataclass(eq=False)
class _Session:
    at: tuple[float, float]
    seed: int
    legs: list[Leg] = field(default_factory=list)
    broken_since: float | None = None
    is_open: bool = True
    dead: set[str] = field(default_factory=set)  # found so since it broke


class Load:
    """A number of users, each of whom opens a session, uses it for a while, and opens the next."""

    def __init__(self, world: World, num_users: int) -> None:
        self.outcome = Outcome()
        self._world = world
        self._rng = random.Random(f"load {world.settings.seed}")
        world.on_leave.append(self._on_leave)
        for _ in range(num_users):
            world.after(world.settings.warm_up_s * self._rng.uniform(0.9, 1.0), self._open)

    def _open(self) -> None:
        session = _Session((self._rng.random(), self._rng.random()), self._rng.getrandbits(32))
        length_s = self._rng.expovariate(1 / MEAN_SESSION_S)
        self.outcome.num_opened += 1
        if self._fill(session):
            self._world.after(length_s, lambda: self._close(session))
        else:
            self.outcome.num_refused += 1
            self._world.after(RETRY_S * 10, self._open)

    def _close(self, session: _Session) -> None:
        if session.is_open:
            session.is_open = False
            self._release(session)
            self._world.after(self._rng.uniform(0, 10), self._open)

    def _release(self, session: _Session) -> None:
        for leg in session.legs:
            self._world.machines[leg.span.peer].sessions.discard(session)
        session.legs = []

    def _on_leave(self, machine: Machine, serves: bool) -> None:
        """Its sessions go elsewhere: ahead of time if it still serves, else as a repair."""
        for session in [held for held in machine.sessions if isinstance(held, _Session)]:
            if serves:
                self._move(session, machine)
            else:
                self._break(session, machine)
        if not serves:
            machine.sessions.clear()

    def _move(self, session: _Session, machine: Machine) -> None:
        kept = list(session.legs)
        session.legs = [leg for leg in kept if leg.span.peer != machine.name]
        if self._fill(session, avoid=machine.name):
            machine.sessions.discard(session)
            self.outcome.num_moved += 1
        else:
            session.legs = kept  # it goes on there until the end; then it breaks

    def _break(self, session: _Session, machine: Machine) -> None:
        session.legs = [leg for leg in session.legs if leg.span.peer != machine.name]
        if session.broken_since is None:
            session.broken_since = self._world.now
            self._repair(session)

    def _repair(self, session: _Session) -> None:
        world = self._world
        since = session.broken_since
        if not session.is_open or since is None:
            return
        if self._fill(session):
            self.outcome.waits_s.append(world.now - since)
            session.broken_since = None
            session.dead.clear()
        elif world.now - since >= PATIENCE_S:
            session.is_open = False
            self._release(session)
            self.outcome.num_lost += 1
            world.after(RETRY_S, self._open)
        else:
            world.after(RETRY_S, lambda: self._repair(session))

    def _fill(self, session: _Session, avoid: str = "") -> bool:
        """Cover what is uncovered, by peers that are found alive when they are tried."""
        view = self._seen_from(session)
        dead = session.dead | {avoid}
        legs = list(session.legs)
        num_tries = 0
        while (hole := _hole(legs, view.num_blocks)) is not None:
            num_tries += 1
            if num_tries > MAX_TRIES:
                return False
            taken = frozenset(Hop(leg.span.peer, 0) for leg in legs)
            wanted = Wanted(*hole, avoid=taken, avoid_peers=frozenset(dead))
            try:
                path = find_path(view, wanted, seed=session.seed)
            except CorollaError:
                if not legs:
                    return False
                legs = []
                continue
            for leg in path.legs:
                span = self._world.machines[leg.span.peer].span
                if span is not None and span.is_online and span.start <= leg.start and leg.end <= span.end:
                    legs.append(leg)
                else:
                    dead.add(leg.span.peer)
                    session.dead.add(leg.span.peer)
            legs.sort(key=lambda leg: leg.start)
        for leg in session.legs:
            self._world.machines[leg.span.peer].sessions.discard(session)
        session.legs = legs
        for leg in legs:
            self._world.machines[leg.span.peer].sessions.add(session)
        return True

    def _seen_from(self, session: _Session) -> SwarmView:
        """The view of its daemon: with round trips, to those that it would look at first."""
        view = self._world.view()
        if len(view.spans) > 1000:
            return view  # strangers' distances are not known
        machines = self._world.machines
        spans = (replace(span, rtt_s=rtt_s(session.at, machines[span.peer].at)) for span in view.spans)
        return replace(view, spans=tuple(spans))


def _hole(legs: list[Leg], num_blocks: int) -> tuple[int, int] | None:
    at = 0
    for leg in legs:
        if leg.start > at:
            return at, leg.start
        at = leg.end
    return (at, num_blocks) if at < num_blocks else None
