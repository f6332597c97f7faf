"""A swarm of simulated machines that come, serve, move, fail and return, under a placement policy. Seeded.

Time jumps from event to event. Machines have a memory (blocks that fit), a speed, a time to load a block. What they
see of each other is what records would tell them: a little late, and for a while still of those who died. The
policies are the daemon's own code (`swarm_policies.py`), and so are the routes of sessions (`swarm_load.py`).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from corolla.daemon.swarm.capacity import Place, carried, units
from corolla.daemon.swarm.census import Census
from corolla.daemon.swarm.view import Span, SwarmView
from corolla.protocol.records import SpanState
from corolla.protocol.steps import Hop
from corolla.protocol.tensors import DType

SEEN_EVERY_S = 2.0  # records pushed to holders are read so late, on average half of it
FEW = 100  # machines of which each is connected to each: a death is seen at once, not when records expire
NOTICED_S = (1.0, 5.0)  # a broken connection
EXPIRED_S = (40.0, 60.0)  # a record that is not refreshed any more
LEAVING_S = 30.0  # a machine that goes in order drains for so long
MOVING_S = 5.0  # a span that moves drains for so long: its sessions are replayed elsewhere


@dataclass(frozen=True)
class Settings:
    """What is simulated. Rates are per machine; a machine that left comes back as good as new."""

    num_machines: int
    num_blocks: int
    seed: int = 0
    warm_up_s: float = 600.0
    duration_s: float = 1800.0
    mean_stay_s: float = 7200.0
    mean_away_s: float = 600.0
    killed_share: float = 0.5  # of departures: without a word
    outage: bool = True  # half way, all who serve the middle block die at once, and stay away for long


@dataclass
class Machine:
    """A volunteer's machine. work: block-tokens per second; load_s: of one block."""

    name: str
    num_fitting: int
    work: float
    load_s: float
    at: tuple[float, float]  # on a map whose unit is 100 ms of round trip
    span: Span | None = None  # what it serves or loads; None while away
    life: int = 0  # how often it left: events of earlier lives are void
    moved_at: float = -1e9
    sessions: set[object] = field(default_factory=set)

    @property
    def tokens_per_s(self) -> float:
        return self.work / self.num_fitting


class Policy(Protocol):
    """Who decides where machines serve."""

    graceful: bool  # spans drain before they move or leave in order

    def place(self, world: World, machine: Machine) -> tuple[int, int]:
        """The first span of a machine that joins."""

    def look(self, world: World, machine: Machine) -> tuple[int, int] | None:
        """Now and then: where it should move; None to stay."""

    def next_look_s(self, rng: random.Random) -> float:
        """Until the next look."""


@dataclass
class Figures:
    """What came out, over the time after the warm-up. Shares of time are from 0 to 1."""

    seconds: float = 0.0
    tokens: float = 0.0  # carried, if routes share the work out as well as can be
    slowest_tokens: float = 0.0  # that the slowest block could do, if all routes took whole spans
    unserved_block_s: float = 0.0
    single_block_s: float = 0.0
    down_s: float = 0.0  # with a block that nobody serves
    machine_hours: float = 0.0
    num_moves: int = 0
    gaps_s: list[float] = field(default_factory=list)  # how long each was open
    gaps_known_s: list[float] = field(default_factory=list)  # the same since records told of it
    bound_tokens_per_s: list[float] = field(default_factory=list)  # samples of what no placement passes
    whole_bound_tokens_per_s: list[float] = field(default_factory=list)  # of the slowest block of the best

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def share(self) -> float:
        """Of the linear program's bound."""
        return self.tokens_per_s / _mean(self.bound_tokens_per_s)

    @property
    def whole_share(self) -> float:
        """The slowest block as a share of its own bound: the published measure."""
        return self.slowest_tokens / self.seconds / _mean(self.whole_bound_tokens_per_s)

    @property
    def moves_per_machine_hour(self) -> float:
        return self.num_moves / self.machine_hours


