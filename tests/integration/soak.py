"""A swarm under constant disturbance, with programs that generate all the time: what the soak test runs.

Every block has two replicas. Each disturbance strikes a machine whose blocks another one serves too, and is
undone by the next look, as volunteers come back; so no text may ever be lost, and every one must be right.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

from corolla.protocol.errors import CorollaError

from ..processes import DaemonProcess, LocalSwarm, wait_until
from .fleet import is_alive

REPLICAS = 2
RETURN_DEADLINE_S = 300.0


class Text(NamedTuple):
    """A prompt, and the tokens that one plain process writes after it."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


class Gap(NamedTuple):
    """Between two tokens of a text, or before the first. at_s: when it was over."""

    at_s: float
    length_s: float
    first: bool


@dataclass
class Writer:
    """A program that generates text after text until it is told to stop."""

    client: DaemonProcess
    model: str
    texts: list[Text]
    stopping: threading.Event
    num_right: int = 0
    num_tokens: int = 0
    num_repairs: int = 0
    gaps: list[Gap] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Write; what goes wrong is kept for the test."""
        for text in itertools.cycle(self.texts):
            if self.stopping.is_set():
                return
            try:
                tokens = self._write(text)
            except CorollaError as problem:
                self.problems.append(f"lost: {problem}")
                continue
            if tokens == text.tokens:
                self.num_right += 1
            else:
                self.problems.append(f"{tokens} after {text.prompt}, expected {text.tokens}")

    def _write(self, text: Text) -> tuple[int, ...]:
        tokens: list[int] = []
        last = time.monotonic()
        with self.client.connect() as daemon:
            for piece in daemon.model(self.model).generate(
                tokens=[list(text.prompt)],
                max_new_tokens=len(text.tokens),
                ignore_eos=True,
                encoding="float32",
                stream=True,
                events=True,
            ):
                if piece.event is not None:
                    self.num_repairs += piece.event == "repaired"
                    continue
                now = time.monotonic()
                self.gaps.append(Gap(now, now - last, not tokens))
                tokens.append(piece.token)
                last = now
        self.num_tokens += len(tokens)
        return tuple(tokens)


@dataclass
class Machine:
    """One volunteer's daemon. undo: what brings it back after the last disturbance."""

    daemon: DaemonProcess
    span: tuple[int, int]
    undo: Callable[[], None] | None = None


class Disturber:
    """Strikes one machine at a time, at random, and brings it back before the next strike at its blocks."""

    def __init__(self, swarm: LocalSwarm, client: DaemonProcess, num_blocks: int, rng: Random) -> None:
        self._swarm = swarm
        self._client = client
        self._num_blocks = num_blocks
        self._rng = rng
        self._names: Iterator[int] = itertools.count()
        self.machines: list[Machine] = []
        self.done: Counter[str] = Counter()

    def serve(self, start: int, end: int) -> None:
        """One more machine."""
        name = f"m{next(self._names)}"
        self.machines.append(Machine(self._swarm.serve(name, start, end), (start, end)))

    def wait_whole(self) -> None:
        """Bring back what was struck, and wait until every block is served as often as it should be."""
        for machine in self.machines:
            if machine.undo is not None:
                machine.undo()
                machine.undo = None
        wait_until(lambda: min(self._replicas()) >= REPLICAS, "every block twice", RETURN_DEADLINE_S)

    def strike(self) -> str:
        """One disturbance; what was done to whom."""
        actions = [self._kill, self._stop, self._pause, self._drain, self._join, self._rebalance]
        action = self._rng.choice(actions)
        machine = self._rng.choice(self.machines)
        action(machine)
        name = action.__name__.lstrip("_")
        self.done[name] += 1
        return f"{name} {machine.daemon.name} of {machine.span}"

    def _replicas(self) -> tuple[int, ...]:
        with self._client.connect() as daemon:
            models = daemon.swarm().models
        return models[0].replicas if models else (0,)

    def _kill(self, machine: Machine) -> None:
        machine.daemon.kill()

        def undo() -> None:
            machine.daemon.start()
            machine.daemon.wait_online()

        machine.undo = undo

    def _stop(self, machine: Machine) -> None:
        pids = [machine.daemon.pid, *machine.daemon.worker_pids()]
        for pid in pids:
            _signal(pid, signal.SIGSTOP)

        def undo() -> None:
            for pid in pids:
                _signal(pid, signal.SIGCONT)

        machine.undo = undo

    def _pause(self, machine: Machine) -> None:
        with machine.daemon.connect() as daemon:
            daemon.pause()
        machine.undo = lambda: _resume(machine.daemon)

    def _drain(self, machine: Machine) -> None:
        with machine.daemon.connect() as daemon:
            daemon.drain()
        machine.undo = lambda: _resume(machine.daemon)

    def _join(self, machine: Machine) -> None:
        """A newcomer with these blocks; the machine that had them says goodbye."""
        self.serve(*machine.span)
        newcomer = self.machines[-1].daemon
        newcomer.wait_online()
        machine.daemon.signal(signal.SIGTERM)
        self.machines.remove(machine)

    def _rebalance(self, machine: Machine) -> None:
        """Move to the first blocks and back; a machine of the first blocks moves to the last."""
        width = machine.span[1] - machine.span[0]
        to = (0, width) if machine.span[0] else (self._num_blocks - width, self._num_blocks)
        with machine.daemon.connect() as daemon:
            daemon.rebalance(to=to)

        def undo() -> None:
            machine.daemon.wait_online()
            with machine.daemon.connect() as daemon:
                daemon.rebalance(to=machine.span)
            machine.daemon.wait_online()

        machine.undo = undo


