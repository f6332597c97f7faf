"""Which spans and models the swarm serves: announces ours, holds others', looks up what is asked for.

It owns the shelf of records, and says our announcements. It chooses no route and opens no session. Who holds
which records for all, `holders.py` knows; readers take the union of several of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.lowlevel
import structlog
from anyio.abc import TaskGroup, TaskStatus
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ....protocol.errors import Code, CorollaError, error
from ....protocol.limits import (
    MAX_KEYS_PER_FIND,
    MAX_RECORD_LIFETIME_S,
    MAX_RECORDS_PER_KEY,
    RECORD_LIFETIME_S,
    RECORDS_AT_ONCE,
    RECORDS_PER_S,
    REFRESH_EVERY_S,
    REGISTRY_IDLE_S,
    REGISTRY_TIMEOUT_S,
)
from ....protocol.messages import Message
from ....protocol.records import (
    ManifestRecord,
    SpanRecord,
    blocks_key,
    buckets,
    models_key,
    peer_id_of,
    subkey_of,
    verify,
)
from ....protocol.registry import (
    REGISTRY,
    REGISTRY_PROTOCOL,
    Declined,
    Entry,
    Find,
    Found,
    Refusal,
    Store,
    Stored,
)
from ....protocol.work import ModelFacts
from ..allowance import Paces, Rate
from ..conversation import Conversation
from ..members.membership import Membership
from ..seam import Network, Stream
from .announcements import Announcements, Offer
from .doubts import Doubts
from .holders import Holders
from .shelf import Kept, Shelf, batches, origin_of

LOOKUP_EVERY_S: Final = 10.0  # how old an answer about a model may get while somebody is interested
INTEREST_S: Final = 120.0  # how long after the last question we keep looking
READ_HOLDERS: Final = 4  # whose union a reader takes: some may be behind, or lie by leaving out
MAX_PAGES: Final = MAX_RECORDS_PER_KEY // 8  # of one holder's answer
EXPIRE_EVERY_S: Final = 2.0  # readers skip what has expired anyway; this tells those who wait
PAUSE_AFTER_FAILURE_S: Final = 2.0
MAX_SENDING: Final = 16  # holders spoken to at once
OWN_EVERY_S: Final = 3 * REFRESH_EVERY_S  # how often we look what others hold in our name

_log = structlog.get_logger("corolla.registry")


@dataclass(frozen=True, slots=True)
class Seen:
    """A span record as we see it now. suspect: our connection to its peer broke after the record came."""

    record: SpanRecord
    expires_in_s: float
    suspect: bool
    mine: bool


@dataclass(slots=True)
class _Interest:
    """A model that somebody here asked about."""

    num_blocks: int
    until: float
    looked_at: float


class Registry:
    """The registry of one swarm, as one member of it. Run `run()` in a task; it ends only by cancellation.

    key: this daemon's identity. stored_seq, save_seq, unix: as in `Announcements`.
    """

    def __init__(
        self,
        network: Network,
        membership: Membership,
        key: Ed25519PrivateKey,
        *,
        stored_seq: int = 0,
        save_seq: Callable[[int], None] = lambda seq: None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = anyio.current_time,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._network = network
        self._membership = membership
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._clock = clock
        self._unix = unix
        self._swarm_id = membership.swarm.swarm_id
        self._shelf = Shelf(self._swarm_id)
        self._ours = Announcements(self._swarm_id, key, stored_seq=stored_seq, save_seq=save_seq, unix=unix)
        self._paces = Paces(Rate(RECORDS_PER_S, RECORDS_AT_ONCE))  # of those whose records we check
        self._holders = Holders(network, membership, clock)
        self._interests: dict[str, _Interest] = {}
        self._models_looked_at: float | None = None
        self._lost: dict[str, float] = {}  # suspect peer → when we lost it
        self._tasks: TaskGroup | None = None
        self._urgent = anyio.Event()
        self._publishing = anyio.Lock()
        self._changed = anyio.Event()
        self._version = 0
        self._own_looked_at = self._clock()
        self.doubts: Final = Doubts()  # about ourselves

    # announcing

    def announce(self, offer: Offer) -> None:
        """Announce a worker's span, or what is new about it; pushed at once unless only its speed changed."""
        if self._ours.offer(offer):
            self._urgent.set()

    def withdraw(self, worker: int) -> None:
        """Announce that a worker's span is gone."""
        if self._ours.withdraw(worker):
            self._urgent.set()

    def announce_model(self, facts: ModelFacts) -> None:
        """Announce a model of which we serve a part. Raises `LIMIT_EXCEEDED` if it has too many files."""
        if self._ours.offer_model(facts):
            self._urgent.set()

    def withdraw_model(self, fingerprint: str) -> None:
        """Announce that we serve no part of a model any more."""
        if self._ours.withdraw_model(fingerprint):
            self._urgent.set()

    async def publish(self) -> int:
        """Sign all announcements anew and push them to their holders; how many of these acknowledged.

        `run` does so every `REFRESH_EVERY_S` and after each change. Await it yourself before leaving.
        """
        async with self._publishing:
            if self._urgent.is_set():
                self._urgent = anyio.Event()
            entries = self._ours.sign_all(self._network.addresses())
            for entry in entries:
                self._keep(entry, owner=self._network.peer)
            await self._holders.find(dict.fromkeys(key for entry in entries for key in entry.keys))
            return await self._send_all(self._holders.address(entries))

    async def _send_all(self, outbox: dict[str, list[Entry]]) -> int:
        """Send each holder its entries; how many holders acknowledged."""
        acknowledged: list[str] = []
        limiter = anyio.CapacityLimiter(MAX_SENDING)

        async def send(holder: str, entries: list[Entry]) -> None:
            async with limiter:
                if await self._send(holder, entries):
                    acknowledged.append(holder)

        async with anyio.create_task_group() as tasks:
            for holder, entries in outbox.items():
                tasks.start_soon(send, holder, entries)
        return len(acknowledged)

    async def _send(self, holder: str, entries: list[Entry]) -> bool:
        try:
            answers = await self._ask(holder, [Store(batch) for batch in batches(entries)])
        except CorollaError as problem:
            _log.info("store_failed", holder=holder, problem=str(problem))
            self._holders.failed(holder)
            return False
        for answer in answers:
            for refusal in answer.refused if isinstance(answer, Stored) else ():
                _log.info("record_refused", holder=holder, problem=str(refusal.problem()))
                if self._ours.outbid(refusal.seq):
                    self._urgent.set()
        return True

    # reading

    def spans_now(self, fingerprint: str) -> tuple[Seen, ...]:
        """Every span of a model that we know of, without asking anyone."""
        now = self._clock()
        return tuple(self._seen(kept, now) for kept in self._shelf.spans(fingerprint, now))

    def all_spans_now(self) -> tuple[Seen, ...]:
        """Every span of every model that we know of, without asking anyone."""
        now = self._clock()
        return tuple(self._seen(kept, now) for kept in self._shelf.all_spans(now))

    async def spans(
        self, fingerprint: str, num_blocks: int, *, max_age_s: float = LOOKUP_EVERY_S
    ) -> tuple[Seen, ...]:
        """Every span of a model, after asking holders unless that was done within `max_age_s`.

        From now on, for a while, `run` keeps the answer fresh.
        """
        now = self._clock()
        interest = self._interests.get(fingerprint)
        if interest is None:
            interest = _Interest(num_blocks, now, now - 2 * LOOKUP_EVERY_S)
            self._interests[fingerprint] = interest
        interest.until = now + INTEREST_S
        if now - interest.looked_at > max_age_s:
            await self._look_up_spans(fingerprint, interest)
        return self.spans_now(fingerprint)

    def manifests_now(self) -> tuple[ManifestRecord, ...]:
        """Every manifest that we know of, without asking anyone."""
        return self._shelf.manifests(self._clock())

    async def models(self, *, max_age_s: float = LOOKUP_EVERY_S) -> tuple[ManifestRecord, ...]:
        """Every manifest, after asking holders unless that was done within `max_age_s`."""
        now = self._clock()
        if self._models_looked_at is None or now - self._models_looked_at > max_age_s:
            self._models_looked_at = now
            await self._look_up([models_key(self._swarm_id)])
        return self.manifests_now()

    @property
    def version(self) -> int:
        """Grows with every change of what the readers above would say."""
        return self._version

    async def wait_changed(self, version: int) -> int:
        """Wait until `version` is not the current one; gives the current one."""
        while self._version == version:
            await self._changed.wait()
        return self._version

    def _seen(self, kept: Kept, now: float) -> Seen:
        record = kept.record
        if not isinstance(record, SpanRecord):
            raise error(Code.INTERNAL, f"record {subkey_of(record)} is no span")
        mine = record.peer == self._network.peer
        return Seen(record, kept.expires_at - now, record.peer in self._lost, mine)

    async def _look_up_spans(self, fingerprint: str, interest: _Interest) -> None:
        interest.looked_at = self._clock()
        touched = buckets(0, interest.num_blocks)
        await self._look_up([blocks_key(self._swarm_id, fingerprint, bucket) for bucket in touched])

    async def _look_up(self, keys: list[bytes]) -> None:
        """Merge what several holders of each key know. A holder that fails is passed over."""
        await self._holders.find(keys)
        questions: dict[str, list[bytes]] = {}
        for key in keys:
            holders = list(self._holders.of(key))
            for holder in self._rng.sample(holders, min(READ_HOLDERS, len(holders))):
                questions.setdefault(holder, []).append(key)
        async with anyio.create_task_group() as tasks:
            for holder, asked in questions.items():
                tasks.start_soon(self._read, holder, asked)

    async def _read(self, holder: str, keys: list[bytes]) -> None:
        after = ""
        try:
            for _ in range(MAX_PAGES):
                (answer,) = await self._ask(holder, [Find(tuple(keys), after)])
                if not isinstance(answer, Found):
                    raise _unexpected(holder, answer)
                for entry in answer.entries:
                    self._keep(entry, owner=None)
                    await anyio.lowlevel.checkpoint()  # a signature takes 0.1 ms, a page has 64
                if not answer.next:
                    return
                after = answer.next
        except CorollaError as problem:
            _log.info("find_failed", holder=holder, problem=str(problem))
            self._holders.failed(holder)

    async def _ask(self, holder: str, questions: Iterable[Message]) -> list[Message]:
        """Ask one holder, on one stream. Raises `PEER_LOST`, `TIMEOUT`, `UNSUPPORTED`, or as it answers."""
        stream = await self._network.open(holder, REGISTRY_PROTOCOL, timeout_s=REGISTRY_TIMEOUT_S)
        conversation = Conversation(stream, REGISTRY, max_payload_bytes=0)
        answers = []
        try:
            for question in questions:
                answer = await conversation.ask(question, timeout_s=REGISTRY_TIMEOUT_S)
                if isinstance(answer, Declined):
                    raise answer.problem()
                answers.append(answer)
        except BaseException:
            stream.reset()
            raise
        await stream.close()
        return answers

    def _keep(self, entry: Entry, *, owner: str | None, origin: str = "") -> None:
        """Put a record on the shelf; one that is refused is a holder's mistake or its signer's, not ours."""
        try:
            self._put(entry, owner=owner, origin=origin)
        except CorollaError as problem:
            _log.debug("record_not_kept", problem=str(problem))

    def _put(self, entry: Entry, *, owner: str | None, origin: str) -> None:
        now = self._clock()
        peer = peer_id_of(entry.signed.public_key)
        if self._membership.roll.is_barred(peer):
            raise error(Code.BAD_RECORD, f"{peer} is banned here, or its membership was revoked")
        try:
            changed = self._shelf.put(entry, now=now, now_unix=self._unix(), owner=owner, origin=origin)
        except CorollaError as problem:
            if "skew_s" in problem.details:  # its signature held
                self.doubts.note_clock(peer, float(problem.details["skew_s"]), now)
            raise
        if peer != self._network.peer:
            self.doubts.note_clock(peer, 0.0, now)
        elif owner is None:
            seq = verify(entry.signed, self._swarm_id, now_unix_s=self._unix()).seq
            self.doubts.note_own(seq, self._ours.last_seq, now)
        lost_at = self._lost.get(peer)
        if lost_at is not None and now + entry.remaining_s - RECORD_LIFETIME_S > lost_at:
            del self._lost[peer]  # it signed this after we lost it: it lives, and others reach it
            changed = True
        if changed:
            self._notify()

    def _notify(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = anyio.Event()

    # holding

    async def _serve(self, stream: Stream) -> None:
        """Answer a member's questions until it ends the stream."""
        conversation = Conversation(stream, REGISTRY, max_payload_bytes=0)
        views = [view for view in self._network.peers() if view.peer == stream.peer]
        origin = origin_of(stream.peer, views[0].addresses if views else ())
        with anyio.move_on_after(REGISTRY_IDLE_S) as scope:
            while True:
                try:
                    question = await conversation.hear()
                except CorollaError as problem:
                    if problem.code is not Code.UNSUPPORTED:
                        raise
                    await conversation.say(Declined(problem.to_wire()))
                    continue
                if question is None:
                    break
                scope.deadline = anyio.current_time() + REGISTRY_IDLE_S
                await conversation.say(await self._answer(question, stream.peer, origin))
            await stream.close()
            return
        stream.reset()

    async def _answer(self, question: Message, peer: str, origin: str) -> Message:
        if isinstance(question, Find):
            return self._shelf.find(question.keys, question.after, self._clock())
        if not isinstance(question, Store):
            return Declined(error(Code.UNSUPPORTED, f"{question.KIND} is no question").to_wire())
        refused = []
        wait_s = self._paces.take(peer, len(question.entries), self._clock())
        for index, entry in enumerate(question.entries):
            try:
                if wait_s > 0:
                    raise error(
                        Code.BUSY, f"more than {RECORDS_PER_S:g} records a second", "store them later"
                    )
                self._put(entry, owner=peer, origin=origin)
            except CorollaError as problem:
                seq = problem.details.get("seq", 0)
                refused.append(Refusal(index, problem.to_wire(), seq))
            await anyio.lowlevel.checkpoint()  # a signature takes 0.1 ms, a batch has 64
        return Stored(tuple(refused))

    # life

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Hold, refresh, keep what is asked for fresh, until cancelled; started once we are a holder."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self._membership.on_member(self._on_member)
            self._membership.on_review(self._on_review)
            self._membership.on_twin(lambda: self.doubts.note_twin(self._clock()))
            self._network.handle(REGISTRY_PROTOCOL, self._serve)
            tasks.start_soon(self._keep_publishing)
            tasks.start_soon(self._keep_fresh)
            tasks.start_soon(self._keep_expiring)
            for member in self._membership.members():
                tasks.start_soon(self._welcome, member.peer)
            task_status.started()
            try:
                await anyio.sleep_forever()
            finally:
                self._tasks = None

    def _on_member(self, peer: str, connected: bool) -> None:
        if connected:
            if self._lost.pop(peer, None) is not None:
                self._notify()
            if self._tasks is not None and self._holders.are_all:
                self._tasks.start_soon(self._welcome, peer)
            if len(self._membership.members()) == 1:
                self._urgent.set()
        else:
            self._lost[peer] = self._clock()
            self._holders.failed(peer)
            self._notify()

    def _on_review(self) -> None:
        """Records of peers that are banned or revoked go, wherever we had them from."""
        if self._shelf.drop(self._membership.roll.is_barred):
            self._notify()

    async def _welcome(self, peer: str) -> None:
        """In a small swarm: tell a new member all that we announce, and ask for what we care for."""
        now = self._clock()
        entries = [
            Entry(kept.signed, kept.expires_at - now, kept.keys)
            for kept in self._shelf.of_peer(self._network.peer, now)
        ]
        if entries:
            await self._send(peer, entries)
        keys = [models_key(self._swarm_id)]
        for fingerprint, interest in self._interests.items():
            touched = buckets(0, interest.num_blocks)
            keys += [blocks_key(self._swarm_id, fingerprint, bucket) for bucket in touched]
        await self._read(peer, keys[:MAX_KEYS_PER_FIND])

    async def _keep_publishing(self) -> None:
        while True:
            with anyio.move_on_after(REFRESH_EVERY_S * self._rng.uniform(0.9, 1.0)):
                await self._urgent.wait()
            try:
                if not self._urgent.is_set():
                    await self._look_for_twin()
                await self.publish()
            except CorollaError as problem:  # a full disk, say: our records run out unless it ends
                _log.error("publish_failed", problem=str(problem))
                await anyio.sleep(PAUSE_AFTER_FAILURE_S)

    async def _look_for_twin(self) -> None:
        """See what others hold in our name, before we say it anew."""
        now = self._clock()
        ours = next(iter(self._shelf.of_peer(self._network.peer, now)), None)
        if ours is not None and ours.keys and now - self._own_looked_at >= OWN_EVERY_S:
            self._own_looked_at = now
            await self._look_up([ours.keys[0]])

    async def _keep_fresh(self) -> None:
        """Look up again what was asked for lately."""
        while True:
            await anyio.sleep(LOOKUP_EVERY_S / 2 * self._rng.uniform(0.8, 1.2))
            now = self._clock()
            for fingerprint, interest in tuple(self._interests.items()):
                if interest.until < now:
                    del self._interests[fingerprint]
                elif now - interest.looked_at > LOOKUP_EVERY_S / 2:
                    await self._look_up_spans(fingerprint, interest)

    async def _keep_expiring(self) -> None:
        while True:
            await anyio.sleep(EXPIRE_EVERY_S)
            now = self._clock()
            self._lost = {p: at for p, at in self._lost.items() if now - at < MAX_RECORD_LIFETIME_S}
            if self._shelf.expire(now):
                self._notify()


def _unexpected(peer: str, answer: Message) -> CorollaError:
    return error(Code.PROTOCOL_VIOLATION, f"{peer} answered {answer.KIND} where nobody asked for it")