class World:
    """The machines and the clock. Listeners hear of machines that drain or die: `on_leave`."""

    def __init__(self, settings: Settings, policy: Policy) -> None:
        self.settings = settings
        self.policy = policy
        self.rng = random.Random(f"world {settings.seed}")
        self.now = 0.0
        self.figures = Figures()
        self.machines = {machine.name: machine for machine in _machines(settings)}
        self.on_leave: list[Callable[[Machine, bool], None]] = []  # machine, whether it still serves
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.version = 0  # of what is seen
        self._seen = Census(settings.num_blocks)
        self._seen_spans: dict[str, Span] = {}
        self._view: SwarmView | None = None  # of those spans, once somebody asks for it
        self._news: dict[
            str, Span | None
        ] = {}  # to be seen from the next refresh on; None: no record any more
        self._supply = [0.0] * settings.num_blocks
        self._replicas = [0] * settings.num_blocks
        self._work: Counter[Place] = Counter()
        self._carried: float | None = None  # None: to be computed again
        self._num_here = 0
        self._gap_since: float | None = None
        self._gap_known: float | None = None
        self.speeds: list[tuple[float, float]] = []  # time, tokens/s carried, where it changed: for plots

    # time

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), act))

    def run(self) -> Figures:
        """Let everybody join during the first minutes, then watch until the end."""
        for machine in self.machines.values():
            self.after(self.rng.uniform(0, self.settings.warm_up_s / 4), self._bound(machine, self._join))
        self._refresh()
        if self.settings.outage:
            self.after(self.settings.warm_up_s + self.settings.duration_s / 2, self._outage)
        end_s = self.settings.warm_up_s + self.settings.duration_s
        while self._queue and self._queue[0][0] <= end_s:
            at, _, act = heapq.heappop(self._queue)
            self._pass(at)
            act()
        self._pass(end_s)
        return self.figures

    def _pass(self, until: float) -> None:
        begin = max(self.now, self.settings.warm_up_s)
        if until > begin:
            seconds = until - begin
            figures = self.figures
            figures.seconds += seconds
            figures.tokens += seconds * self._carried_now()
            figures.slowest_tokens += seconds * min(self._supply)
            unserved = self._replicas.count(0)
            figures.unserved_block_s += seconds * unserved
            figures.single_block_s += seconds * self._replicas.count(1)
            figures.down_s += seconds * (unserved > 0)
            figures.machine_hours += seconds * self._num_here / 3600
        self.now = until

    def _carried_now(self) -> float:
        if self._carried is None:
            self._carried = carried(self._work, self.settings.num_blocks).tokens_per_s
            self.speeds.append((self.now, self._carried))
        return self._carried

    def _bound(self, machine: Machine, act: Callable[[Machine], None]) -> Callable[[], None]:
        """An event in this life of a machine only."""
        life = machine.life

        def run() -> None:
            if machine.life == life:
                act(machine)

        return run

    # what is seen

    def view(self) -> SwarmView:
        """What everybody knows: the records of a moment ago."""
        if self._view is None:
            self._view = SwarmView("f", self.settings.num_blocks, tuple(self._seen_spans.values()))
        return self._view

    def census(self) -> Census:
        """The same, counted."""
        return self._seen

    def record(self, machine: Machine) -> Span | None:
        """What is seen of a machine."""
        return self._seen_spans.get(machine.name)

    @contextmanager
    def census_without(self, machine: Machine) -> Iterator[Census]:
        """The census as one sees it who comes back, and does not count the old record of itself."""
        old = self._seen_spans.get(machine.name)
        if old is not None:
            self._seen.remove(old)
        yield self._seen
        if old is not None:
            self._seen.add(old)

    def _refresh(self) -> None:
        for name, span in self._news.items():
            old = self._seen_spans.pop(name, None)
            if old is not None:
                self._seen.remove(old)
            if span is not None:
                self._seen.add(span)
                self._seen_spans[name] = span
        if self._news:
            self._news, self._view = {}, None
            self.version += 1
            if self._gap_since is not None and self._gap_known is None and self._seen.coverage().num_gaps:
                self._gap_known = self.now
        self.after(SEEN_EVERY_S, self._refresh)

    def _announce(self, key: str, span: Span | None) -> None:
        self._news[key] = span

    # machines

    def _join(self, machine: Machine) -> None:
        self._num_here += 1
        start, end = self.policy.place(self, machine)
        self._load(machine, start, end)
        self.after(self.rng.expovariate(1 / self.settings.mean_stay_s), self._bound(machine, self._leave))
        self.after(self.policy.next_look_s(self.rng), self._bound(machine, self._look))

    def _load(self, machine: Machine, start: int, end: int) -> None:
        machine.span = _span(machine, start, end, SpanState.LOADING)
        self._announce(machine.name, machine.span)
        place = (start, end)

        def ready(machine: Machine) -> None:
            span = machine.span
            if span is not None and (span.start, span.end) == place and span.state is SpanState.LOADING:
                machine.span = _span(machine, start, end, SpanState.ONLINE)
                self._announce(machine.name, machine.span)
                self._count(machine, 1)

        self.after(machine.load_s * (end - start), self._bound(machine, ready))

    def _look(self, machine: Machine) -> None:
        self.after(self.policy.next_look_s(self.rng), self._bound(machine, self._look))
        span = machine.span
        if span is None or span.state is not SpanState.ONLINE:
            return
        place = self.policy.look(self, machine)
        if place is not None and place != (span.start, span.end):
            self._move(machine, *place)

    def _move(self, machine: Machine, start: int, end: int) -> None:
        span = machine.span
        if span is None:
            return
        machine.moved_at = self.now
        if self.now > self.settings.warm_up_s:
            self.figures.num_moves += 1
        if not self.policy.graceful:
            self._count(machine, -1)
            self._tell_leaving(machine, serves=False)
            self._load(machine, start, end)
            return
        machine.span = _span(machine, span.start, span.end, SpanState.DRAINING)
        self._announce(machine.name, _span(machine, start, end, SpanState.LOADING))  # the claim

        def drained(machine: Machine) -> None:
            self._count(machine, -1)
            self._tell_leaving(machine, serves=False)
            self._load(machine, start, end)

        self._tell_leaving(machine, serves=True)
        self.after(MOVING_S, self._bound(machine, drained))

    def _leave(self, machine: Machine) -> None:
        killed = self.rng.random() < self.settings.killed_share
        span = machine.span
        serves = span is not None and span.state is not SpanState.LOADING
        if killed or not self.policy.graceful or not serves or span is None:
            self.end(machine, noticed=not killed)
            return
        machine.span = _span(machine, span.start, span.end, SpanState.DRAINING)
        self._announce(machine.name, machine.span)
        self._tell_leaving(machine, serves=True)
        self.after(LEAVING_S, self._bound(machine, self.end))

    def end(self, machine: Machine, *, noticed: bool = True) -> None:
        """A machine is gone. noticed: with a farewell; else its record stays until its death is noticed."""
        span = machine.span
        if span is None:
            return
        if span.state is not SpanState.LOADING:
            self._count(machine, -1)
        machine.span = None
        machine.life += 1
        self._num_here -= 1
        self._tell_leaving(machine, serves=False)
        lag_s = self.rng.uniform(*(NOTICED_S if len(self.machines) <= FEW else EXPIRED_S))
        life = machine.life

        def forgotten() -> None:
            if machine.life == life and machine.span is None:
                self._announce(machine.name, None)

        self.after(0.0 if noticed else lag_s, forgotten)
        away_s = self.rng.expovariate(1 / self.settings.mean_away_s)
        self.after(away_s, self._bound(machine, self._join))

    def _outage(self) -> None:
        """Nobody serves the middle block any more."""
        middle = self.settings.num_blocks // 2
        for machine in self.machines.values():
            if machine.span is not None and machine.span.start <= middle < machine.span.end:
                self.end(machine, noticed=False)

    def _tell_leaving(self, machine: Machine, *, serves: bool) -> None:
        for listener in self.on_leave:
            listener(machine, serves)

    def _count(self, machine: Machine, sign: int) -> None:
        span = machine.span
        if span is None:
            return
        for block in range(span.start, span.end):
            self._replicas[block] += sign
            speed = self._supply[block] + sign * machine.tokens_per_s
            self._supply[block] = speed if self._replicas[block] else 0.0
        self._work[span.start, span.end] += sign * units(machine.work)
        if not self._work[span.start, span.end]:
            del self._work[span.start, span.end]
        self._carried = None
        gap = 0 in self._replicas
        if gap and self._gap_since is None and self.now > self.settings.warm_up_s:
            self._gap_since = self.now
        elif not gap and self._gap_since is not None:
            self.figures.gaps_s.append(self.now - self._gap_since)
            if self._gap_known is not None:
                self.figures.gaps_known_s.append(self.now - self._gap_known)
            self._gap_since = self._gap_known = None


def _mean(samples: list[float]) -> float:
    return sum(samples) / len(samples)


def rtt_s(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The round trip between two places."""
    return 0.005 + 0.1 * float(((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2) ** 0.5)


def _machines(settings: Settings) -> list[Machine]:
    """Uneven ones: they hold an eighth to a half of the model; speeds differ up to fortyfold."""
    rng = random.Random(f"machines {settings.seed}")
    machines = []
    for index in range(settings.num_machines):
        num_fitting = rng.randint(max(1, settings.num_blocks // 8), max(2, settings.num_blocks // 2))
        work = min(2000.0, max(50.0, rng.lognormvariate(5.5, 0.9)))
        load_s = rng.uniform(0.3, 2.0)
        machines.append(Machine(f"m{index}", num_fitting, work, load_s, (rng.random(), rng.random())))
    return machines


def _span(machine: Machine, start: int, end: int, state: SpanState) -> Span:
    speed = machine.tokens_per_s
    return Span(machine.name, 0, start, end, state, DType.FLOAT32, tokens_per_s=speed, movable=True)


def hop_of(machine: Machine) -> Hop:
    """Its address in a route."""
    return Hop(machine.name, 0)
