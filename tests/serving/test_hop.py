"""One hop's decisions: which steps count, what becomes of outputs, what the client is told."""

from __future__ import annotations

import pytest

from corolla.daemon.serving.hop import RECEIPT_AFTER_S, HopSession, Verdict
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.steps import (
    NEW_ROW,
    Hop,
    LinkHop,
    OpenSession,
    Replay,
    Replayed,
    Reply,
    Result,
    Row,
    Stage,
    Step,
    Where,
)
from corolla.protocol.tensors import Encoding

SESSION = b"s" * 16
UP, DOWN = Hop("up", 0), Hop("down", 1)
SIZE = 4  # bytes of a token


def a_hop(*, upstream: Hop | None = UP, downstream: Hop | None = DOWN, linked: bool = True) -> HopSession:
    opened = OpenSession(SESSION, "f" * 64, 0, 2, 4, Encoding.FLOAT32, 2, 32)
    hop = HopSession("client", opened, SIZE, 1 << 20)
    if linked:
        hop.link(LinkHop(SESSION, 1, upstream, downstream, 0))
    return hop


def a_step(
    step_id: int, position: int = 0, n: int = 1, *, epoch: int = 1, hops: int = 0, final: bool = True
) -> Step:
    row = Row(0 if position else NEW_ROW, position, n)
    return Step(
        SESSION, epoch, step_id, (row,), 0, Reply.LAST, hops, final, payload=bytes([step_id]) * n * SIZE
    )


def taken(hop: HopSession, step: Step, output: bytes | None = None) -> object:
    """Take a step, compute it, and send it on."""
    assert hop.judge(step, hop.upstream, 0.0) is Verdict.TAKE
    message = hop.computed(step, step.payload if output is None else output)
    hop.sending(step)
    assert hop.sent(step) is None
    return message


def stage_of(hop: HopSession, step_id: int, epoch: int = 1) -> Stage:
    return hop.where(Where(SESSION, epoch, step_id)).stage


def test_nothing_counts_before_the_first_link() -> None:
    hop = a_hop(linked=False)
    assert hop.judge(a_step(1), UP, 0.0) is Verdict.STALE
    assert hop.judge(a_step(1, epoch=0), None, 0.0) is Verdict.DROP


def test_only_the_upstream_of_this_epoch_is_heard() -> None:
    hop = a_hop()
    for sender in (None, DOWN, Hop("up", 1)):
        assert hop.judge(a_step(1), sender, 0.0) is Verdict.STALE
    for epoch in (0, 2):
        assert hop.judge(a_step(1, epoch=epoch), UP, 0.0) is Verdict.STALE
    assert hop.judge(a_step(1), UP, 0.0) is Verdict.TAKE
    assert hop.expects(1, UP)
    assert not hop.expects(2, UP)


def test_an_output_goes_downstream_with_all_its_tokens() -> None:
    hop = a_hop()
    step = a_step(1, n=3)
    assert hop.wanted(step) is Reply.ALL
    message = taken(hop, step, b"x" * 3 * SIZE)
    assert isinstance(message, Step)
    assert (message.step_id, message.rows, message.reply) == (1, step.rows, Reply.LAST)
    assert message.payload == b"x" * 3 * SIZE
    assert hop.history.lengths == (3,)


def test_the_last_hop_gives_what_was_asked_for_and_keeps_nothing() -> None:
    hop = a_hop(downstream=None)
    step = a_step(1, n=3)
    assert hop.wanted(step) is Reply.LAST
    assert taken(hop, step, b"last") == Result(SESSION, 1, 1, b"last")
    assert hop.history.size_bytes == 0
    with pytest.raises(CorollaError, match="gave 12 bytes, expected 4"):
        taken(hop, a_step(2, 3), b"far too long")


def test_a_repeated_step_is_sent_again_only_once_it_was_answered() -> None:
    hop = a_hop()
    step = a_step(1)
    assert hop.judge(step, UP, 0.0) is Verdict.TAKE
    assert hop.judge(step, UP, 0.0) is Verdict.DROP  # its answer is still to come
    message = hop.computed(step, b"out!")
    assert hop.judge(step, UP, 0.0) is Verdict.REPEAT
    assert hop.last_sent == message
    taken(hop, a_step(2, 1))
    assert hop.judge(step, UP, 0.0) is Verdict.DROP


