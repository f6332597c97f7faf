"""The engine over blocks that are simple enough to check by head: messages in, answers out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from corolla.model.adapters import Overlay
from corolla.model.attention import Batch, Segment
from corolla.model.batch import Policy
from corolla.model.checkpoint import open_checkpoint
from corolla.model.engine import Engine
from corolla.model.failures import explain
from corolla.model.parking import IDLE_S, PATIENCE_S
from corolla.model.pool import PAGE_TOKENS, Memory, PageCopy, PageMove
from corolla.model.sessions import Capacity
from corolla.model.span import Span
from corolla.model.steps import cut
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.messages import Message
from corolla.protocol.steps import NEW_ROW, Reply, Row
from corolla.protocol.tensors import Encoding
from corolla.protocol.work import (
    BeginGeneration,
    CloseCache,
    Compute,
    Configure,
    Done,
    Failed,
    ModelSource,
    OpenCache,
    Restore,
    Restored,
    Sampling,
    SourceKind,
    TokenRow,
)

from .tiny import NUM_BLOCKS, VOCAB_SIZE, save_tiny

HIDDEN_SIZE = 2
NUM_PAGES = 16
POLICY = Policy(decode_tokens=64, prefill_tokens=64, mixed_tokens=16, patience=3)
A, B, C, D = b"a" * 16, b"b" * 16, b"c" * 16, b"d" * 16


class SummingBlocks:
    """Blocks whose output at a position is the sum of all inputs of its row so far, times the blocks passed.

    A token that is lost, stale, doubled or somebody else's changes every later sum.
    """

    def __init__(self) -> None:
        self.start, self.end = 2, 6
        self.hidden_size = HIDDEN_SIZE
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.num_blocks_computed = 0
        self.passes: list[tuple[tuple[int, int], int]] = []  # blocks, tokens
        self.before_pass: Callable[[Batch], None] = lambda batch: None
        self._slots = torch.full((NUM_PAGES * PAGE_TOKENS, HIDDEN_SIZE), float("nan"))
        self._host = self._slots.repeat(2, 1)
        self._between = self._slots.clone()
        self.num_moved = 0  # pages, to host memory or back

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        for source, target in copies:
            at, to = source * PAGE_TOKENS, target * PAGE_TOKENS
            self._slots[to : to + PAGE_TOKENS] = self._slots[at : at + PAGE_TOKENS]

    def move_pages(self, moves: Iterable[PageMove]) -> None:
        memories = {Memory.DEVICE: self._slots, Memory.HOST: self._host, Memory.BETWEEN: self._between}
        for of, source, to, target in moves:
            at, goes = source * PAGE_TOKENS, target * PAGE_TOKENS
            memories[to][goes : goes + PAGE_TOKENS] = memories[of][at : at + PAGE_TOKENS]
            if of is not Memory.DEVICE:  # others may share what stays there
                memories[of][at : at + PAGE_TOKENS] = float("nan")
            self.num_moved += 1

    @property
    def modules(self) -> Mapping[int, nn.Module]:
        return {}

    def forward(
        self,
        hidden: Tensor,
        batch: Batch,
        blocks: tuple[int, int] | None = None,
        overlays: Sequence[Overlay] = (),
    ) -> Tensor:
        assert blocks is not None
        self.before_pass(batch)
        self.passes.append((blocks, batch.num_tokens))
        self.num_blocks_computed += blocks[1] - blocks[0]
        outputs, offset = [], 0
        for segment in batch.segments:
            slots = [
                segment.pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
                for position in range(segment.start + segment.n)
            ]
            self._slots[slots[segment.start :]] = hidden[offset : offset + segment.n]
            outputs.append(self._slots[slots].cumsum(0)[segment.start :])
            offset += segment.n
        return torch.cat(outputs) * (blocks[1] - blocks[0])


class Desk:
    """An engine, its answers, and requests in few words."""

    def __init__(self, num_pages: int = NUM_PAGES, num_host_pages: int = 0) -> None:
        self.blocks = SummingBlocks()
        self.answers: list[Message] = []
        self.now_s = 0.0  # each look at the clock takes a hundredth of a second
        self.engine = Engine(
            self.blocks,
            None,
            Capacity(num_pages, num_host_pages),
            self.answers.append,
            POLICY,
            clock=self.clock,
        )
        self._request = 0

    def clock(self) -> float:
        self.now_s += 0.01
        return self.now_s

    def open(
        self, session: bytes = A, blocks: tuple[int, int] = (2, 6), rows: int = 1, tokens: int = 64
    ) -> Message:
        self._request += 1
        self.engine.handle(
            OpenCache(self._request, session, *blocks, Encoding.FLOAT32, max_rows=rows, max_tokens=tokens)
        )
        return self.answers.pop()

    def ask(
        self, step: int, rows: Iterable[tuple[int, int, int]], values: Iterable[float], session: bytes = A,
        reply: Reply = Reply.ALL, committed: int | None = None,
    ) -> int:  # fmt: skip
        """Queue a step whose tokens are these values; the request's number."""
        self._request += 1
        payload = torch.tensor([[value, -value] for value in values], dtype=torch.float32).numpy().tobytes()
        self.engine.handle(
            Compute(
                self._request,
                session,
                step,
                step - 1 if committed is None else committed,
                tuple(Row(*row) for row in rows),
                reply,
                payload,
            )
        )
        return self._request

    def run(self) -> dict[int, Message]:
        """Answers of all that waited, by request."""
        while not self.engine.is_idle:
            self.engine.run()
        answers = {getattr(answer, "request", 0): answer for answer in self.answers}
        self.answers.clear()
        return answers

    def step(
        self, step: int, rows: Iterable[tuple[int, int, int]], values: Iterable[float], session: bytes = A,
        reply: Reply = Reply.ALL,
    ) -> list[float]:  # fmt: skip
        """Run a step; its answer per block passed."""
        request = self.ask(step, rows, values, session, reply)
        return sums(self.run()[request])

    def fail(self, step: int, rows: Iterable[tuple[int, int, int]], values: Iterable[float]) -> CorollaError:
        return problem(self.run_one(self.ask(step, rows, values)))

    def run_one(self, request: int) -> Message:
        return self.run()[request]

    def restore(self, base_step: int, lengths: tuple[int, ...], session: bytes = A) -> Message:
        self._request += 1
        self.engine.handle(Restore(self._request, session, base_step, lengths))
        return self.answers.pop()


