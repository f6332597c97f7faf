"""Sessions of this machine's users over the swarm: their terms, and the hidden-state ones that stay open.

`opened` is what `generation.py` and the calls of a program share: it finds the model and opens the session.
A program's own session lives in a task of its connection, and ends with it.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

import structlog
import trio

from ..protocol.control import OpenModelSession, SessionHandle, SessionOpened, SessionStep
from ..protocol.errors import Code, CorollaError, error
from ..protocol.limits import MAX_ROWS, SESSION_ID_BYTES
from ..protocol.steps import Hop, check_payload
from ..protocol.tensors import Encoding, is_finite
from ..protocol.work import Done, EmbedPrompt, ModelFacts
from .belonging.belonging import Belonging
from .control import Ask, Connection, Reply
from .serving.port import WorkerPort
from .session.client import Events, Session, open_session
from .session.deadlines import Settings
from .session.events import SessionEvent
from .session.prefix import Prefix
from .session.roster import Terms
from .session.wiring import RouteRequest
from .swarm.standby import Unrest
from .training.parts import Adapter, put_parts
from .training.virtual import Virtual

MAX_SESSIONS_PER_PROGRAM: Final = 64
MODEL_RETRY_S: Final = 0.5  # between two looks for a model that nobody serves yet
DEFAULT_ENCODING: Final = Encoding.FLOAT32  # the one in which every promise of equality holds

_log = structlog.get_logger("corolla.sessions")


class Lender(Protocol):
    """Who has workers for the ends of models; `ends.Ends` is one."""

    async def ends_of(self, facts: ModelFacts) -> WorkerPort:
        """A worker with this model's ends, ready; the same one again while it can be kept alive."""


