"""Whole daemons on a network in memory: the client's code and the hops' code as they ship, workers of hashes.

Time is a mock clock that jumps, trio's scheduler is seeded, and everything random comes from one seed, so that
a run repeats itself exactly.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256

import pytest
import structlog.testing
import trio
import trio.testing
from anyio.abc import TaskStatus
from trio._core import _run

from corolla.daemon.network.memory import MemoryHub, memory_hub
from corolla.daemon.serving.peers import HopService
from corolla.daemon.serving.training import TrainingService
from corolla.daemon.serving.twin import HIDDEN_SIZE, WorkerTwin, not_finite, twin_facts, whole_row
from corolla.daemon.session.client import Session, open_session
from corolla.daemon.session.deadlines import Settings
from corolla.daemon.session.roster import Terms
from corolla.daemon.session.wiring import Route, RouteRequest
from corolla.daemon.swarm.blame import HEAVY, LIGHT
from corolla.daemon.training.parts import put_parts
from corolla.protocol.errors import Code, error
from corolla.protocol.steps import NEW_ROW, Hop, Reply, Row
from corolla.protocol.tensors import Encoding
from corolla.protocol.training import NO_PART

from .paths import Offer, random_route
from .rows import random_rows

NUM_BLOCKS = 4
FACTS = twin_facts(num_blocks=NUM_BLOCKS)
TOKEN_BYTES = Encoding.FLOAT32.token_bytes(HIDDEN_SIZE)
MAX_TOKENS = 60
LIMIT_S = 2000.0
CLIENT = "client"


@contextmanager
def deterministic_trio(seed: int) -> Iterator[None]:
    """Let trio order its tasks by the seed."""
    state = _run._r.getstate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        _run._r.seed(seed)
        try:
            yield
        finally:
            _run._r.setstate(state)


@dataclass
class Daemon:
    """One peer that serves a span, in one of its lives."""

    name: str
    start: int
    end: int
    service: HopService
    worker: WorkerTwin
    life: trio.CancelScope
    alive: bool = True
    listed: bool = True


@dataclass
class Story:
    """What a run told: for comparing two runs of one seed, and for the checks."""

    lines: list[str] = field(default_factory=list)
    charges: list[tuple[str, float, str]] = field(default_factory=list)
    num_repairs: int = 0
    num_bridges: int = 0  # of the last route


class Reference:
    """What the whole model answers with an adapter's parts, by the one rule of rows."""

    def __init__(self, parts: tuple[bytes, ...]) -> None:
        self._parts = parts
        self._inputs: list[list[bytes]] = []

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self._inputs))

    def step(self, rows: tuple[Row, ...], payload: bytes, reply: Reply) -> bytes:
        tokens = [payload[i : i + TOKEN_BYTES] for i in range(0, len(payload), TOKEN_BYTES)]
        table, answer = [], []
        for row in rows:
            kept = [] if row.parent == NEW_ROW else self._inputs[row.parent][: row.position]
            table.append(kept + tokens[: row.n])
            tokens = tokens[row.n :]
            outputs = whole_row(0, NUM_BLOCKS, table[-1], self._parts)[row.position :]
            answer += outputs if reply is Reply.ALL else outputs[-1:] if reply is Reply.LAST else []
        self._inputs = table
        return b"".join(answer)