def sums(answer: Message, num_blocks: int = 4) -> list[float]:
    assert isinstance(answer, Done), answer
    if not answer.payload:
        return []
    states = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32).view(-1, HIDDEN_SIZE)
    assert torch.equal(states[:, 0], -states[:, 1])
    return [float(value) for value in states[:, 0] / num_blocks]


def problem(answer: Message) -> CorollaError:
    assert isinstance(answer, Failed), answer
    return answer.problem()


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    assert isinstance(desk.open(), Done)
    return desk


def test_a_prefill_and_its_decodes_see_all_tokens_before_them(desk: Desk) -> None:
    assert desk.step(1, [(NEW_ROW, 0, 3)], [1, 2, 3]) == [1, 3, 6]
    assert desk.step(2, [(0, 3, 1)], [4]) == [10]
    assert desk.step(3, [(0, 4, 2)], [5, 6]) == [15, 21]


def test_only_the_tokens_asked_for_are_answered(desk: Desk) -> None:
    desk.open(rows=3)
    rows = [(NEW_ROW, 0, 2), (NEW_ROW, 0, 0), (NEW_ROW, 0, 3)]
    assert desk.step(1, rows, [1, 2, 3, 4, 5], reply=Reply.ALL) == [1, 3, 3, 7, 12]
    assert desk.step(2, rows, [1, 2, 3, 4, 5], reply=Reply.LAST) == [3, 12]
    assert desk.step(3, rows, [1, 2, 3, 4, 5], reply=Reply.NONE) == []


def test_decodes_of_several_sessions_run_in_one_pass(desk: Desk) -> None:
    desk.open(B)
    desk.step(1, [(NEW_ROW, 0, 2)], [1, 2])
    desk.step(1, [(NEW_ROW, 0, 2)], [10, 20], session=B)
    before = len(desk.blocks.passes)
    first, second = desk.ask(2, [(0, 2, 1)], [3]), desk.ask(2, [(0, 2, 1)], [30], session=B)
    answers = desk.run()
    assert (sums(answers[first]), sums(answers[second])) == ([6], [60])
    assert desk.blocks.passes[before:] == [((2, 6), 2)]


