"""A client's session as a pure state machine: events in, actions out.

It owns the route, the epoch, what is in flight and what is committed, every deadline, and repair (DESIGN,
section 3). It has no clock, no I/O and no randomness: time comes with each event, ids come with the terms.

    IDLE → ROUTING → OPENING → LINKING → REPLAYING → RUNNING
              ↑__________________________________________|      something failed: `_disturb`

Whatever fails, one thing follows: the failed hop leaves the roster if it is to be replaced, and `_advance`
walks up again (`ascent.py`). So a failure amid a repair is no case of its own. A hop that is only late keeps its
place until another one has been opened beside it (`overtaking.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ...protocol.errors import Code, CorollaError, Fault, error
from ...protocol.messages import Message
from ...protocol.steps import (
    At,
    Failure,
    Linked,
    Opened,
    Receipt,
    Replayed,
    Result,
    Step,
    Where,
)
from ...protocol.training import missing_parts
from ..swarm.blame import HEAVY, LIGHT
from . import letters
from .ascent import Phase
from .events import (
    Action,
    CloseHop,
    CloseRequested,
    Deliver,
    Disputed,
    Event,
    HopLost,
    HopSaid,
    KeepRequested,
    Kind,
    LeaveRequested,
    OpenRequested,
    PartsPut,
    Refuse,
    RouteFound,
    RouteMissing,
    StepRequested,
    Tick,
)
from .overtaking import Overtaking
from .replays import CLIENT
from .roster import Member, Standing
from .suspicion import Replace
from .watch import Await, BadLink, Hung, Late, Odd, Stuck
from .wiring import RouteHop

MAX_DETOURS: Final = 8  # bad links that a session goes round; the next ones it bridges at once
STEADY_S: Final = 30.0  # a wiring that lasted so long was good; what failed before it counts no more


@dataclass(frozen=True, slots=True)
class Statistics:
    """How a session went so far. repair_s: seconds in which it could not compute.

    num_bridges: links of the present route whose steps pass through the client. prefix_lengths: that each row
    began with, computed for earlier sessions.
    """

    num_steps: int
    num_repairs: int
    repair_s: float
    epoch: int
    hops: tuple[RouteHop, ...]
    history_bytes: int
    num_bridges: int = 0
    prefix_lengths: tuple[int, ...] = ()


class SessionMachine(Overtaking):
    """One session of a client. Feed it events; do the actions in the order given."""

    # the public face

    @property
    def phase(self) -> Phase:
        """Where the session stands."""
        return self._phase

    @property
    def next_deadline(self) -> float | None:
        """When to send a `Tick`, in seconds of the clock of the events; None if only events matter."""
        return min(self._deadlines(), default=None)

    def statistics(self) -> Statistics:
        """How it went so far."""
        hops = tuple(member.place for member in self._roster)
        size = self._pipeline.history.size_bytes
        bridges = sum(map(self._roster.is_bridged, range(len(hops))))
        return Statistics(
            self._num_steps,
            self._num_repairs,
            self._repair_s,
            self._epoch,
            hops,
            size,
            bridges,
            self._prefix_lengths,
        )

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What to do about an event. After the session has ended, nothing."""
        self._now = now_s
        if self._phase is not Phase.ENDED:
            _EVENTS[type(event)](self, event)
        actions, self._actions = self._actions, []
        return actions

    # the user

    def _on_open_requested(self, event: OpenRequested) -> None:
        if self._phase is Phase.IDLE:
            self._advance()

    def _on_step_requested(self, event: StepRequested) -> None:
        if self._pipeline.is_idle:
            self._search.begin_waiting_anew(self._now)
        try:
            self._pipeline.request(event.ticket, event.rows, event.payload, event.reply)
        except CorollaError as problem:
            self._do(Refuse(event.ticket, problem))
            return
        self._send_steps()

    def _on_keep_requested(self, event: KeepRequested) -> None:
        if self._phase is Phase.RUNNING and self._pipeline.is_idle:
            letter = letters.keeping(self._terms, self._epoch, self._pipeline.committed, event.rows)
            for member in self._roster:
                self._send(member, letter)

    def _on_disputed(self, event: Disputed) -> None:
        answered_by = self._pipeline.undo(event.ticket)
        if not answered_by:
            self._fail(event.problem)
            return
        after = self._pipeline.last_sent_id + 1  # only a step beyond shows that the user was content
        suspects = [member for member in self._roster if member.place.hop in answered_by]
        if len(answered_by) == len(suspects) == 1:
            self._accuse(None, suspects[0].place, after, event.problem)
        else:
            self._disturb("the last answer was wrong, and it is not known whose it was")

    def _on_leave_requested(self, event: LeaveRequested) -> None:
        member = next((member for member in self._roster if member.place.hop == event.hop), None)
        if member is not None and self._phase is Phase.RUNNING:
            self._drop(member, event.reason)

    def _on_close_requested(self, event: CloseRequested) -> None:
        self._end()

    # what a wiring gives

    def _on_result(self, member: Member, message: Result) -> None:
        oldest = self._pipeline.oldest
        if oldest is None or member is not self._roster[-1] or message.step_id < oldest.step_id:
            return
        if message.step_id > oldest.step_id or oldest.sent_at is None:
            self._strike(member, f"answered step {message.step_id} before {oldest.step_id}")
            return
        expected = self._pipeline.expected_bytes(oldest)
        if len(message.payload) != expected:
            said = f"answered with {len(message.payload)} bytes, expected {expected}"
            self._drop(member, said, charge=HEAVY, avoid_peer=True)
            return
        guilty = self._suspicion.committed(oldest.step_id)
        if guilty is not None:
            self._charge(guilty.hop.peer, HEAVY, "gave wrong values, or accused another of it falsely")
        self._end_race()
        self._watch.answered(self._now)
        answer = self._pipeline.commit(message.payload, member.place.hop)
        self._expect_step()
        self._num_wirings = 0
        self._num_steps += 1
        self._charged.clear()
        self._link_failures.clear()
        if answer is not None:
            self._do(Deliver(answer.ticket, answer.payload))
        self._send_steps()

    def _on_step(self, member: Member, message: Step) -> None:
        """A step on its way from one hop to the next, who do not reach each other: pass it on as it is.

        Its values are not looked at: the next hop checks them, and accuses whom it would have accused.
        """
        index = self._roster.index(member)
        if self._roster.is_bridged(index):
            self._send(self._roster[index + 1], message)
        else:
            self._drop(
                member, "sent a step that should have gone to the next hop", charge=HEAVY, avoid_peer=True
            )

    # down the stairs: what hops report

    def _on_said(self, event: HopSaid) -> None:
        member = self._roster.by_wire(event.wire)
        rule = _MESSAGES.get(type(event.message))
        if member is None:
            self._on_said_beside(event)
            return
        if rule is None or getattr(event.message, "session", None) != self._terms.session:
            self._drop(member, f"said {event.message.KIND} out of turn", charge=HEAVY, avoid_peer=True)
            return
        phases, handler = rule
        fresh = isinstance(event.message, Opened | At) or getattr(event.message, "epoch", 0) == self._epoch
        refused = isinstance(event.message, Failure) and member.standing is Standing.OPENING
        if refused or (fresh and self._phase in phases):
            handler(self, member, event.message)

    def _on_lost(self, event: HopLost) -> None:
        member = self._roster.by_wire(event.wire)
        problem = event.problem
        if member is None:
            self._on_lost_beside(event)
            return
        if problem.fault is Fault.PEER:
            self._drop(member, problem.message, charge=HEAVY, avoid_peer=True)
        elif problem.code is Code.UNSUPPORTED:
            self._drop(member, problem.message, avoid_peer=True)
        elif member.standing is not Standing.OPEN or member.resumed_at == self._pipeline.committed:
            self._drop(member, f"is gone: {problem.message}", charge=LIGHT, avoid_peer=True)
        else:
            member.resumed_at = self._pipeline.committed
            member.resumes = True
            self._roster.reopen(member)
            self._disturb(f"the stream to {member.name} broke", member)

    def _on_failure(self, member: Member, failure: Failure) -> None:
        problem = failure.problem()
        if problem.code is Code.ADAPTER_MISSING:
            self._put_parts(member, missing_parts(problem))
            return
        if member.standing is Standing.OPENING:
            self._search.note_refusal(problem)
            self._drop(member, f"refused: {problem.message}")
            return
        about = None if failure.about is None else self._roster.neighbour(member, failure.about)
        match problem.code:
            case Code.LINK_FAILED if about is not None:
                ends = (member, about) if self._roster.upstream(about) is member else (about, member)
                self._ask_where(link=ends)
            case Code.BAD_ANSWER | Code.NOT_FINITE | Code.BAD_SHAPE | Code.BAD_DTYPE:
                self._on_accusation(member, failure, problem)
            case Code.HISTORY_GONE if self._is_source(member):
                self._without_history.add(self._roster.index(member))
                self._replay_or_run()
            case Code.HISTORY_GAP if problem.details.get("window"):
                self._pipeline.cut_back()  # it is filled again up to there, and not beyond
                self._strike(member, problem.message)
            case Code.HISTORY_GAP if problem.details.get("evicted"):
                self._strike(
                    member, problem.message
                )  # it made room for others, and sets its rows back to nothing
            case Code.HISTORY_GAP if member.struck_at == self._pipeline.committed:
                self._on_accusation(member, failure, problem)  # twice, and linked anew between
            case Code.HISTORY_GAP | Code.HISTORY_GONE | Code.STALE_EPOCH | Code.LINK_FAILED:
                self._strike(member, problem.message)
            case Code.UNKNOWN_SESSION:
                self._reopen(member, problem)
            case Code.WORKER_LOST:
                self._drop(member, problem.message, charge=LIGHT)
            case _:
                self._drop(member, problem.message)

    def _is_source(self, member: Member) -> bool:
        plan = self._plan
        return (
            self._phase is Phase.REPLAYING and plan is not None and self._roster.index(member) == plan.source
        )

    def _reopen(self, member: Member, problem: CorollaError) -> None:
        """The hop forgot the session: it gets it anew, once."""
        if member.struck_at == self._pipeline.committed:
            self._drop(member, problem.message)
            return
        member.struck_at = self._pipeline.committed
        self._do(CloseHop(member.wire, None))
        self._roster.reopen(member)
        self._disturb(f"{member.name} forgot the session", member)

    def _on_accusation(self, member: Member, failure: Failure, problem: CorollaError) -> None:
        upstream = self._roster.upstream(member)
        oldest = self._pipeline.oldest
        step_id = oldest.step_id if oldest is not None else self._pipeline.committed + 1
        if upstream is None:
            self._accuse(member.place, None, step_id, problem)
        elif problem.code is Code.HISTORY_GAP or failure.about == upstream.place.hop:
            self._accuse(member.place, upstream.place, step_id, problem)
        else:
            self._accuse(None, member.place, step_id, problem)  # it speaks of its own values

    def _accuse(
        self, accuser: RouteHop | None, accused: RouteHop | None, step_id: int, problem: CorollaError
    ) -> None:
        decision = self._suspicion.accuse(accuser, accused, step_id)
        if decision is None and accuser is not None and accused is not None:
            self._fail(
                error(
                    Code.SESSION_LOST,
                    f"hops go on accusing each other of wrong values: {problem.message}",
                    "try again later, with other peers",
                )
            )
        elif decision is None:
            self._fail(problem)
        else:
            self._replace(decision, problem.message)

    def _replace(self, decision: Replace, reason: str) -> None:
        member = self._roster.of(decision.remove.hop)
        leaving = [] if member is None else [member]
        if member is not None:
            self._roster.remove(member)
        if decision.restore is not None:
            leaving += self._roster.put_back(decision.restore)
        for other in leaving:
            self._do(CloseHop(other.wire, self._farewell()))
        self._disturb(f"{decision.remove.hop.peer} is replaced: {reason}", member)

    def _strike(self, member: Member, reason: str) -> None:
        """Something that a new wiring may cure; without progress since the last time, the hop goes."""
        if member.struck_at == self._pipeline.committed:
            self._drop(member, reason)
        else:
            member.struck_at = self._pipeline.committed
            self._disturb(f"{member.name}: {reason}", member)

    def _drop(self, member: Member, reason: str, *, charge: float = 0.0, avoid_peer: bool = False) -> None:
        """Replace a hop. avoid_peer: it is dead or bad altogether, so that no last word is sent either."""
        self._expel(member, reason, charge=charge, avoid_peer=avoid_peer)
        self._disturb(f"{member.name} {reason}", member)

    def _expel(self, member: Member, reason: str, *, charge: float, avoid_peer: bool) -> None:
        """As `_drop`, while others are still to go."""
        if charge:
            self._charge(member.place.hop.peer, charge, reason)
        self._roster.remove(member)
        self._suspicion.left(member.place)
        self._roster.avoided.add(member.place.hop)
        if avoid_peer:
            self._roster.avoided_peers.add(member.place.hop.peer)
        self._do(CloseHop(member.wire, None if avoid_peer else self._farewell()))

    def _disturb(self, reason: str, member: Member | None = None) -> None:
        """The wiring does not work any more: note it, and begin to climb again."""
        if self._phase is Phase.RUNNING:
            self._repair_since = self._now
            if self._now - self._running_since >= STEADY_S:
                self._num_wirings = 0
        if self._is_ready:
            detail: dict[str, Any] = {"reason": reason}
            if member is not None:
                detail |= {
                    "peer": member.place.hop.peer,
                    "start": member.place.start,
                    "end": member.place.end,
                }
            self._emit(Kind.REPAIRING, reason, **detail)
        self._phase = Phase.ROUTING
        self._end_race()
        self._watch.expect(Await.NOTHING, self._now)
        self._plan = None
        self._pipeline.rewind()
        self._advance()

    # silence

    def _deadlines(self) -> Iterator[float]:
        for member in self._roster:
            if member.standing is Standing.OPENING:
                yield min(member.deadline, member.late_at)
        search = self._search.deadline(is_ready=self._is_ready, is_idle=self._pipeline.is_idle)
        for deadline in (search, self._watch.deadline):
            if deadline is not None:
                yield deadline

    def _on_tick(self, event: Tick) -> None:
        deadline = self.next_deadline
        if deadline is None or self._now < deadline:
            return
        opening = [m for m in self._roster if m.standing is Standing.OPENING]
        overdue = next((member for member in opening if member.deadline <= self._now), None)
        late = next((member for member in opening if member.late_at <= self._now), None)
        if overdue is not None:
            self._drop(overdue, "did not open the session in time", charge=LIGHT, avoid_peer=True)
        elif late is not None:
            self._doubt(late, is_silent=False)
        elif self._search.hole is not None:
            idle = self._pipeline.is_idle
            self._on_search(self._search.tick(self._now, is_ready=self._is_ready, is_idle=idle), "no answer")
        elif self._watch.is_asking:
            self._conclude()
        else:
            self._ask_where()

    def _ask_where(self, link: tuple[Member, Member] | None = None) -> None:
        """Ask every hop where the step is: who does not answer hangs, and the others' answers tell more."""
        oldest = self._pipeline.oldest if self._phase is Phase.RUNNING else None
        step_id = oldest.step_id if oldest is not None else self._pipeline.committed
        members = tuple(self._roster)
        if self._watch.ask(members, (self._epoch, step_id), self._now, link):
            for member in members:
                self._send(member, Where(self._terms.session, self._epoch, step_id))

    def _on_at(self, member: Member, message: At) -> None:
        self._answers(member)
        self._watch.hear(member, message)
        if self._watch.is_asking and all(other.stage is not None for other in self._roster):
            self._conclude()

    def _conclude(self) -> None:
        """Decide who or what is at fault, from the answers that came."""
        members = tuple(self._roster)
        plan = self._plan
        chain = members if plan is None else members[plan.source + 1 : plan.last + 1]
        match self._watch.conclude(members, chain, self._now):
            case Hung(hung):
                for member in hung[1:]:  # all at once, or each would cost a deadline of its own
                    self._expel(member, "does not answer", charge=LIGHT, avoid_peer=True)
                self._drop(hung[0], "does not answer", charge=LIGHT, avoid_peer=True)
            case BadLink(upstream, downstream):
                self._cut_link(upstream, downstream)
            case Stuck(member):
                # In a replay it may be waiting for a part that got lost between two hops: then it is innocent.
                is_sure = plan is None or (plan.source == CLIENT and member is members[0])
                self._drop(member, "has a worker that is stuck", charge=LIGHT if is_sure else 0.0)
            case Odd(member, reason):
                self._strike(member, reason)
            case Late(member, is_silent):
                self._doubt(member, is_silent=is_silent)

    def _cut_link(self, upstream: Member, downstream: Member) -> None:
        """Two live hops do not reach each other. Once may be chance; then one of them makes room, uncharged.

        If no route can do without the link, the search finds one that has it, and it is bridged. So it is at
        once where many links are bad: to try them all would take longer than a user waits.
        """
        if self._roster.is_bridged(self._roster.index(upstream)):
            self._strike(upstream, f"got nothing through to {downstream.name} by way of the client")
            return
        link = (upstream.place.hop.peer, downstream.place.hop.peer)
        self._link_failures[link] += 1
        if self._link_failures[link] == 1:
            self._disturb(f"the link from {upstream.name} to {downstream.name} failed", downstream)
            return
        failed_from = {
            pair for pair, count in self._link_failures.items() if count > 1 and pair[0] == link[0]
        }
        leaving = upstream if len(failed_from) > 1 or link[0] == link[1] else downstream
        self._roster.bad_links.add(link)
        if len(self._roster.bad_links) > MAX_DETOURS:
            self._disturb(f"{upstream.name} and {downstream.name} do not reach each other", downstream)
            return
        self._roster.remove(leaving)
        self._suspicion.left(leaving.place)
        self._do(CloseHop(leaving.wire, self._farewell()))
        self._disturb(f"{upstream.name} and {downstream.name} do not reach each other", leaving)


