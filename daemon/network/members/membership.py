"""Who belongs to our swarm: greets each new connection, parts with strangers, keeps up acquaintance.

It owns the set of members (connected, and of our swarm) and dials those heard of. Only members
enter the network's routing tables. It knows nothing of records, models or sessions. Peer sampling follows
the idea of gossip: each greeting carries a small random sample of whom the other side knows
(Jelasity et al. 2007, Gossip-based Peer Sampling).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from ....protocol.errors import Code, CorollaError, error, error_from_wire
from ....protocol.limits import (
    CONNECT_TIMEOUT_S,
    GREETINGS_AT_ONCE,
    GREETINGS_PER_S,
    HELLO_TIMEOUT_S,
    MAX_ADDRESSES,
    MAX_MEMBERS_TOLD,
    MAX_NAME_CHARS,
)
from ....protocol.registry import HELLO_PROTOCOL, RUN_BYTES, Hello, PeerAddresses
from ..allowance import Paces, Rate
from ..seam import Network, Stream
from .acquaintances import Acquaintances, of_peer, tell_of
from .bootstrap import Bootstrap
from .greeting import PROTOCOL_MAJORS, Swarm, another_swarm, as_hello, converse, greet_with, let_it_hear
from .roll import Roll
from .runs import Runs
from .strangers import Strangers

GOSSIP_EVERY_S: Final = 30.0
FAREWELL_S: Final = 2.0  # for one put out to hear why
MAX_REASON_CHARS: Final = 500  # of a refusal, which a stranger wrote
PATIENCE_S: Final = 2.0  # how long the dialled side waits for the dialler to greet before greeting itself

_log = structlog.get_logger("corolla.membership")


@dataclass(frozen=True, slots=True)
class Member:
    """A connected peer of our swarm, as it introduced itself. clock_ahead_s: its clock against ours; None if it
    told no time.
    """

    peer: str
    version: str
    majors: tuple[int, ...]
    addresses: tuple[str, ...]
    clock_ahead_s: float | None = None


class Membership:
    """The members of one swarm, on one network. Run `run()` in a task; it ends only by cancellation.

    bootstrap: multiaddresses of members, from a token or remembered.
    version: of this program, told to others. roll: who may be a member; None lets everybody in.
    on_refused: told when a member says, not as at the last time, why it has nothing to do with us.
    unix: the wall clock, in seconds, told to others and compared with theirs.
    """

    def __init__(
        self,
        network: Network,
        swarm: Swarm,
        *,
        bootstrap: Sequence[str] = (),
        version: str = "",
        roll: Roll | None = None,
        on_refused: Callable[[CorollaError], None] = lambda problem: None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = anyio.current_time,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self.swarm = swarm
        self.roll = roll or Roll(network.peer)
        self._network = network
        self._version = version
        self._rng = rng or random.Random()  # noqa: S311 - picks whom to tell of, guards nothing
        self._clock = clock
        self._unix = unix
        self._bootstrap = Bootstrap(bootstrap, self._rng, clock)
        self._members: dict[str, Member] = {}
        self._known = Acquaintances(self._rng, clock)
        self._strangers = Strangers()
        self._greetings = Paces(Rate(GREETINGS_PER_S, GREETINGS_AT_ONCE))
        self._listeners: list[Callable[[str, bool], None]] = []
        self._reviewers: list[Callable[[], None]] = []
        self._twin_listeners: list[Callable[[], None]] = []
        self._run = self._rng.randbytes(RUN_BYTES)
        self._runs = Runs()
        self._on_refused = on_refused
        self._refusal: CorollaError | None = None
        self._changed: anyio.Event | None = None
        self._tasks: TaskGroup | None = None

    # what others ask

    def members(self) -> tuple[Member, ...]:
        """Connected peers of our swarm, without us."""
        return tuple(self._members.values())

    def is_member(self, peer: str) -> bool:
        """Is this peer connected and of our swarm? We are."""
        return peer in self._members or peer == self._network.peer

    def known(self) -> tuple[PeerAddresses, ...]:
        """Members heard of, connected or not: worth remembering for the next start."""
        return self._known.told()

    def unseen_s(self, peer: str) -> float | None:
        """For how long a member that we know was not connected; None if it is, or is unknown."""
        return None if peer in self._members else self._known.unseen_s(peer)

    @property
    def num_known(self) -> int:
        """How many members we know to exist, without us."""
        return len({*self._known.peers(), *self._members})

    def hear_of(self, told: PeerAddresses) -> None:
        """A member may be there: it is dialled, and its greeting shows whether it is one."""
        self._hear_of(told)
        self._known.bound(self._members)
        self._wake()

    def on_member(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener(peer, connected)` whenever a member is admitted or lost."""
        self._listeners.append(listener)

    def on_review(self, listener: Callable[[], None]) -> None:
        """Call `listener()` whenever others are banned or revoked than before."""
        self._reviewers.append(listener)

    def on_twin(self, listener: Callable[[], None]) -> None:
        """Call `listener()` whenever a member says that another daemon greets in our name."""
        self._twin_listeners.append(listener)

    @property
    def refusal(self) -> CorollaError | None:
        """Why a member said it has nothing to do with us, if nobody else is connected."""
        return None if self._members else self._refusal

    async def wait_member(self, peer: str, *, timeout_s: float) -> bool:
        """Wait until this peer is a member; False if it is not within the time."""
        with anyio.move_on_after(timeout_s):
            while not self.is_member(peer):
                await self._wait_changed()
        return self.is_member(peer)

    async def wait_joined(self, *, timeout_s: float) -> None:
        """Wait for the first other member.

        Raises `NO_PEERS` naming what was tried; `NOT_INVITED` as soon as all of it failed and a member refused us.
        """
        with anyio.move_on_after(timeout_s):
            while not self._members and not self._bootstrap.is_refused():
                await self._wait_changed()
        if not self._members:
            if self._refusal is not None and self._bootstrap.is_refused():
                raise error(self._refusal.code, self._refusal.message, self._refusal.remedy)
            raise error(
                Code.NO_PEERS,
                f"no member of swarm {self.swarm.name} answered in {timeout_s:g} s ({self._bootstrap})",
                "check that a member runs and can be reached, or paste a fresh token",
            )

    def unreached(self) -> tuple[tuple[str, str], ...]:
        """The bootstrap addresses that did not answer when last dialled, and why."""
        return self._bootstrap.unreached()

    def may_speak(self, peer: str, protocol: str) -> bool:
        """May a peer use a protocol of ours? Everyone may greet; the rest is for members."""
        return protocol == HELLO_PROTOCOL or self.is_member(peer)

    def review(self) -> None:
        """The roll has changed: part with members that are none any longer, tell the others."""
        if self._tasks is None:
            return
        for peer in tuple(self._members):
            problem = self.roll.bar(peer)
            if problem is None:
                self._tasks.start_soon(self._greet_again, peer)
            else:
                self._lose(peer, problem)
                self._tasks.start_soon(self._part, peer, problem)
        for listener in self._reviewers:
            listener()

    def forgive(self, peer: str) -> None:
        """A peer is no longer banned: it may come, and be dialled, as one never met."""
        self._strangers.forgive(peer)

    # life

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Greet, dial, gossip, until cancelled; started once greetings are served."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self._network.restrict(self.may_speak)
            self._network.handle(HELLO_PROTOCOL, self._answer)
            self._network.on_peer(self._on_peer)
            self._network.on_addresses(self._on_addresses)
            for view in self._network.peers():
                self._on_peer(view.peer, True)
            tasks.start_soon(self._keep_acquaintance)
            tasks.start_soon(self._gossip)
            task_status.started()
            try:
                await anyio.sleep_forever()
            finally:
                self._tasks = None

    def _on_peer(self, peer: str, connected: bool) -> None:
        if self._tasks is None:
            return
        if connected:
            self._tasks.start_soon(self._meet, peer)
        elif self._members.pop(peer, None) is not None:
            self._known.parted(peer)
            self._tell(peer, False)

    def _on_addresses(self) -> None:
        """We are reached elsewhere now: let the members know at once."""
        if self._tasks is not None:
            for peer in self._members:
                self._tasks.start_soon(self._greet_again, peer)

    # greeting

    async def _meet(self, peer: str) -> None:
        """Learn which swarm a new connection belongs to; part with it if not ours."""
        try:
            with anyio.move_on_after(HELLO_TIMEOUT_S):
                met_at = self._clock()
                if any(view.inbound for view in self._network.peers() if view.peer == peer):
                    await self._wait_greeted(peer, met_at, timeout_s=PATIENCE_S)
                if not self._is_judged(peer, met_at):
                    await self._greet(peer)
        except CorollaError as problem:
            _log.info("greeting_failed", peer=peer, problem=str(problem))
            if problem.code is Code.UNSUPPORTED:  # it may be asking which swarm this is, and join then
                await self.wait_member(peer, timeout_s=HELLO_TIMEOUT_S)
        if not self.is_member(peer):
            await self._network.disconnect(peer)

    async def _wait_greeted(self, peer: str, since: float, *, timeout_s: float) -> None:
        with anyio.move_on_after(timeout_s):
            while not self._is_judged(peer, since):
                await self._wait_changed()

    def _is_judged(self, peer: str, since: float) -> bool:
        """Whether nothing is left to ask a peer: it is a member, or proved to be none, or left.

        To greet one that left would be to dial it.
        """
        if self.is_member(peer) or self._strangers.proved(peer, since) is not None:
            return True
        return not any(view.peer == peer for view in self._network.peers())

    async def _greet(self, peer: str) -> None:
        """Say hello and hear it. Raises `WRONG_SWARM`, `NOT_INVITED`, and as `greet_with`."""
        ours = self._hello(peer, self.roll.bar(peer))  # one who is barred hears that at once
        async with greet_with(self._network, peer, ours, timeout_s=HELLO_TIMEOUT_S) as hello:
            if hello.problem is not None:
                raise self._hear_refusal(peer, hello)
            try:
                is_new = hello.swarm_id == self.swarm.swarm_id and self._admit(peer, hello)
            except CorollaError as problem:
                self._shun(peer, problem)
                raise
        if is_new:
            self._tell(peer, True)
            if self.roll.revocations != hello.revocations and self._tasks is not None:
                self._tasks.start_soon(self._greet_again, peer)  # ours is for members, which it is only now
        if hello.swarm_id == self.swarm.swarm_id:
            return
        if hello.swarm_id:
            stranger = another_swarm(peer, hello, self.swarm)
            self._shun(peer, stranger)
            raise stranger
        await self.wait_member(peer, timeout_s=HELLO_TIMEOUT_S)  # a guest: it may join yet

    async def _answer(self, stream: Stream) -> None:
        """Serve one greeting."""
        conversation = converse(stream)
        if self._greetings.take(stream.peer, 1, self._clock()) > 0:
            raise error(Code.LIMIT_EXCEEDED, f"{stream.peer} greets too often")
        with anyio.move_on_after(HELLO_TIMEOUT_S):
            hello = as_hello(await conversation.hear(), stream.peer)
            if hello.problem is not None:
                self._hear_refusal(stream.peer, hello)
                await conversation.say(self._hello(stream.peer))
                await stream.close()
                return
            is_ours = hello.swarm_id == self.swarm.swarm_id
            refusal: CorollaError | None = None
            is_new = False
            try:
                is_new = is_ours and self._admit(stream.peer, hello)
            except CorollaError as problem:
                refusal = problem
            await conversation.say(self._hello(stream.peer, refusal))
            await stream.close()
            await let_it_hear(stream)
            if is_new and stream.peer in self._members:
                self._tell(stream.peer, True)
            if refusal is not None or (hello.swarm_id and not is_ours):
                self._shun(stream.peer, refusal or another_swarm(stream.peer, hello, self.swarm))
                await self._network.disconnect(stream.peer)
            return
        stream.reset()

    # parting

    async def _part(self, peer: str, problem: CorollaError) -> None:
        """Tell a member why it is one no longer, if it will hear that, and close its connections."""
        with anyio.move_on_after(FAREWELL_S):
            try:
                ours = self._hello(peer, problem)
                async with greet_with(self._network, peer, ours, timeout_s=FAREWELL_S):
                    pass
            except CorollaError as failure:
                _log.info("left_untold", peer=peer, problem=str(failure))
        await self._network.disconnect(peer)

    def _hear_refusal(self, peer: str, hello: Hello) -> CorollaError:
        """A peer has nothing to do with us: part with it, and remember why."""
        told = error_from_wire(hello.problem)
        said, remedy = told.message[:MAX_REASON_CHARS], told.remedy[:MAX_REASON_CHARS]
        problem = error(told.code, f"{peer} refused us: {said}", remedy)
        if peer in self._members or (not self._members and self._may_refuse(peer, hello)):
            self._refusal = problem
            if self._strangers.said(peer) != str(problem):
                self._on_refused(problem)
        self._lose(peer, problem)
        return problem

    def _may_refuse(self, peer: str, hello: Hello) -> bool:
        """Whether it says so as a member: strangers shall not make us believe that we were put out."""
        return hello.swarm_id == self.swarm.swarm_id and self.roll.is_credible(peer, hello.proof)

    def _lose(self, peer: str, problem: CorollaError) -> None:
        """It is no member, or none any longer, though it may be connected still."""
        self._shun(peer, problem)
        if self._members.pop(peer, None) is not None:
            self._tell(peer, False)

    def _hello(self, to: str, refusal: CorollaError | None = None) -> Hello:
        """What we say. Members and memberships go to members alone."""
        is_member = to in self._members
        sample: tuple[PeerAddresses, ...] = ()
        if to in self._members:
            others = [m for m in self._members.values() if m.peer != to and m.addresses]
            chosen = self._rng.sample(others, min(len(others), MAX_MEMBERS_TOLD))
            sample = tuple(tell_of(m.peer, m.addresses) for m in chosen)
        return Hello(
            self.swarm.swarm_id,
            self.swarm.name,
            self._version,
            PROTOCOL_MAJORS,
            self._network.addresses()[:MAX_ADDRESSES],
            sample,
            charter=self.roll.charter,
            proof=self.roll.proof,
            revocations=self.roll.revocations if is_member else None,
            admitted=self.roll.sample(self._rng) if is_member else (),
            unix_s=self._unix(),
            observed=self._network.observes(to)[:MAX_NAME_CHARS],
            problem=None if refusal is None else refusal.to_wire(),
            run=self._run,
            doubled=self._runs.take_turns(to, self._clock()),
        )

    def _admit(self, peer: str, hello: Hello) -> bool:
        """Take a peer in, or what is new about it; True if it was no member before. Raises `NOT_INVITED`."""
        if not any(view.peer == peer for view in self._network.peers()):
            return False  # the connection closed while it was talking
        is_news = hello.revocations is not None and self.roll.hear_revocations(hello.revocations)
        self.roll.admit(peer, hello.proof)
        self.roll.hear_of(hello.admitted)
        if is_news:
            self.review()
        addresses = tuple(of_peer(hello.addresses, peer))
        is_new = peer not in self._members
        self._refusal = None
        ahead_s = hello.unix_s - self._unix() if hello.unix_s else None
        self._members[peer] = Member(peer, hello.version, hello.majors, addresses, ahead_s)
        self._strangers.forgive(peer)
        if hello.observed:
            self._network.observed_by(peer, hello.observed)
        if addresses:
            self._network.learn(peer, addresses)
            self._known.met(peer, addresses)
        self._runs.note(peer, hello.run, self._clock())
        if hello.doubled:
            for listener in self._twin_listeners:
                listener()
        for told in hello.members:
            self._hear_of(told)
        self._known.bound(self._members)
        return is_new

    def _hear_of(self, told: PeerAddresses) -> None:
        if not self.is_member(told.peer) and told.peer not in self._strangers:
            self._known.hear_of(told)

    def _shun(self, peer: str, reason: CorollaError) -> None:
        self._known.forget(peer)
        self._strangers.note(peer, reason, self._clock())
        self._wake()

    def _tell(self, peer: str, connected: bool) -> None:
        _log.info("member_joined" if connected else "member_lost", peer=peer, num=len(self._members))
        for listener in self._listeners:
            listener(peer, connected)
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _wait_changed(self) -> None:
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    # keeping up acquaintance

    async def _gossip(self) -> None:
        while True:
            await anyio.sleep(GOSSIP_EVERY_S * self._rng.uniform(0.8, 1.2))
            if not self._members:
                continue
            await self._greet_again(self._rng.choice(sorted(self._members)))

    async def _greet_again(self, peer: str) -> None:
        """Tell a member what is new, and hear what is new with it."""
        try:
            await self._greet(peer)
        except CorollaError as problem:
            _log.info("gossip_failed", peer=peer, problem=str(problem))

    async def _keep_acquaintance(self) -> None:
        """Dial members heard of until we have enough; the bootstrap addresses, too, while we have none."""
        while True:
            if self._members:
                self._bootstrap.rest()
            elif self._bootstrap.due_at() <= self._clock():
                await self._dial_bootstrap()
                self._bootstrap.dialled()
            due = self._known.due(self._members)
            async with anyio.create_task_group() as tasks:
                for peer in due:
                    tasks.start_soon(self._dial, peer)
            if not due:
                with anyio.move_on_after(self._pause_s()):
                    await self._wait_changed()

    def _pause_s(self) -> float:
        """Until somebody may be dialled."""
        now = self._clock()
        soonest = min(self._known.due_at(self._members), now + GOSSIP_EVERY_S)
        if not self._members:
            soonest = min(soonest, self._bootstrap.due_at())
        return max(0.05, soonest - now)

    async def _dial(self, peer: str) -> None:
        for address in self._known.dial(peer):
            try:
                await self._connect(address)
            except CorollaError as problem:
                _log.debug("dial_failed", peer=peer, address=address, problem=str(problem))
            else:
                return

    async def _connect(self, address: str) -> None:
        """Dial an address and wait for the greeting's outcome. Raises `PEER_LOST`, `TIMEOUT`, or why not."""
        dialled_at = self._clock()
        peer = await self._network.connect(address, timeout_s=CONNECT_TIMEOUT_S)
        with anyio.move_on_after(HELLO_TIMEOUT_S):
            while not self.is_member(peer):
                reason = self._strangers.proved(peer, dialled_at)
                if reason is not None:
                    raise error(reason.code, reason.message, reason.remedy)
                await self._wait_changed()
            return
        raise error(Code.TIMEOUT, "it did not greet")

    async def _dial_bootstrap(self) -> None:
        async with anyio.create_task_group() as tasks:
            for address in self._bootstrap.addresses:
                tasks.start_soon(self._dial_address, address)

    async def _dial_address(self, address: str) -> None:
        try:
            await self._connect(address)
        except CorollaError as problem:
            self._bootstrap.tried(address, problem)
        else:
            self._bootstrap.tried(address, None)
        self._wake()
