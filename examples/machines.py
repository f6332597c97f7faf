"""The machines that an example trains on: a private swarm on this one, or the user's own daemon.

In the private swarm every block is served twice, so that a daemon can be killed while the run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

from corolla.sdk.client import Daemon, connect
from corolla.sdk.demo import plain, split
from corolla.sdk.demo_swarm import DemoSwarm, Member

REPLICAS = 2
DEFAULT_NAME = "SmolLM2-135M-Instruct"


class Machines:
    """A daemon to ask, and machines that can be killed. label: of the model, as the daemon calls it."""

    def __init__(self, daemon: Daemon, model: str, swarm: DemoSwarm | None) -> None:
        self.daemon = daemon
        self.model = model
        self._swarm = swarm
        self._numbers = itertools.count(1)

    def kill_one(self) -> None:
        """SIGKILL to the machine that has run longest; another one with its blocks is started.

        Waits until the one killed before has its successor, so that no block is ever without a machine.
        """
        if self._swarm is None:
            sys.exit("error: --kill-every is for the private swarm; leave out --socket")
        self._swarm.wait(self._swarm.is_serving, _nothing)
        victim = next(member for member in self._swarm.members if _is_lending(member))
        self._swarm.kill(victim)
        self._swarm.members.remove(victim)
        self._swarm.add(f"successor-{next(self._numbers)}", victim.blocks)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `chosen` reads."""
    parser.add_argument(
        "--model", help=f"folder, GGUF file or hub id; else {DEFAULT_NAME}, fetched once (93 MB)"
    )
    parser.add_argument("--socket", help="of your own daemon; else a private swarm is started")
    parser.add_argument("--hops", type=int, default=2, help="of the private swarm, each on two daemons")


def chosen(options: argparse.Namespace) -> AbstractContextManager[Machines]:
    """The machines that the options ask for."""
    if options.socket is not None:
        return own(options.socket, options.model or DEFAULT_NAME)
    return private(options.model or fetched(), options.hops)


def fetched() -> str:
    """The file of SmolLM2 in the user's cache, where `packaging/try` puts it too. Ends the program without it."""
    program = Path(__file__).parents[1] / "packaging" / "fetch_model.py"
    answer = subprocess.run([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        sys.exit("error: the model cannot be fetched; give another with --model FOLDER, FILE or HUB_ID")
    return answer.stdout.strip()


@contextmanager
def private(model: str, hops: int) -> Iterator[Machines]:
    """A swarm of this machine alone, gone at the end. model: a folder, a GGUF file or a hub id."""
    num_blocks = int(plain(model)["num_blocks"])
    with _leaving_in_order(), DemoSwarm(model, "example") as swarm:
        spans = split(num_blocks, hops)
        names = [(f"hop-{a}-{b}", span) for a, span in enumerate(spans) for b in range(REPLICAS)]
        print(f"starting {len(names) + 1} daemons, each with a part of {Path(model).stem}", file=sys.stderr)
        swarm.start([*names, ("client", None)], _nothing)
        swarm.wait(swarm.is_serving, _nothing)
        client = next(member for member in swarm.members if member.blocks is None)
        with client.connect() as daemon:
            swarm.wait(lambda: _is_covered(daemon), _nothing)
            yield Machines(daemon, daemon.models()[0].name, swarm)


@contextmanager
def own(socket: str, model: str) -> Iterator[Machines]:
    """The daemon that answers on a socket, and a model of its swarm."""
    with connect(socket) as daemon:
        yield Machines(daemon, model, None)


def _is_covered(daemon: Daemon) -> bool:
    return any(min(model.replicas) >= REPLICAS for model in daemon.models())


def _is_lending(member: Member) -> bool:
    return member.blocks is not None and not member.is_killed


@contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Told to end, we end as with Ctrl-C, and the daemons with us."""
    before = [(number, signal.signal(number, _leave)) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _nothing() -> None:
    return None