def test_sessions_on_parts_of_the_span_run_through_just_their_blocks(desk: Desk) -> None:
    desk.open(B, blocks=(3, 5))
    first, second = desk.ask(1, [(NEW_ROW, 0, 2)], [1, 2]), desk.ask(1, [(NEW_ROW, 0, 2)], [1, 2], session=B)
    answers = desk.run()
    assert sums(answers[first], 4) == sums(answers[second], 2) == [1, 3]
    assert sorted(desk.blocks.passes) == [((2, 6), 2), ((3, 5), 2)]


def test_a_long_prefill_in_parts_answers_as_if_it_were_whole_and_lets_decodes_through(desk: Desk) -> None:
    desk.open(B, tokens=300)
    desk.step(1, [(NEW_ROW, 0, 1)], [1])
    long = desk.ask(1, [(NEW_ROW, 0, 200)], [1] * 200, session=B, reply=Reply.LAST)
    desk.engine.run()
    short = desk.ask(2, [(0, 1, 1)], [2])
    desk.engine.run()
    assert [getattr(answer, "request", 0) for answer in desk.answers] == [short]
    assert sums(desk.run()[long]) == [200]
    assert max(num_tokens for _, num_tokens in desk.blocks.passes) <= 64


def test_steps_in_flight_of_one_session_run_in_order(desk: Desk) -> None:
    asked = [
        desk.ask(step, [(0 if step > 1 else NEW_ROW, step - 1, 1)], [step], committed=0) for step in (1, 2, 3)
    ]
    answers = desk.run()
    assert [sums(answers[request]) for request in asked] == [[1], [3], [6]]


def test_rows_fork_and_are_dropped(desk: Desk) -> None:
    desk.open(rows=2)
    desk.step(1, [(NEW_ROW, 0, 3)], [1, 2, 3])
    assert desk.step(2, [(0, 3, 1), (0, 3, 1)], [10, 20]) == [16, 26]
    assert desk.step(3, [(1, 4, 1)], [1]) == [27]


def test_a_step_without_tokens_is_done(desk: Desk) -> None:
    desk.step(1, [(NEW_ROW, 0, 3)], [1, 2, 3])
    assert desk.step(2, [(0, 2, 0)], []) == []
    assert desk.step(3, [(0, 2, 1)], [4]) == [7]


