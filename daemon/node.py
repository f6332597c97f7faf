"""The daemon as a whole: starts everything, holds it together, stops it in order.

One task group holds the workers, the control socket and the place in a swarm. Entering or leaving a swarm ends
the old place and begins a new one; workers and the control socket stay.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from .. import __version__
from ..protocol.control import privacy_words
from ..protocol.errors import Code, CorollaError, error
from ..protocol.settings import Applied
from ..protocol.views import Status, WorkerStatus
from .belonging.belonging import Belonging, Terms
from .belonging.inviting import Inviting
from .config import Config, rules_of, with_settings
from .control import ControlServer, Handler, listen, uids_of
from .events import EventLog
from .health import reach_words, wrong_with
from .identity import load_identity
from .lending.contribution import Contributing
from .lending.lending import Lending
from .lending.pausing import Pausing
from .lending.profiles import Profiles
from .lending.rebalancing import Rebalancing
from .lending.uplink import Uplink
from .lending.weights import Weights
from .network.dialling import Reachability
from .network.libp2p.host import check_port
from .network.libp2p.tcp import listenable
from .network.reach.relaying import RelayLimits
from .network.traffic import Traffic
from .pages import Door, Pages
from .place import HINT, Place
from .reloading import Reloading, Sources
from .serving.environment import Environment
from .store import Store
from .systemd import Manager
from .tally import Tally
from .training.jobs import Jobs

SIGNAL_DEADLINE_S: Final = 30.0  # for sessions to move after SIGTERM; below the unit's TimeoutStopSec
STOP_TIMEOUT_S: Final = 10.0  # of everything that is left when the daemon stops

_log = structlog.get_logger("corolla.node")


class Node:
    """One daemon. `run` is its life; the rest is what calls ask of it.

    methods, pages: what answers the calls of this node's control socket, and HTTP. sources: the configuration
    anew, for reloads.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        socket: Path,
        cache_folder: Path,
        methods: Callable[[Node], Mapping[str, Handler]],
        pages: Callable[[Node], Pages],
        sources: Sources | None = None,
    ) -> None:
        self.config = config
        self.store: Final = store
        self.events: Final = EventLog()
        self.traffic: Final = Traffic()
        self.tally: Final = Tally()
        self.pages: Final = pages(self)
        self.door: Final = Door(self.pages, lambda: self.config.metrics_port, self.events.emit)
        self.jobs: Final = Jobs()
        self.profiles: Final = Profiles(store, __version__, self.events.emit)
        self.uplink: Final = Uplink(
            self.traffic, self.profiles, lambda: self.config.upload_bytes_per_s, self.events.emit
        )
        self.control: ControlServer
        self.reloading: Final = Reloading(
            store, sources or partial(with_settings, config), config, self._put_in_force, self.events.emit
        )
        self.lending: Lending
        self.rebalancing: Rebalancing
        self.pausing: Pausing
        self.weights: Weights
        self.contributing: Contributing
        self._socket = socket
        self.environment: Final = Environment(store.folder / "worker")
        self._cache_folder = cache_folder
        self._methods = methods
        self._manager = Manager(os.environ)
        self._identity = load_identity(store.folder)
        self._nursery: trio.Nursery
        self._began = time.monotonic()
        self._num_sessions = 0
        self._no_sessions = trio.Event()
        self.inviting: Final = Inviting(store, self._identity)
        self.place: Final = Place(self._terms, self.inviting, store, self.events)
        self._is_stopping = False
        self._stop_asked = trio.Event()
        self._stop_deadline_s = 0.0
        self._draining = trio.CancelScope()

    # its life

    async def run(self) -> None:
        """Serve until stopped. Raises what keeps it from starting: `PORT_TAKEN`, `STATE_IN_USE`, …"""
        for address in listenable(self.config.listen):
            check_port(address)
        operators = uids_of(self.config.operators)
        failure: CorollaError | None = None
        with listen(self._socket) as listener:
            async with trio.open_nursery() as nursery:
                try:
                    await self._start(nursery, listener, operators)
                    await self._stop_asked.wait()
                    await self._stop()
                except CorollaError as problem:  # raised again outside, so that the nursery does not wrap it
                    failure = problem
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        _log.info("stopped")

    async def _start(
        self, nursery: trio.Nursery, listener: trio.SocketListener, operators: frozenset[int]
    ) -> None:
        self.lending = Lending(
            self.config,
            str(self._cache_folder),
            nursery,
            self.events.emit,
            self.profiles,
            self.environment.command,
        )
        self.rebalancing = Rebalancing(self.lending, nursery, self.events.emit)
        self.contributing = Contributing(self.lending, self.store, self.events.emit, self.tally, self.traffic)
        self.pausing = Pausing(
            self.lending, self.store, nursery, self.events.emit, rules=lambda: rules_of(self.config)
        )
        self.pausing.start()
        self.weights = Weights(
            self._cache_folder,
            lambda: self.config.disk_bytes,
            self.lending.weights_in_use,
            self.events.emit,
        )
        nursery.start_soon(self.weights.run)
        nursery.start_soon(self.contributing.run)
        nursery.start_soon(self.rebalancing.run)
        nursery.start_soon(self.uplink.run)
        nursery.start_soon(self.door.run)
        nursery.start_soon(self.pausing.follow)
        nursery.start_soon(self._watch_signals)
        nursery.start_soon(self.place.keep, self.lending)
        self._nursery = nursery
        self.control = ControlServer(self._methods(self), operators, self.pages)
        nursery.start_soon(self._watch_reloads)
        await nursery.start(self.control.serve, listener)
        nursery.start_soon(self._manager.keep_informed, self._status_line)
        self.events.emit("started", f"corollad {__version__} answers on {self._socket}")
        if self.config.join:
            nursery.start_soon(self.place.join_configured, self.config.join)
        elif not self.place.is_wanted:
            self.events.emit("idle", HINT)

    async def _stop(self) -> None:
        """Drain for as long as asked, then leave the swarm and end the workers."""
        self._is_stopping = True
        self.place.close()
        self._manager.stopping()
        self.events.emit("stopping", f"stopping, at most {self._stop_deadline_s:g} s for running sessions")
        self._draining.deadline = trio.current_time() + self._stop_deadline_s
        with self._draining:
            await self._drain()
        self.contributing.save()
        with trio.move_on_after(STOP_TIMEOUT_S):
            await self.place.end()
        self.lending.stop()

    async def _drain(self) -> None:
        """Wait until neither users of this machine nor other members have a session here."""
        self.lending.drain()
        while self._num_sessions:
            self._no_sessions = trio.Event()
            await self._no_sessions.wait()
        if self.belonging is not None:
            await self.belonging.hops.wait_idle()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                self.events.emit("signal", f"received {signal.Signals(number).name}")
                self.stop(0.0 if self._is_stopping else SIGNAL_DEADLINE_S)

    async def _watch_reloads(self) -> None:
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            async for _ in signals:
                self.reloading.reload()

    def _terms(self) -> Terms:
        return Terms(
            identity=self._identity,
            listen=self.config.listen,
            announce=self.config.announce,
            stored_seq=self.store.load_seq(),
            save_seq=self._keep_seq,
            session_grace_s=self.config.session_grace_s,
            reachability=Reachability(self.config.reachability),
            relay=RelayLimits(is_wanted=lambda: self.config.relay),
            mdns=self.config.mdns,
            upnp=self.config.upnp,
            admits=self._admit,
            traffic=self.traffic,
            tally=self.tally,
            on_charge=lambda peer, weight, reason: self.events.emit(
                "charged", f"{peer}: {reason}", peer=peer, weight=weight
            ),
            standing=self.inviting.standing,
            save_standing=self.inviting.keep,
            on_refused=lambda problem: self.events.emit("refused", str(problem)),
        )

    def _keep_seq(self, seq: int) -> None:
        """Remember a sequence number if the disk lets us: holders tell the right one to whoever lost it."""
        was_well = self.store.problem is None
        try:
            self.store.save_seq(seq)
        except CorollaError as problem:
            if was_well:
                self.events.emit("store_failed", str(problem))

    def _admit(self, client: str) -> None:
        if self._is_stopping:
            raise error(Code.BUSY, "this daemon is stopping", "use another peer")

    @property
    def belonging(self) -> Belonging | None:
        """Our place in a swarm, if we are in one."""
        return self.place.belonging

    def the_belonging(self) -> Belonging:
        """Our place in a swarm. Raises `NO_SWARM`."""
        return self.place.the_belonging()

    def _put_in_force(self, config: Config, applied: Applied) -> None:
        """Serve by another configuration. Raises `UNKNOWN_MODEL`, `BAD_CONFIG`, and then nothing has changed."""
        operators = uids_of(config.operators)
        self.config = config
        self.control.allow(operators)
        self.uplink.apply()
        self.pausing.stir()
        self.weights.stir()
        self.door.stir()
        if self.belonging is not None:
            self.belonging.hops.keep_for(config.session_grace_s)
        self.lending.reconfigure(config)
        if "join" in applied.now and config.join:
            self._nursery.start_soon(self.place.join_configured, config.join)

    # what calls ask

    def stop(self, deadline_s: float) -> None:
        """Begin to stop; sessions may move or finish within the deadline. Asked again, the earlier one counts."""
        self._stop_deadline_s = deadline_s
        self._draining.deadline = min(self._draining.deadline, trio.current_time() + deadline_s)
        self._is_stopping = True
        self.place.close()
        self._stop_asked.set()

    @contextmanager
    def session_open(self) -> Iterator[None]:
        """Count a user's session while it runs. Raises `NOT_READY` when the daemon is stopping."""
        if self._is_stopping:
            raise error(Code.NOT_READY, "this daemon is stopping", "start it again: corollad")
        self._num_sessions += 1
        try:
            yield
        finally:
            self._num_sessions -= 1
            if not self._num_sessions:
                self._no_sessions.set()

    def first_text_words(self) -> str | None:
        """What has to be said with the first text in a swarm, and then no more."""
        swarm_id = self.the_belonging().swarm.swarm_id
        if self.store.state.told_swarm == swarm_id:
            return None
        try:
            self.store.update(told_swarm=swarm_id)
        except CorollaError as problem:
            self.events.emit("store_failed", str(problem))
        words = self.privacy()
        self.events.emit("notice", words)
        return words

    def privacy(self) -> str:
        """What users have to know of our swarm."""
        return privacy_words(self.inviting.standing.charter is not None)

    def status(self) -> Status:
        """The daemon in one screen."""
        belonging = self.belonging
        roll = belonging.membership.roll if belonging is not None else None
        token = belonging.token() if belonging is not None else ""
        workers = self.lending.statuses()
        state = "idle" if not self.place.is_wanted else "joining" if belonging is None else "online"
        return Status(
            version=__version__,
            state="stopping" if self._is_stopping else state,
            peer=self._identity.peer,
            socket=str(self._socket),
            state_folder=str(self.store.folder),
            uptime_s=time.monotonic() - self._began,
            swarm=belonging.swarm.name if belonging is not None else None,
            swarm_id=belonging.swarm.swarm_id if belonging is not None else None,
            join_command=f"daemonctl join {token}" if token else None,
            num_peers=len(belonging.membership.members()) if belonging is not None else 0,
            addresses=belonging.network.addresses() if belonging is not None else (),
            workers=workers,
            num_sessions=self._num_sessions,
            resident_bytes=_resident_bytes(),
            pid=os.getpid(),
            hint=self._hint(),
            lending=self.lending.lends,
            contribution=self.contributing.so_far(),
            line=self.uplink.view(),
            invited=roll is not None and roll.charter is not None,
            owner=roll is not None and roll.is_owner,
            training=self.jobs.views(trio.current_time()),
            num_users_served=belonging.hops.num_clients if belonging is not None else 0,
            reach=reach_words(belonging.network.reach()) if belonging is not None else "",
            health=self._health(workers),
        )

    def _status_line(self) -> str:
        """All of it in a line, for the service manager."""
        status = self.status()
        place = f"in swarm {status.swarm} with {status.num_peers} peers" if status.swarm else status.state
        spans = [f"{w.model} {w.start}:{w.end} {w.state}" for w in status.workers if not w.ends]
        return "; ".join([place, *spans, *([status.hint] if status.hint else [])])

    def _health(self, workers: tuple[WorkerStatus, ...]) -> tuple[str, ...]:
        """What is wrong, if anything."""
        ours = (self.store.problem, self.place.problem, self.reloading.problem)
        doubts = (self.inviting.hint(), self.place.doubt, self.weights.excess)
        return wrong_with(workers, [*(str(problem) for problem in ours if problem), *filter(None, doubts)])

    def _hint(self) -> str | None:
        """What to do next, if anything."""
        if (problem := self.place.problem) is not None:
            return str(problem)
        if (lost := self.inviting.hint()) is not None:
            return lost
        if (doubt := self.place.doubt) is not None:
            return doubt
        if (words := self.pausing.explain()) is not None:
            return words
        if (words := self.reloading.explain()) is not None:
            return words
        return None if self.place.is_wanted else HINT


def _resident_bytes() -> int:
    """Memory of this process in RAM."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