class Swarm:
    """Daemons, a client, and what befalls them."""

    def __init__(self, seed: int, hub: MemoryHub, nursery: trio.Nursery) -> None:
        self.rng = random.Random(f"daemons {seed}")
        self.story = Story()
        self.guilty: set[str] = set()
        self.liars: set[str] = set()
        self.daemons: dict[str, Daemon] = {}
        self._hub = hub
        self._nursery = nursery
        self._network = hub.network(CLIENT)
        self.session: Session | None = None
        chance = random.Random(f"adapter {seed}")  # of its own: the other choices stay those of the seed
        data = [chance.randbytes(chance.randint(1, 200_000)) for _ in range(NUM_BLOCKS)]
        self.data = {sha256(part).digest(): part for part in data}
        names = tuple(name if chance.random() < 0.7 else NO_PART for name in self.data)
        self.parts = names if chance.random() < 0.5 and any(names) else ()

    # peers

    async def start(self, name: str, start: int, end: int, compute_s: float) -> None:
        """A daemon comes up, or comes back."""
        life = trio.CancelScope()
        network = self._hub.network(name)
        service = HopService(network)
        TrainingService(network, service.worker_for)  # the network holds it
        worker = WorkerTwin(0, FACTS, start, end, compute_s=compute_s)
        service.add_worker(worker)
        await self._nursery.start(self._live, service, worker, life)  # type: ignore[arg-type]
        self.daemons[name] = Daemon(name, start, end, service, worker, life)

    async def _live(
        self,
        service: HopService,
        worker: WorkerTwin,
        life: trio.CancelScope,
        task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with life:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.run)
                await nursery.start(service.run)  # type: ignore[arg-type]
                task_status.started()

    async def find_route(self, request: RouteRequest) -> Route:
        """The session's router."""
        await trio.sleep(self.rng.uniform(0, 0.1))
        offers = [Offer(Hop(d.name, 0), d.start, d.end) for d in self.daemons.values() if d.listed]
        route = random_route(self.rng, offers, request)
        if route is None:
            raise error(Code.BLOCKS_UNSERVED, "nobody serves this")
        return route

    def charge(self, peer: str, weight: float, reason: str) -> None:
        """The session's ledger."""
        self.story.charges.append((peer, weight, reason))
        self.tell(f"charged {peer} {weight:g}: {reason}")
        allowed = self.liars if weight >= HEAVY else self.guilty | self.liars
        if weight >= LIGHT and peer not in allowed:  # anybody may be slow
            raise AssertionError(f"{peer} is innocent, and charged: {reason}")

    async def bring(self, hop: Hop, parts: tuple[tuple[int, bytes], ...]) -> None:
        """Put parts of the adapter on a hop."""
        self.tell(f"parts of {len(parts)} blocks for {hop.peer}")
        await put_parts(self._network, FACTS.fingerprint, hop, parts, self.data)

    def tell(self, line: str) -> None:
        """Another line of the story."""
        self.story.lines.append(f"{trio.current_time():10.4f} {line}")

    # the user

    async def use(self, num_steps: int) -> None:
        """Take random steps and compare every answer; then close, and see that nothing is left."""
        id_ = self.rng.randbytes(16)
        encoding = Encoding.FLOAT32
        terms = Terms(id_, FACTS.fingerprint, 0, NUM_BLOCKS, encoding, TOKEN_BYTES, 8, MAX_TOKENS, self.parts)
        settings = Settings(part_tokens=self.rng.choice((2, 5, 512)), open_wait_s=60.0)
        reference = Reference(self.parts)
        async with open_session(
            self._network, self, terms, settings, charge=self.charge, bring=self.bring
        ) as self.session:
            self.tell("open")
            for index in range(num_steps):
                rows = random_rows(self.rng, reference.lengths, MAX_TOKENS, first=index == 0)
                payload = self.rng.randbytes(TOKEN_BYTES * sum(row.n for row in rows))
                reply = self.rng.choice(tuple(Reply))
                expected = reference.step(rows, payload, reply)
                answer = await self.session.step(rows, payload, reply)
                while not_finite(TOKEN_BYTES) in answer:
                    answer = await self.session.again(error(Code.NOT_FINITE, "the answer is not finite"))
                if answer != expected:
                    raise AssertionError(f"step {index} was answered wrongly")
                self.tell(f"step {index}")
                await trio.sleep(self.rng.choice((0.01, 0.1, 1.0)))
            self.story.num_repairs = self.session.statistics().num_repairs
            self.story.num_bridges = self.session.statistics().num_bridges
        await trio.sleep(300.0)  # hops that missed the farewell free everything when grace ends
        self._check_released()

    def _check_released(self) -> None:
        for daemon in self.daemons.values():
            held = daemon.service.statistics()
            if daemon.alive and (held.num_sessions or held.num_push_streams or held.history_bytes):
                raise AssertionError(f"{daemon.name} keeps {held}")
            caches = daemon.worker.statistics()
            if daemon.alive and (caches.num_caches or caches.num_pending):
                raise AssertionError(f"{daemon.name}'s worker keeps {caches}")
        if self._hub.num_streams_of(CLIENT):
            raise AssertionError("the client keeps streams")

    # what goes wrong

    async def misfortune(self, at_s: float, kind: int) -> None:
        """After a while something befalls a peer, mostly one on the route; never a rock."""
        await trio.sleep(at_s)
        names = [name for name in self.daemons if not name.startswith("rock")]
        used = [place.hop.peer for place in self.session.statistics().hops] if self.session else []
        targets = [name for name in used if name in names] if self.rng.random() < 0.7 else names
        name = self.rng.choice(targets or names)
        daemon = self.daemons[name]
        if not daemon.alive:
            return
        self.tell(f"misfortune {kind} for {name}")
        match kind:
            case 0 | 1:
                self._kill(daemon)
                await trio.sleep(self.rng.uniform(0, 60))
                daemon.listed = False
                if kind == 1:
                    await self.start(name, daemon.start, daemon.end, 0.0)
            case 2:
                self.guilty.add(name)
                self._hub.hang(name)
                await trio.sleep(self.rng.choice((1.0, 15.0, 100.0)))
                if daemon.alive:
                    self._hub.wake(name)
            case 3:
                self.guilty.add(name)
                daemon.worker.crash()
            case 4:
                self.guilty.add(name)
                daemon.worker.hang()
            case 5:
                self.liars.add(name)
                daemon.worker.spoil = self.rng.choice((_not_a_number, _too_long))
            case 6:
                other = self.rng.choice([other for other in self.daemons if other != name])
                self._hub.cut(name, other)
                await trio.sleep(self.rng.choice((1.0, 30.0)))
                self._hub.heal(name, other)
            case 7:
                self.guilty.add(name)
                await self._network.disconnect(name)
            case 8:
                daemon.worker.evict()

    async def break_link(self, at_s: float, one: str, other: str) -> None:
        """Two daemons do not reach each other any more."""
        await trio.sleep(at_s)
        self.tell(f"{one} and {other} part")
        self._hub.cut(one, other)

    def _kill(self, daemon: Daemon) -> None:
        self.guilty.add(daemon.name)
        daemon.alive = False
        self._hub.kill(daemon.name)
        daemon.life.cancel()


