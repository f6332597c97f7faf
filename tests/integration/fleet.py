"""A swarm of real daemons with spares, which tests kill one by one and replace."""

from __future__ import annotations

import itertools
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..model.tiny import VOCAB_SIZE, save_tiny
from ..processes import DaemonProcess, LocalSwarm, local_swarm, wait_until

NUM_BLOCKS = 6
SPANS = ((0, 2), (2, 4), (4, 6))
NEW_TOKENS = 120
MOST_TOKENS = 8000  # of a text that its user ends: beyond what any machine writes while a repair lasts
GRACE_S = 4  # what a hop keeps a session that left it; the next test waits for that
GOES_ON = 24  # tokens after what was waited for
LIAR = Path(__file__).with_name("liar.py")
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")


@dataclass
class Liar(DaemonProcess):
    """A `corollad` of `liar.py`."""

    def command(self) -> list[str]:
        honest = super().command()
        return [sys.executable, str(LIAR), str(self.folder), *honest[honest.index("corolla.daemon") + 1 :]]

    def lie(self, kind: str) -> None:
        """Spoil the next step that it sends."""
        (self.folder / "lie").write_text(kind)

    def cut(self, *others: DaemonProcess) -> None:
        """No step of it reaches these any more; without any, all is well again."""
        (self.folder / "unreachable").write_text("\n".join(map(peer_of, others)))

    def hold(self) -> None:
        """Keep back the next step that it sends, until `release`."""
        (self.folder / "hold").touch()

    def release(self) -> None:
        """Send what was held back."""
        (self.folder / "hold").unlink()

    def holds(self) -> bool:
        """Whether it keeps a step back now."""
        return (self.folder / "held").exists()


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

    def chosen(self, prompt: list[int], tokens: Sequence[int]) -> tuple[int, ...]:
        """What the whole model would write at each place of a text: these very tokens, if the text is its own.

        One pass instead of one for each token, since how long a text became depends on the machine.
        """
        with torch.inference_mode():
            logits = self.whole(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits
        return tuple(logits[0, len(prompt) - 1 :].argmax(-1).tolist())

    def charges(self) -> list[str]:
        """Peers that the client's daemon has charged so far, one for each charge."""
        with self.client.connect() as daemon:
            return [event.detail["peer"] for event in daemon.events() if event.kind == "charged"]

    def charged(self, since: int = 0) -> set[str]:
        """The same after the first `since` charges, each once."""
        return set(self.charges()[since:])


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
    *,
    until: str = "",
    then: Callable[[], None] = lambda: None,
    **sampling: Any,
) -> Outcome:
    """One streamed generation; `disturb` is called after each token with their number. See `generate_rows`."""
    rows, events = generate_rows(
        fleet.client,
        [prompt],
        disturb,
        MOST_TOKENS if until else num_tokens,
        until=until,
        then=then,
        **sampling,
    )
    return Outcome(rows[0], events)


def generate_rows(
    client: DaemonProcess,
    prompts: list[list[int]],
    disturb: Callable[[int], None],
    num_tokens: int,
    *,
    until: str = "",
    then: Callable[[], None] = lambda: None,
    **sampling: Any,
) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """The tokens of each row, and the kinds of events in between.

    until: the event that the text has to live to see: its user ends it a while after that, so that nothing depends
    on how fast the machine writes. then: called when that event was told, amid the text.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    events: list[str] = []
    count = 0
    end = math.inf
    with (
        client.connect() as daemon,
        daemon.model("tiny").generate(
            tokens=prompts, max_new_tokens=num_tokens, stream=True, events=True, **sampling
        ) as pieces,
    ):
        for piece in pieces:
            if piece.event is not None:
                events.append(piece.event)
                if piece.event == until and end == math.inf:
                    end = count + GOES_ON * len(rows)
                    then()
                continue
            rows[piece.row].append(piece.token)
            count += 1
            disturb(count)
            if count >= end:
                break
    return [tuple(row) for row in rows], tuple(events)


@contextmanager
def fleet_of(folder: Path, cache: Path, kind: type[DaemonProcess] = DaemonProcess) -> Iterator[Fleet]:
    """A fleet that serves a tiny random Llama of `NUM_BLOCKS`. kind: of the daemons that serve."""
    whole = save_tiny(
        folder,
        "llama",
        seed=4,
        num_hidden_layers=NUM_BLOCKS,
        eos_token_id=None,
        max_position_embeddings=2 * MOST_TOKENS,
    )
    config = cache / "config.toml"
    config.write_text(f"session_grace_s = {GRACE_S}\n")
    with local_swarm(folder, *OPTIONS, "--cache-dir", str(cache), "--config", str(config)) as swarm:
        swarm.kind = kind
        yield Fleet(swarm, swarm.found(), whole)


def stop(daemon: DaemonProcess) -> None:
    """SIGSTOP: it hangs, and its connections stay open."""
    daemon.signal(signal.SIGSTOP)


def wake(daemon: DaemonProcess) -> None:
    """SIGCONT."""
    daemon.signal(signal.SIGCONT)
