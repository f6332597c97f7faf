"""The way up: from blocks that nobody covers to a wiring that runs. Pure.

    IDLE → ROUTING → OPENING → LINKING → REPLAYING → RUNNING

It owns the session's state and every step upwards: cover the uncovered blocks, open what is not open, link all
in a new epoch, replay what is missing, send what is unanswered. What is still good (hops, streams, caches) is
kept because nothing has to be done for it. It does not know what makes a session fall: that is `machine.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from enum import Enum, auto
from typing import Any, Final

from ...protocol.errors import Code, CorollaError, Fault, error
from ...protocol.messages import Message
from ...protocol.steps import CloseSession, Linked, Opened, Replayed
from ..swarm.blame import HEAVY, LIGHT
from . import letters
from .deadlines import Settings
from .events import (
    Action,
    Charge,
    CloseHop,
    Emit,
    Fail,
    FindRoute,
    Kind,
    OpenHop,
    PartsPut,
    PutParts,
    Ready,
    RouteFound,
    RouteMissing,
    Send,
    SessionEvent,
)
from .lateness import Lateness
from .parts import max_part_tokens
from .pipeline import Pipeline
from .replays import CLIENT, Holding, ReplayPlan, next_replay
from .roster import Member, Roster, Standing, Terms
from .search import Search, Standstill
from .suspicion import Replace, Suspicion
from .watch import Await, Watch

MAX_PUTS: Final = 3  # of parts to one hop: it may drop some while others come; then it has no room for them
# What a hop says of parts that are wrong in themselves. Amid a session others took the same ones: then it errs.
_UNFIT: Final = frozenset((Code.BAD_REQUEST, Code.BAD_SHAPE, Code.NOT_FINITE))
MAX_WIRINGS: Final = 64  # without a committed step between them; then something is wrong that no route cures


class Phase(Enum):
    """Where the session stands; see the module's docstring."""

    IDLE = auto()
    ROUTING = auto()
    OPENING = auto()
    LINKING = auto()
    REPLAYING = auto()
    RUNNING = auto()
    ENDED = auto()


