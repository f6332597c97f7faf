"""A worker's twin in memory: the same port, hashes for hidden states, and mishaps on demand.

Each block chains its inputs, as attention over a cache would: what it gives at a position is a hash of the
block and of every input up to there. So a lost, repeated, stale or swapped token changes all that follows,
and spans give the same however the blocks are cut. Time is trio's; there are no threads and no randomness.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import PREFIX_PAGE_TOKENS
from ...protocol.steps import NEW_ROW, PREFIX_STEP, Reply, Row, check_payload, prefixes_of
from ...protocol.tensors import DType, Encoding
from ...protocol.training import NO_PART
from ...protocol.work import (
    Backward,
    BeginGeneration,
    Begun,
    Chosen,
    CloseCache,
    Compute,
    Done,
    EmbedPrompt,
    EndGeneration,
    Forward,
    HoldPart,
    ModelFacts,
    NamePages,
    OpenCache,
    Ready,
    Restore,
    Restored,
    Sample,
    Sampled,
    Sampling,
    TokenRow,
)
from .port import ANSWERS, Answer, Notice, Pending, Request

HIDDEN_SIZE: Final = 8  # 32 bytes a token in float32; a digest has 64 at most
_STATE_BYTES: Final = 16
_SLICE_S: Final = 1.0  # a slow computation shows progress so often, as a beat does

Chain = tuple[bytes, ...]  # a block's state after each position of one row
Table = tuple[tuple[Chain, ...], ...]  # row → block → chain


def twin_facts(name: str = "twin", num_blocks: int = 4) -> ModelFacts:
    """What a model of hashes says of itself."""
    return ModelFacts(
        name=name,
        fingerprint=blake2b(f"{name} {num_blocks}".encode(), digest_size=32).hexdigest(),
        architecture="Twin",
        num_blocks=num_blocks,
        hidden_size=HIDDEN_SIZE,
        vocab_size=256,
        max_position=1 << 16,
        files={},
    )


def whole_row(start: int, end: int, inputs: Sequence[bytes], parts: Sequence[bytes] = ()) -> list[bytes]:
    """What blocks [start, end) give for one row from its beginning: the reference to compare with.

    parts: of an adapter, by name, one for each block, or nothing.
    """
    values = list(inputs)
    for block in range(start, end):
        values, _ = _through(block, (), values, parts[block - start] if parts else NO_PART)
    return values


def embedding(token: int, token_bytes: int) -> bytes:
    """A token's hidden state before the first block."""
    return blake2b(b"embed %d" % token, digest_size=token_bytes).digest()


def not_finite(token_bytes: int) -> bytes:
    """A hidden state that no worker accepts; in every encoding all its numbers are NaN."""
    return b"\xff" * token_bytes


def _through(
    block: int, chain: Chain, values: Sequence[bytes], part: bytes = NO_PART
) -> tuple[list[bytes], Chain]:
    """One block, with a part of an adapter over it: its outputs, and its chain after these inputs."""
    states = list(chain)
    state = states[-1] if states else b"block %d" % block + part
    outputs = []
    for value in values:
        state = blake2b(state + value, digest_size=_STATE_BYTES).digest()
        states.append(state)
        outputs.append(blake2b(state, digest_size=len(value), person=b"%d" % block).digest())
    return outputs, tuple(states)


