"""What this daemon lends: the worker processes of its spans, and what is announced of them.

It owns the workers of spans, and how one is emptied of sessions before its span moves or ends. Which blocks a worker of
`--blocks auto` serves at first, `swarm/placement` decides, once the worker has told how many fit; whether it moves
later is `rebalancing.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import structlog
import trio

from ...protocol.errors import CorollaError
from ...protocol.records import SpanState
from ...protocol.tensors import Encoding
from ...protocol.views import WorkerStatus
from ...protocol.work import Configure, ModelFacts, Ready
from ..belonging.belonging import Belonging
from ..config import Config
from ..network.registry.announcements import Offer
from ..schedule import Lends
from ..serving.workers import Worker, WorkerState, worker_command
from ..swarm.demand import Demand
from ..swarm.models import is_allowed
from ..swarm.placement import choose_span
from .ends import FIRST_OTHER, Ends, loaded
from .profiles import Profiles
from .sources import source_of
from .wanted import matched, not_allowed, spans_wanted

SETTLE_S: Final = 1.0  # after joining, before placement looks at who is there
SPREAD_S: Final = 2.0  # and up to so much more, so that daemons started together see each other's choice
MOVE_DEADLINE_S: Final = 20.0  # for sessions to leave a span that moves
PAUSE_DEADLINE_S: Final = 6.0  # and one that pauses: its device is free within 10 s
ASK_AGAIN_S: Final = 0.5  # sessions that have not left, or that nobody else could serve yet
ASK_IDLE_S: Final = 0.02  # between two looks for a moment without steps under way
ASKS: Final = 10  # such looks; then they are asked amid their steps

_log = structlog.get_logger("corolla.lending")


class Lending:
    """The workers of one daemon. nursery: where their processes' tasks live.

    on_event: told of what people may want to know: kind, text. profiles: where measurements are kept.
    command: how a worker process is started.
    """

    def __init__(
        self,
        config: Config,
        cache_folder: str,
        nursery: trio.Nursery,
        on_event: Callable[[str, str], None],
        profiles: Profiles | None = None,
        command: Callable[[int], Sequence[str]] = worker_command,
    ) -> None:
        self._config = config
        self._command = command
        self._cache_folder = cache_folder
        self.ends: Final = Ends(lambda: self._config, cache_folder, nursery, on_event, command)
        self._nursery = nursery
        self._on_event = on_event
        self._profiles = profiles
        self._spans: list[Worker] = []
        self._changing = trio.Lock()
        self._num_changes = 0  # asked for and not done
        self._belonging: Belonging | None = None
        self._told: dict[int, str] = {}
        self._served: dict[int, Ready] = {}  # what each worker served last, for what is said while it loads
        self._weights: dict[int, ModelFacts] = {}  # of each worker, to tell when they change
        self._placed: set[int] = set()
        self._rng = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._is_draining = False
        self._why_paused: Lends | None = None
        self._num_pausing = 0  # pauses under way
        self._uses_gpu = False
        self._leaving: set[int] = set()  # workers that are being emptied
        self._beside: set[int] = set()  # numbers of workers that load while those they replace still serve
        self._came_from: dict[int, Configure] = {}  # of workers that moved: what to go back to
        self._load_began: dict[int, float] = {}
        self._load_s: dict[int, float] = {}
        self._demand: dict[int, Demand] = {}

    def start(self) -> None:
        """Start the workers that the configuration asks for. Raises `UNKNOWN_MODEL` for a model it misnames."""
        for number, configure in enumerate(self._wanted()):
            self._start_span(number, configure)

    def _wanted(self) -> tuple[Configure, ...]:
        """What the workers of our spans should be. Raises `UNKNOWN_MODEL`."""
        if not self._config.model:
            return ()
        return spans_wanted(self._config, self._cache_folder, source_of(self._config.model))

    def reconfigure(self, config: Config) -> None:
        """Serve by another configuration: workers that differ start again, after their sessions have moved.

        One that failed is tried again, one whose model may not be lent any more ends. Raises `UNKNOWN_MODEL`.
        """
        self._config, before = config, self._config
        try:
            self._wanted()
        except CorollaError:
            self._config = before
            raise
        self._num_changes += 1
        self._nursery.start_soon(self._change_workers)

    async def _change_workers(self) -> None:
        try:
            async with self._changing:
                await self._change()
        finally:
            self._num_changes -= 1

    async def _change(self) -> None:
        if self.is_paused:
            return
        running = [(w, w.ready or self._served.get(w.number)) for w in self._spans]
        kept, missing = matched(self._config, self._wanted(), running)
        obsolete = [w for w in self._spans if w not in kept and w.number not in self._beside]
        async with trio.open_nursery() as nursery:
            for worker in obsolete:
                nursery.start_soon(self._empty, worker, MOVE_DEADLINE_S)
        for worker in obsolete:
            self._end(worker)
        for worker in obsolete:
            await worker.wait_stopped()  # its memory is needed
        if self.is_paused or self._is_draining:
            return
        for configure in missing:
            taken = {worker.number for worker in self._spans} | set(self._served)
            self._start_span(next(n for n in range(FIRST_OTHER) if n not in taken), configure)

    def start_paused(self, why: Lends) -> None:
        """Start nothing until `resume`."""
        self._why_paused = why

    @property
    def belonging(self) -> Belonging | None:
        """Our place in a swarm."""
        return self._belonging

    @property
    def is_auto(self) -> bool:
        """May spans move by themselves?"""
        return self._config.blocks == "auto"

    @property
    def is_paused(self) -> bool:
        """Is nothing lent until `resume`?"""
        return self._why_paused is not None

    @property
    def is_changing(self) -> bool:
        """Are workers being started again for another configuration?"""
        return self._num_changes > 0

    @property
    def lends(self) -> Lends:
        """Whether we do, or why not."""
        return self._why_paused or (Lends.DRAINING if self._is_draining else Lends.YES)

    @property
    def uses_gpu(self) -> bool:
        """Is, or was, a GPU lent?"""
        return self._uses_gpu

    def weights_in_use(self) -> tuple[str, ...] | None:
        """Paths of the weights that our workers took up, and of their quantized forms; None while one is loading."""
        workers = (*self._spans, *self.ends.workers)
        if any(worker.state is WorkerState.LOADING for worker in workers) or self.ends.is_pulling:
            return None
        ready = [worker.ready for worker in workers if worker.ready is not None]
        return tuple(name for r in ready for name in (f"{r.folder}/", r.facts.fingerprint[:32]))

    def processes(self) -> tuple[int, ...]:
        """Of our workers, also those that load: they use their device long before they are ready."""
        workers = (*self._spans, *self.ends.workers)
        return tuple(worker.process for worker in workers if worker.process is not None)

    def serving(self) -> tuple[tuple[Worker, Ready], ...]:
        """The spans that serve now, and are neither moving nor ending."""
        return tuple(
            (worker, worker.ready)
            for worker in self._spans
            if worker.ready is not None and worker.number not in self._leaving and not self._is_draining
        )

    def load_s(self, worker: Worker) -> float:
        """How long it would take to load as many blocks elsewhere, as far as was measured."""
        ready = self._served.get(worker.number)
        if self._profiles is not None and ready is not None:
            return self._profiles.of(ready).load_time_s(ready.end - ready.start)
        return self._load_s.get(worker.number, 0.0)

    def note_demand(self) -> None:
        """Look how much is asked of our spans; the records tell when they are announced anew."""
        if self._belonging is None:
            return
        for worker, _ in self.serving():
            demand = self._demand.setdefault(worker.number, Demand())
            before = demand.queue
            num_refused = self._belonging.hops.num_refused(worker.number)
            demand.note(worker.queue, num_refused, trio.current_time())
            if demand.queue != before:
                self._announce(worker)

    def enter(self, belonging: Belonging) -> None:
        """We are in a swarm: offer our spans there."""
        self._belonging = belonging
        for worker in self._spans:
            belonging.hops.add_worker(worker)
            self._announce(worker)

    def leave(self) -> None:
        """We are in no swarm any more."""
        self._belonging = None

    def drain(self) -> None:
        """Take no new sessions, and ask those that are open to go on elsewhere once others can take them."""
        self._is_draining = True
        for worker in self._spans:
            self._announce(worker)
            self._nursery.start_soon(self._empty, worker, math.inf)

    async def pause(self, why: Lends = Lends.PAUSED, deadline_s: float = PAUSE_DEADLINE_S) -> None:
        """Let sessions go on elsewhere, then end the workers of our spans; returns when they have ended.

        Resumed meanwhile, it starts them anew. Raises as `start` then.
        """
        self._why_paused = why
        workers, self._load_began = tuple(self._spans), {}
        self._num_pausing += 1
        try:
            async with trio.open_nursery() as nursery:
                for worker in workers:
                    nursery.start_soon(self._empty, worker, deadline_s)
            for worker in workers:
                self._end(worker)
            for worker in workers:
                await worker.wait_stopped()
        finally:
            self._num_pausing -= 1
        if self._why_paused is None and not self._num_pausing:
            self.start()

    def resume(self) -> None:
        """Take new sessions again; start the spans again if they were paused. Raises as `start`."""
        self._is_draining = False
        self._leaving.clear()
        for worker in self._spans:
            if self._belonging is not None:
                self._belonging.hops.undrain(worker.number)
            self._announce(worker)
        if self._why_paused is not None:
            self._why_paused = None
            if not self._num_pausing:
                self.start()

    async def move(self, worker: Worker, start: int, end: int) -> None:
        """Serve [start, end) instead, by a worker with another number.

        It is claimed at once. If the old one would be missed, and there is memory for both, the new one serves
        before the old one is emptied and ends.
        """
        belonging, ready = self._belonging, worker.ready
        if belonging is None or ready is None or worker.number in self._leaving:
            return
        taken = {other.number for other in self._spans} | set(self._served)
        number = next(n for n in range(FIRST_OTHER) if n not in taken)
        speed = ready.decode_tokens_per_s * (ready.end - ready.start) / (end - start)
        self._served[number] = replace(ready, start=start, end=end, decode_tokens_per_s=speed)
        self._placed.add(number)
        self._on_event(
            "moving", f"worker {worker.number} moves to blocks {start}:{end} of {ready.facts.name}"
        )
        belonging.registry.announce(self._offer(number, self._served[number], SpanState.LOADING))
        configure = replace(worker.configure, start=start, end=end)
        is_missed = belonging.hops.num_sessions(worker.number) or not self._others_serve(worker)
        is_made = bool(is_missed) and await self._make_beside(number, configure)
        if worker not in self._spans:  # paused, or ended otherwise, meanwhile
            return
        await self._empty(worker, MOVE_DEADLINE_S)
        self._end(worker)
        await worker.wait_stopped()  # its memory is needed
        if is_made:
            return
        if self.is_paused or self._is_draining:
            belonging.registry.withdraw(number)
            self._served.pop(number, None)
            return
        self._came_from[number] = replace(worker.configure, start=ready.start, end=ready.end)
        self._start_span(number, configure)

    async def _make_beside(self, number: int, configure: Configure) -> bool:
        """Start a span while another that it replaces still serves; whether that was possible.

        An owner's limit of memory would be passed by two at once. Otherwise the worker itself finds out, before it
        loads, whether its span fits into what the device has free.
        """
        if configure.memory_bytes:
            return False
        self._beside.add(number)
        claimed = self._served[number]
        self._start_span(number, configure)
        (fresh,) = (worker for worker in self._spans if worker.number == number)
        try:
            await loaded(fresh)
        except CorollaError:
            self._end(fresh)
            await fresh.wait_stopped()
            self._served[number] = claimed
            return False
        finally:
            self._beside.discard(number)
        return True

    async def _empty(self, worker: Worker, deadline_s: float) -> None:
        """Announce a span as draining and have its sessions go, as soon as others can take them over."""
        belonging, number = self._belonging, worker.number
        if belonging is None:
            return
        self._leaving.add(number)
        belonging.hops.drain(number)
        self._announce(worker)
        with trio.move_on_after(deadline_s) as deadline:
            while belonging.hops.num_sessions(number) and self._leaves(number):
                if self._others_serve(worker):
                    await self._ask_to_leave(belonging, number)
                with trio.move_on_after(ASK_AGAIN_S):
                    await belonging.hops.wait_idle(number)
        if deadline.cancelled_caught:
            belonging.hops.ask_to_leave(number, amid_steps=True)
        self._leaving.discard(number)

    def _leaves(self, number: int) -> bool:
        return number in self._leaving

    async def _ask_to_leave(self, belonging: Belonging, number: int) -> None:
        """Between two steps if there is such a moment, so that none is computed twice."""
        for _ in range(ASKS):
            belonging.hops.ask_to_leave(number, amid_steps=False)
            await trio.sleep(ASK_IDLE_S)
            if not belonging.hops.num_sessions(number):
                return
        belonging.hops.ask_to_leave(number, amid_steps=True)

    def _others_serve(self, worker: Worker) -> bool:
        """Could sessions go elsewhere with all that this worker serves?"""
        belonging, ready = self._belonging, self._served.get(worker.number)
        if belonging is None or ready is None:
            return False
        view = belonging.routes.view(ready.facts.fingerprint, ready.facts.num_blocks)
        spans = tuple(s for s in view.spans if not (s.mine and s.worker == worker.number))
        return not replace(view, spans=spans).gaps(ready.start, ready.end)

    def _end(self, worker: Worker) -> None:
        """A span ends: nothing of it is offered any more."""
        self._spans = [other for other in self._spans if other is not worker]
        self._served.pop(worker.number, None)
        self._placed.discard(worker.number)
        if self._belonging is not None:
            self._belonging.hops.remove_worker(worker)
            self._belonging.registry.withdraw(worker.number)
        worker.stop()

    def stop(self) -> None:
        """End all workers."""
        self._is_draining = True
        for worker in (*self._spans, *self.ends.workers):
            worker.stop()

    def statuses(self) -> tuple[WorkerStatus, ...]:
        """Every worker, for people."""
        hops = self._belonging.hops if self._belonging is not None else None
        return tuple(
            replace(worker.status(), sessions=hops.num_sessions(worker.number) if hops is not None else 0)
            for worker in (*self._spans, *self.ends.workers)
        )

    def _start_span(self, number: int, configure: Configure) -> None:
        worker = Worker(
            number,
            configure,
            model=self._config.model,
            command=self._command,
            is_polite=self._config.low_priority,
        )
        self._told.pop(number, None)  # of the worker before it
        self._load_began[number] = trio.current_time()
        self._spans = [other for other in self._spans if other.number != number] + [worker]
        worker.on_change(lambda: self._changed(worker))
        self._nursery.start_soon(worker.run)
        if self._belonging is not None:
            self._belonging.hops.add_worker(worker)
            self._announce(worker)

    # what others are told

    def _changed(self, worker: Worker) -> None:
        if worker not in self._spans:
            return
        if worker.ready is not None:
            self._uses_gpu |= _is_gpu(worker.ready)
            if not is_allowed(worker.ready.facts, self._config.models):
                worker.refuse(not_allowed(worker.ready.facts, self._config.models))
                return
            self._note_weights(worker, worker.ready)
        if worker.ready is not None and worker.number in self._load_began:
            self._load_s[worker.number] = trio.current_time() - self._load_began.pop(worker.number)
            if self._profiles is not None:
                self._profiles.note(worker.ready, self._load_s[worker.number])
        elif (
            worker.ready is not None
            and self._profiles is not None
            and self._has_drifted(worker.ready, worker)
        ):
            self._profiles.note(worker.ready, 0.0)
        if worker.number in self._beside and worker.state is WorkerState.FAILED:
            return  # there is no memory for both: `move` goes on without it
        if worker.problem is not None and worker.state is WorkerState.FAILED:
            self._on_event("worker_failed", f"worker {worker.number}: {worker.problem}")
            before = self._came_from.pop(worker.number, None)
            if before is not None:  # it does not fit there, say: rather as it was than not at all
                self._end(worker)
                self._placed.add(worker.number)
                self._start_span(worker.number, before)
                return
        elif self._told.get(worker.number) != worker.state.value:
            self._on_event(f"worker_{worker.state.value}", self._describe(worker))
        self._told[worker.number] = worker.state.value
        self._announce(worker)

    def _has_drifted(self, ready: Ready, worker: Worker) -> bool:
        """Does it compute at another speed than when it was last heard?"""
        before = self._served.get(worker.number)
        return before is not None and before.decode_tokens_per_s != ready.decode_tokens_per_s

    def _note_weights(self, worker: Worker, ready: Ready) -> None:
        """Tell when a worker that started again found other weights: the swarm knows them as another model."""
        before = self._weights.get(worker.number)
        self._weights[worker.number] = facts = ready.facts
        if before is None or before.name != facts.name or before.fingerprint == facts.fingerprint:
            return
        still = {other.fingerprint for other in self._weights.values()}
        if self._belonging is not None and before.fingerprint not in still:
            self._belonging.registry.withdraw_model(before.fingerprint)
        told = f"the weights of {facts.name} in {ready.folder} have changed: {before.fingerprint[:8]} is served no more"
        self._on_event("weights_changed", f"{told}, {facts.fingerprint[:8]} is")

    def _describe(self, worker: Worker) -> str:
        status = worker.status()
        return f"worker {worker.number}: {status.model} {status.start}:{status.end} {status.state}"

    def _announce(self, worker: Worker) -> None:
        """Tell the swarm how it is with a span: loading (once we know of what), online, draining, or gone."""
        belonging = self._belonging
        if belonging is None:
            return
        if worker.ready is not None:
            self._served[worker.number] = worker.ready
        ready = self._served.get(worker.number)
        if ready is None or not worker.is_back_soon:  # others then fill the gap
            belonging.registry.withdraw(worker.number)
            return
        if self.is_auto and worker.number not in self._placed:
            self._placed.add(worker.number)
            self._nursery.start_soon(self._place, worker)
        state = SpanState.ONLINE if worker.ready is not None else SpanState.LOADING
        if self._is_draining or worker.number in self._leaving:
            state = SpanState.DRAINING
        try:
            belonging.registry.announce_model(ready.facts)
            demand = self._demand.get(worker.number)
            queue = 0 if demand is None else demand.queue
            belonging.registry.announce(self._offer(worker.number, ready, state, queue=queue))
        except CorollaError as problem:
            self._on_event("announce_failed", str(problem))

    def _offer(self, number: int, ready: Ready, state: SpanState, *, queue: int = 0) -> Offer:
        return Offer(
            worker=number,
            fingerprint=ready.facts.fingerprint,
            start=ready.start,
            end=ready.end,
            state=state,
            dtype=ready.dtype,
            quantization=ready.quantization,
            encodings=tuple(Encoding),
            tokens_per_s=ready.decode_tokens_per_s,
            cache_tokens=ready.cache_tokens,
            movable=self.is_auto,
            queue=queue,
        )

    async def _place(self, worker: Worker) -> None:
        """Move a worker of `auto` to where it helps most, if that is elsewhere than where it began."""
        await trio.sleep(SETTLE_S + self._rng.uniform(0, SPREAD_S))
        belonging, ready = self._belonging, worker.ready
        if belonging is None or ready is None or self._is_draining or self.is_paused:
            self._placed.discard(worker.number)  # when it is back
            return
        facts = ready.facts
        try:
            await belonging.registry.spans(facts.fingerprint, facts.num_blocks)
        except CorollaError as problem:  # what is known already has to do
            self._on_event("placement_unsure", f"worker {worker.number}: {problem}")
        view = belonging.routes.view(facts.fingerprint, facts.num_blocks)
        others = replace(
            view, spans=tuple(s for s in view.spans if not (s.mine and s.worker == worker.number))
        )
        start, end = choose_span(others, ready.end - ready.start, ready.decode_tokens_per_s)
        if (start, end) != (ready.start, ready.end):
            await self.move(worker, start, end)


def _is_gpu(ready: Ready) -> bool:
    return ready.device.startswith("cuda")