class Strike(NamedTuple):
    """When which kind of disturbance was done."""

    at_s: float
    kind: str


@dataclass(frozen=True)
class Figures:
    """What a soak run showed. growth: resident bytes of each lasting process at the end over those before.

    median_gap_s: between two tokens; longest_gap_s: likewise, by the last strike before its end; longest_start_s:
    from a question to its first token.
    """

    num_texts: int
    num_tokens: int
    num_repairs: int
    median_gap_s: float
    longest_gap_s: dict[str, float]
    longest_start_s: float
    strikes: dict[str, int]
    growth: dict[str, float]
    problems: tuple[str, ...]


def soak(
    disturber: Disturber,
    writers: list[Writer],
    stopping: threading.Event,
    num_strikes: int,
    interval_s: float,
    tell: Callable[[str], None],
) -> Figures:
    """So many disturbances at least, one each interval, while all writers write. tell: hears of each."""
    threads = [threading.Thread(target=writer.run) for writer in writers]
    for thread in threads:
        thread.start()
    client = writers[0].client
    before: dict[str, int] = {}
    begin_s = time.monotonic()
    strikes = [Strike(-math.inf, "none")]

    def begun() -> bool:
        return all(writer.num_right or writer.problems for writer in writers)

    try:
        wait_until(begun, "a first text of each", RETURN_DEADLINE_S)
        # Beyond the number too, until one has struck where a text was written.
        for number in itertools.count():
            if number >= num_strikes and any(writer.num_repairs for writer in writers):
                break
            if number == num_strikes // 3:
                before = resident(disturber, client)
            at_s = time.monotonic()
            struck = disturber.strike()
            strikes.append(Strike(at_s, struck.partition(" ")[0]))
            # The strike lasts; it is the pace of the test, and nothing is concluded from it.
            stopping.wait(interval_s)
            undone_s = time.monotonic()
            disturber.wait_whole()
            tell(f"{at_s - begin_s:6.1f} s: {struck}; {_since(at_s, undone_s, writers)}")
        after = resident(disturber, client)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    gaps = [gap for writer in writers for gap in writer.gaps if not gap.first]
    return Figures(
        num_texts=sum(writer.num_right for writer in writers),
        num_tokens=sum(writer.num_tokens for writer in writers),
        num_repairs=sum(writer.num_repairs for writer in writers),
        median_gap_s=round(median(gap.length_s for gap in gaps), 3),
        longest_gap_s=longest_by_strike(gaps, strikes),
        longest_start_s=round(max(g.length_s for writer in writers for g in writer.gaps if g.first), 1),
        strikes=dict(disturber.done),
        growth={name: round(after[name] / before[name], 3) for name in after if name in before},
        problems=tuple(problem for writer in writers for problem in writer.problems),
    )


def _since(at_s: float, undone_s: float, writers: list[Writer]) -> str:
    """What has come of a strike."""
    gaps = [gap.length_s for writer in writers for gap in writer.gaps if gap.at_s > at_s and not gap.first]
    parts = (
        f"longest gap {max(gaps, default=0.0):.1f} s, whole again in {time.monotonic() - undone_s:.1f} s",
        f"texts {[writer.num_right for writer in writers]}",
        f"repairs {[writer.num_repairs for writer in writers]}",
        *(f"PROBLEM {problem}" for writer in writers for problem in writer.problems),
    )
    return ", ".join(parts)


def longest_by_strike(gaps: list[Gap], strikes: list[Strike]) -> dict[str, float]:
    """The longest gap that ended after a strike of each kind and before the next strike."""
    longest: dict[str, float] = {}
    for gap in gaps:
        kind = next(strike.kind for strike in reversed(strikes) if strike.at_s <= gap.at_s)
        longest[kind] = max(longest.get(kind, 0.0), round(gap.length_s, 1))
    return longest


def resident(disturber: Disturber, client: DaemonProcess) -> dict[str, int]:
    """Memory in bytes of the client's daemon and of each that serves, by what it is and its process."""
    found = {"client's daemon": resident_bytes(client.pid)}
    for machine in disturber.machines:
        pid = machine.daemon.pid
        found[f"{machine.daemon.name}'s daemon {pid}"] = resident_bytes(pid)
        for worker in machine.daemon.worker_pids():
            found[f"{machine.daemon.name}'s worker {worker}"] = resident_bytes(worker)
    return found


def resident_bytes(pid: int) -> int:
    """Memory of one process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def _resume(process: DaemonProcess) -> None:
    if not is_alive(process):
        return
    with process.connect() as daemon:
        daemon.resume()
    process.wait_online()


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it was killed by a later strike