_EVENTS: Final[dict[type, Callable[[SessionMachine, Any], None]]] = {
    OpenRequested: SessionMachine._on_open_requested,
    StepRequested: SessionMachine._on_step_requested,
    KeepRequested: SessionMachine._on_keep_requested,
    Disputed: SessionMachine._on_disputed,
    LeaveRequested: SessionMachine._on_leave_requested,
    RouteFound: SessionMachine._on_route_found,
    RouteMissing: SessionMachine._on_route_missing,
    HopSaid: SessionMachine._on_said,
    HopLost: SessionMachine._on_lost,
    PartsPut: SessionMachine._on_parts_put,
    Tick: SessionMachine._on_tick,
    CloseRequested: SessionMachine._on_close_requested,
}
_WIRED: Final = frozenset((Phase.LINKING, Phase.REPLAYING, Phase.RUNNING))
# What a hop may say, in which phases it means something; elsewhere it is late, and ignored.
_MESSAGES: Final[
    dict[type[Message], tuple[frozenset[Phase], Callable[[SessionMachine, Member, Any], None]]]
] = {
    Opened: (frozenset(Phase), SessionMachine._on_opened),
    Linked: (frozenset((Phase.LINKING,)), SessionMachine._on_linked),
    Replayed: (frozenset((Phase.REPLAYING,)), SessionMachine._on_replayed),
    Receipt: (_WIRED, SessionMachine._on_receipt),
    At: (_WIRED, SessionMachine._on_at),
    Step: (frozenset((Phase.REPLAYING, Phase.RUNNING)), SessionMachine._on_step),
    Result: (frozenset((Phase.RUNNING,)), SessionMachine._on_result),
    Failure: (_WIRED, SessionMachine._on_failure),
}