class _Cache:
    """One session's rows, by the one rule of rows, with the tables after recent steps."""

    def __init__(self, ask: OpenCache, hidden_size: int, prefixes: dict[bytes, tuple[Chain, ...]]) -> None:
        """prefixes: rows by the names of their pages, of all sessions."""
        self.ask = ask
        self._prefixes = prefixes
        self.promised_tokens = ask.max_rows * ask.max_tokens
        self._token_bytes = ask.encoding.token_bytes(hidden_size)
        self._rows: Table = ()
        self._tables: dict[int, Table] = {}
        self._is_evicted = False
        self._names = prefixes_of(ask.prefix, ask.prefix_rows, ask.max_rows)
        found = tuple(self._known(names[: ask.max_tokens // PREFIX_PAGE_TOKENS]) for names in self._names)
        if any(row[0] for row in found):
            self._rows = found
            self._tables = {PREFIX_STEP: self._rows}

    def _known(self, names: tuple[bytes, ...]) -> tuple[Chain, ...]:
        known = next((place for place, name in enumerate(names) if name not in self._prefixes), len(names))
        return self._prefixes[names[known - 1]] if known else ((),) * (self.ask.end - self.ask.start)

    def evict(self) -> None:
        """Make room for others: nothing is left, and the next step is told so."""
        self._rows, self._tables = (), {}
        self._is_evicted = True

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each row."""
        return tuple(len(row[0]) for row in self._rows)

    def compute(self, ask: Compute) -> bytes:
        """Raises as `work.Compute` says, and leaves the rows as they were then."""
        check_payload(ask.rows, ask.payload, self._token_bytes)
        size = self._token_bytes
        tokens = [ask.payload[place : place + size] for place in range(0, len(ask.payload), size)]
        if not_finite(size) in tokens:
            raise error(Code.NOT_FINITE, f"token {tokens.index(not_finite(size))} of the step is not finite")
        for index, row in enumerate(ask.rows):
            self._check(index, row)
        table, outputs = [], []
        for row in ask.rows:
            chains, values = self._row(row, tokens[: row.n])
            tokens = tokens[row.n :]
            table.append(chains)
            outputs.append(values)
        self._rows = tuple(table)
        kept = {step: rows for step, rows in self._tables.items() if ask.committed <= step <= ask.step_id}
        self._tables = {**kept, ask.step_id: self._rows}
        if len(ask.rows) != len(self._names) or any(
            r.parent not in (NEW_ROW, i) for i, r in enumerate(ask.rows)
        ):
            self._names = ()
        for index, names in enumerate(self._names):
            self._keep_prefix(index, names)
        return _answered(outputs, ask.reply)

    def name_pages(self, notice: NamePages) -> None:
        """As `work.NamePages` says."""
        if self._tables.get(notice.step_id) is self._rows:
            for row, chain in enumerate(notice.rows):
                self._keep_prefix(row, chain.names)

    def _keep_prefix(self, row: int, names: tuple[bytes, ...]) -> None:
        for page, name in enumerate(names, 1):
            length = page * PREFIX_PAGE_TOKENS
            if length <= self.lengths[row]:
                self._prefixes.setdefault(name, tuple(chain[:length] for chain in self._rows[row]))

    def restore(self, base_step: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """As `work.Restore` says."""
        self._is_evicted = False
        base = self._tables.get(base_step) if base_step else None
        if base is None:
            self._rows, self._tables = (), {}
            return (0,) * len(lengths)
        if len(base) != len(lengths):
            raise error(
                Code.BAD_REQUEST, f"lengths {lengths} for the {len(base)} rows after step {base_step}"
            )
        self._rows = tuple(
            tuple(chain[:length] for chain in row) for row, length in zip(base, lengths, strict=True)
        )
        self._tables = {step: rows for step, rows in self._tables.items() if step < base_step}
        self._tables[base_step] = self._rows
        return self.lengths

    def _row(self, row: Row, values: list[bytes]) -> tuple[tuple[Chain, ...], list[bytes]]:
        chains = []
        for index, block in enumerate(range(self.ask.start, self.ask.end)):
            kept = () if row.parent == NEW_ROW else self._rows[row.parent][index][: row.position]
            part = self.ask.parts[index] if self.ask.parts else NO_PART
            values, chain = _through(block, kept, values, part)
            chains.append(chain)
        return tuple(chains), values

    def _check(self, index: int, row: Row) -> None:
        if self._is_evicted and row.parent != NEW_ROW:
            said = f"row {index} begins at position {row.position}; the session had to make room for others"
            raise error(Code.HISTORY_GAP, said, first_position=0, row=index, evicted=True)
        if row.parent >= len(self._rows) or index >= self.ask.max_rows:
            raise error(
                Code.BAD_REQUEST,
                f"row {index} continues row {row.parent}, there are {len(self._rows)} rows"
                f" of at most {self.ask.max_rows}",
            )
        held = 0 if row.parent == NEW_ROW else len(self._rows[row.parent][0])
        if row.position > held:
            raise error(
                Code.HISTORY_GAP,
                f"row {index} begins at position {row.position}, row {row.parent} holds {held} tokens",
                first_position=held,
                row=index,
            )
        if row.position + row.n > self.ask.max_tokens:
            raise error(
                Code.TOO_LONG,
                f"row {index} would hold {row.position + row.n} tokens, opened for {self.ask.max_tokens}",
            )


def _answered(outputs: Iterable[Sequence[bytes]], reply: Reply) -> bytes:
    """What of each row's outputs the reply names."""
    if reply is Reply.NONE:
        return b""
    if reply is Reply.LAST:
        return b"".join(values[-1] for values in outputs if values)
    return b"".join(value for values in outputs for value in values)


@dataclass(slots=True)
class _Text:
    """One generation."""

    ask: BeginGeneration
    prompts: tuple[tuple[int, ...], ...]
    generated: list[list[int]] = field(default_factory=list)

    @property
    def sampling(self) -> Sampling:
        return self.ask.sampling

    def choose(self, row: int, hidden: bytes, vocab_size: int) -> Chosen:
        """A row's next token: a hash of the whole prefix, since `hidden` is one; of the seed too when sampled."""
        noise = b"%d %d" % (self.sampling.seed, row) if self.sampling.temperature else b""
        token = int.from_bytes(blake2b(hidden + noise, digest_size=8).digest()) % vocab_size
        told = self.generated[row]
        told.append(token)
        limit = min(self.ask.max_tokens - len(self.prompts[row]), self.ask.max_new_tokens or 1 << 62)
        finish = "length" if len(told) >= limit else None
        if token in self.sampling.stop_token_ids:
            finish = "stop"
        return Chosen(row, token, f"{token} ", finish)


@dataclass(frozen=True, slots=True)
class TwinStatistics:
    """What a twin holds; for checks that all was released."""

    num_caches: int
    num_generations: int
    num_pending: int


class WorkerTwin:
    """One worker in memory; see `port.WorkerPort`. `run` is its life.

    compute_s: seconds that each step takes. restart_s: from a crash until it serves again. silence_s: how
    long it may hang while requests wait, until it is killed as `workers.Worker` would.
    spoil: changes what it computes, as a faulty or lying worker does; given the output, gives the answer.
    """

    def __init__(
        self,
        number: int,
        facts: ModelFacts,
        start: int,
        end: int,
        *,
        cache_tokens: int = 1 << 16,
        compute_s: float = 0.0,
        restart_s: float = 1.0,
        silence_s: float = 30.0,
    ) -> None:
        self.number = number
        self.compute_s = compute_s
        self.spoil: Callable[[bytes], bytes] | None = None
        self.max_parts = 1 << 16  # of adapters, held until it crashes
        self.restarts = 0
        self._serves = Ready(facts, start, end, DType.FLOAT32, None, "twin", 0, cache_tokens, 100.0, 1000.0)
        self._restart_s = restart_s
        self._silence_s = silence_s
        self._is_online = True
        self._is_hung = False
        self._progress = 0
        self._next_request = 0
        self._queue: deque[tuple[Request, Pending]] = deque()
        self._caches: dict[bytes, _Cache] = {}
        self._texts: dict[int, _Text] = {}
        self._prefixes: dict[bytes, tuple[Chain, ...]] = {}  # rows by the names of their pages
        self._parts: set[bytes] = set()  # names of adapter parts held
        self._lost: list[Callable[[], None]] = []
        self._changed = trio.Event()
        self._working = trio.CancelScope()

    # the port

    @property
    def ready(self) -> Ready | None:
        return self._serves if self._is_online else None

    @property
    def progress(self) -> int:
        return self._progress

    @property
    def queue(self) -> int:
        return sum(not pending.is_done for _, pending in self._queue)

    def submit(self, request: Request) -> Pending:
        self._next_request += 1
        pending = Pending(self._next_request, ANSWERS[type(request)])
        if not self._is_online:
            pending.fail(error(Code.WORKER_LOST, f"worker {self.number} is loading"))
            return pending
        if isinstance(request, Restore):
            self._drop_steps(request.session)
        self._queue.append((request, pending))
        self._wake()
        return pending

    def abandon(self, pending: Pending) -> None:
        pending.fail(
            error(Code.STALE_EPOCH, "nobody wants this step any more")
        )  # yet it is computed, as there

    def tell(self, notice: Notice) -> None:
        match notice:
            case NamePages():
                if notice.session in self._caches:
                    self._caches[notice.session].name_pages(notice)
            case CloseCache():
                self._drop_steps(notice.session)
                self._caches.pop(notice.session, None)
            case EndGeneration():
                self._texts.pop(notice.generation, None)

    def on_lost(self, listener: Callable[[], None]) -> Callable[[], None]:
        self._lost.append(listener)
        return lambda: self._lost.remove(listener)

    # its life

    async def run(self) -> None:
        """Answer requests one after another, until cancelled."""
        while True:
            if not self._is_online:
                await trio.sleep(self._restart_s)
                self._is_online = True
                self.restarts += 1
            elif self._is_hung:
                await self._hang_on()
            elif self._queue:
                with trio.CancelScope() as self._working:
                    await self._take(*self._queue[0])
            else:
                await self._changed.wait()

    def statistics(self) -> TwinStatistics:
        """What it holds."""
        return TwinStatistics(len(self._caches), len(self._texts), len(self._queue))

    # what befalls it

    def crash(self) -> None:
        """Everything it knew is gone; it comes back after `restart_s`."""
        if not self._is_online:
            return
        self._is_online = self._is_hung = False
        queue, self._queue = self._queue, deque()
        self._caches.clear()
        self._texts.clear()
        self._prefixes.clear()
        self._parts.clear()
        for _, pending in queue:
            pending.fail(error(Code.WORKER_LOST, f"worker {self.number} crashed"))
        self._working.cancel()
        self._wake()
        for listener in tuple(self._lost):
            listener()

    def evict(self) -> None:
        """Every session makes room for others, without being told."""
        for cache in self._caches.values():
            cache.evict()

    def hang(self) -> None:
        """It answers nothing and makes no progress until `wake`, or until its silence kills it."""
        self._is_hung = True
        self._working.cancel()
        self._wake()

    def wake(self) -> None:
        """Go on as if nothing had happened."""
        self._is_hung = False
        self._wake()

    # inside

    async def _hang_on(self) -> None:
        silent_since = trio.current_time()
        while self._is_hung:
            left_s = silent_since + self._silence_s - trio.current_time() if self._queue else math.inf
            if left_s <= 0:
                self.crash()
                return
            with trio.move_on_after(left_s):
                await self._changed.wait()

    async def _take(self, request: Request, pending: Pending) -> None:
        left_s = self.compute_s if isinstance(request, Compute) else 0.0
        while left_s > _SLICE_S:
            await trio.sleep(_SLICE_S)
            self._progress += 1
            left_s -= _SLICE_S
        await trio.sleep(left_s)
        if not self._queue or self._queue[0][1] is not pending:
            return  # dropped meanwhile
        self._queue.popleft()
        self._progress += 1
        try:
            pending.resolve(self._answer(request))
        except CorollaError as problem:
            pending.fail(problem)

    def _answer(self, request: Request) -> Answer:
        match request:
            case OpenCache():
                rows = self._open(request)
                return Done(request.request, held=sum(rows), rows=rows)
            case Compute():
                output = self._cache(request.session).compute(request)
                return Done(request.request, self.spoil(output) if self.spoil is not None else output)
            case Restore():
                held = self._cache(request.session).restore(request.base_step, request.lengths)
                return Restored(request.request, held)
            case BeginGeneration():
                return self._begin(request)
            case Sample():
                return self._sample(request)
            case HoldPart():
                if len(self._parts | {request.part}) > self.max_parts:
                    raise error(Code.OUT_OF_MEMORY, f"a part beyond the {self.max_parts} that fit")
                self._parts.add(request.part)
                return Done(request.request)
            case Forward() | Backward() | EmbedPrompt():
                raise error(Code.UNSUPPORTED, "a twin does not train")

    def _open(self, ask: OpenCache) -> tuple[int, ...]:
        if not self._serves.start <= ask.start < ask.end <= self._serves.end:
            raise error(Code.BLOCKS_OUT_OF_RANGE, f"blocks {ask.start}:{ask.end} of a twin")
        self._caches.pop(ask.session, None)
        missing = sorted({part.hex() for part in ask.parts if part != NO_PART and part not in self._parts})
        if missing:
            raise error(Code.ADAPTER_MISSING, f"a twin without {len(missing)} parts", missing=missing)
        cache = _Cache(ask, self._serves.facts.hidden_size, self._prefixes)
        free_tokens = self._serves.cache_tokens - sum(c.promised_tokens for c in self._caches.values())
        if cache.promised_tokens > free_tokens:
            never = cache.promised_tokens > self._serves.cache_tokens
            raise error(
                Code.TOO_LONG if never else Code.BUSY,
                f"{cache.promised_tokens} tokens wanted, {free_tokens} free",
                wanted_tokens=cache.promised_tokens,
                free_tokens=free_tokens,
            )
        self._caches[ask.session] = cache
        return cache.lengths

    def _cache(self, session: bytes) -> _Cache:
        if session not in self._caches:
            raise error(Code.UNKNOWN_SESSION, f"this worker has no session {session.hex()[:8]}")
        return self._caches[session]

    def _begin(self, ask: BeginGeneration) -> Begun:
        texts = ask.prompts or tuple(turn.content for turn in ask.messages)
        prompts = tuple(tuple(text.encode()) for text in texts) or tuple(row.ids for row in ask.tokens)
        generated = [list(row.ids) for row in ask.generated] or [[] for _ in prompts]
        if not prompts or not all(prompts) or len(generated) != len(prompts):
            raise error(Code.BAD_REQUEST, f"{len(prompts)} prompts, {len(generated)} rows generated")
        if max(map(len, prompts)) >= ask.max_tokens:
            raise error(Code.TOO_LONG, f"a prompt of {max(map(len, prompts))} tokens, limit {ask.max_tokens}")
        self._texts[ask.generation] = _Text(ask, prompts, generated)
        rows = [(*prompt, *told) for prompt, told in zip(prompts, generated, strict=True)]
        payload = self._embedded((token for row in rows for token in row), ask.encoding)
        return Begun(ask.request, tuple(TokenRow(row) for row in rows), payload)

    def _sample(self, ask: Sample) -> Sampled:
        text = self._texts.get(ask.generation)
        if text is None:
            raise error(Code.UNKNOWN_SESSION, f"this worker has no generation {ask.generation}")
        facts, encoding = self._serves.facts, text.ask.encoding
        size = encoding.token_bytes(facts.hidden_size)
        if len(ask.payload) != size * len(ask.rows):
            raise error(Code.BAD_SHAPE, f"{len(ask.payload)} bytes to sample {len(ask.rows)} rows from")
        hidden = [ask.payload[place : place + size] for place in range(0, len(ask.payload), size)]
        if not_finite(size) in hidden:
            raise error(Code.NOT_FINITE, "hidden states to sample from are not finite")
        chosen = tuple(
            text.choose(row, state, facts.vocab_size) for row, state in zip(ask.rows, hidden, strict=True)
        )
        going_on = (choice.token for choice in chosen if choice.finish is None)
        return Sampled(ask.request, chosen, self._embedded(going_on, encoding))

    def _embedded(self, tokens: Iterable[int], encoding: Encoding) -> bytes:
        size = encoding.token_bytes(self._serves.facts.hidden_size)
        return b"".join(embedding(token, size) for token in tokens)

    def _drop_steps(self, session: bytes) -> None:
        self._queue = deque(
            item for item in self._queue if not (isinstance(item[0], Compute) and item[0].session == session)
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
