"""A swarm of real daemons with spares, which tests kill one by one and replace."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..model.tiny import VOCAB_SIZE, save_tiny
from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until

NUM_BLOCKS = 6
SPANS = ((0, 2), (2, 4), (4, 6))
NEW_TOKENS = 240  # a second or two, so that there is a text to disturb
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")


@dataclass
class Fleet:
    """Daemons by span; every span of `SPANS` has one, and a spare, at the start of each test."""

    swarm: LocalSwarm
    client: DaemonProcess
    whole: Any
    serving: dict[tuple[int, int], list[DaemonProcess]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def add(self, span: tuple[int, int]) -> DaemonProcess:
        """Start one more daemon for a span; `wait` waits for all."""
        daemon = self.swarm.serve(f"d{next(self._numbers)}", *span)
        self.serving.setdefault(span, []).append(daemon)
        return daemon

    def wait(self) -> None:
        """Wait until every daemon serves and the client's sees it."""
        daemons = [daemon for group in self.serving.values() for daemon in group]
        for daemon in daemons:
            daemon.wait_online()
        replicas = [0] * NUM_BLOCKS
        for (start, end), group in self.serving.items():
            for block in range(start, end):
                replicas[block] += len(group)
        self.swarm.wait_covered(self.client, replicas)

    def restock(self, count: int = 2) -> None:
        """Replace what died, so that every span has `count` daemons again, all without a session."""
        for span in list(self.serving):
            self.serving[span] = [d for d in self.serving[span] if is_alive(d)]
            for daemon in self.serving[
                span
            ]:  # a hop that was left may keep its session for the time of grace
                daemon.wait_for(
                    lambda status: not any(worker.sessions for worker in status.workers), "has no session"
                )
            if span not in SPANS:
                for daemon in self.serving.pop(span):
                    daemon.kill()
        for span in SPANS:
            while len(self.serving.get(span, [])) < count:
                self.add(span)
        self.wait()

    def in_use(self, span: tuple[int, int]) -> DaemonProcess:
        """The daemon of a span that has a session now; waits for the first one."""

        def busy() -> list[DaemonProcess]:
            alive = [d for d in self.serving[span] if is_alive(d)]
            return [d for d in alive if any(worker.sessions for worker in d.status().workers)]

        wait_until(lambda: bool(busy()), f"a session on {span}")
        return busy()[0]

    def expected(self, prompt: list[int], num_tokens: int = NEW_TOKENS) -> tuple[int, ...]:
        """What one plain transformers process writes."""
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = self.whole.generate(
                ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        return tuple(out[0, len(prompt) :].tolist())

    def charges(self) -> list[str]:
        """Peers that the client's daemon has charged so far, one for each charge."""
        with self.client.connect() as daemon:
            return [event.detail["peer"] for event in daemon.events() if event.kind == "charged"]

    def charged(self) -> set[str]:
        """The same, each once."""
        return set(self.charges())


def is_alive(daemon: DaemonProcess) -> bool:
    """Whether its process runs."""
    return daemon.process is not None and daemon.process.poll() is None


def peer_of(daemon: DaemonProcess) -> str:
    """Its peer id, asked while it lives."""
    return daemon.status().peer


def prompt_of(num_tokens: int) -> list[int]:
    """A fixed prompt."""
    return [3 + (i * 37) % (VOCAB_SIZE - 4) for i in range(num_tokens)]


class Outcome(NamedTuple):
    """What a user got: tokens, and the kinds of events in between."""

    tokens: tuple[int, ...]
    events: tuple[str, ...]


def generate(
    fleet: Fleet,
    prompt: list[int],
    disturb: Callable[[int], None] = lambda count: None,
    num_tokens: int = NEW_TOKENS,
    **sampling: Any,
) -> Outcome:
    """One streamed generation; `disturb` is called after each token with their number."""
    tokens: list[int] = []
    events: list[str] = []
    with fleet.client.connect() as daemon:
        for piece in daemon.model("tiny").generate(
            tokens=[prompt], max_new_tokens=num_tokens, stream=True, events=True, **sampling
        ):
            if piece.event is not None:
                events.append(piece.event)
            else:
                tokens.append(piece.token)
                disturb(len(tokens))
    return Outcome(tuple(tokens), tuple(events))


@contextmanager
def fleet_of(folder: Path, cache: Path) -> Iterator[Fleet]:
    """A fleet that serves a tiny random Llama of `NUM_BLOCKS`."""
    whole = save_tiny(
        folder, "llama", seed=4, num_hidden_layers=NUM_BLOCKS, eos_token_id=None, max_position_embeddings=1024
    )
    with local_swarm(folder, *OPTIONS, "--cache-dir", str(cache)) as swarm:
        yield Fleet(swarm, swarm.found(), whole)


def stop(daemon: DaemonProcess) -> None:
    """SIGSTOP: it hangs, and its connections stay open."""
    daemon.signal(signal.SIGSTOP)


def wake(daemon: DaemonProcess) -> None:
    """SIGCONT."""
    daemon.signal(signal.SIGCONT)
