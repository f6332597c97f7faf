"""What is late, and what comes of it: somebody else is opened beside the hop, and whoever is first stays."""

from __future__ import annotations

import pytest

from corolla.daemon.session import events as ev
from corolla.daemon.session.ascent import Phase
from corolla.daemon.session.deadlines import Settings
from corolla.daemon.session.lateness import (
    LATE,
    LEAST_S,
    MIN_SAMPLES,
    OPENING_S,
    SHOWN_S,
    SLOW_LINK,
    UNKNOWN_S,
    Lateness,
    answer_s,
)
from corolla.daemon.session.machine import SessionMachine
from corolla.daemon.session.overtaking import AWAY_S
from corolla.daemon.session.roster import Terms
from corolla.daemon.swarm.blame import LIGHT, SLOW
from corolla.protocol.errors import Code, error
from corolla.protocol.steps import (
    NEW_ROW,
    At,
    CloseSession,
    Failure,
    LinkHop,
    Opened,
    Receipt,
    Replay,
    Replayed,
    Result,
    Row,
    Stage,
    Where,
)
from corolla.protocol.tensors import DType, Encoding

from .test_machine import ID, A, B, Bench, C, at, opened

HASTY = Settings(replacement_wait_s=5.0)


def running() -> Bench:
    """A session over three hops with a step under way, of a kind that was answered at once so far."""
    bench = opened(A, B, C, settings=HASTY)
    for number in range(MIN_SAMPLES):
        bench.step(number + 2, Row(0, 3, 1))
        bench.hear("c", Result(ID, 1, number + 2, b"d"))
    bench.step(9, Row(0, 4, 1))
    return bench


STEP = MIN_SAMPLES + 2  # that is under way there


def silent(bench: Bench) -> None:
    """The middle hop does not answer the question where the step is, and so is late."""
    bench.tick()
    assert bench.said("b", Where) == [Where(ID, 1, STEP)]
    bench.hear("a", At(ID, 1, STEP, Stage.SENT))
    bench.hear("c", At(ID, 1, STEP, Stage.UNKNOWN))
    bench.tick()


# what is late


def test_silence_is_late_at_a_multiple_of_what_is_usual_for_steps_of_that_size() -> None:
    lateness = Lateness()
    for silence_s in (0.5, 0.6, 0.7, 2.0):
        lateness.note(1, silence_s)
    assert lateness.patience_s(1, 0, 0.0) == LATE * 2.0
    for _ in range(60):
        lateness.note(1, 0.5)
    assert lateness.patience_s(1, 0, 0.0) == LATE * 0.5  # one in twenty is nothing usual
    assert lateness.patience_s(100, 0, 0.0) == UNKNOWN_S


def test_nobody_is_late_before_the_least_silence_however_fast_the_hops_are() -> None:
    lateness = Lateness()
    for _ in range(MIN_SAMPLES):
        lateness.note(1, 0.001)
    assert lateness.patience_s(1, 0, 0.0) == LEAST_S


def test_what_is_on_its_way_over_a_slow_link_is_not_late() -> None:
    assert Lateness().patience_s(512, 10 * SLOW_LINK, 0.0) == UNKNOWN_S + 10
    assert Lateness().linking_s(10 * SLOW_LINK, 0.0) == UNKNOWN_S + 10


def test_each_hurry_doubles_the_patience_for_a_while() -> None:
    lateness = Lateness()
    lateness.note_hurry(100.0)
    lateness.note_hurry(110.0)
    assert lateness.opening_s(120.0) == 4 * OPENING_S
    assert lateness.opening_s(165.0) == 2 * OPENING_S
    assert lateness.opening_s(200.0) == OPENING_S


# a hop amid a step


def test_a_hop_that_answers_nothing_is_overtaken_and_charged_little() -> None:
    bench = running()
    silent(bench)
    assert bench.now == LEAST_S + answer_s(LEAST_S)
    (question,) = bench.of(ev.FindRoute)
    request = question.request
    assert (request.start, request.end, request.upstream, request.downstream) == (1, 2, A.hop, C.hop)
    assert request.precision == B.precision
    assert "b" in request.avoid_peers
    assert {A.hop, B.hop, C.hop} <= request.avoid
    bench.found(at(B, "new"))
    assert bench.machine.phase is Phase.RUNNING  # the late one may still come first
    bench.hear("new", Opened(ID))
    assert bench.of(ev.Charge) == [
        ev.Charge("b", SLOW, "is late, and somebody else was there first"),
    ]
    assert ev.CloseHop(bench.wires["b"], CloseSession(ID)) in bench.done
    assert bench.said("new", LinkHop)[0].epoch == 2
    bench.link(2, a=(4,), new=(0,), c=(4,))
    assert bench.said("a", Replay) == [Replay(ID, 2, STEP - 1, (0,), (4,), 1)]
    bench.hear("new", Replayed(ID, 2))
    assert bench.machine.statistics().num_repairs == 1
    bench.hear("c", Result(ID, 2, STEP, b"d"))
    assert bench.of(ev.Deliver) == [ev.Deliver(9, b"d")]


