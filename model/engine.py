"""The loop's body: one worker's requests in, passes through the blocks, answers out.

Owns the device: everything that computes runs in the one thread that calls it (torch keeps a team of
threads for each caller). What runs next is decided by `batch`, what a session may hold by `sessions`, text
and samples by `generation`; this file carries steps between them and answers each request once.

An error of one request fails that request alone, and leaves its session as it was before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatchmethod
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..protocol.errors import Code, CorollaError, error
from ..protocol.messages import Message
from ..protocol.work import (
    Backward,
    Beat,
    BeginGeneration,
    CloseCache,
    Compute,
    Done,
    EmbedPrompt,
    EndGeneration,
    Failed,
    Forward,
    HoldPart,
    NamePages,
    OpenCache,
    Restore,
    Restored,
    Sample,
)
from .adapters import Overlay
from .adapters import Part as AdapterPart
from .attention import Batch, Segment
from .batch import Part, Pass, Policy, Scheduler
from .company import Rhythm
from .failures import explain
from .generation import Generations
from .pool import PageMove
from .sessions import Capacity, Sessions
from .steps import Blocks, Step, Steps
from .training import Room, Trainer
from .transfers import to_host

logger = logging.getLogger(__name__)

# How often steps look for pages while nothing else can run; a session is idle after a second.
_BLOCKED_S: Final = 0.02


class _Worn(NamedTuple):
    """The adapter of a session: names to unpin, and block → part."""

    names: tuple[bytes, ...]
    parts: Mapping[int, AdapterPart]


class Engine:
    """One worker's device, behind messages.

    `handle` takes a request, `run` does some of what waits. Answers go to `send`, some of them later.
    """

    def __init__(
        self,
        span: Blocks | None,
        generations: Generations | None,
        capacity: Capacity,
        send: Callable[[Message], None],
        policy: Policy | None = None,
        room: Room | None = None,
        *,
        on_decode: Callable[[float, int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_decode: told of each pass of one token alone through the whole span: seconds, tokens before it."""
        self._span = span
        self._clock = clock
        self._on_decode = on_decode
        self._alone: int | None = None  # tokens before the only one of the pass that runs
        self._generations = generations
        self._send = send
        blocks = (span.start, span.end) if span else (0, 0)
        self._sessions = Sessions(blocks, capacity, self._move_pages)
        self._scheduler = Scheduler(policy or Policy())
        self._steps = Steps(self._sessions, clock)
        self._samples: list[Sample] = []
        self._trainer = Trainer(span, room or Room()) if span else None
        self._worn: dict[bytes, _Worn] = {}  # by session
        self._num_loops = 0
        self._num_tokens = 0
        self._rhythm = Rhythm()
        self._last_beat = (time.monotonic(), 0)
        self.lost: CorollaError | None = None  # why the device computes no more; then this process should end

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return not self._samples and not self._scheduler.num_waiting

    @property
    def blocked_s(self) -> float:
        """How long to wait for requests first, where nothing can run before somebody makes room; else 0."""
        return _BLOCKED_S if self._steps.are_blocked and not self._samples else 0.0

    @property
    def grace_s(self) -> float:
        """How long it pays to wait for more requests before `run`: a part of what a pass takes, at most."""
        if not (self._samples or self._scheduler.has_steps):
            return 0.0
        return self._rhythm.grace_s(self._clock(), to_sample=bool(self._samples))

    def beat(self, num_unread: int = 0) -> Beat:
        """A sign of life, for another thread to send. num_unread: requests not handed over yet.

        Progress counts blocks computed and rounds of the loop; in a block that hangs, both stand still.
        """
        now, num_tokens = time.monotonic(), self._num_tokens
        then, num_before = self._last_beat
        self._last_beat = (now, num_tokens)
        return Beat(
            progress=self._num_loops + (self._span.num_blocks_computed if self._span else 0),
            queue=num_unread + self._scheduler.num_waiting + len(self._samples),
            free_tokens=self._sessions.free_tokens,
            tokens_per_s=(num_tokens - num_before) / max(now - then, 1e-3),
        )

    def handle(self, message: Message) -> None:
        """Take a request: answer it at once, or queue it for `run`."""
        request: int | None = getattr(message, "request", None)
        try:
            self._handle(message)
        except Exception as problem:
            if request is not None:
                self._fail(request, problem)
            else:  # nobody waits for an answer
                logger.error("the message %r failed", message.KIND, exc_info=problem)

    def run(self) -> None:
        """Sample what is to be sampled, then one pass of what waits longest or matters most."""
        self._num_loops += 1
        if self._samples:
            self._sample()
            if not self._scheduler.has_steps:
                self._rhythm.begin(self._clock())
            if self.grace_s:  # those who got tokens ask for the next at once
                return
        training = self._scheduler.next_training()
        if training is not None:
            self._run_turn(training)
            return
        self._unblock()
        chosen = self._scheduler.next(self._steps.blocked)
        if chosen is not None:
            began = self._clock()
            self._alone = None
            self._run_pass(chosen)
            ended = self._clock()
            self._rhythm.passed(began, ended)
            if self._alone is not None and self._on_decode is not None:
                self._on_decode(ended - began, self._alone)

    @singledispatchmethod
    def _handle(self, message: Message) -> None:
        raise error(Code.UNSUPPORTED, f"a worker does not know the message {message.KIND!r} here")

    @_handle.register
    def _open(self, ask: OpenCache) -> None:
        self._close(CloseCache(ask.session))
        worn = None
        if ask.parts:
            worn = _Worn(ask.parts, self._training().adapters.pin((ask.start, ask.end), ask.parts))
        try:
            session = self._sessions.open(ask, self._clock())
        except CorollaError:
            self._take_off(worn)
            raise
        if worn is not None:
            self._worn[ask.session] = worn
        lengths = session.pages.lengths
        self._send(Done(ask.request, held=sum(lengths), rows=lengths))

    @_handle.register
    def _compute(self, ask: Compute) -> None:
        job = self._steps.ask(ask, self._blocks().hidden_size)
        self._note_arrival()
        self._rhythm.step_comes(ask.session, self._clock())
        self._scheduler.add(job)

    @_handle.register
    def _restore(self, ask: Restore) -> None:
        self._sessions.get(ask.session)
        self._drop_steps(ask.session)
        self._send(Restored(ask.request, self._sessions.restore(ask)))

    @_handle.register
    def _name(self, ask: NamePages) -> None:
        self._sessions.name_pages(ask)

    @_handle.register
    def _close(self, ask: CloseCache) -> None:
        self._drop_steps(ask.session)
        self._sessions.close(ask.session, self._clock())
        self._take_off(self._worn.pop(ask.session, None))
        self._rhythm.session_ends(ask.session)

    @_handle.register
    def _train(self, ask: Forward | Backward) -> None:
        self._training().begin(ask)
        self._scheduler.add_training(ask.request)

    @_handle.register
    def _hold(self, ask: HoldPart) -> None:
        self._training().adapters.hold(ask.part, ask.block, ask.payload)
        self._send(Done(ask.request))

    @_handle.register
    def _begin(self, ask: BeginGeneration) -> None:
        self._send(self._ends().begin(ask))

    @_handle.register
    def _embed_prompt(self, ask: EmbedPrompt) -> None:
        self._send(self._ends().embed_prompt(ask))

    @_handle.register
    def _take_sample(self, ask: Sample) -> None:
        self._ends()
        self._note_arrival()
        self._rhythm.sample_comes(ask.generation, self._clock())
        self._samples.append(ask)

    @_handle.register
    def _end(self, ask: EndGeneration) -> None:
        if self._generations is not None:
            self._generations.end(ask.generation)
        self._rhythm.generation_ends(ask.generation)

    def _note_arrival(self) -> None:
        """Who comes to an idle engine may be waited with from now on."""
        if self.is_idle:
            self._rhythm.begin(self._clock())

    def _blocks(self) -> Blocks:
        if self._span is None:
            raise error(Code.BLOCKS_OUT_OF_RANGE, "this worker serves no blocks")
        return self._span

    def _training(self) -> Trainer:
        self._blocks()
        if self._trainer is None:
            raise error(Code.INTERNAL, "a worker with blocks that cannot train them")
        return self._trainer

    def _take_off(self, worn: _Worn | None) -> None:
        if worn is not None:
            self._training().adapters.unpin(worn.names)

    def _ends(self) -> Generations:
        if self._generations is None:
            raise error(
                Code.NOT_READY, "this worker holds no ends of the model", "ask a worker configured with ends"
            )
        return self._generations

    def _drop_steps(self, session: bytes) -> None:
        for job in self._scheduler.drop(session):
            self._steps.give_up(job.request)

    def _sample(self) -> None:
        asks, self._samples = self._samples, []
        try:
            answers = self._ends().sample(asks)
        except Exception as problem:
            for ask in asks:
                self._fail(ask.request, problem)
            return
        for ask, answer in zip(asks, answers, strict=True):
            if isinstance(answer, CorollaError):
                self._fail(ask.request, answer)
            else:
                self._send(answer)

    def _run_turn(self, request: int) -> None:
        """One block of a training request and those that travel with it; the answers of all that are through."""
        try:
            ended = self._training().turn(request)
        except Exception as problem:
            self._scheduler.finish_training(request)
            self._fail(request, problem)
            return
        for one in ended:
            self._scheduler.finish_training(one.request)
            if isinstance(one.answer, CorollaError):
                self._fail(one.request, one.answer)
            else:
                self._num_tokens += one.num_tokens
                self._send(one.answer)

    def _run_pass(self, chosen: Pass) -> None:
        running: list[tuple[Part, Step]] = []
        for part in chosen.parts:
            try:
                step = self._steps.begun(part, self._blocks(), self._scheduler.sessions)
                if step is not None:
                    running.append((part, step))
                else:
                    self._scheduler.put_back(part)
            except Exception as problem:
                self._fail_step(part, problem)
        if not running:
            return
        try:
            outputs = self._forward(running, chosen.blocks)
        except Exception as problem:
            if len(running) == 1:
                self._fail_step(running[0][0], problem)
                return
            logger.warning("a batch of %d steps failed, each runs again alone: %s", len(running), problem)
            for part, step in running:
                self._run_alone(part, step, chosen.blocks)
            return
        for (part, _), output in zip(running, outputs, strict=True):
            self._take_output(part, output)

    def _run_alone(self, part: Part, step: Step, blocks: tuple[int, int]) -> None:
        """Run one of a failed batch; what the batch wrote already is written again with the same values."""
        try:
            (output,) = self._forward([(part, step)], blocks)
        except Exception as problem:
            self._fail_step(part, problem)
            return
        self._take_output(part, output)

    def _unblock(self) -> None:
        """Begin the steps that wait for pages, as far as there are any now."""
        for part in tuple(self._steps.blocked.values()):
            try:
                self._steps.begun(part, self._blocks(), self._scheduler.sessions)
            except Exception as problem:
                self._fail_step(part, problem)

    def _move_pages(self, moves: tuple[PageMove, ...]) -> None:
        self._blocks().move_pages(moves)

    def _forward(self, running: list[tuple[Part, Step]], blocks: tuple[int, int]) -> tuple[Tensor, ...]:
        """One pass with these parts side by side; each one's output (part.num, hidden_size)."""
        segments: list[Segment] = []
        overlays: list[Overlay] = []
        offset = 0
        for part, step in running:
            mine = step.segments_of(part)
            segments.extend(mine)
            worn = self._worn.get(part.job.session)
            if worn is not None:
                overlays.append(_overlay(worn, mine, offset, self._blocks().device))
            offset += part.num
        inputs = [step.input_of(part) for part, step in running]
        batch = Batch(tuple(segments))
        is_alone = (
            batch.num_tokens == 1 and blocks == (self._blocks().start, self._blocks().end) and not overlays
        )
        self._alone = max(segment.start for segment in segments) if is_alone else None
        output = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
        if batch.num_tokens:
            output = self._blocks().forward(output, batch, blocks, overlays)
        self._num_tokens += batch.num_tokens
        return torch.split(to_host(output), [part.num for part, _ in running])

    def _take_output(self, part: Part, output: Tensor) -> None:
        """Add a part's output to its step's answer, and send that once it is whole."""
        try:
            answer = self._steps.take_output(part, output)
        except Exception as problem:
            self._fail_step(part, problem)
            return
        if answer is not None:
            self._send(Done(part.job.request, answer))
            self._rhythm.step_answered(part.job.session)

    def _fail_step(self, part: Part, problem: Exception) -> None:
        """Answer that a step failed, and leave its session as it was before."""
        self._scheduler.cancel(part.job)
        self._steps.give_up(part.job.request)
        self._fail(part.job.request, problem)

    def _fail(self, request: int, problem: Exception) -> None:
        explained = explain(problem)
        if explained is not problem:
            logger.error("request %d failed", request, exc_info=problem)
        if explained.code is Code.DEVICE_LOST:  # this request fails with all others, when the process ends
            self.lost = explained
            return
        self._send(Failed.of(request, explained))


def _overlay(worn: _Worn, segments: Sequence[Segment], offset: int, device: torch.device) -> Overlay:
    """A session's adapter over its tokens, which start at `offset` of the batch; rows begin at position 0."""
    places = [segment.start + i for segment in segments for i in range(segment.n)]
    return Overlay(
        first=offset,
        last=offset + len(places),
        parts=worn.parts,
        places=torch.tensor(places, dtype=torch.int64, device=device),
        earliest=min(places, default=0),
    )
