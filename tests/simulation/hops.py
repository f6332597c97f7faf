"""A hop in pure Python, by the rules of `protocol/steps.py`, and what can befall it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from corolla.daemon.session.history import History
from corolla.protocol.errors import Code, CorollaError, error
from corolla.protocol.messages import Message
from corolla.protocol.steps import (
    At,
    CloseSession,
    Failure,
    Hop,
    Linked,
    LinkHop,
    Opened,
    OpenSession,
    Receipt,
    Replay,
    Replayed,
    Result,
    Stage,
    Step,
    Where,
)

from .blocks import TOKEN_BYTES, Blocks, numbers, payload_of, reply_of

WORKER = 0  # each simulated peer has one worker
NOT_A_NUMBER = (1 << 64) - 1  # a token that workers find not finite


class Surroundings(Protocol):
    """What a hop needs of the world."""

    def after(self, delay_s: float, callback: Callable[[], None]) -> None: ...

    def compute_s(self, peer: SimPeer) -> float: ...

    def held_share(self) -> float: ...

    def push(self, source: SimPeer, target: str, message: Message | Attach) -> bool: ...


@dataclass(frozen=True)
class Attach:
    """A push stream's first message, and its answer."""

    session: bytes
    epoch: int
    source: str
    answered: bool = False


@dataclass
class Habits:
    """How a peer misbehaves, if it does."""

    garbage: str = ""  # "nan", "shape" or "short": what it sends on from time to time
    slanders: bool = False  # accuses its upstream falsely
    stuck: bool = False  # its worker computes nothing
    busy: bool = False  # refuses sessions
    history_bytes: int = 1 << 30
    repeats: bool = False  # sends every result twice


@dataclass
class SimSession:
    """What a hop knows of one session."""

    opened: OpenSession
    say: Callable[[Message], None]
    blocks: Blocks
    history: History
    stream: int
    epoch: int = 0
    upstream: Hop | None = None
    downstream: Hop | None = None
    relays_from: bool = False
    relays_to: bool = False
    last_step: int = 0
    last_result: Result | None = None
    snapshots: dict[int, tuple[object, ...]] = field(default_factory=dict)
    stages: dict[int, Stage] = field(default_factory=dict)
    queue: deque[Step] = field(default_factory=deque)
    working: bool = False
    attaching: Attach | None = None  # from upstream, ahead of our own link
    is_linked: bool = False
    base_lengths: tuple[int, ...] = ()