def test_a_hop_that_was_late_may_come_back_later() -> None:
    bench = running()
    silent(bench)
    bench.found(at(B, "new"))
    bench.hear("new", Opened(ID))
    bench.link(2, a=(4,), new=(4,), c=(4,))
    bench.hear("c", Result(ID, 2, STEP, b"d"))
    for after_s, is_avoided in ((AWAY_S - 10, True), (AWAY_S + 10, False)):
        bench.now = LEAST_S + answer_s(LEAST_S) + after_s
        bench.feed(ev.LeaveRequested(C.hop if is_avoided else at(C, "other").hop, "is slow"))
        (question,) = bench.of(ev.FindRoute)
        assert (B.hop in question.request.avoid, "b" in question.request.avoid_peers) == (is_avoided,) * 2
        bench.found(at(C, "other"))
        bench.hear("other", Opened(ID))
        bench.link(3, a=(5,), new=(5,), other=(5,))


def test_a_result_in_time_ends_the_race_and_nothing_has_changed() -> None:
    bench = running()
    silent(bench)
    bench.found(at(B, "new"))
    bench.hear("c", Result(ID, 1, STEP, b"d"))
    assert ev.CloseHop(bench.wires["new"], CloseSession(ID)) in bench.done
    assert bench.of(ev.Deliver) == [ev.Deliver(9, b"d")]
    assert bench.hear("new", Opened(ID)) == []  # too late
    statistics = bench.machine.statistics()
    assert (statistics.epoch, statistics.num_repairs) == (1, 0)


def test_a_hop_that_shows_that_it_computes_is_not_overtaken() -> None:
    bench = running()
    silent(bench)
    bench.found(at(B, "new"))
    bench.hear("b", Receipt(ID, 1, STEP, Stage.WORKING))
    assert ev.CloseHop(bench.wires["new"], CloseSession(ID)) in bench.done
    assert not bench.of(ev.Charge)


def test_a_daemon_that_answers_after_all_is_not_overtaken_and_a_worker_is() -> None:
    bench = running()
    silent(bench)
    bench.found(at(B, "new"))
    bench.hear("b", At(ID, 1, STEP, Stage.RECEIVED))
    assert ev.CloseHop(bench.wires["new"], CloseSession(ID)) in bench.done
    bench.tick()
    for name, stage in (("a", Stage.SENT), ("b", Stage.RECEIVED), ("c", Stage.UNKNOWN)):
        bench.hear(name, At(ID, 1, STEP, stage))
    bench.found(at(B, "other"))
    bench.hear("b", At(ID, 1, STEP, Stage.RECEIVED))
    bench.hear("other", Opened(ID))
    assert bench.machine.phase is Phase.LINKING


def test_a_hop_that_nobody_can_replace_is_waited_for_until_the_deadline() -> None:
    bench = running()
    silent(bench)
    bench.missing()
    assert bench.machine.phase is Phase.RUNNING
    assert not bench.of(ev.Charge)
    while not bench.of(ev.Charge):
        bench.tick()
        if bench.of(ev.FindRoute) and not bench.of(ev.Charge):
            bench.missing()
        if bench.said("a", Where):
            bench.hear("a", At(ID, 1, STEP, Stage.SENT))
            bench.hear("c", At(ID, 1, STEP, Stage.UNKNOWN))
    assert bench.of(ev.Charge) == [ev.Charge("b", LIGHT, "does not answer")]
    assert bench.now >= HASTY.step_timeout_s


def test_a_worker_that_shows_nothing_for_longer_than_its_beats_is_overtaken() -> None:
    bench = running()
    for look in (1, 2):
        bench.tick()
        bench.hear("a", At(ID, 1, STEP, Stage.SENT))
        bench.hear("c", At(ID, 1, STEP, Stage.UNKNOWN))
        bench.hear("b", At(ID, 1, STEP, Stage.RECEIVED))
        assert bool(bench.of(ev.FindRoute)) == (look == 2)
    assert SHOWN_S <= bench.now < SHOWN_S + 1
    assert (
        "b" not in bench.of(ev.FindRoute)[0].request.avoid_peers
    )  # its daemon lives, and may have other workers
    bench.found(at(B, "new"))
    bench.hear("new", Opened(ID))
    assert bench.machine.phase is Phase.LINKING


def test_a_step_between_two_hops_makes_neither_of_them_late() -> None:
    bench = running()
    for _ in range(3):
        bench.tick()
        bench.hear("a", At(ID, 1, STEP, Stage.SENT))
        bench.hear("b", At(ID, 1, STEP, Stage.UNKNOWN))
        bench.hear("c", At(ID, 1, STEP, Stage.UNKNOWN))
        assert not bench.of(ev.FindRoute)