def test_sessions_that_share_passes_get_what_each_alone_would_get(tmp_path: Path) -> None:
    whole = save_tiny(tmp_path)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path)), tmp_path)
    span = Span.load(checkpoint, 0, NUM_BLOCKS, torch.float32, torch.device("cpu"))
    span.allocate(NUM_PAGES)
    answers: list[Message] = []
    engine = Engine(
        span, None, Capacity(NUM_PAGES), answers.append, Policy(prefill_tokens=24, mixed_tokens=7)
    )
    hidden, expected, lengths = {}, {}, {A: 70, B: 9, C: 33}
    outputs: list[Tensor] = []  # of the last block, before the final norm
    whole.model.layers[-1].register_forward_hook(lambda *call: outputs.append(call[2]))
    for index, (session, length) in enumerate(lengths.items()):
        tokens = (torch.arange(length + 3) * (7 + index)) % VOCAB_SIZE
        with torch.inference_mode():
            hidden[session] = whole(tokens[None], output_hidden_states=True).hidden_states[0][0]
        expected[session] = outputs[-1].reshape(length + 3, -1)
        engine.handle(OpenCache(0, session, 0, NUM_BLOCKS, Encoding.FLOAT32, 1, 128))
    got: dict[bytes, list[Tensor]] = {session: [] for session in lengths}
    for session, length in lengths.items():
        for step, (first, num) in enumerate([(0, length), (length, 1), (length + 1, 1), (length + 2, 1)], 1):
            payload = hidden[session][first : first + num].numpy().tobytes()
            row = Row(0 if first else NEW_ROW, first, num)
            engine.handle(Compute(session[0] * 8 + step, session, step, 0, (row,), Reply.ALL, payload))
    while not engine.is_idle:
        engine.run()
    for answer in answers[len(lengths) :]:
        assert isinstance(answer, Done), answer
        states = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32).view(-1, span.hidden_size)
        got[bytes([answer.request // 8]) * 16].append(states)
    for session in lengths:
        assert torch.allclose(torch.cat(got[session]), expected[session], atol=1e-5)


def test_texts_in_a_cache_three_times_too_small_are_those_of_each_alone(tmp_path: Path) -> None:
    whole = save_tiny(tmp_path)
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(tmp_path)), tmp_path)
    num_pages, num_host_pages, length = 6, 14, 256
    sessions = [bytes([number]) * 16 for number in range(6)]  # each of up to 3 pages: 18 in all
    prompts = [[(7 * number + place) % VOCAB_SIZE for place in range(120)] for number in range(6)]

    def written(chosen: Sequence[int]) -> list[list[int]]:
        span = Span.load(checkpoint, 0, NUM_BLOCKS, torch.float32, torch.device("cpu"))
        span.allocate(num_pages, num_host_pages=num_host_pages)
        answers: list[Message] = []
        seconds = iter(range(1 << 30))  # all of them had their turn, and waited, whenever it is looked at
        engine = Engine(
            span, None, Capacity(num_pages, num_host_pages), answers.append, clock=lambda: next(seconds)
        )
        texts = {number: list(prompts[number]) for number in chosen}
        for number in chosen:
            engine.handle(OpenCache(0, sessions[number], 0, NUM_BLOCKS, Encoding.FLOAT32, 1, length))
            assert isinstance(answers.pop(), Done)
        for step in range(1, 20):  # beyond the end of a page
            for number, text in texts.items():
                fresh = text if step == 1 else text[-1:]
                row = Row(0 if step > 1 else NEW_ROW, len(text) - len(fresh), len(fresh))
                with torch.inference_mode():
                    payload = whole.model.embed_tokens(torch.tensor(fresh)).numpy().tobytes()
                engine.handle(Compute(number, sessions[number], step, step - 1, (row,), Reply.LAST, payload))
            while not engine.is_idle:
                engine.run()
            for answer in answers:
                assert isinstance(answer, Done), answer
                state = torch.frombuffer(bytearray(answer.payload), dtype=torch.float32)
                with torch.inference_mode():
                    texts[answer.request].append(int(whole.lm_head(whole.model.norm(state)).argmax()))
            answers.clear()
        return list(texts.values())

    assert written(range(6)) == [written([number])[0] for number in range(6)]


# errors fail one request alone


def test_a_gap_is_reported_with_the_first_position_missing(desk: Desk) -> None:
    desk.step(1, [(NEW_ROW, 0, 3)], [1, 2, 3])
    failed = desk.fail(2, [(0, 5, 1)], [4])
    assert (failed.code, failed.details["first_position"]) == (Code.HISTORY_GAP, 3)
    assert desk.step(2, [(0, 3, 1)], [4]) == [10]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_input_that_is_not_finite_is_the_senders_fault_and_changes_nothing(desk: Desk, value: float) -> None:
    desk.step(1, [(NEW_ROW, 0, 2)], [1, 2])
    assert desk.fail(2, [(0, 2, 1)], [value]).code is Code.NOT_FINITE
    assert desk.step(2, [(0, 2, 1)], [3]) == [6]


def test_output_that_is_not_finite_is_our_fault_and_is_undone(desk: Desk) -> None:
    desk.step(1, [(NEW_ROW, 0, 2)], [1, 2])
    failed = desk.fail(2, [(0, 2, 2)], [3e38, 3e38])
    assert (failed.code, failed.details) == (Code.INTERNAL, {"not_finite": "output"})
    assert "blocks 2:6" in failed.message
    assert desk.step(2, [(0, 2, 1)], [3]) == [6]


def test_output_that_nobody_asked_for_is_checked_too(desk: Desk) -> None:
    request = desk.ask(1, [(NEW_ROW, 0, 3)], [3e38, 3e38, 1], reply=Reply.NONE)
    assert problem(desk.run_one(request)).details == {"not_finite": "output"}


def test_a_payload_of_another_length_is_refused(desk: Desk) -> None:
    failed = desk.fail(1, [(NEW_ROW, 0, 3)], [1, 2])
    assert failed.code is Code.BAD_SHAPE
    assert "16 bytes" in failed.message
    assert "24" in failed.message


def test_a_step_of_a_session_that_is_not_open_is_refused(desk: Desk) -> None:
    assert problem(desk.run_one(desk.ask(1, [(NEW_ROW, 0, 1)], [1], session=B))).code is Code.UNKNOWN_SESSION
    assert problem(desk.restore(0, (), session=B)).code is Code.UNKNOWN_SESSION


def test_one_bad_step_of_a_batch_fails_alone(desk: Desk) -> None:
    desk.open(B)
    good, bad = desk.ask(1, [(NEW_ROW, 0, 1)], [1]), desk.ask(1, [(NEW_ROW, 0, 1)], [3.4e38], session=B)
    answers = desk.run()
    assert sums(answers[good]) == [1]
    assert problem(answers[bad]).code is Code.INTERNAL


def refuse_large(batch: Batch) -> None:
    """A device on which one of the sessions does not fit."""
    if any(segment.n > 4 for segment in batch.segments):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_batch_without_memory_is_run_again_step_by_step(desk: Desk) -> None:
    desk.open(B)
    desk.step(1, [(NEW_ROW, 0, 1)], [1])
    desk.blocks.before_pass = refuse_large
    small, large = desk.ask(2, [(0, 1, 1)], [2]), desk.ask(1, [(NEW_ROW, 0, 5)], [1] * 5, session=B)
    answers = desk.run()
    assert sums(answers[small]) == [3]
    assert problem(answers[large]).code is Code.OUT_OF_MEMORY
    assert desk.step(3, [(0, 2, 1)], [3]) == [6]


def test_a_defect_is_internal_and_the_session_goes_on(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    def broken(batch: Batch) -> None:
        raise ZeroDivisionError("a defect")

    desk.step(1, [(NEW_ROW, 0, 2)], [1, 2])
    desk.blocks.before_pass = broken
    failed = desk.fail(2, [(0, 2, 1)], [3])
    assert (failed.code, failed.message) == (Code.INTERNAL, "ZeroDivisionError: a defect")
    assert "failed" in caplog.text
    desk.blocks.before_pass = lambda batch: None
    assert desk.step(2, [(0, 2, 1)], [3]) == [6]


def test_a_lost_device_ends_the_worker_and_no_request_alone(desk: Desk) -> None:
    def broken(batch: Batch) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")

    desk.open(B)
    desk.blocks.before_pass = broken
    desk.ask(1, [(NEW_ROW, 0, 1)], [1], session=A)
    desk.ask(1, [(NEW_ROW, 0, 1)], [1], session=B)
    assert desk.run() == {}  # they fail with the process: their sessions go on elsewhere
    assert desk.engine.lost is not None
    assert desk.engine.lost.code is Code.DEVICE_LOST
    assert "unspecified launch failure" in desk.engine.lost.message


def test_a_failed_part_of_a_prefill_undoes_the_parts_before_it(desk: Desk) -> None:
    desk.open(tokens=256)
    desk.step(1, [(NEW_ROW, 0, 2)], [1, 2])
    values = [1.0] * 100 + [3e38, 3e38]
    assert desk.fail(2, [(0, 2, 102)], values).code is Code.INTERNAL
    assert desk.engine.is_idle
    assert desk.fail(2, [(0, 3, 1)], [1]).code is Code.HISTORY_GAP
    assert desk.step(2, [(0, 2, 1)], [3]) == [6]


def test_messages_that_this_worker_has_no_part_for_are_refused(desk: Desk) -> None:
    desk.engine.handle(BeginGeneration(9, 1, Sampling(), Encoding.FLOAT32, 8, tokens=(TokenRow((1,)),)))
    assert problem(desk.answers.pop()).code is Code.NOT_READY
    ends_only = Engine(None, None, Capacity(0), desk.answers.append)
    ends_only.handle(OpenCache(1, A, 0, 1, Encoding.FLOAT32, 1, 64))
    assert problem(desk.answers.pop()).code is Code.BLOCKS_OUT_OF_RANGE


def test_a_message_that_cannot_be_answered_is_logged(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.engine.handle(Configure(ModelSource(SourceKind.FOLDER, "/model"), "/cache"))
    assert desk.answers == []
    assert "configure" in caplog.text


# restore and close


def test_restoring_sets_rows_back_and_tells_what_they_hold(desk: Desk) -> None:
    desk.step(1, [(NEW_ROW, 0, 3)], [1, 2, 3])
    desk.step(2, [(0, 3, 1)], [4])
    assert desk.restore(1, (2,)) == Restored(4, (2,))
    assert desk.step(2, [(0, 2, 1)], [10]) == [13]


def test_restoring_an_unknown_base_leaves_nothing(desk: Desk) -> None:
    desk.step(1, [(NEW_ROW, 0, 3)], [1, 2, 3])
    assert desk.restore(7, (3,)) == Restored(3, (0,))
    assert desk.step(8, [(NEW_ROW, 0, 1)], [5]) == [5]


def test_restoring_drops_queued_steps_unanswered(desk: Desk) -> None:
    desk.step(1, [(NEW_ROW, 0, 3)], [1, 2, 3])
    desk.ask(2, [(0, 3, 1)], [4])
    desk.ask(3, [(0, 4, 1)], [5])
    assert desk.restore(1, (3,)) == Restored(5, (3,))
    assert desk.engine.is_idle
    assert desk.run() == {}
    assert desk.step(2, [(0, 3, 1)], [6]) == [12]


def test_what_was_never_computed_of_a_dropped_replay_is_not_held(desk: Desk) -> None:
    desk.open(tokens=256)
    desk.step(5, [(NEW_ROW, 0, 3)], [1, 2, 3])  # the first part of a replay to step 5
    desk.ask(5, [(0, 3, 100)], [1] * 100, committed=5)  # the second, of which one pass runs
    desk.engine.run()
    assert desk.restore(5, (103,)) == Restored(5, (3,))
    assert desk.step(5, [(0, 3, 1)], [4]) == [10]


def test_closing_frees_everything_and_drops_what_waits(desk: Desk) -> None:
    desk.open(tokens=256)
    desk.ask(1, [(NEW_ROW, 0, 200)], [1] * 200)
    desk.engine.run()
    assert desk.engine.beat().free_tokens == (NUM_PAGES - 4) * PAGE_TOKENS
    desk.engine.handle(CloseCache(A))
    desk.engine.handle(CloseCache(A))
    assert desk.engine.is_idle
    assert desk.answers == []
    assert desk.engine.beat().free_tokens == NUM_PAGES * PAGE_TOKENS


# admission


def test_a_session_is_admitted_while_what_all_are_expected_to_hold_leaves_room(desk: Desk) -> None:
    desk.step(1, [(NEW_ROW, 0, 1)], [1])
    for session in (B, C):
        assert isinstance(desk.open(session, tokens=16 * PAGE_TOKENS), Done)  # a quarter of it, they say
    desk.step(1, [(NEW_ROW, 0, 8 * PAGE_TOKENS)], [1] * 8 * PAGE_TOKENS, session=B)
    busy = problem(desk.open(D, tokens=16 * PAGE_TOKENS))
    assert busy.code is Code.BUSY
    assert busy.details["wanted_tokens"] == 4 * PAGE_TOKENS
    assert busy.details["free_tokens"] == 3 * PAGE_TOKENS
    assert 0 < busy.details["wait_s"] <= 60
    desk.engine.handle(CloseCache(B))
    assert isinstance(desk.open(D, tokens=16 * PAGE_TOKENS), Done)


def test_room_in_host_memory_counts(desk: Desk) -> None:
    desk = Desk(num_host_pages=NUM_PAGES)
    sessions = [bytes([number]) * 16 for number in range(9)]
    answers = [desk.open(session, tokens=16 * PAGE_TOKENS) for session in sessions]
    assert [isinstance(answer, Done) for answer in answers] == [True] * 8 + [False]


def test_a_session_that_could_never_fit_is_too_long(desk: Desk) -> None:
    assert problem(desk.open(B, tokens=NUM_PAGES * PAGE_TOKENS + 1)).code is Code.TOO_LONG
    assert problem(desk.open(B, rows=16, tokens=PAGE_TOKENS)).code is Code.TOO_LONG


@pytest.mark.parametrize("blocks", [(1, 3), (2, 7), (4, 4), (5, 3)])
def test_blocks_outside_the_span_are_refused(desk: Desk, blocks: tuple[int, int]) -> None:
    failed = problem(desk.open(B, blocks=blocks))
    assert failed.code is Code.BLOCKS_OUT_OF_RANGE
    assert "2:6" in failed.message


def test_opening_a_session_again_begins_it_anew(desk: Desk) -> None:
    desk.step(1, [(NEW_ROW, 0, 3)], [1, 2, 3])
    assert isinstance(desk.open(blocks=(2, 4)), Done)
    assert sums(desk.run_one(desk.ask(1, [(NEW_ROW, 0, 1)], [7])), 2) == [7]
    assert desk.engine.beat().free_tokens == (NUM_PAGES - 1) * PAGE_TOKENS


def test_an_admitted_session_can_always_grow_to_its_promise_by_forking(desk: Desk) -> None:
    desk.engine.handle(CloseCache(A))
    assert isinstance(desk.open(B, tokens=4 * PAGE_TOKENS), Done)
    desk.step(1, [(NEW_ROW, 0, 256)], [1] * 256, session=B)
    length = 2 * PAGE_TOKENS
    assert isinstance(desk.open(A, rows=4, tokens=length), Done)
    desk.step(1, [(NEW_ROW, 0, 60)], [1] * 60)
    row_values = [1.0] * 4
    desk.step(2, [(0, 60, 1)] * 4, row_values)
    for step, position in enumerate(range(61, length), start=3):
        parents = [3, 3, 0, 1] if step % 2 else [0, 1, 2, 3]
        got = desk.step(step, [(parent, position, 1) for parent in parents], row_values)
        assert got == [position + 1] * 4


def test_progress_grows_with_blocks_and_rounds(desk: Desk) -> None:
    before = desk.engine.beat()
    desk.ask(1, [(NEW_ROW, 0, 3)], [1, 2, 3])
    assert desk.engine.beat(2).queue == before.queue + 3
    desk.run()
    after = desk.engine.beat()
    assert after.progress >= before.progress + 4
    assert after.tokens_per_s > 0
    desk.engine.run()
    assert desk.engine.beat().progress == after.progress + 1


# more promised than there is


def write(desk: Desk, sessions: Sequence[bytes], num_steps: int, first: int = 60) -> None:
    """Texts that grow token by token, all of them together; every sum is checked."""
    for session in sessions:
        assert isinstance(desk.open(session, tokens=16 * PAGE_TOKENS), Done)
        desk.ask(1, [(NEW_ROW, 0, first)], [1] * first, session=session)
        desk.run()
    for step in range(2, num_steps + 2):
        position = first + (step - 2) * 16
        asked = [desk.ask(step, [(0, position, 16)], [1] * 16, session=session) for session in sessions]
        answers = desk.run()
        for request in asked:
            assert sums(answers[request]) == list(range(position + 1, position + 17))


def test_sessions_that_together_outgrow_the_device_are_parked_in_turns_and_lose_nothing() -> None:
    desk = Desk(num_host_pages=2 * NUM_PAGES)
    sessions = [bytes([number]) * 16 for number in range(6)]
    write(desk, sessions, 20)  # 6 * 7 pages, of 16
    assert desk.blocks.num_moved > 2 * NUM_PAGES


def test_who_is_idle_makes_room_at_once_and_comes_back_as_it_was() -> None:
    desk = Desk(num_host_pages=10)  # so that the two change places
    desk.open(A, tokens=16 * PAGE_TOKENS)
    desk.step(1, [(NEW_ROW, 0, 600)], [1] * 600)
    desk.open(B, tokens=16 * PAGE_TOKENS)
    desk.now_s += IDLE_S
    before = desk.now_s
    desk.step(1, [(NEW_ROW, 0, 600)], [2] * 600, session=B)
    assert desk.now_s - before < PATIENCE_S
    assert desk.blocks.num_moved == 10
    desk.now_s += IDLE_S
    assert desk.step(2, [(0, 600, 1)], [1]) == [601]
    desk.now_s += IDLE_S
    assert desk.step(2, [(0, 600, 1)], [2], session=B) == [1202]


def test_parked_rows_are_set_back_and_closed_as_any() -> None:
    desk = Desk(num_host_pages=NUM_PAGES)
    desk.open(A, tokens=16 * PAGE_TOKENS)
    desk.step(1, [(NEW_ROW, 0, 600)], [1] * 600)
    desk.open(B, tokens=16 * PAGE_TOKENS)
    desk.now_s += IDLE_S
    desk.step(1, [(NEW_ROW, 0, 600)], [2] * 600, session=B)
    assert desk.restore(1, (70,)) == Restored(5, (70,))
    assert desk.step(2, [(0, 70, 1)], [1]) == [71]
    desk.now_s += IDLE_S
    desk.open(C, tokens=16 * PAGE_TOKENS)
    desk.step(1, [(NEW_ROW, 0, 900)], [1] * 900, session=C)
    assert desk.restore(0, (), session=B).held == ()  # type: ignore[attr-defined]
    assert desk.step(1, [(NEW_ROW, 0, 1)], [5], session=B) == [5]
    for session in (A, B, C):
        desk.engine.handle(CloseCache(session))
    assert desk.engine.beat().free_tokens == NUM_PAGES * PAGE_TOKENS


def test_without_host_memory_the_idle_are_evicted_and_told_from_where_to_send_again() -> None:
    desk = Desk()
    desk.open(A, tokens=16 * PAGE_TOKENS)
    desk.step(1, [(NEW_ROW, 0, 600)], [1] * 600)
    desk.open(B, tokens=16 * PAGE_TOKENS)
    desk.now_s += IDLE_S
    desk.step(1, [(NEW_ROW, 0, 600)], [2] * 600, session=B)
    failed = desk.fail(2, [(0, 600, 1)], [1])
    assert failed.code is Code.HISTORY_GAP
    assert (failed.details["first_position"], failed.details["evicted"]) == (0, True)
    desk.now_s += IDLE_S
    assert desk.restore(1, (600,)).held == (0,)  # type: ignore[attr-defined]
    assert desk.step(1, [(NEW_ROW, 0, 600)], [1] * 600)[-1] == 600
    assert desk.step(2, [(0, 600, 1)], [1]) == [601]


def test_a_step_that_waits_for_pages_holds_nobody_else_up_and_can_be_dropped() -> None:
    desk = Desk(num_host_pages=NUM_PAGES)
    for session in (A, B):
        desk.open(session, tokens=16 * PAGE_TOKENS)
    desk.step(1, [(NEW_ROW, 0, 600)], [1] * 600)
    large = desk.ask(1, [(NEW_ROW, 0, 600)], [2] * 600, session=B)
    small = desk.ask(2, [(0, 600, 1)], [1])
    for _ in range(4):
        desk.engine.run()
    (answer,) = desk.answers
    assert (getattr(answer, "request", 0), sums(answer)) == (small, [601])
    assert desk.engine.blocked_s > 0
    assert not desk.engine.is_idle
    desk.answers.clear()
    assert desk.restore(0, (), session=B) == Restored(6, ())
    assert desk.engine.is_idle
    assert large not in desk.run()


# pure parts


def test_a_cut_of_segments_is_counted_over_all_of_them() -> None:
    segments = (Segment((1, 2), 10, 3), Segment((), 0, 0), Segment((3,), 5, 4))
    assert cut(segments, 0, 7) == (segments[0], segments[2])
    assert cut(segments, 2, 3) == (Segment((1, 2), 12, 1), Segment((3,), 5, 2))
    assert cut(segments, 5, 2) == (Segment((3,), 7, 2),)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (MemoryError(), Code.OUT_OF_MEMORY),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            Code.OUT_OF_MEMORY,
        ),
        (RuntimeError("std::bad_alloc"), Code.OUT_OF_MEMORY),
        (RuntimeError("No CUDA GPUs are available"), Code.DEVICE_LOST),
        (RuntimeError("HIP error: an illegal memory access was encountered"), Code.DEVICE_LOST),
        (torch.AcceleratorError("CUDA error: unspecified launch failure\nSearch for"), Code.DEVICE_LOST),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), Code.DEVICE_LOST),
        (RuntimeError("CUDA error: invalid configuration argument"), Code.INTERNAL),
        (torch.OutOfMemoryError("CUDA out of memory"), Code.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), Code.OUT_OF_MEMORY),
        (RuntimeError("shapes differ\nmore"), Code.INTERNAL),
        (CorollaError(Code.BUSY, "later"), Code.BUSY),
    ],
)
def test_foreign_errors_are_explained(raised: Exception, code: Code) -> None:
    assert explain(raised).code is code
    assert "\n" not in explain(raised).message