def test_a_step_left_out_or_of_wrong_size_is_the_senders_fault() -> None:
    hop = a_hop()
    for step, code in (
        (a_step(2), Code.HISTORY_GAP),
        (Step(SESSION, 1, 1, (Row(NEW_ROW, 0, 2),), payload=b"five!"), Code.BAD_SHAPE),
        (a_step(1, n=33), Code.BAD_SHAPE),  # opened for 32 tokens
        (Step(SESSION, 1, 1, (Row(NEW_ROW, 0, 0),) * 3), Code.BAD_SHAPE),  # and two rows
    ):
        with pytest.raises(CorollaError) as raised:
            hop.judge(step, UP, 0.0)
        assert raised.value.code is code
        assert hop.accused(raised.value) == UP
    assert hop.accused(error(Code.OUT_OF_MEMORY, "no room")) is None


def test_after_a_failure_nothing_counts_until_the_next_link() -> None:
    hop = a_hop()
    hop.judge(a_step(1), UP, 0.0)
    hop.break_link()
    assert hop.judge(a_step(2, 1), UP, 0.0) is Verdict.DROP
    hop.link(LinkHop(SESSION, 2, UP, DOWN, 0))
    assert hop.judge(a_step(1, epoch=2), UP, 0.0) is Verdict.TAKE


def test_a_link_that_is_not_newer_is_stale() -> None:
    hop = a_hop()
    taken(hop, a_step(1))
    for epoch in (0, 1):
        with pytest.raises(CorollaError) as raised:
            hop.link(LinkHop(SESSION, epoch, None, None, 0))
        assert raised.value.code is Code.STALE_EPOCH
    assert (hop.upstream, hop.history.lengths) == (UP, (1,))


def test_a_link_with_more_rows_than_were_opened_is_refused() -> None:
    with pytest.raises(CorollaError, match="3 rows, opened for 2"):
        a_hop().link(LinkHop(SESSION, 2, UP, DOWN, 1, (1, 1, 1)))


def test_a_link_sets_the_history_back_with_the_rows() -> None:
    hop = a_hop()
    taken(hop, a_step(1, n=3))
    taken(hop, a_step(2, 3))
    assert hop.link(LinkHop(SESSION, 2, UP, DOWN, 1, (2,))) == 1
    assert hop.history.lengths == (2,)
    linked = hop.linked((2,))
    assert (linked.epoch, linked.held, linked.history_from) == (2, (2,), (0,))
    assert hop.judge(a_step(2, 2, epoch=2), UP, 0.0) is Verdict.TAKE


def test_a_cache_that_history_does_not_cover_is_not_kept() -> None:
    hop = a_hop(downstream=None)
    taken(hop, a_step(1, n=3), b"last")
    assert hop.link(LinkHop(SESSION, 2, UP, DOWN, 1, (3,))) == 0  # it was the last, and is no more
    assert hop.linked((0,)).history_from == (0,)


def test_history_outlives_the_cache() -> None:
    hop = a_hop()
    taken(hop, a_step(1, n=3))
    assert hop.link(LinkHop(SESSION, 2, UP, DOWN, 1, (3,))) == 1
    assert hop.linked((0,)).history_from == (0,)
    replayed = a_step(1, n=3, epoch=2, hops=1)
    assert isinstance(taken(hop, replayed), Replayed)
    assert hop.history.lengths == (3,)