def test_a_link_that_fails_amid_the_question_is_what_the_answers_tell_of() -> None:
    bench = running()
    bench.tick()
    bench.hear("a", Failure.of(ID, 1, error(Code.LINK_FAILED, "broke"), STEP, B.hop))
    for name, stage in (("a", Stage.SENT), ("b", Stage.RECEIVED), ("c", Stage.UNKNOWN)):
        bench.hear(name, At(ID, 1, STEP, stage))
    assert bench.machine.phase is Phase.LINKING  # the same hops once more
    assert not bench.of(ev.FindRoute)
    assert not bench.of(ev.Charge)


def test_where_nobody_answers_nobody_is_late() -> None:
    bench = running()
    for _ in range(4):
        bench.tick()
        assert not bench.of(ev.FindRoute)


def test_a_second_one_who_computes_otherwise_does_not_overtake() -> None:
    bench = running()
    silent(bench)
    bench.found(at(B, "new", DType.BFLOAT16))
    assert not bench.of(ev.OpenHop)


@pytest.mark.parametrize("says", ["busy", "gone"])
def test_a_second_one_who_does_not_take_the_session_is_not_asked_again(says: str) -> None:
    bench = running()
    silent(bench)
    bench.found(at(B, "new"))
    if says == "busy":
        bench.hear("new", Failure.of(ID, 0, error(Code.BUSY, "full")))
    else:
        bench.lose("new")
    assert bench.machine.phase is Phase.RUNNING
    silent(bench)
    request = bench.of(ev.FindRoute)[0].request
    assert at(B, "new").hop in request.avoid or "new" in request.avoid_peers


def test_a_second_one_who_lacks_the_adapter_takes_over_and_gets_it() -> None:
    bench = opening((b"p" * 32, b""))
    bench.tick()
    bench.found(at(A, "new"))
    lacks = error(Code.ADAPTER_MISSING, "not here", missing=[(b"p" * 32).hex()])
    bench.hear("new", Failure.of(ID, 0, lacks))
    (put,) = bench.of(ev.PutParts)
    assert (put.hop.peer, put.parts) == ("new", ((0, b"p" * 32),))
    assert ev.CloseHop(bench.wires["a"], CloseSession(ID)) in bench.done


def test_another_failure_ends_the_race() -> None:
    bench = running()
    silent(bench)
    bench.found(at(B, "new"))
    bench.lose("c")
    assert ev.CloseHop(bench.wires["new"], CloseSession(ID)) in bench.done
    assert bench.machine.phase is Phase.OPENING


def test_the_end_of_the_session_ends_the_race() -> None:
    bench = running()
    silent(bench)
    bench.found(at(B, "new"))
    bench.feed(ev.CloseRequested())
    assert ev.CloseHop(bench.wires["new"], CloseSession(ID)) in bench.done


# a hop that opens, or links


def opening(parts: tuple[bytes, ...] = ()) -> Bench:
    """A session whose second hop is open, and the first one is not yet."""
    terms = Terms(ID, "model", 0, 2, Encoding.FLOAT32, 1, 4, 100, parts)
    bench = Bench(SessionMachine(terms, HASTY))
    bench.feed(ev.OpenRequested())
    bench.found(A, B)
    bench.hear("b", Opened(ID))
    return bench


def test_a_hop_that_is_long_in_opening_is_overtaken() -> None:
    bench = opening()
    bench.tick()
    assert bench.now == OPENING_S
    bench.found(at(A, "new"))
    bench.hear("new", Opened(ID))
    bench.link(1, new=(), b=())
    assert bench.of(ev.Ready)
    bench.step(1, Row(NEW_ROW, 0, 3))
    bench.hear("b", Result(ID, 1, 1, b"abc"))
    assert bench.of(ev.Deliver)


def test_a_hop_that_opens_before_the_second_one_stays() -> None:
    bench = opening()
    bench.tick()
    bench.found(at(A, "new"))
    bench.hear("a", Opened(ID))
    assert ev.CloseHop(bench.wires["new"], CloseSession(ID)) in bench.done
    bench.link(1, a=(), b=())
    assert bench.of(ev.Ready)


def test_a_hop_that_hangs_while_links_are_made_is_overtaken() -> None:
    bench = opening()
    bench.hear("a", Opened(ID))
    bench.link(1, b=())
    bench.tick()
    assert bench.now == UNKNOWN_S
    bench.hear("b", At(ID, 1, 0, Stage.UNKNOWN))
    bench.tick()
    bench.found(at(A, "new"))
    bench.hear("new", Opened(ID))
    bench.link(2, new=(), b=())
    assert bench.of(ev.Ready)
