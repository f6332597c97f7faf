"""The state machine, event by event, where a schedule alone would not show which rule held."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

import pytest

from corolla.daemon.session import events as ev
from corolla.daemon.session.ascent import MAX_PUTS, Phase
from corolla.daemon.session.deadlines import Settings
from corolla.daemon.session.machine import MAX_DETOURS, SessionMachine
from corolla.daemon.session.prefix import Prefix
from corolla.daemon.session.roster import Terms
from corolla.daemon.session.wiring import Route, RouteHop
from corolla.daemon.swarm.blame import HEAVY, LIGHT
from corolla.protocol.errors import Code, error
from corolla.protocol.messages import Message
from corolla.protocol.steps import (
    NEW_ROW,
    PREFIX_STEP,
    At,
    CloseSession,
    Failure,
    Hop,
    Linked,
    LinkHop,
    Opened,
    Replay,
    Replayed,
    Reply,
    Result,
    Row,
    Stage,
    Step,
    Where,
)
from corolla.protocol.tensors import DType, Encoding

ID = b"0123456789abcdef"
A, B, C, D = (RouteHop(Hop(name, 0), at, at + 1, DType.FLOAT32) for at, name in enumerate("abcd"))
SETTINGS = Settings(
    replacement_wait_s=5.0, least_late_s=inf
)  # deadlines alone; `test_overtaking.py` has the rest
T = TypeVar("T")


def at(place: RouteHop, name: str, dtype: DType = DType.FLOAT32) -> RouteHop:
    """Another hop for the same blocks."""
    return RouteHop(Hop(name, 0), place.start, place.end, dtype)


@dataclass
class Bench:
    """A machine, the time, and what it did last."""

    machine: SessionMachine
    now: float = 0.0
    done: list[ev.Action] = field(default_factory=list)
    wires: dict[str, int] = field(default_factory=dict)

    def feed(self, event: ev.Event) -> list[ev.Action]:
        self.done = self.machine.handle(event, self.now)
        self.wires.update({action.peer: action.wire for action in self.of(ev.OpenHop)})
        return self.done

    def of(self, kind: type[T]) -> list[T]:
        return [action for action in self.done if isinstance(action, kind)]

    def said(self, name: str, kind: type[T]) -> list[T]:
        sent = [action for action in self.of(ev.Send) if action.wire == self.wires[name]]
        return [message for action in sent for message in action.messages if isinstance(message, kind)]

    def hear(self, name: str, message: Message) -> list[ev.Action]:
        return self.feed(ev.HopSaid(self.wires[name], message))

    def lose(self, name: str) -> list[ev.Action]:
        return self.feed(ev.HopLost(self.wires[name], error(Code.PEER_LOST, "gone")))

    def tick(self) -> list[ev.Action]:
        deadline = self.machine.next_deadline
        assert deadline is not None
        self.now = deadline
        return self.feed(ev.Tick())

    def found(self, *hops: RouteHop) -> list[ev.Action]:
        (question,) = self.of(ev.FindRoute)
        return self.feed(ev.RouteFound(question.ticket, Route(hops)))

    def missing(self, code: Code = Code.BLOCKS_UNSERVED) -> list[ev.Action]:
        (question,) = self.of(ev.FindRoute)
        return self.feed(ev.RouteMissing(question.ticket, error(code, "nobody")))

    def link(self, epoch: int, **held: tuple[int, ...]) -> None:
        """Every hop named answers its link, holding so many tokens of each row, all of them replayable."""
        for name, lengths in held.items():
            self.hear(name, Linked(ID, epoch, lengths, (0,) * len(lengths)))

    def step(self, ticket: int, *rows: Row) -> list[ev.Action]:
        return self.feed(ev.StepRequested(ticket, rows, b"x" * sum(row.n for row in rows), Reply.ALL))


def opened(*hops: RouteHop, settings: Settings = SETTINGS) -> Bench:
    """A session that runs over these hops, with one row of three tokens committed by step 1."""
    terms = Terms(ID, "model", 0, len(hops), Encoding.FLOAT32, 1, 4, 100)
    bench = Bench(SessionMachine(terms, settings))
    bench.feed(ev.OpenRequested())
    bench.found(*hops)
    for hop in hops:
        bench.hear(hop.hop.peer, Opened(ID))
    for hop in hops:
        bench.hear(hop.hop.peer, Linked(ID, 1))
    assert bench.of(ev.Ready)
    bench.step(1, Row(NEW_ROW, 0, 3))
    bench.hear(hops[-1].hop.peer, Result(ID, 1, 1, b"abc"))
    assert bench.of(ev.Deliver) == [ev.Deliver(1, b"abc")]
    return bench


def with_prefix(num_tokens: int, **held: int) -> Bench:
    """A session that is to begin with so many tokens, of which each hop named holds some, up to its links."""
    prefix = Prefix(tuple(bytes([page]) * 16 for page in range(num_tokens // 64)), b"x" * num_tokens)
    hops = [A, B, C][: len(held)]
    terms = Terms(ID, "model", 0, len(hops), Encoding.FLOAT32, 1, 1, 400, prefix=prefix)
    bench = Bench(SessionMachine(terms, SETTINGS))
    bench.feed(ev.OpenRequested())
    bench.found(*hops)
    assert all(opening.message.prefix == prefix.names for opening in bench.of(ev.OpenHop))
    for name, tokens in held.items():
        bench.hear(name, Opened(ID, prefix_tokens=tokens))
    return bench


def test_a_session_begins_with_what_all_hops_hold_of_its_prefix() -> None:
    bench = with_prefix(192, a=192, b=128)
    (link,) = bench.said("a", LinkHop)
    assert (link.base_step, link.lengths) == (PREFIX_STEP, (128,))
    bench.link(1, a=(128,), b=(128,))
    assert bench.of(ev.Ready)
    assert bench.machine.statistics().prefix_lengths == (128,)
    bench.step(1, Row(0, 128, 2))
    (step,) = bench.said("a", Step)
    assert (step.step_id, step.committed) == (PREFIX_STEP + 1, PREFIX_STEP)


@pytest.mark.parametrize("held", [0, 63, -5])
def test_a_hop_without_the_prefix_brings_it_to_nothing(held: int) -> None:
    bench = with_prefix(192, a=192, b=held)
    (link,) = bench.said("a", LinkHop)
    assert (link.base_step, link.lengths) == (0, ())
    bench.link(1, a=(), b=())
    bench.step(1, Row(NEW_ROW, 0, 200))
    assert bench.said("a", Step)[0].step_id == 1


def test_a_hop_that_says_more_than_there_is_gets_no_more() -> None:
    bench = with_prefix(128, a=1 << 30, b=1 << 40)
    assert bench.said("a", LinkHop)[0].lengths == (128,)


def test_a_hop_that_lost_the_prefix_by_the_link_has_it_replayed() -> None:
    bench = with_prefix(128, a=128, b=128)
    bench.link(1, a=(128,), b=(0,))
    assert bench.said("a", Replay) == [Replay(ID, 1, PREFIX_STEP, (0,), (128,), 1)]
    bench.hear("b", Replayed(ID, 1))
    assert bench.of(ev.Ready)
    bench = with_prefix(128, a=128, b=128)
    bench.link(1, a=(0,), b=(0,))
    (part,) = bench.said("a", Step)  # the client has it, too
    assert (part.step_id, part.rows, part.payload) == (PREFIX_STEP, (Row(NEW_ROW, 0, 128),), b"x" * 128)


def test_links_name_the_neighbours_of_each_hop() -> None:
    bench = Bench(SessionMachine(Terms(ID, "model", 0, 3, Encoding.FLOAT32, 1, 4, 100), SETTINGS))
    bench.feed(ev.OpenRequested())
    bench.found(A, B, C)
    for name in "abc":
        bench.hear(name, Opened(ID))
    (link,) = bench.said("b", LinkHop)
    assert (link.epoch, link.upstream, link.downstream, link.base_step) == (1, A.hop, C.hop, 0)
    assert bench.said("a", LinkHop)[0].upstream is None
    assert bench.said("c", LinkHop)[0].downstream is None


def test_a_broken_stream_is_resumed_before_the_hop_is_given_up() -> None:
    bench = opened(A, B, C)
    old = bench.wires["b"]
    bench.lose("b")
    assert bench.wires["b"] != old
    assert not bench.of(ev.Charge)
    bench.hear("b", Opened(ID, 1))
    bench.link(2, a=(3,), b=(3,), c=(3,))
    assert bench.machine.phase is Phase.RUNNING


def test_the_nearest_survivor_replays_to_a_replacement_and_others_keep_their_caches() -> None:
    bench = opened(A, B, C)
    bench.step(2, Row(0, 3, 1))
    bench.lose("b")
    bench.lose("b")
    assert bench.of(ev.Charge) == [ev.Charge("b", LIGHT, "is gone: gone")]
    (question,) = bench.of(ev.FindRoute)
    request = question.request
    assert (request.start, request.end, request.upstream, request.downstream) == (1, 2, A.hop, C.hop)
    assert "b" in request.avoid_peers
    bench.found(at(B, "new"))
    bench.hear("new", Opened(ID))
    assert bench.said("a", LinkHop)[0].lengths == (3,)
    bench.link(2, a=(3,), new=(0,), c=(3,))
    assert bench.said("a", Replay) == [Replay(ID, 2, 1, (0,), (3,), 1)]
    bench.hear("new", Replayed(ID, 2))
    (again,) = bench.said("a", Step)
    assert (again.step_id, again.epoch, again.committed) == (2, 2, 1)
    bench.hear("c", Result(ID, 2, 2, b"d"))
    assert bench.of(ev.Deliver) == [ev.Deliver(2, b"d")]


def test_the_client_replays_if_the_first_hop_is_replaced() -> None:
    bench = opened(A, B)
    bench.lose("a")
    bench.lose("a")
    bench.found(at(A, "new"))
    bench.hear("new", Opened(ID))
    bench.link(2, new=(0,), b=(3,))
    (step,) = bench.said("new", Step)
    assert (step.replay_hops, step.step_id, step.rows, step.payload) == (1, 1, (Row(NEW_ROW, 0, 3),), b"xxx")


def test_history_gone_moves_the_replay_upstream_and_at_last_to_the_client() -> None:
    bench = opened(A, B, C)
    bench.lose("c")
    bench.lose("c")
    bench.found(at(C, "new"))
    bench.hear("new", Opened(ID))
    bench.link(2, a=(3,), b=(3,), new=(1,))
    assert bench.said("b", Replay) == [Replay(ID, 2, 1, (1,), (3,), 1)]
    bench.hear("b", Failure.of(ID, 2, error(Code.HISTORY_GONE, "dropped")))
    assert bench.said("a", Replay) == [Replay(ID, 2, 1, (1,), (3,), 2)]
    bench.hear("a", Failure.of(ID, 2, error(Code.HISTORY_GONE, "dropped")))
    assert bench.said("a", Step)[0].replay_hops == 3
    assert not bench.of(ev.Charge)


def test_messages_of_an_older_epoch_and_of_wires_given_up_change_nothing() -> None:
    bench = opened(A, B)
    bench.step(2, Row(0, 3, 1))
    zombie = bench.wires["b"]
    bench.lose("b")
    bench.hear("b", Opened(ID, 1))
    bench.link(2, a=(3,), b=(3,))
    assert bench.feed(ev.HopSaid(zombie, Result(ID, 2, 2, b"z"))) == []
    assert bench.hear("b", Result(ID, 1, 2, b"z")) == []
    assert bench.hear("a", Result(ID, 2, 2, b"z")) == []  # not the last hop
    bench.hear("b", Result(ID, 2, 2, b"d"))
    assert bench.hear("b", Result(ID, 2, 2, b"d")) == []  # twice


def test_silence_is_asked_about_and_a_hop_that_does_not_answer_is_replaced() -> None:
    bench = opened(A, B, C)
    bench.step(2, Row(0, 3, 1))
    bench.tick()
    assert bench.now == SETTINGS.step_timeout_s
    assert bench.said("b", Where) == [Where(ID, 1, 2)]
    bench.hear("a", At(ID, 1, 2, Stage.SENT))
    bench.hear("c", At(ID, 1, 2, Stage.UNKNOWN))
    bench.tick()
    assert bench.of(ev.Charge) == [ev.Charge("b", LIGHT, "does not answer")]
    assert ev.CloseHop(bench.wires["b"], None) in bench.done


def test_a_step_sent_and_never_received_is_a_failed_link_and_charges_nobody() -> None:
    bench = opened(A, B)
    bench.step(2, Row(0, 3, 1))
    for epoch in (1, 2):
        bench.tick()
        bench.hear("a", At(ID, epoch, 2, Stage.SENT))
        bench.hear("b", At(ID, epoch, 2, Stage.UNKNOWN))
        assert not bench.of(ev.Charge)
        if epoch == 1:  # it may have been chance: the same hops are linked anew
            bench.link(2, a=(3,), b=(3,))
    (question,) = bench.of(ev.FindRoute)
    assert question.request.avoid_links == {("a", "b")}
    assert ev.CloseHop(bench.wires["b"], CloseSession(ID)) in bench.done


def test_a_step_received_and_not_worked_on_is_the_workers_fault() -> None:
    bench = opened(A, B)
    bench.step(2, Row(0, 3, 1))
    bench.tick()
    bench.hear("b", At(ID, 1, 2, Stage.RECEIVED))
    bench.hear("a", At(ID, 1, 2, Stage.SENT))
    assert [charge.peer for charge in bench.of(ev.Charge)] == ["b"]


def test_a_step_that_is_worked_on_gets_one_more_silence() -> None:
    bench = opened(A)
    bench.step(2, Row(0, 3, 1))
    bench.tick()
    assert bench.hear("a", At(ID, 1, 2, Stage.WORKING)) == []
    bench.tick()
    bench.hear("a", At(ID, 1, 2, Stage.WORKING))
    assert [charge.peer for charge in bench.of(ev.Charge)] == ["a"]


def accuse(bench: Bench, accuser: str, accused: RouteHop, epoch: int) -> None:
    problem = error(Code.NOT_FINITE, "not finite")
    bench.hear(accuser, Failure.of(ID, epoch, problem, 2, accused.hop))


def test_the_accused_is_guilty_if_its_replacement_cures_it() -> None:
    bench = opened(A, B)
    bench.step(2, Row(0, 3, 1))
    accuse(bench, "b", A, 1)
    assert not bench.of(ev.Charge)
    bench.found(at(A, "new"))
    bench.hear("new", Opened(ID))
    bench.link(2, new=(3,), b=(3,))
    bench.hear("b", Result(ID, 2, 2, b"d"))
    assert [(charge.peer, charge.weight) for charge in bench.of(ev.Charge)] == [("a", HEAVY)]


def test_the_accuser_is_guilty_if_its_replacement_cures_it() -> None:
    bench = opened(A, B)
    bench.step(2, Row(0, 3, 1))
    accuse(bench, "b", A, 1)
    bench.found(at(A, "new"))
    bench.hear("new", Opened(ID))
    bench.link(2, new=(3,), b=(3,))
    accuse(bench, "b", at(A, "new"), 2)
    assert [action.peer for action in bench.of(ev.OpenHop)] == []
    (question,) = bench.of(ev.FindRoute)
    assert (question.request.start, question.request.end) == (1, 2)
    assert question.request.upstream == A.hop  # restored
    bench.found(at(B, "other"))
    assert {action.peer for action in bench.of(ev.OpenHop)} == {"a", "other"}
    bench.hear("a", Opened(ID))
    bench.hear("other", Opened(ID))
    bench.link(3, a=(3,), other=(3,))
    bench.hear("other", Result(ID, 3, 2, b"d"))
    assert [(charge.peer, charge.weight) for charge in bench.of(ev.Charge)] == [("b", HEAVY)]


def test_a_hop_that_evicts_a_session_again_and_again_is_left_and_nobody_accused() -> None:
    bench = opened(A, B)
    bench.step(2, Row(0, 3, 1))
    problem = error(Code.HISTORY_GAP, "made room for others", first_position=0, evicted=True)
    bench.hear("b", Failure.of(ID, 1, problem, 2))
    bench.link(2, a=(3,), b=(3,))
    assert bench.machine.phase is Phase.RUNNING
    bench.hear("b", Failure.of(ID, 2, problem, 2))
    (question,) = bench.of(ev.FindRoute)
    assert (question.request.start, question.request.end) == (1, 2)
    assert B.hop in question.request.avoid
    assert not question.request.avoid_peers
    assert not bench.of(ev.Charge)


def test_a_rollback_behind_a_hops_window_is_replayed_up_to_where_it_begins() -> None:
    bench = opened(A, B)
    bench.step(2, Row(0, 1, 1))
    problem = error(Code.HISTORY_GAP, "further back than kept", first_position=0, window=True)
    bench.hear("b", Failure.of(ID, 1, problem, 2))
    assert [link.lengths for link in bench.said("a", LinkHop)] == [(1,)]
    bench.hear("a", Linked(ID, 2, (1,), (0,)))
    bench.hear("b", Linked(ID, 2, (0,), (0,)))
    (replay,) = bench.said("a", Replay)
    assert (replay.starts, replay.lengths) == ((0,), (1,))
    bench.hear("b", Replayed(ID, 2))
    (step,) = bench.said("a", Step)
    assert (step.step_id, step.rows) == (2, (Row(0, 1, 1),))
    assert not bench.of(ev.Charge)


def test_an_answer_of_the_wrong_length_is_seen_by_the_client_itself() -> None:
    bench = opened(A)
    bench.step(2, Row(0, 3, 1))
    bench.hear("a", Result(ID, 1, 2, b"too long"))
    assert [(charge.peer, charge.weight) for charge in bench.of(ev.Charge)] == [("a", HEAVY)]
    assert not bench.of(ev.Deliver)


def test_without_a_replacement_it_waits_asks_again_and_at_last_fails() -> None:
    bench = opened(A, B)
    bench.step(2, Row(0, 3, 1))
    bench.lose("b")
    bench.lose("b")
    bench.missing()  # for the lost blocks
    (question,) = bench.of(ev.FindRoute)
    assert (question.request.start, question.request.end) == (0, 2)
    bench.missing()  # for all blocks anew
    assert [action.event.kind for action in bench.of(ev.Emit)] == [ev.Kind.WAITING]
    asked = 0
    while not bench.of(ev.Fail):
        bench.tick()
        while bench.of(ev.FindRoute):
            asked += 1
            bench.missing()
    assert asked >= SETTINGS.replacement_wait_s / SETTINGS.route_retry_s - 1
    assert bench.of(ev.Fail)[0].problem.code is Code.SESSION_LOST
    assert bench.now == pytest.approx(SETTINGS.replacement_wait_s)
    assert bench.machine.next_deadline is None


def test_one_put_out_of_the_swarm_waits_for_no_replacement() -> None:
    bench = opened(A)
    bench.step(2, Row(0, 3, 1))
    bench.lose("a")
    bench.lose("a")
    bench.missing(Code.NOT_INVITED)
    (failed,) = bench.of(ev.Fail)
    assert failed.problem.code is Code.NOT_INVITED


def test_an_idle_session_waits_for_as_long_as_it_lives() -> None:
    bench = opened(A)
    bench.lose("a")
    bench.lose("a")
    bench.missing()
    for _ in range(50):
        bench.tick()
        bench.missing()
    assert bench.machine.phase is Phase.ROUTING
    bench.step(2, Row(0, 3, 1))
    while not bench.of(ev.Fail):
        bench.tick()
        if bench.of(ev.FindRoute):
            bench.missing()
    assert bench.now > 50


def test_at_the_opening_the_routers_own_error_is_given_at_once() -> None:
    bench = Bench(SessionMachine(Terms(ID, "model", 0, 1, Encoding.FLOAT32, 1, 4, 100), SETTINGS))
    bench.feed(ev.OpenRequested())
    bench.missing()
    assert bench.of(ev.Fail)[0].problem.code is Code.BLOCKS_UNSERVED


def test_a_replacement_of_other_precision_is_told() -> None:
    bench = opened(A, B)
    bench.lose("b")
    bench.lose("b")
    assert bench.of(ev.FindRoute)[0].request.precision == B.precision
    bench.found(at(B, "half", DType.BFLOAT16))
    assert ev.Kind.PRECISION_CHANGED in [action.event.kind for action in bench.of(ev.Emit)]


def test_two_spans_may_replace_one_and_several_failures_make_one_repair() -> None:
    wide = RouteHop(Hop("wide", 0), 0, 2, DType.FLOAT32)
    terms = Terms(ID, "model", 0, 3, Encoding.FLOAT32, 1, 4, 100)
    bench = Bench(SessionMachine(terms, SETTINGS))
    bench.feed(ev.OpenRequested())
    bench.found(wide, C)
    for name in ("wide", "c"):
        bench.hear(name, Opened(ID))
    for name in ("wide", "c"):
        bench.hear(name, Linked(ID, 1))
    bench.lose("wide")
    bench.lose("wide")
    bench.found(A, B)
    bench.lose("a")  # while it is being opened
    bench.found(at(A, "new"))
    for name in ("b", "new"):
        bench.hear(name, Opened(ID))
    bench.link(2, new=(), b=(), c=())
    assert [place.hop.peer for place in bench.machine.statistics().hops] == ["new", "b", "c"]
    assert bench.machine.statistics().num_repairs == 1


def test_a_forgotten_session_is_opened_anew_once() -> None:
    bench = opened(A)
    old = bench.wires["a"]
    bench.hear("a", Failure.of(ID, 1, error(Code.UNKNOWN_SESSION, "forgot")))
    assert ev.CloseHop(old, None) in bench.done
    assert bench.wires["a"] != old
    assert not bench.of(ev.Charge)


def test_closing_says_goodbye_to_every_hop_and_keeps_nothing() -> None:
    bench = opened(A, B)
    bench.feed(ev.CloseRequested())
    assert {action.wire for action in bench.of(ev.CloseHop)} == {bench.wires["a"], bench.wires["b"]}
    assert all(action.message == CloseSession(ID) for action in bench.of(ev.CloseHop))
    assert bench.machine.next_deadline is None
    assert bench.machine.statistics().history_bytes == 0
    assert bench.step(2, Row(0, 3, 1)) == []


def bridged() -> Bench:
    """A session over two hops that do not reach each other, and nobody else serves their blocks."""
    bench = opened(A, B)
    bench.step(2, Row(0, 3, 1))
    for epoch in (1, 2):
        bench.hear("a", Failure.of(ID, epoch, error(Code.LINK_FAILED, "no way"), about=B.hop))
        for name in "ab":
            bench.hear(name, At(ID, epoch, 2, Stage.UNKNOWN))
        if epoch == 1:
            bench.link(2, a=(3,), b=(3,))
    bench.missing()  # for the lost blocks without the link
    bench.missing()  # for all blocks without it
    return bench


def test_steps_between_hops_that_do_not_reach_each_other_pass_through_the_client() -> None:
    bench = bridged()
    (question,) = bench.of(ev.FindRoute)
    assert (question.request.start, question.request.end) == (1, 2)
    assert not question.request.avoid_links
    bench.found(B)
    bench.hear("b", Opened(ID))
    assert [action.event.detail for action in bench.of(ev.Emit)] == [{"peers": ["a", "b"]}]
    (above,), (below,) = bench.said("a", LinkHop), bench.said("b", LinkHop)
    assert (above.downstream, above.relays_from, above.relays_to) == (B.hop, False, True)
    assert (below.upstream, below.relays_from, below.relays_to) == (A.hop, True, False)
    bench.link(3, a=(3,), b=(0,))
    assert bench.said("a", Replay)  # histories are kept, and replayed, as with any other link
    part = Step(ID, 3, 1, (Row(NEW_ROW, 0, 3),), 1, replay_hops=1, payload=b"yyy")
    bench.hear("a", part)
    assert bench.said("b", Step) == [part]
    bench.hear("b", Replayed(ID, 3))
    passing = Step(ID, 3, 2, (Row(0, 3, 1),), 1, Reply.ALL, payload=b"y")
    bench.hear("a", passing)
    assert bench.said("b", Step) == [passing]
    bench.hear("b", Result(ID, 3, 2, b"d"))
    assert bench.of(ev.Deliver) == [ev.Deliver(2, b"d")]
    assert bench.machine.statistics().num_bridges == 1
    assert not bench.of(ev.Charge)


def test_a_bridge_is_left_out_of_the_next_route_if_one_can_do_without() -> None:
    bench = bridged()
    bench.found(B)
    bench.hear("b", Opened(ID))
    bench.link(3, a=(3,), b=(3,))
    bench.lose("b")
    bench.lose("b")
    assert bench.of(ev.FindRoute)[0].request.avoid_links == {("a", "b")}


def test_a_step_of_an_older_epoch_is_not_passed_on() -> None:
    bench = bridged()
    bench.found(B)
    bench.hear("b", Opened(ID))
    bench.link(3, a=(3,), b=(3,))
    assert bench.hear("a", Step(ID, 2, 2, (Row(0, 3, 1),), 1, payload=b"y")) == []


def test_a_hop_that_sends_the_client_what_belongs_to_the_next_hop_is_charged() -> None:
    bench = opened(A, B)
    bench.hear("a", Step(ID, 1, 2, (Row(0, 3, 1),), 1, payload=b"y"))
    assert [(charge.peer, charge.weight) for charge in bench.of(ev.Charge)] == [("a", HEAVY)]


def test_where_many_links_are_bad_the_next_one_is_bridged_without_a_search() -> None:
    bench = opened(A, B)
    bench.machine._roster.bad_links |= {("x", str(number)) for number in range(MAX_DETOURS)}
    for epoch in (1, 2):
        bench.hear("a", Failure.of(ID, epoch, error(Code.LINK_FAILED, "no way"), about=B.hop))
        for name in "ab":
            bench.hear(name, At(ID, epoch, 1, Stage.UNKNOWN))
    assert not bench.of(ev.FindRoute)
    assert bench.said("b", LinkHop)[0].relays_from


PART = bytes(range(32))


def adapted(*hops: RouteHop) -> Bench:
    """A session with an adapter on the first block alone, as its hops are being opened."""
    parts = (PART, *[b""] * (len(hops) - 1))
    terms = Terms(ID, "model", 0, len(hops), Encoding.FLOAT32, 1, 4, 100, parts)
    bench = Bench(SessionMachine(terms, SETTINGS))
    bench.feed(ev.OpenRequested())
    bench.found(*hops)
    return bench


def lacks(name: str = PART.hex()) -> Failure:
    return Failure.of(ID, 0, error(Code.ADAPTER_MISSING, "not here", missing=[name]))


def put(bench: Bench) -> ev.PutParts:
    (action,) = bench.of(ev.PutParts)
    return action


def test_only_hops_of_adapted_blocks_hear_of_the_adapter() -> None:
    bench = adapted(A, B)
    assert [opening.message.parts for opening in bench.of(ev.OpenHop)] == [(PART,), ()]


def test_a_hop_without_the_parts_gets_them_and_is_opened_again() -> None:
    bench = adapted(A, B)
    bench.hear("b", Opened(ID))
    bench.hear("a", lacks())
    assert put(bench).hop == A.hop
    assert put(bench).parts == ((0, PART),)
    bench.feed(ev.PartsPut(put(bench).wire))
    (again,) = bench.of(ev.OpenHop)
    assert (again.peer, again.message.parts) == ("a", (PART,))
    bench.hear("a", Opened(ID))
    assert bench.machine.phase is Phase.LINKING


def test_a_hop_that_keeps_no_parts_makes_room_for_another_uncharged() -> None:
    bench = adapted(A, B)
    for _ in range(MAX_PUTS):
        bench.hear("a", lacks())
        bench.feed(ev.PartsPut(put(bench).wire))
    bench.hear("a", lacks())
    assert not bench.of(ev.PutParts)
    assert not bench.of(ev.Charge)
    assert bench.of(ev.FindRoute)


@pytest.mark.parametrize("told", [5, "x", [7], ["00" * 32], None])
def test_a_hop_that_lacks_what_nobody_named_makes_room(told: object) -> None:
    bench = adapted(A, B)
    bench.hear("a", Failure.of(ID, 0, error(Code.ADAPTER_MISSING, "what?", missing=told)))
    assert not bench.of(ev.PutParts)
    assert bench.of(ev.FindRoute)


@pytest.mark.parametrize(
    ("code", "charge"),
    [
        (Code.BUSY, None),
        (Code.PEER_LOST, LIGHT),
        (Code.PROTOCOL_VIOLATION, HEAVY),
        (Code.BLOCKS_OUT_OF_RANGE, None),
    ],
)
def test_a_hop_that_does_not_take_the_parts_makes_room(code: Code, charge: float | None) -> None:
    bench = adapted(A, B)
    bench.hear("a", lacks())
    bench.feed(ev.PartsPut(put(bench).wire, error(code, "no")))
    assert bench.of(ev.FindRoute)
    assert [action.weight for action in bench.of(ev.Charge)] == ([] if charge is None else [charge])


def test_parts_that_fit_no_hop_end_the_session_before_it_began() -> None:
    bench = adapted(A, B)
    bench.hear("a", lacks())
    problem = error(Code.BAD_SHAPE, "for another model")
    bench.feed(ev.PartsPut(put(bench).wire, problem))
    assert bench.of(ev.Fail) == [ev.Fail(problem)]


def test_a_worker_that_lost_the_parts_amid_a_session_gets_them_again() -> None:
    bench = adapted(A, B)
    for name in "ab":
        bench.hear(name, Opened(ID))
    for name in "ab":
        bench.hear(name, Linked(ID, 1))
    bench.hear("a", Failure.of(ID, 1, error(Code.ADAPTER_MISSING, "lost", missing=[PART.hex()])))
    bench.feed(ev.PartsPut(put(bench).wire))
    bench.hear("a", Opened(ID))
    assert bench.said("a", LinkHop)[0].epoch == 2
    assert not bench.of(ev.Charge)