class Ascent(ABC):
    """A session's state, and its way to `RUNNING`. Each handler appends to `_actions`."""

    def __init__(self, terms: Terms, settings: Settings) -> None:
        self._terms = terms
        self._settings = settings
        self._phase = Phase.IDLE
        self._now = 0.0
        self._actions: list[Action] = []
        self._pipeline = Pipeline(
            terms.token_bytes,
            terms.max_rows,
            terms.max_tokens,
            settings.history_bytes,
            settings.part_tokens,
        )
        self._roster = Roster(terms)
        self._suspicion = Suspicion()
        self._search = Search(settings, self._roster, self._suspicion)
        self._lateness = Lateness(settings.least_late_s)
        self._watch = Watch(settings, self._lateness)
        self._epoch = 0
        self._plan: ReplayPlan | None = None
        self._without_history: set[int] = set()  # indexes of hops, in this wiring
        self._link_failures: Counter[tuple[str, str]] = Counter()
        self._charged: set[tuple[str, str]] = set()
        self._num_wirings = 0
        self._running_since = 0.0
        self._is_ready = False
        self._repair_since: float | None = None
        self._num_repairs = 0
        self._repair_s = 0.0
        self._num_steps = 0
        self._prefix_lengths: tuple[int, ...] = ()

    # up the stairs: routing

    def _advance(self) -> None:
        """Do whatever is next on the way to a working wiring."""
        if not self._find_missing() and not self._open_missing():
            self._link()

    def _find_missing(self) -> bool:
        question = self._search.look(self._now)
        if question is not None:
            self._do(question)
        if self._search.hole is None:
            return False
        self._phase = Phase.ROUTING
        return True

    def _on_route_found(self, event: RouteFound) -> None:
        request = self._search.answered(event.ticket)
        if request is None:
            return
        try:
            leaving = self._roster.admit(event.route, request)
        except CorollaError as problem:
            self._on_route_missing(RouteMissing(event.ticket, problem))
            return
        self._search.succeed()
        for member in leaving:
            self._suspicion.left(member.place)
            # A hop that is opened anew on other blocks must not be closed by the old stream's last word.
            again = self._roster.of(member.place.hop) is not None
            self._do(CloseHop(member.wire, None if again else self._farewell()))
        if self._roster.precision_changed(event.route, request):
            names = sorted({str(hop.quantization or hop.dtype) for hop in event.route.hops})
            text = f"nobody serves these blocks as before; now in {', '.join(names)}"
            self._emit(Kind.PRECISION_CHANGED, text, start=request.start, end=request.end)
        self._advance()

    def _on_route_missing(self, event: RouteMissing) -> None:
        if self._search.answered(event.ticket) is not None:
            self._on_search(
                self._search.fail(
                    event.problem, self._now, is_ready=self._is_ready, is_idle=self._pipeline.is_idle
                ),
                event.problem.message,
            )

    def _on_search(
        self, outcome: FindRoute | Replace | Standstill | CorollaError | None, reason: str
    ) -> None:
        """Do what a search in vain leads to."""
        wait_s = self._search.wait_s(is_ready=self._is_ready)
        match outcome:
            case FindRoute():
                self._do(outcome)
            case Replace():
                self._replace(outcome, "no replacement for the accused hop")
            case CorollaError():
                self._fail(outcome)
            case Standstill.WAITS:
                start, end = self._search.hole or (self._terms.start, self._terms.end)
                text = f"waiting up to {wait_s:g} s for a peer that serves blocks {start}:{end}"
                self._emit(Kind.WAITING, text, start=start, end=end, wait_s=wait_s, reason=reason)
            case None:
                self._link_failures.clear()
                self._advance()

    # up the stairs: opening and linking

    def _open_missing(self) -> bool:
        for member in self._roster:
            if member.standing is Standing.NEW:
                self._open(
                    member,
                    self._settings.resume_timeout_s if member.resumes else self._settings.open_timeout_s,
                )
        if all(member.standing is Standing.OPEN for member in self._roster):
            return False
        self._phase = Phase.OPENING
        return True

    def _open(self, member: Member, patience_s: float) -> None:
        member.standing = Standing.OPENING
        member.deadline = self._now + patience_s
        member.late_at = self._now + self._lateness.opening_s(self._now)
        opening = letters.opening(self._terms, member.place)
        self._do(OpenHop(member.wire, member.place.hop.peer, opening, patience_s))

    def _on_opened(self, member: Member, message: Opened) -> None:
        if member.standing is Standing.OPENING:
            self._admit(member, message)
            self._advance()

    def _admit(self, member: Member, message: Opened) -> None:
        member.standing = Standing.OPEN
        member.prefix_lengths = message.row_tokens or (message.prefix_tokens,)
        member.resumes = False

    def _put_parts(self, member: Member, missing: frozenset[str]) -> None:
        """A hop lacks parts of the adapter: it gets them, and is opened again. Nobody is to blame."""
        parts = letters.lacking(self._terms, member.place, missing)
        if not parts or member.num_puts == MAX_PUTS:
            self._drop(member, f"does not keep the adapter's parts, put there {member.num_puts} times")
            return
        member.num_puts += 1
        is_amid = member.standing is Standing.OPEN
        self._do(CloseHop(member.wire, None))
        self._roster.reopen(member)
        member.standing = Standing.LACKING
        self._do(PutParts(member.wire, member.place.hop, parts))
        if is_amid:
            self._disturb(f"{member.name} lost the adapter's parts", member)

    def _on_parts_put(self, event: PartsPut) -> None:
        member = self._roster.by_wire(event.wire)
        problem = event.problem
        if member is None or member.standing is not Standing.LACKING:
            return
        if problem is None:
            member.standing = Standing.NEW
            self._advance()
        elif problem.code in _UNFIT and not self._is_ready:  # it fits no other hop better
            self._fail(problem)
        elif problem.fault is Fault.PEER:
            self._drop(member, problem.message, charge=HEAVY, avoid_peer=True)
        elif problem.code in (Code.PEER_LOST, Code.TIMEOUT):
            self._drop(member, f"is gone: {problem.message}", charge=LIGHT, avoid_peer=True)
        else:
            self._search.note_refusal(problem)
            self._drop(member, f"takes no adapter: {problem.message}")

    def _link(self) -> None:
        self._num_wirings += 1
        if self._num_wirings > MAX_WIRINGS:
            self._fail(
                error(
                    Code.SESSION_LOST,
                    f"{MAX_WIRINGS} wirings in a row failed",
                    "try again later; `daemonctl events` tells what failed",
                )
            )
            return
        if not self._epoch:
            self._begin_with_prefix()
        self._phase = Phase.LINKING
        self._epoch += 1
        for upstream, downstream in self._roster.bridge():
            ends = [upstream.place.hop.peer, downstream.place.hop.peer]
            text = (
                f"{upstream.name} and {downstream.name} do not reach each other: their steps pass through us"
            )
            self._emit(Kind.BRIDGED, text, peers=ends)
        self._watch.expect(Await.LINKS, self._now, num_bytes=self._pipeline.in_flight_bytes)
        self._without_history.clear()
        base, lengths = self._pipeline.committed, self._pipeline.lengths
        for member in self._roster:
            member.linked = False
        for wire, link in letters.links(self._terms, self._roster, self._epoch, base, lengths):
            self._do(Send(wire, (link,)))

    def _begin_with_prefix(self) -> None:
        """What all hops hold of the prefix need not be computed; who lost it by the link has it replayed."""
        prefix = self._terms.prefix
        shared = prefix.shared(member.prefix_lengths for member in self._roster)
        if any(shared):
            self._prefix_lengths = shared
            self._pipeline.begin_with(shared, prefix.inputs_of(shared, self._terms.token_bytes))

    def _on_linked(self, member: Member, message: Linked) -> None:
        lengths = self._pipeline.lengths
        held, history = message.held, message.history_from
        if (
            not len(held) == len(history) == len(lengths)
            or any(not 0 <= tokens <= length for tokens, length in zip(held, lengths, strict=True))
            or any(first < 0 for first in history)
        ):
            self._drop(member, f"holds {held} of {lengths}", charge=HEAVY, avoid_peer=True)
            return
        member.linked = True
        member.num_puts = 0
        member.holding = Holding.of(held, history, lengths)
        if all(other.linked for other in self._roster):
            self._replay_or_run()

    # up the stairs: replaying

    def _replay_or_run(self) -> None:
        holdings = [member.holding for member in self._roster]
        plan = next_replay(self._pipeline.lengths, holdings, self._without_history)
        self._plan = plan
        if plan is None:
            self._run()
            return
        self._phase = Phase.REPLAYING
        self._watch.expect(Await.REPLAY, self._now)
        terms, epoch = self._terms, self._epoch
        base, lengths = self._pipeline.committed, self._pipeline.lengths
        if plan.source != CLIENT:
            self._send(self._roster[plan.source], letters.replay(terms, epoch, base, plan, lengths))
            return
        max_tokens = max_part_tokens(terms.token_bytes, self._settings.part_tokens)
        try:
            parts = self._pipeline.history.read(plan.starts, lengths, max_tokens)
        except CorollaError as problem:
            lost = f"the hidden states of a lost hop cannot be sent again: {problem.message}"
            self._fail(error(Code.SESSION_LOST, lost, "begin the session anew"))
            return
        steps = letters.replayed(terms, epoch, base, plan.num_hops, parts)
        self._do(Send(self._roster[0].wire, steps))

    def _on_replayed(self, member: Member, message: Replayed) -> None:
        plan = self._plan
        if plan is None or self._roster.index(member) != plan.last:
            return
        for index in range(plan.source + 1, plan.last + 1):
            other = self._roster[index]
            other.holding = other.holding.after(plan.starts, self._pipeline.lengths)
        self._replay_or_run()

    # running

    def _run(self) -> None:
        self._phase = Phase.RUNNING
        self._running_since = self._now
        self._search.end(patient=True)
        if not self._is_ready:
            self._is_ready = True
            self._do(Ready())
        elif self._repair_since is not None:
            seconds = self._now - self._repair_since
            self._num_repairs += 1
            self._repair_s += seconds
            peers = [member.place.hop.peer for member in self._roster]
            spans = [[member.place.start, member.place.end] for member in self._roster]
            self._emit(
                Kind.REPAIRED, f"repaired in {seconds:.2f} s", seconds=seconds, peers=peers, spans=spans
            )
        self._repair_since = None
        self._watch.expect(Await.NOTHING, self._now)
        self._send_steps()

    def _send_steps(self) -> None:
        if self._phase is not Phase.RUNNING:
            return
        committed = self._pipeline.committed
        parts = self._pipeline.take(self._now)
        if parts:
            if self._pipeline.oldest is parts[0]:
                self._expect_step()
            steps = [letters.step(self._terms, self._epoch, committed, part) for part in parts]
            self._do(Send(self._roster[0].wire, steps))

    def _expect_step(self) -> None:
        oldest = self._pipeline.oldest
        if oldest is None:
            self._watch.expect(Await.NOTHING, self._now)
        else:
            num_tokens = sum(row.n for row in oldest.rows)
            self._watch.expect(Await.STEP, self._now, num_tokens, self._pipeline.in_flight_bytes)

    # the end

    def _end(self) -> None:
        for member in self._roster:
            self._do(CloseHop(member.wire, self._farewell()))
            self._roster.remove(member)
        self._phase = Phase.ENDED
        self._search.end(patient=True)
        self._watch.expect(Await.NOTHING, self._now)
        self._pipeline.close()

    def _fail(self, problem: CorollaError) -> None:
        self._end()
        self._do(Fail(problem))

    # what comes out

    def _farewell(self) -> CloseSession:
        return CloseSession(self._terms.session)

    def _send(self, member: Member, message: Message) -> None:
        self._do(Send(member.wire, (message,)))

    def _charge(self, peer: str, weight: float, reason: str) -> None:
        """Once for each thing, however often it is tried until the session gets on."""
        key = (peer, "light" if weight < HEAVY else "heavy")
        if key not in self._charged:
            self._charged.add(key)
            self._do(Charge(peer, weight, reason))

    def _emit(self, kind: Kind, text: str, **detail: Any) -> None:
        self._do(Emit(SessionEvent(kind, text, detail)))

    def _do(self, action: Action) -> None:
        self._actions.append(action)

    # the way down

    @abstractmethod
    def _drop(self, member: Member, reason: str, *, charge: float = 0.0, avoid_peer: bool = False) -> None:
        """Replace a hop."""

    @abstractmethod
    def _disturb(self, reason: str, member: Member | None = None) -> None:
        """The wiring does not work any more."""

    @abstractmethod
    def _replace(self, decision: Replace, reason: str) -> None:
        """Carry out what a trial needs."""
