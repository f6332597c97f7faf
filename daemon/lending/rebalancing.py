"""Moves this daemon's spans to where the swarm needs them: by itself now and then, or when its owner asks.

What is good for the swarm, `swarm/placement` decides, and whether this worker moves now, `swarm/moving`; how a span
is emptied and started elsewhere is `lending.py`'s. This asks the one at the right time and tells the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import structlog
import trio

from ...protocol.control import Rebalance
from ...protocol.errors import Code, CorollaError, error
from ...protocol.steps import Hop
from ...protocol.views import Rebalanced
from ...protocol.work import Ready
from ..belonging.belonging import Belonging
from ..belonging.routes import no_swarm
from ..serving.workers import Worker
from ..swarm.moving import CHECK_EVERY_S, Patience, next_plan, own_part, pays_off
from ..swarm.placement import MIN_GAIN, Gain, best_for, gain_of
from ..swarm.view import SwarmView
from .lending import Lending

DEMAND_EVERY_S: Final = 2.0  # a look at our own queues, which change with every request
KNOWN_WELL_S: Final = 5.0  # so old may what is known of the swarm be when a span is moved by it

_log = structlog.get_logger("corolla.rebalancing")


class Rebalancing:
    """Decides for the workers of one `Lending`. nursery: where moves are carried out. on_event: as there."""

    def __init__(
        self,
        lending: Lending,
        nursery: trio.Nursery,
        on_event: Callable[[str, str], None],
        *,
        rng: random.Random | None = None,
    ) -> None:
        self._lending = lending
        self._nursery = nursery
        self._on_event = on_event
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._patience: dict[str, Patience] = {}  # by fingerprint
        self._moved_at = -float("inf")

    async def run(self) -> None:
        """Look at the swarm now and then, at moments of our own, and do our part of the plan."""
        self._nursery.start_soon(self._watch_demand)
        while True:
            await trio.sleep(CHECK_EVERY_S * self._rng.uniform(0.5, 1.5))
            try:
                await self.look()
            except CorollaError as problem:
                self._on_event("rebalance_failed", str(problem))

    async def _watch_demand(self) -> None:
        while True:
            await trio.sleep(DEMAND_EVERY_S)
            self._lending.note_demand()

    async def look(self) -> None:
        """One look: at most one of our spans moves. Returns when it has been started elsewhere."""
        belonging = self._lending.belonging
        if belonging is None or not self._lending.is_auto or self._lending.is_paused:
            return
        for worker, ready in self._lending.serving():
            view = await _fresh_view(belonging, ready)
            patience = self._patience.setdefault(ready.facts.fingerprint, Patience())
            now = trio.current_time()
            move = own_part(next_plan(view, patience, now), Hop(belonging.network.peer, worker.number))
            if move is None:
                continue
            load_s = self._lending.load_s(worker)
            num_sessions = belonging.hops.num_sessions(worker.number)
            rested_s = now - self._moved_at
            if pays_off(move, load_s=load_s, num_sessions=num_sessions, rested_s=rested_s):
                self._moved_at = now
                self._on_event(
                    "rebalanced", f"worker {worker.number}: {move.purpose} at blocks {move.start}:{move.end}"
                )
                await self._lending.move(worker, move.start, move.end)
                return

    async def rebalance(self, request: Rebalance) -> tuple[Rebalanced, ...]:
        """What our owner asks for; moves go on after this has returned.

        Raises `NO_SWARM`, `NOT_READY` if nothing serves, `BLOCKS_OUT_OF_RANGE`, `DOES_NOT_FIT`, `BAD_REQUEST` if
        it is not clear which of several workers should move.
        """
        belonging = self._lending.belonging
        if belonging is None:
            raise no_swarm()
        chosen = [
            (worker, ready)
            for worker, ready in self._lending.serving()
            if request.worker in (-1, worker.number)
        ]
        if not chosen:
            raise error(
                Code.NOT_READY,
                "no worker of this daemon serves blocks now",
                "wait until `daemonctl status` shows one online, or `daemonctl resume`",
            )
        if request.end and len(chosen) > 1:
            numbers = ", ".join(str(worker.number) for worker, _ in chosen)
            raise error(
                Code.BAD_REQUEST, f"workers {numbers} serve: which one should move?", "add --worker NUMBER"
            )
        answers = []
        for worker, ready in chosen:
            view = await _fresh_view(belonging, ready)
            answer = _judge(view, belonging.network.peer, worker, ready, request)
            answers.append(answer)
            if answer.moves and not request.dry_run:
                self._moved_at = trio.current_time()
                self._nursery.start_soon(self._lending.move, worker, answer.to_start, answer.to_end)
        return tuple(answers)


async def _fresh_view(belonging: Belonging, ready: Ready) -> SwarmView:
    facts = ready.facts
    try:
        await belonging.registry.spans(facts.fingerprint, facts.num_blocks, max_age_s=KNOWN_WELL_S)
    except CorollaError as problem:  # alone, say: what is known has to do
        _log.debug("asked_in_vain", problem=str(problem))
    return belonging.routes.view(facts.fingerprint, facts.num_blocks)


def _judge(view: SwarmView, peer: str, worker: Worker, ready: Ready, request: Rebalance) -> Rebalanced:
    """Where a worker should go, whether it pays, and what it changes."""
    hop = Hop(peer, worker.number)
    if request.end:
        start, end = request.start, request.end
        gain = gain_of(view, hop, start, end)
        length = ready.end - ready.start
        if end - start > length and ready.end - ready.start < view.num_blocks and worker.configure.end == -1:
            raise error(
                Code.DOES_NOT_FIT,
                f"{end - start} blocks asked of worker {worker.number}, which has room for {length}",
                f"ask for {length} blocks at most",
            )
        moves = (start, end) != (ready.start, ready.end)
    else:
        start, end = best_for(view, hop) or (ready.start, ready.end)
        gain = gain_of(view, hop, start, end)
        moves = (start, end) != (ready.start, ready.end) and _is_better(gain)
    before, after = gain.before, gain.after
    return Rebalanced(
        worker=worker.number,
        model=ready.facts.name,
        start=ready.start,
        end=ready.end,
        to_start=start,
        to_end=end,
        moves=moves,
        tokens_per_s=(gain.carried_before, gain.carried_after),
        num_gaps=(before.num_gaps, after.num_gaps),
        num_single=(before.num_single, after.num_single),
    )


def _is_better(gain: Gain) -> bool:
    before, after = gain.before, gain.after
    risks = (before.num_gaps, before.num_single), (after.num_gaps, after.num_single)
    if risks[0] != risks[1]:
        return risks[1] < risks[0]
    return gain.tokens_per_s > MIN_GAIN * gain.carried_before