async def embedded_prompt(worker: WorkerPort, adapter: Adapter, encoding: Encoding) -> bytes:
    """Hidden states of an adapter's virtual tokens. Raises `BAD_REQUEST`, `BAD_SHAPE`, `NOT_FINITE`, `WORKER_LOST`."""
    if not adapter.soft:
        return b""
    return cast(Done, await worker.submit(EmbedPrompt(0, encoding, adapter.soft)).answer()).payload


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user asks of a session. end -1 is the last block. prefix: what its rows will begin with."""

    model: str
    start: int = 0
    end: int = -1
    max_rows: int = 1
    max_tokens: int = 2048
    encoding: Encoding | None = None
    wait_s: float = 0.0
    adapter: Adapter = field(default_factory=Adapter)
    prefix: Prefix = field(default_factory=Prefix)


async def find_model(belonging: Belonging, name: str, wait_s: float) -> ModelFacts:
    """The model that a user names, waiting for somebody to serve it if asked to. Raises `UNKNOWN_MODEL`, …"""
    deadline = trio.current_time() + wait_s
    while True:
        try:
            return await belonging.routes.find_model(name)
        except CorollaError as problem:
            if problem.code is not Code.UNKNOWN_MODEL or trio.current_time() >= deadline:
                raise
        await trio.sleep(MODEL_RETRY_S)


@asynccontextmanager
async def opened(
    belonging: Belonging,
    facts: ModelFacts,
    wanted: Wanted,
    *,
    replacement_wait_s: float,
    on_event: Callable[[SessionEvent], None],
) -> AsyncIterator[Session]:
    """An open session, which ends early when we leave the swarm.

    Raises `BLOCKS_OUT_OF_RANGE`, `BLOCKS_UNSERVED`, `NO_PEERS`, `TOO_LONG`, `BUSY`, `BAD_REQUEST`, and `BAD_SHAPE` for
    an adapter of another model; at the end what the block raised, or `SESSION_LOST` when we left.
    """
    terms = _terms(facts, wanted)
    settings = Settings(open_wait_s=wanted.wait_s, replacement_wait_s=replacement_wait_s)

    def charge(peer: str, weight: float, reason: str) -> None:
        belonging.ledger.charge(peer, weight, reason, trio.current_time())

    async def bring(hop: Hop, parts: tuple[tuple[int, bytes], ...]) -> None:
        await put_parts(belonging.network, facts.fingerprint, hop, parts, wanted.adapter.data)

    async def tell(events: Events) -> None:
        async for event in events:
            belonging.hops.tally.session_events[event.kind.value] += 1
            on_event(event)

    async def end_with_swarm(scope: trio.CancelScope) -> None:
        await belonging.over.wait()
        scope.cancel()

    async def leave_slow_hops(session: Session) -> None:
        request = RouteRequest(
            facts.fingerprint, terms.start, terms.end, terms.encoding, terms.max_rows, terms.max_tokens
        )
        unrest = Unrest(random.Random())  # noqa: S311 - spreads looks, guards nothing
        while True:
            await trio.sleep(unrest.next_look_s())
            try:
                standings = await routes.stand(request, session.statistics().hops)
            except CorollaError as problem:  # nothing is known now: whoever fails is replaced as ever
                _log.debug("route_not_looked_at", problem=str(problem))
                continue
            slow = unrest.look(standings)
            if slow is not None and slow.standby is not None:
                there_s = slow.standby.expected_s
                told = f"expected to take {slow.expected_s:.3f} s a token, {there_s:.3f} s elsewhere"
                session.leave(slow.leg.span.hop, f"is slow: {told}")

    failure: Exception | None = None
    is_done = False
    network, routes = belonging.network, belonging.routes
    async with (
        open_session(network, routes, terms, settings, charge=charge, bring=bring) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(tell, session.events())
        nursery.start_soon(end_with_swarm, nursery.cancel_scope)
        nursery.start_soon(leave_slow_hops, session)
        try:
            yield session
            is_done = True
        except Exception as problem:  # raised again outside, so that the nursery does not wrap it
            failure = problem
        nursery.cancel_scope.cancel()
    if belonging.over.is_set() and not is_done:
        raise belonging.left() from failure
    if failure is not None:
        raise failure


def _terms(facts: ModelFacts, wanted: Wanted) -> Terms:
    """What is asked for, with an id that nobody can guess. Raises what is wrong with it."""
    end = facts.num_blocks if wanted.end == -1 else wanted.end
    if not 0 <= wanted.start < end <= facts.num_blocks:
        raise error(
            Code.BLOCKS_OUT_OF_RANGE,
            f"blocks {wanted.start}:{end} of {facts.name}, which has {facts.num_blocks}",
            f"choose a range within 0:{facts.num_blocks}",
        )
    if not (1 <= wanted.max_rows <= MAX_ROWS and wanted.max_tokens >= 1):
        raise error(
            Code.BAD_REQUEST,
            f"a session of {wanted.max_rows} rows of {wanted.max_tokens} tokens",
            f"ask for 1 to {MAX_ROWS} rows of at least 1 token",
        )
    if wanted.max_tokens > facts.max_position:
        raise error(
            Code.TOO_LONG,
            f"a length of {wanted.max_tokens} tokens; {facts.name} reaches to {facts.max_position}",
            "ask for a smaller max_length",
        )
    encoding = wanted.encoding or DEFAULT_ENCODING
    return Terms(
        session=secrets.token_bytes(SESSION_ID_BYTES),
        fingerprint=facts.fingerprint,
        start=wanted.start,
        end=end,
        encoding=encoding,
        token_bytes=encoding.token_bytes(facts.hidden_size),
        max_rows=wanted.max_rows,
        max_tokens=wanted.max_tokens,
        parts=wanted.adapter.of(facts, wanted.start, end),
        prefix=wanted.prefix,
    )


class ProgramSession:
    """One session that a program holds by its handle."""

    def __init__(
        self, session: Session, belonging: Belonging, facts: ModelFacts, encoding: Encoding, virtual: bytes
    ) -> None:
        self.session: Final = session
        self.belonging: Final = belonging
        self.encoding: Final = encoding
        self.hidden_size: Final = facts.hidden_size
        self.token_bytes: Final = encoding.token_bytes(facts.hidden_size)
        self.virtual: Final = Virtual(virtual, self.token_bytes)
        self.closing: Final = trio.Event()


async def open_for_program(
    ask: Ask,
    belonging: Belonging,
    adapter: Adapter,
    *,
    lender: Lender,
    replacement_wait_s: float,
    on_event: Callable[[SessionEvent], None],
    counted: Callable[[], AbstractContextManager[None]],
) -> Reply:
    """Answer `session.open`: the session stays open in a task of the connection, inside `counted`."""
    arguments: OpenModelSession = ask.arguments
    connection = ask.connection
    if len(connection.opened) >= MAX_SESSIONS_PER_PROGRAM:
        raise error(
            Code.LIMIT_EXCEEDED,
            f"this program has {len(connection.opened)} sessions open",
            "close some of them, or connect once more",
        )
    facts = await find_model(belonging, arguments.model, arguments.wait_s)
    encoding = arguments.encoding or DEFAULT_ENCODING
    virtual = b""
    if adapter.soft and arguments.start == 0:  # what comes from a block before holds them already
        virtual = await embedded_prompt(await lender.ends_of(facts), adapter, encoding)
    wanted = Wanted(
        arguments.model,
        arguments.start,
        arguments.end,
        arguments.max_rows,
        arguments.max_length + len(virtual) // encoding.token_bytes(facts.hidden_size),
        encoding,
        arguments.wait_s,
        adapter,
    )
    handle = connection.new_handle()
    context = opened(belonging, facts, wanted, replacement_wait_s=replacement_wait_s, on_event=on_event)
    end = facts.num_blocks if wanted.end == -1 else wanted.end
    ready: trio.MemorySendChannel[CorollaError | None]
    ready, outcome = trio.open_memory_channel(2)

    async def hold() -> None:
        try:
            with counted():
                async with context as session:
                    held = ProgramSession(session, belonging, facts, encoding, virtual)
                    connection.opened[handle] = held
                    ready.send_nowait(None)
                    await held.closing.wait()
        except CorollaError as problem:  # heard by whoever opens it, and after that by who takes a step
            ready.send_nowait(problem)
        finally:
            connection.opened.pop(handle, None)

    scope = trio.CancelScope()

    async def hold_scoped() -> None:
        with scope:
            await hold()

    connection.nursery.start_soon(hold_scoped)
    try:
        problem = await outcome.receive()
    except trio.Cancelled:
        scope.cancel()
        raise
    if problem is not None:
        raise problem
    return Reply(SessionOpened(handle, facts.hidden_size, encoding, wanted.start, end))


async def step_for_program(ask: Ask) -> Reply:
    """Answer `session.step`. Raises `BAD_SHAPE`, `NOT_FINITE`, and what the session ends with."""
    arguments: SessionStep = ask.arguments
    held = _held(ask.connection, arguments.handle)
    check_payload(arguments.rows, ask.payload, held.token_bytes)
    if not is_finite(ask.payload, held.encoding, held.hidden_size):
        raise error(
            Code.NOT_FINITE,
            f"hidden states with values that are NaN or infinite as {held.encoding}",
            "look for an overflow in what computed them; float32 holds the largest numbers",
        )
    rows, payload = held.virtual.sent(arguments.rows, ask.payload)
    try:
        answer = await held.session.step(rows, payload, arguments.reply)
        return Reply(payload=held.virtual.heard(arguments.rows, answer, arguments.reply))
    except CorollaError as problem:
        if held.belonging.over.is_set():
            raise held.belonging.left() from problem
        raise


async def close_for_program(ask: Ask) -> Reply:
    """Answer `session.close`; a session that is gone already is closed."""
    arguments: SessionHandle = ask.arguments
    held = ask.connection.opened.get(arguments.handle)
    if isinstance(held, ProgramSession):
        held.closing.set()
    await trio.lowlevel.checkpoint()
    return Reply()


def _held(connection: Connection, handle: int) -> ProgramSession:
    held = connection.opened.get(handle)
    if not isinstance(held, ProgramSession):
        raise error(
            Code.UNKNOWN_SESSION,
            f"this program has no session {handle} open",
            "open another: model.session(…)",
        )
    return held
