"""Finds out whether others can dial us, and does others the same service, by AutoNAT v2. See `autonat.py`.

It owns what was found. It dials nobody itself: it is told how. What it does for others is bounded: one dial at
a time for each, few at once, so many a minute, and none but to the public IP from which the asker speaks. So nobody
can be made to knock at a third one's door. Where the specification would ask for data before it dials another IP,
to make that dear, we refuse; nor do we pay for such a dial. The nonce has to come from the peer that was asked, over
a connection that it made: only members are heard, so nobody could bring it in another name.
A NAT that lets in whoever shares its address with one we spoke to is taken for an open one (RFC 5780, section
4.4, would ask a third peer to dial); peers at several places have to agree, which makes it rare.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import structlog
import trio

from ....protocol.errors import Code, CorollaError, error
from ....protocol.limits import (
    CONNECT_TIMEOUT_S,
    DIAL_BACK_AGAIN_S,
    MAX_DIAL_BACKS,
    MAX_DIAL_BACKS_PER_MINUTE,
)
from ..seam import Network, Stream
from . import autonat
from .autonat import DIAL_BACK_PROTOCOL, DIAL_REQUEST_PROTOCOL, DialRequest, DialResponse, DialStatus, Status
from .observations import Sighting, endpoint_of, place_of
from .preamble import Preamble
from .proofs import FRESH_S, LASTING_S, Proof, Question, Verdict, judge, questions

ASK_S: Final = CONNECT_TIMEOUT_S + 5.0  # for the answer, with the dial in between
RING_S: Final = 3.0  # for the nonce over a connection that stands
FIRST_AGAIN_S: Final = 2.0  # before a peer is asked again that did not answer; then less and less often
LAST_AGAIN_S: Final = 300.0
MAX_PROOFS: Final = 256

_log = structlog.get_logger("corolla.reaching")


Ring: TypeAlias = Callable[[str, str, int], Awaitable[bool]]  # address, peer, nonce


@dataclass(frozen=True, slots=True)
class Doorbell:
    """What reaching needs of a network.

    ring: dials a peer at an address from a port that its NAT has never seen, and brings the nonce over that
    connection; whether it was taken; raises `PEER_LOST` with the reason if nobody answers there. came_in: whether a
    stream came over a direct connection that the far side made. own: our public addresses, as far as we know them
    ourselves. sightings: where connected peers see us.
    """

    ring: Ring
    came_in: Callable[[Stream], bool]
    own: Callable[[], Sequence[str]]
    sightings: Callable[[], Mapping[str, Sighting]]


class _Later(NamedTuple):
    """A peer did not answer: when to ask it again, and how long that was put off."""

    again_at: float
    after_s: float


class Reaching:
    """Of one network. changed: called when the verdict is another."""

    def __init__(self, network: Network, bell: Doorbell, changed: Callable[[], None] = lambda: None) -> None:
        self._network = network
        self._bell = bell
        self._changed = changed
        self._proofs: deque[Proof] = deque(maxlen=MAX_PROOFS)
        self._verdict = Verdict()
        self._awaited: dict[int, str] = {}  # nonce → who shall bring it
        self._came: set[int] = set()
        self._later: dict[str, _Later] = {}
        self._served = Doorkeeper()
        self._stirred = trio.Event()

    @property
    def verdict(self) -> Verdict:
        """Whether others can dial us, as far as is known."""
        return self._verdict

    def serve(self) -> None:
        """Answer others, and take what they bring, from now on."""
        self._network.handle(DIAL_REQUEST_PROTOCOL, self._answer)
        self._network.handle(DIAL_BACK_PROTOCOL, self._take)

    def stir(self) -> None:
        """Look at once whether there is something to ask: we are seen elsewhere, or by another."""
        self._stirred.set()

    async def run(self) -> None:
        """Ask whenever something is to be learned, until cancelled."""
        while True:
            self._stirred = trio.Event()
            looked_at = trio.current_time()
            async with trio.open_nursery() as nursery:
                for question in self._due(looked_at):
                    nursery.start_soon(self._ask, question)
            self._judge()
            with trio.move_on_after(self._pause_s(looked_at)):
                await self._stirred.wait()

    def _due(self, now: float) -> list[Question]:
        sightings = self._bell.sightings()
        self._later = {peer: later for peer, later in self._later.items() if peer in sightings}
        ready = {
            peer: sighting
            for peer, sighting in sightings.items()
            if peer not in self._later or self._later[peer].again_at <= now
        }
        wanted = questions(ready, self._bell.own(), self._proofs, now)
        return list({question.peer: question for question in reversed(wanted)}.values())  # one of each peer

    def _pause_s(self, looked_at: float) -> float:
        """Until something may be due that was not when we looked last."""
        times = [later.again_at for later in self._later.values()]
        times += [proof.at + FRESH_S for proof in self._proofs]
        soonest = min((at for at in times if at > looked_at), default=looked_at + FRESH_S)
        return max(FIRST_AGAIN_S, soonest - trio.current_time())

    def _judge(self) -> None:
        seen = [sighting.address for sighting in self._bell.sightings().values() if sighting.place]
        verdict = judge(self._proofs, self._bell.own(), seen, trio.current_time())
        if verdict != self._verdict:
            self._verdict = verdict
            _log.info("reachability", is_public=verdict.is_public, proven=verdict.proven)
            self._changed()

    async def _ask(self, question: Question) -> None:
        nonce = autonat.new_nonce()
        self._awaited[nonce] = question.peer
        try:
            reached = await self._dialled_back(question, nonce)
        except CorollaError as problem:
            _log.debug("not_dialled_back", peer=question.peer, reason=problem.message)
            last = self._later.get(question.peer)
            after_s = min(LAST_AGAIN_S, 2 * last.after_s) if last is not None else FIRST_AGAIN_S
            self._later[question.peer] = _Later(trio.current_time() + after_s, after_s)
        else:
            self._later.pop(question.peer, None)
            self._note(Proof(question.place, question.address, reached, trio.current_time()))
        finally:
            del self._awaited[nonce]
            self._came.discard(nonce)

    async def _dialled_back(self, question: Question, nonce: int) -> bool:
        """Whether the peer reached us. Raises what kept us from learning it."""
        peer = question.peer
        stream = await self._network.open(peer, DIAL_REQUEST_PROTOCOL, timeout_s=ASK_S)
        try:
            with trio.fail_after(ASK_S):
                talk = Preamble(stream)
                await talk.say(autonat.request((question.address,), nonce))
                answer = autonat.as_response(await talk.hear(autonat.ENVELOPE))
        except trio.TooSlowError as problem:
            raise error(Code.TIMEOUT, f"{peer} did not answer in {ASK_S:g} s") from problem
        finally:
            stream.reset()
        if nonce in self._came:
            return True
        if answer.status is not Status.OK:
            raise error(Code.BUSY, f"{peer} did not dial us: {answer.status.name.lower()}")
        if answer.index == 0 and answer.dial_status is DialStatus.DIAL_ERROR:
            _log.debug("not_reached", peer=peer, address=question.address)
            return False
        if answer.dial_status is DialStatus.DIAL_BACK_ERROR:
            raise error(Code.PEER_LOST, f"{peer} dialled us, and could not bring its nonce")
        raise error(Code.PROTOCOL_VIOLATION, f"{peer} says that it dialled us, and did not")

    def _note(self, proof: Proof) -> None:
        now = proof.at
        kept = [
            one
            for one in self._proofs
            if now - one.at < LASTING_S and (one.place, one.address) != (proof.place, proof.address)
        ]
        self._proofs = deque((*kept, proof), maxlen=MAX_PROOFS)
        self._judge()

    async def _take(self, stream: Stream) -> None:
        """Somebody brings a nonce."""
        with trio.move_on_after(RING_S):
            talk = Preamble(stream)
            nonce = autonat.nonce_of(await talk.hear(autonat.DIAL_BACK))
            if self._awaited.get(nonce) == stream.peer and self._bell.came_in(stream):
                self._came.add(nonce)
                await talk.say(autonat.dial_back_response())
                await stream.close()
                return
        stream.reset()

    # for others

    async def _answer(self, stream: Stream) -> None:
        talk = Preamble(stream)
        with trio.move_on_after(RING_S) as patience:
            asked = autonat.as_request(await talk.hear(autonat.ENVELOPE))
        if patience.cancelled_caught:
            stream.reset()
            return
        answer = await self._dial_back(stream.peer, asked)
        with trio.move_on_after(RING_S) as patience:
            await talk.say(autonat.response(answer))
            await stream.close()
        if patience.cancelled_caught:
            stream.reset()

    async def _dial_back(self, peer: str, asked: DialRequest) -> DialResponse:
        observed = self._network.observes(peer)
        why_not = {address: refusal(address, observed) for address in asked.addresses}
        index = next((at for at, address in enumerate(asked.addresses) if not why_not[address]), None)
        if index is None:
            _log.debug("dial_refused", peer=peer, reasons=why_not)
            return DialResponse(Status.REFUSED)
        busy = self._served.admit(peer, trio.current_time())
        if busy:
            _log.debug("dial_rejected", peer=peer, reason=busy)
            return DialResponse(Status.REJECTED)
        found = DialStatus.DIAL_ERROR
        try:
            with trio.move_on_after(CONNECT_TIMEOUT_S + RING_S):
                is_taken = await self._bell.ring(asked.addresses[index], peer, asked.nonce)
                found = DialStatus.OK if is_taken else DialStatus.DIAL_BACK_ERROR
        except CorollaError as problem:
            _log.debug("dialled_in_vain", peer=peer, reason=problem.message)
        finally:
            self._served.done(peer)
        return DialResponse(Status.OK, index, found)


async def say_nonce(stream: Stream, nonce: int) -> bool:
    """Bring a nonce, on a stream over the connection that was made for it; whether it was taken."""
    taken = False
    with trio.move_on_after(RING_S):
        try:
            talk = Preamble(stream)
            await talk.say(autonat.dial_back(nonce))
            autonat.check_taken(await talk.hear(autonat.DIAL_BACK_RESPONSE))
            await stream.close()
            taken = True
        except CorollaError as problem:
            _log.debug("nonce_not_taken", peer=stream.peer, reason=problem.message)
    if not taken:
        stream.reset()
    return taken


def refusal(address: str, observed: str) -> str:
    """Why we do not dial `address` for one whom we see at `observed`; "" if we do."""
    wanted, seen = endpoint_of(address), endpoint_of(observed)
    if wanted is None:
        return "not an address of TCP over IP"
    if seen is None or not place_of(observed):
        return "you do not come to me over the internet"
    if wanted[0] != seen[0]:
        return f"you come from {seen[0]}, not from {wanted[0]}"
    return ""


class Doorkeeper:
    """For whom we dial, and how often. Pure: the clock is an argument."""

    def __init__(self) -> None:
        self._dialling: set[str] = set()
        self._times: deque[tuple[float, str]] = deque()  # of the last minute's dials

    def admit(self, peer: str, now: float) -> str:
        """Take up a dial for a peer, which ends by `done`; or why not."""
        while self._times and now - self._times[0][0] >= 60.0:
            self._times.popleft()
        if peer in self._dialling or any(
            one == peer and now - at < DIAL_BACK_AGAIN_S for at, one in self._times
        ):
            return f"asked twice in {DIAL_BACK_AGAIN_S:g} s"
        if len(self._dialling) >= MAX_DIAL_BACKS or len(self._times) >= MAX_DIAL_BACKS_PER_MINUTE:
            return "busy"
        self._dialling.add(peer)
        self._times.append((now, peer))
        return ""

    def done(self, peer: str) -> None:
        """The dial has ended."""
        self._dialling.discard(peer)
