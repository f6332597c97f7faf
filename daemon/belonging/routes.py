"""Routes for sessions: joins what the registry knows, how far peers are, and who is to blame.

It owns nothing but its memory of round trips. What a good route is, `swarm/routing` decides; it is asked with a
frozen view. It opens no session.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import anyio
import structlog

from ...protocol import views
from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import CONNECT_TIMEOUT_S
from ...protocol.work import ModelFacts
from ..network.members.greeting import PROTOCOL_MAJORS
from ..network.members.membership import Membership
from ..network.registry.registry import Registry, Seen
from ..network.seam import Network
from ..session.wiring import Route, RouteHop, RouteRequest
from ..swarm.blame import Ledger
from ..swarm.models import known_models, resolve_model
from ..swarm.routing import Path, Wanted, find_path
from ..swarm.standby import Standing, stand
from ..swarm.view import Span, SwarmView

KNOWN_WELL_S: Final = 30.0  # so old may the answer of holders be when a route is found in it
KNOWN_NOW_S: Final = 2.0  # and so old before we say that blocks are served by nobody
RTT_TTL_S: Final = 600.0  # how long a round trip is remembered of a peer that is no longer connected
MAX_PROBES: Final = 4  # peers connected to, to learn how far they are, for one route
PROBE_TIMEOUT_S: Final = 2.0  # farther than that is too far

_log = structlog.get_logger("corolla.routes")


def no_swarm() -> CorollaError:
    """The error of everything that needs a swarm while there is none."""
    return error(Code.NO_SWARM, "not in a swarm", "daemonctl join TOKEN, or daemonctl swarm create NAME")


class Routes:
    """Finds routes and models in one swarm; a `session.wiring.Router`.

    rng: spreads sessions over replicas. clock: monotonic seconds, the same as the ledger's.
    """

    def __init__(
        self,
        network: Network,
        membership: Membership,
        registry: Registry,
        ledger: Ledger,
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        self._network = network
        self._membership = membership
        self._registry = registry
        self._ledger = ledger
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._clock = clock
        self._rtts: dict[str, tuple[float, float]] = {}  # peer → round trip, when seen

    async def find_route(self, request: RouteRequest) -> Route:
        """The route of least expected time.

        Raises `BLOCKS_UNSERVED` naming the blocks and who is loading them, `NO_PEERS` if nobody else is
        there at all, `BLOCKS_OUT_OF_RANGE`. A repair is answered from what is known, without asking around.
        """
        seed = self._rng.getrandbits(32)
        num_blocks = self._num_blocks(request.fingerprint, request.end)
        await self._registry.spans(request.fingerprint, num_blocks, max_age_s=KNOWN_WELL_S)
        try:
            path = self._find_path(request, seed)
        except CorollaError as problem:
            if problem.code is not Code.BLOCKS_UNSERVED:
                raise
            await self._registry.spans(request.fingerprint, num_blocks, max_age_s=KNOWN_NOW_S)
            path = self._find_path_or_say_why(request, seed)
        if not _is_repair(request) and await self._probe(request, path):
            path = self._find_path_or_say_why(request, seed)
        self._make_reachable(leg.span.peer for leg in path.legs)
        return Route(
            tuple(
                RouteHop(leg.span.hop, leg.start, leg.end, leg.span.dtype, leg.span.quantization)
                for leg in path.legs
            )
        )

    async def stand(self, request: RouteRequest, hops: Sequence[RouteHop]) -> list[Standing]:
        """How each hop of a session's route does beside its standby, by what is known here. Nobody is measured for it.

        request: what the route was found for. Raises what the registry raises, as `find_route`.
        """
        num_blocks = self._num_blocks(request.fingerprint, request.end)
        await self._registry.spans(request.fingerprint, num_blocks, max_age_s=KNOWN_WELL_S)
        view = self.view(request.fingerprint, num_blocks)
        return stand(view, _wanted(request), [(place.hop, place.start, place.end) for place in hops])

    async def find_model(self, name: str) -> ModelFacts:
        """The model that a user calls `name`; see `swarm.models.resolve_model` for what it raises."""
        manifests = await self._registry.models()
        try:
            return resolve_model(name, manifests)
        except CorollaError as problem:
            if problem.code is not Code.UNKNOWN_MODEL:
                raise
        return resolve_model(name, await self._registry.models(max_age_s=KNOWN_NOW_S))

    def view(self, fingerprint: str, num_blocks: int) -> SwarmView:
        """The swarm's spans of one model as we know them now."""
        now = self._clock()
        self._note_rtts(now)
        spans = (self._span(seen, now) for seen in self._registry.spans_now(fingerprint))
        return SwarmView(fingerprint, num_blocks, tuple(spans))

    def describe(self) -> views.SwarmView:
        """The whole swarm, for people and their programs."""
        models = known_models(self._registry.manifests_now())
        names = {model.fingerprint: model.name for model in models}
        swarm = self._membership.swarm
        return views.SwarmView(
            name=swarm.name,
            swarm_id=swarm.swarm_id,
            models=tuple(self._describe_model(model) for model in models),
            spans=tuple(
                views.SpanView(
                    peer=seen.record.peer,
                    worker=seen.record.worker,
                    model=names.get(seen.record.fingerprint, seen.record.fingerprint[:8]),
                    fingerprint=seen.record.fingerprint,
                    start=seen.record.start,
                    end=seen.record.end,
                    state="lost" if seen.suspect else seen.record.state.value,
                    dtype=seen.record.dtype,
                    quantization=seen.record.quantization,
                    tokens_per_s=seen.record.tokens_per_s,
                    expires_in_s=seen.expires_in_s,
                    mine=seen.mine,
                )
                for seen in self._registry.all_spans_now()
            ),
        )

    def _describe_model(self, model: ModelFacts) -> views.ModelView:
        return views.ModelView(
            name=model.name,
            fingerprint=model.fingerprint,
            architecture=model.architecture,
            num_blocks=model.num_blocks,
            hidden_size=model.hidden_size,
            hub_id=model.hub_id,
            licence=model.licence,
            replicas=self.view(model.fingerprint, model.num_blocks).replicas(),
        )

    # the view

    def _span(self, seen: Seen, now: float) -> Span:
        record = seen.record
        rtt = (0.0, now) if seen.mine else self._rtts.get(record.peer)
        return Span(
            peer=record.peer,
            worker=record.worker,
            start=record.start,
            end=record.end,
            state=record.state,
            dtype=record.dtype,
            quantization=record.quantization,
            encodings=record.encodings,
            tokens_per_s=record.tokens_per_s,
            cache_tokens=record.cache_tokens,
            majors=record.protocol_majors,
            rtt_s=None if rtt is None else rtt[0],
            penalty_s=self._ledger.penalty(record.peer, now),
            suspect=seen.suspect,
            mine=seen.mine,
            movable=record.movable,
            queue=record.queue,
        )

    def _note_rtts(self, now: float) -> None:
        for view in self._network.peers():
            if view.rtt_s is not None:
                self._rtts[view.peer] = (view.rtt_s, now)
        self._rtts = {peer: rtt for peer, rtt in self._rtts.items() if now - rtt[1] < RTT_TTL_S}

    def _num_blocks(self, fingerprint: str, at_least: int) -> int:
        """How many blocks the model has, as far as its manifest is known here."""
        for model in known_models(self._registry.manifests_now()):
            if model.fingerprint == fingerprint:
                return model.num_blocks
        return at_least

    # the choice

    def _find_path(self, request: RouteRequest, seed: int) -> Path:
        view = self.view(request.fingerprint, self._num_blocks(request.fingerprint, request.end))
        return find_path(view, _wanted(request), seed=seed)

    def _find_path_or_say_why(self, request: RouteRequest, seed: int) -> Path:
        try:
            return self._find_path(request, seed)
        except CorollaError as problem:
            if problem.code is Code.BLOCKS_UNSERVED and not self._membership.members():
                refusal = self._membership.refusal
                if refusal is not None:
                    raise error(refusal.code, refusal.message, refusal.remedy) from problem
                raise error(
                    Code.NO_PEERS,
                    f"no other member of swarm {self._membership.swarm.name} is connected,"
                    f" and {problem.message}",
                    "wait with `--wait`, or run `daemonctl status` on another member and join by its line",
                    **problem.details,
                ) from problem
            raise

    async def _probe(self, request: RouteRequest, path: Path) -> bool:
        """Connect to a few peers whose distance would matter and is not known; True if any answered.

        Those are the peers on the path, then those who would take over from one of them, so that a standby is warm
        when it is needed, and then others that serve the same blocks, by chance.
        """
        view = self.view(request.fingerprint, self._num_blocks(request.fingerprint, request.end))
        unknown = {
            span.peer
            for span in view.spans
            if span.rtt_s is None
            and span.is_online
            and span.start < request.end
            and span.end > request.start
            and span.peer not in request.avoid_peers
        }
        connected = {peer.peer for peer in self._network.peers()}
        places = [(leg.span.hop, leg.start, leg.end) for leg in path.legs]
        standbys = [one.standby for one in stand(view, _wanted(request), places) if one.standby is not None]
        legs = (*path.legs, *(leg for standby in standbys for leg in standby.legs))
        first = list(dict.fromkeys(leg.span.peer for leg in legs if leg.span.peer in unknown))
        others = sorted(unknown - set(first))
        self._rng.shuffle(others)
        chosen = [peer for peer in (*first, *others) if peer not in connected][:MAX_PROBES]
        answered: list[str] = []
        with anyio.move_on_after(PROBE_TIMEOUT_S):
            async with anyio.create_task_group() as tasks:
                for peer in chosen:
                    tasks.start_soon(self._connect, peer, answered)
        return bool(answered)

    async def _connect(self, peer: str, answered: list[str]) -> None:
        for address in self._addresses(peer):
            try:
                await self._network.connect(address, timeout_s=CONNECT_TIMEOUT_S)
            except CorollaError as problem:
                _log.debug("probe_failed", peer=peer, address=address, problem=str(problem))
                continue
            if await self._membership.wait_member(peer, timeout_s=CONNECT_TIMEOUT_S):
                answered.append(peer)
            return

    def _make_reachable(self, peers: Iterable[str]) -> None:
        """Let the network know where the route's peers are, so that sessions can open streams to them."""
        for peer in dict.fromkeys(peers):
            addresses = self._addresses(peer)
            if addresses and not self._membership.is_member(peer):
                self._network.learn(peer, addresses)

    def _addresses(self, peer: str) -> tuple[str, ...]:
        """Where a peer's own records say that it is."""
        for seen in self._registry.all_spans_now():
            if seen.record.peer == peer:
                return tuple(a for a in seen.record.addresses if a.rpartition("/p2p/")[2] == peer)
        return ()


def _is_repair(request: RouteRequest) -> bool:
    return (request.upstream, request.downstream, request.precision) != (None, None, None)


def _wanted(request: RouteRequest) -> Wanted:
    precision = request.precision
    return Wanted(
        start=request.start,
        end=request.end,
        encoding=request.encoding,
        dtype=None if precision is None else precision.dtype,
        quantization=None if precision is None else precision.quantization,
        avoid=request.avoid,
        avoid_peers=request.avoid_peers,
        avoid_links=frozenset(request.avoid_links),
        upstream=None if request.upstream is None else request.upstream.peer,
        downstream=None if request.downstream is None else request.downstream.peer,
        cache_tokens=request.max_rows * request.max_tokens,
        majors=PROTOCOL_MAJORS,
    )