def test_a_replay_passes_through_and_ends_at_its_last_hop() -> None:
    hop = a_hop()
    hop.link(LinkHop(SESSION, 2, UP, DOWN, 5, (2,)))
    first, last = a_step(5, epoch=2, hops=2, final=False), a_step(5, 1, epoch=2, hops=2)
    message = taken(hop, first)
    assert isinstance(message, Step)
    assert (message.replay_hops, message.final, message.step_id) == (1, False, 5)
    assert stage_of(hop, 5, 2) is Stage.RECEIVED
    taken(hop, last)
    assert stage_of(hop, 5, 2) is Stage.SENT
    taken(hop, a_step(6, 2, epoch=2))
    assert hop.judge(last, UP, 0.0) is Verdict.DROP  # steps have been taken since

    end = a_hop(downstream=None)
    end.link(LinkHop(SESSION, 2, UP, None, 5, (2,)))
    assert taken(end, a_step(5, epoch=2, hops=1, final=False), b"last") is None
    assert taken(end, a_step(5, 1, epoch=2, hops=1), b"last") == Replayed(SESSION, 2)


def test_history_is_read_for_a_replay_of_the_rows_that_stand() -> None:
    hop = a_hop()
    taken(hop, a_step(1, n=3), b"aaaabbbbcccc")
    hop.link(LinkHop(SESSION, 2, UP, DOWN, 1, (3,)))
    (step,) = hop.replayed(Replay(SESSION, 2, 1, (1,), (3,), 2))
    assert (step.rows, step.payload, step.replay_hops) == ((Row(0, 1, 2),), b"bbbbcccc", 2)
    assert (step.step_id, step.committed, step.final) == (1, 1, True)
    for replay, code in (
        (Replay(SESSION, 1, 1, (1,), (3,), 2), Code.STALE_EPOCH),
        (Replay(SESSION, 2, 2, (1,), (3,), 2), Code.BAD_REQUEST),
        (Replay(SESSION, 2, 1, (1,), (4,), 2), Code.HISTORY_GONE),
    ):
        with pytest.raises(CorollaError) as raised:
            hop.replayed(replay)
        assert raised.value.code is code


def test_where_tells_how_far_a_step_is() -> None:
    hop = a_hop()
    assert stage_of(hop, 1) is Stage.UNKNOWN
    step = a_step(1)
    hop.judge(step, UP, 0.0)
    assert stage_of(hop, 1) is Stage.RECEIVED
    hop.receipts(0.2, 7)
    hop.receipts(1.5, 8)
    assert stage_of(hop, 1) is Stage.WORKING
    hop.computed(step, step.payload)
    hop.sending(step)
    assert stage_of(hop, 1) is Stage.SENT
    assert stage_of(hop, 1, epoch=2) is Stage.UNKNOWN
    hop.link(LinkHop(SESSION, 2, UP, DOWN, 1, (1,)))
    assert stage_of(hop, 1, epoch=2) is Stage.UNKNOWN


def test_receipts_are_given_for_slow_steps_alone() -> None:
    hop = a_hop()
    step = a_step(1)
    hop.judge(step, UP, 0.0)
    hop.judge(a_step(2, 1), UP, 0.0)
    assert hop.receipts(RECEIPT_AFTER_S / 2, 1) == []
    told = hop.receipts(RECEIPT_AFTER_S, 1)
    assert [(receipt.step_id, receipt.stage) for receipt in told] == [
        (1, Stage.RECEIVED),
        (2, Stage.RECEIVED),
    ]
    assert hop.receipts(0.9, 2) == []
    assert [(r.step_id, r.stage) for r in hop.receipts(1.2, 3)] == [(1, Stage.WORKING)]
    assert hop.receipts(5.0, 3) == []  # no progress, no sign of life
    assert [(r.step_id, r.stage) for r in hop.receipts(5.1, 4)] == [(1, Stage.WORKING)]
    hop.computed(step, step.payload)
    hop.sending(step)
    assert hop.receipts(9.0, 5) == []  # it is the next hop's by now
    receipt = hop.sent(step)
    assert receipt is not None
    assert (receipt.step_id, receipt.stage) == (1, Stage.SENT)


def test_what_left_after_a_new_link_is_of_no_account() -> None:
    hop = a_hop()
    step = a_step(1)
    hop.judge(step, UP, 0.0)
    hop.receipts(1.0, 1)
    hop.link(LinkHop(SESSION, 2, UP, DOWN, 0))
    assert hop.sent(step) is None
    assert hop.receipts(9.0, 2) == []