def _not_a_number(output: bytes) -> bytes:
    return output[:-TOKEN_BYTES] + not_finite(TOKEN_BYTES) if output else output


def _too_long(output: bytes) -> bytes:
    return output + bytes(TOKEN_BYTES) if output else output


def play_daemons(seed: int, *, links_break: bool = False) -> Story:
    """One schedule with whole daemons. Raises AssertionError naming the seed.

    links_break: some of them, or all, never reach each other, or from some time on.
    """
    stories: list[Story] = []

    async def main() -> None:
        rng = random.Random(f"plan {seed}")
        max_delay_s = rng.choice((0.001, 0.05, 0.2))
        compute_s = rng.choice((0.0, 0.02, 2.5))
        async with (
            memory_hub(seed=seed, delay=lambda chance, _from, _to: chance.uniform(0, max_delay_s)) as hub,
            trio.open_nursery() as nursery,
        ):
            swarm = Swarm(seed, hub, nursery)
            stories.append(swarm.story)
            at = 0
            while at < NUM_BLOCKS:
                end = rng.randint(at + 1, NUM_BLOCKS)
                await swarm.start(f"rock{at}", rng.randint(0, at), end, compute_s)
                at = end
            for index in range(rng.randint(2, 5)):
                start = rng.randrange(NUM_BLOCKS)
                await swarm.start(f"peer{index}", start, rng.randint(start + 1, NUM_BLOCKS), compute_s)
            if links_break:
                share = rng.choice((0.5, 1.0))
                for one, other in itertools.combinations(swarm.daemons, 2):
                    if rng.random() < share:
                        nursery.start_soon(swarm.break_link, rng.choice((0.0, rng.uniform(0, 5))), one, other)
            for _ in range(rng.randint(0, 5)):
                at_s = rng.choice((0.0, rng.uniform(0, 1), rng.uniform(0, 10)))
                nursery.start_soon(swarm.misfortune, at_s, rng.randrange(9))
            with trio.fail_after(LIMIT_S):
                await swarm.use(rng.randint(3, 12))
            nursery.cancel_scope.cancel()

    try:
        with deterministic_trio(seed), structlog.testing.capture_logs() as logs:
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        failed = [line for line in logs if line["log_level"] == "error"]
        if failed:
            raise AssertionError(f"a daemon logged {failed[0]}")
    except BaseException as problem:
        told = "\n".join(stories[0].lines[-30:]) if stories else ""
        raise AssertionError(f"daemons, seed {seed}: {problem!r}\n{told}") from problem
    return stories[0]