class SimPeer:
    """One peer with one worker. The world calls `hear` and `hear_push`; it answers through `say` and `push`."""

    def __init__(self, name: str, start: int, end: int, world: Surroundings) -> None:
        self.name = name
        self.start = start
        self.end = end
        self.habits = Habits()
        self.alive = True
        self.hung = False
        self.life = 0  # grows with each death, so that what an earlier life planned does not happen
        self.sessions: dict[bytes, SimSession] = {}
        self._world = world

    @property
    def hop(self) -> Hop:
        return Hop(self.name, WORKER)

    def later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Do something later in this life, and not while hung."""
        life = self.life

        def go() -> None:
            if self.life != life:
                return
            if self.hung:
                self._world.after(0.5, go)
            else:
                callback()

        self._world.after(delay_s, go)

    def crash_worker(self) -> None:
        """The worker's caches are gone; its sessions are told."""
        for session in self.sessions.values():
            session.blocks = Blocks(session.blocks.start, session.blocks.end)
            session.snapshots.clear()
            session.queue.clear()
            session.working = False
            self._fail(session, error(Code.WORKER_LOST, "the worker crashed"))

    # from the client

    def hear(self, message: Message, say: Callable[[Message], None], stream: int) -> None:
        if isinstance(message, OpenSession):
            self._open(message, say, stream)
            return
        session = self.sessions.get(message.session)  # type: ignore[attr-defined]
        if isinstance(message, CloseSession):
            if session is not None and session.stream == stream:
                del self.sessions[message.session]
            return
        if session is None:
            problem = error(Code.UNKNOWN_SESSION, "no such session")
            say(Failure.of(message.session, message.epoch, problem))  # type: ignore[attr-defined]
        elif session.stream == stream:
            match message:
                case LinkHop():
                    self._link(session, message)
                case Step():
                    self._step(session, message, session.upstream if session.relays_from else None)
                case Replay():
                    self._replay(session, message)
                case Where():
                    stage = session.stages.get(message.step_id, Stage.UNKNOWN)
                    session.say(At(message.session, message.epoch, message.step_id, stage))

    def _open(self, message: OpenSession, say: Callable[[Message], None], stream: int) -> None:
        session = self.sessions.get(message.session)
        if self.habits.busy or not self.start <= message.start < message.end <= self.end:
            say(Failure.of(message.session, 0, error(Code.BUSY, "no room")))
            return
        if session is None or session.opened != message:
            session = SimSession(
                message,
                say,
                Blocks(message.start, message.end),
                History(TOKEN_BYTES, self.habits.history_bytes),
                stream,
            )
            self.sessions[message.session] = session
        session.say = say
        session.stream = stream
        say(Opened(message.session, session.epoch))

    def _link(self, session: SimSession, message: LinkHop) -> None:
        if message.epoch <= session.epoch:
            session.say(Failure.of(message.session, message.epoch, error(Code.STALE_EPOCH, "an old link")))
            return
        session.epoch = message.epoch
        session.upstream, session.downstream = message.upstream, message.downstream
        session.relays_from, session.relays_to = message.relays_from, message.relays_to
        session.is_linked = False
        session.base_lengths = message.lengths
        session.queue.clear()
        session.working = False
        session.last_step = message.base_step
        session.last_result = None
        session.stages = {}
        self._restore(session, message)
        if session.downstream is None or session.relays_to:
            self._linked(session)
        else:
            attach = Attach(message.session, message.epoch, self.name)
            if not self._world.push(self, session.downstream.peer, attach):
                self.link_failed(session)
        if session.attaching is not None:
            waiting, session.attaching = session.attaching, None
            self._attached(session, waiting)

    def _restore(self, session: SimSession, message: LinkHop) -> None:
        table = session.snapshots.get(message.base_step) if message.base_step else None
        session.history.restore(message.base_step, message.lengths)
        if table is None:
            session.blocks.rows = ()
            session.snapshots.clear()
            return
        session.blocks.rows = table  # type: ignore[assignment]
        share = self._world.held_share()
        session.blocks.cut([int(length * share) for length in message.lengths])
        session.snapshots = {s: t for s, t in session.snapshots.items() if s < message.base_step}
        session.snapshots[message.base_step] = session.blocks.rows

    def _linked(self, session: SimSession) -> None:
        session.is_linked = True
        lengths = session.base_lengths
        held = session.blocks.lengths or (0,) * len(lengths)
        firsts = session.history.first_positions() or held
        spans = zip(held, firsts, session.history.lengths or held, strict=True)
        history = tuple(first if length >= kept else kept for kept, first, length in spans)
        session.say(Linked(session.opened.session, session.epoch, held, history))

    def _replay(self, session: SimSession, message: Replay) -> None:
        if message.epoch != session.epoch or session.downstream is None:
            return
        try:
            parts = session.history.read(message.starts, message.lengths, 3)
        except CorollaError as problem:
            self._fail(session, problem)
            return
        for part in parts:
            self._push(
                session,
                Step(
                    message.session,
                    message.epoch,
                    message.base_step,
                    part.rows,
                    message.base_step,
                    replay_hops=message.num_hops,
                    final=part.final,
                    payload=part.payload,
                ),
            )

    # from the upstream hop

    def hear_push(self, message: Message | Attach) -> None:
        session = self.sessions.get(message.session)  # type: ignore[union-attr]
        if session is None:
            return
        if isinstance(message, Attach):
            if message.answered:
                if message.epoch == session.epoch and not session.is_linked:
                    self._linked(session)
            else:
                self._attached(session, message)
        elif isinstance(message, Step) and not session.relays_from:
            self._step(session, message, session.upstream)

    def _attached(self, session: SimSession, attach: Attach) -> None:
        if attach.epoch > session.epoch:
            session.attaching = attach
        elif session.relays_from:
            return
        elif attach.epoch == session.epoch and session.upstream == Hop(attach.source, WORKER):
            answer = Attach(attach.session, attach.epoch, self.name, answered=True)
            self._world.push(self, attach.source, answer)

    def link_failed(self, session: SimSession) -> None:
        """The push stream to the downstream hop, if there is one, broke, or could not be opened."""
        if session.relays_to:
            return
        self._fail(session, error(Code.LINK_FAILED, "no way downstream"), about=session.downstream)

    # steps

    def _step(self, session: SimSession, step: Step, sender: Hop | None) -> None:
        if step.epoch != session.epoch or sender != session.upstream:
            return
        if not step.replay_hops:
            if step.step_id == session.last_step and session.last_result is not None:
                session.say(session.last_result)
            if step.step_id <= session.last_step:
                return
            session.last_step = step.step_id
        session.stages.setdefault(step.step_id, Stage.RECEIVED)
        session.queue.append(step)
        self._work(session)

    def _work(self, session: SimSession) -> None:
        if session.working or not session.queue or self.habits.stuck:
            return
        session.working = True
        step = session.queue.popleft()
        compute_s = self._world.compute_s(self)
        session.stages[step.step_id] = Stage.WORKING
        receipt = Receipt(step.session, step.epoch, step.step_id, Stage.WORKING)
        for second in range(1, int(compute_s) + 1):
            self.later(second, lambda: self._if_current(session, step, lambda: session.say(receipt)))
        self.later(compute_s, lambda: self._if_current(session, step, lambda: self._done(session, step)))

    def _if_current(self, session: SimSession, step: Step, callback: Callable[[], None]) -> None:
        if self.sessions.get(step.session) is session and session.epoch == step.epoch:
            callback()

    def _done(self, session: SimSession, step: Step) -> None:
        session.working = False
        gap = session.blocks.gap(step.rows)
        if gap is not None:
            self._fail(session, error(Code.HISTORY_GAP, f"cannot begin {gap}"), step.step_id)
            return
        tokens = numbers(step.payload)
        if len(step.payload) != sum(row.n for row in step.rows) * TOKEN_BYTES:
            self._accuse(session, Code.BAD_SHAPE, step)
            return
        if NOT_A_NUMBER in tokens or (self.habits.slanders and session.upstream is not None):
            self._accuse(session, Code.NOT_FINITE, step)
            return
        out = session.blocks.compute(step.rows, tokens)
        for old in [s for s in session.snapshots if s < step.committed or s > step.step_id]:
            del session.snapshots[old]
        session.snapshots[step.step_id] = session.blocks.rows
        session.history.apply(step.step_id, step.committed, step.rows, payload_of(out))
        if step.final:
            session.stages[step.step_id] = Stage.SENT
        self._pass_on(session, step, out)
        self._work(session)

    def _pass_on(self, session: SimSession, step: Step, out: list[int]) -> None:
        if step.replay_hops == 1:
            if step.final:
                session.say(Replayed(step.session, step.epoch))
        elif step.replay_hops or session.downstream is not None:
            hops = max(0, step.replay_hops - 1)
            sent = Step(
                step.session,
                step.epoch,
                step.step_id,
                step.rows,
                step.committed,
                step.reply,
                hops,
                step.final,
                self._spoilt(payload_of(out)),
            )
            self._push(session, sent)
        else:
            answer = payload_of(reply_of(step.rows, step.reply, out))
            if self.habits.garbage != "nan":  # not finite results are for the user's side to find
                answer = self._spoilt(answer)
            session.last_result = Result(step.session, step.epoch, step.step_id, answer)
            session.say(session.last_result)
            if self.habits.repeats:
                session.say(session.last_result)

    def _spoilt(self, payload: bytes) -> bytes:
        match self.habits.garbage if payload else "":
            case "nan":
                return payload[:-TOKEN_BYTES] + NOT_A_NUMBER.to_bytes(TOKEN_BYTES)
            case "shape":
                return payload + bytes(TOKEN_BYTES)
            case "short":
                return payload[:-1]
        return payload

    def _push(self, session: SimSession, message: Message) -> None:
        if session.relays_to:
            session.say(message)
        elif session.downstream is not None and not self._world.push(self, session.downstream.peer, message):
            self.link_failed(session)

    def _accuse(self, session: SimSession, code: Code, step: Step) -> None:
        problem = error(code, f"{self.name} cannot use what {session.upstream} sent")
        self._fail(session, problem, step.step_id, session.upstream)

    def _fail(
        self, session: SimSession, problem: CorollaError, step_id: int = 0, about: Hop | None = None
    ) -> None:
        session.say(Failure.of(session.opened.session, session.epoch, problem, step_id, about))
