"""What each method of the control protocol does, one handler a row. They ask the node and hold nothing."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from contextlib import aclosing
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import trio

from ...protocol.control import (
    CreateSwarm,
    Follow,
    Generate,
    InstallProgress,
    Join,
    Joined,
    OpenModelSession,
    Pause,
    Piece,
    Pulled,
    PullModel,
    Rebalance,
    SetConfig,
    Stop,
)
from ...protocol.errors import Code, CorollaError, error
from ...protocol.views import SwarmView
from ...protocol.work import SourceKind
from ..control import Ask, Handler, Reply
from ..generation import Generation, event_piece
from ..lending.sources import source_of
from ..pages import Pages
from ..sessions import close_for_program, open_for_program, step_for_program
from ..training.parts import PartShelf
from .guests import Guests
from .metrics import CONTENT_TYPE, Metrics
from .netcheck import NetworkChecks
from .programs import Programs

if TYPE_CHECKING:
    from ..node import Node


METRICS: Final = "/metrics"


def handlers(node: Node) -> Mapping[str, Handler]:
    """The table of handlers; its names are those of `protocol.control.METHODS`."""
    parts = PartShelf()
    methods = Methods(node, parts, secrets.token_bytes(32))
    return {
        "status": methods.status,
        "swarm": methods.swarm,
        "models": methods.models,
        "events": methods.events,
        "config": methods.config,
        "config.set": methods.set_config,
        "worker.install": methods.install_worker,
        "generate": methods.generate,
        "session.open": methods.open_session,
        "session.step": step_for_program,
        "session.close": close_for_program,
        "model.pull": methods.pull,
        "swarm.create": methods.create_swarm,
        "swarm.join": methods.join,
        "swarm.leave": methods.leave,
        "rebalance": methods.rebalance,
        "metrics": methods.metrics,
        "drain": methods.drain,
        "pause": methods.pause,
        "resume": methods.resume,
        "stop": methods.stop,
        **Programs(node, parts).handlers(),
        **Guests(node).handlers(),
        **NetworkChecks(node).handlers(),
    }


def pages(node: Node) -> Pages:
    """What is answered over HTTP, by path."""
    metrics = Metrics(node)
    return {METRICS: lambda: (CONTENT_TYPE, metrics.text())}


class Methods:
    """Handlers that need the node.

    parts: of adapters that programs put here. secret: keys the names under which hops keep what users began with.
    """

    def __init__(self, node: Node, parts: PartShelf, secret: bytes) -> None:
        self._node = node
        self._parts = parts
        self._secret = secret

    async def status(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        return Reply(self._node.status())

    async def swarm(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        belonging = self._node.belonging
        return Reply(SwarmView(None, None, (), ()) if belonging is None else belonging.routes.describe())

    async def models(self, ask: Ask) -> Reply:
        belonging = self._node.belonging
        if belonging is None:
            return Reply(())
        await belonging.registry.models()
        return Reply(belonging.routes.describe().models)

    async def events(self, ask: Ask) -> Reply:
        arguments: Follow = ask.arguments
        async with aclosing(self._node.events.read(follow=arguments.follow)) as events:
            async for event in events:
                await ask.item(event)
        return Reply()

    async def config(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        return Reply(dataclasses.asdict(self._node.config))

    async def set_config(self, ask: Ask) -> Reply:
        arguments: SetConfig = ask.arguments
        await trio.lowlevel.checkpoint()
        return Reply(self._node.reloading.set(arguments.key, arguments.value))

    async def generate(self, ask: Ask) -> Reply:
        arguments: Generate = ask.arguments
        node = self._node

        async def emit(piece: Piece) -> None:
            node.tally.generated_tokens += piece.token >= 0
            await ask.item(piece)

        generation = Generation(
            node.the_belonging(),
            node.lending.ends,
            arguments,
            emit,
            ask.post,
            self._parts.adapter(arguments.parts, arguments.soft),
            replacement_wait_s=node.config.replacement_wait_s,
            secret=self._secret_of(ask.caller.uid),
        )
        with node.session_open():
            if (words := node.first_text_words()) is not None:
                ask.post(event_piece("notice", words))
            return Reply(await generation.run())

    def _secret_of(self, uid: int) -> bytes:
        """What keys the names of a user's prefixes: users share nothing, and a restarted daemon begins anew."""
        return blake2b(str(uid).encode(), key=self._secret, digest_size=32).digest()

    async def open_session(self, ask: Ask) -> Reply:
        node = self._node
        arguments: OpenModelSession = ask.arguments
        return await open_for_program(
            ask,
            node.the_belonging(),
            self._parts.adapter(arguments.parts, arguments.soft),
            lender=node.lending.ends,
            replacement_wait_s=node.config.replacement_wait_s,
            on_event=lambda event: node.events.emit(f"session_{event.kind}", event.text, **event.detail),
            counted=node.session_open,
        )

    async def pull(self, ask: Ask) -> Reply:
        """Fetch by a worker that loads the ends alone, which is how any worker fetches."""
        arguments: PullModel = ask.arguments
        try:
            source = source_of(arguments.model)
        except CorollaError:
            if self._node.belonging is None:
                raise
            facts = await self._node.belonging.routes.find_model(arguments.model)
            worker = await self._node.lending.ends.ends_of(facts)
            return Reply(Pulled((await worker.wait_ready()).folder))
        if arguments.revision:
            if source.kind is not SourceKind.HUB:
                raise error(
                    Code.BAD_REQUEST,
                    f"{arguments.model} is on this machine and has no revisions",
                    "leave it out",
                )
            source = dataclasses.replace(source, revision=arguments.revision)
        folder = await self._node.lending.ends.pull(source, ask.item)
        return Reply(Pulled(folder))

    async def install_worker(self, ask: Ask) -> Reply:
        """Workers that wait for their environment find it at their next start."""

        async def tell(line: str) -> None:
            await ask.item(InstallProgress(line))

        await self._node.environment.install(tell)
        return Reply()

    async def create_swarm(self, ask: Ask) -> Reply:
        arguments: CreateSwarm = ask.arguments
        return self._joined(await self._node.place.create(arguments.name, invited=arguments.invited))

    async def join(self, ask: Ask) -> Reply:
        arguments: Join = ask.arguments
        return self._joined(await self._node.place.join(arguments.token))

    def _joined(self, token: str) -> Reply:
        swarm = self._node.the_belonging().swarm
        return Reply(Joined(swarm.name, swarm.swarm_id, token, self._node.privacy()))

    async def leave(self, ask: Ask) -> Reply:
        await self._node.place.leave()
        return Reply()

    async def rebalance(self, ask: Ask) -> Reply:
        arguments: Rebalance = ask.arguments
        return Reply(await self._node.rebalancing.rebalance(arguments))

    async def metrics(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        return Reply(self._node.pages[METRICS]()[1].decode())

    async def drain(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        self._node.pausing.drain()
        return Reply()

    async def pause(self, ask: Ask) -> Reply:
        arguments: Pause = ask.arguments
        await self._node.pausing.pause(arguments.for_s)
        return Reply()

    async def resume(self, ask: Ask) -> Reply:
        await trio.lowlevel.checkpoint()
        self._node.pausing.resume()
        return Reply()

    async def stop(self, ask: Ask) -> Reply:
        arguments: Stop = ask.arguments
        await trio.lowlevel.checkpoint()
        self._node.stop(max(0.0, arguments.deadline_s))
        return Reply()
