"""A swarm under constant disturbance, with programs that generate all the time: what the soak test runs.

Each disturbance strikes a machine whose blocks another one serves too, and is undone after a while, as volunteers
come back, whatever befalls others meanwhile; so no text may ever be lost, and every one must be right.
"""

from __future__ import annotations

import itertools
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

from ..processes import DaemonFailedError, DaemonProcess, LocalSwarm, wait_until

RETURN_DEADLINE_S = 600.0
SLOW_START_S = 5.0  # a first token that takes longer is told with what happened before it


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
    slow_starts: list[str] = field(default_factory=list)

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
        events: list[str] = []
        last = began = time.monotonic()
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
                    if not tokens:
                        events.append(f"{time.monotonic() - began:.1f} s {piece.event} {piece.detail}")
                    continue
                now = time.monotonic()
                if not tokens and self.gaps and now - began > SLOW_START_S:
                    self.slow_starts.append(
                        f"{now - began:.1f} s at {began:.1f}: {'; '.join(events) or 'no event'}"
                    )
                self.gaps.append(Gap(now, now - last, not tokens))
                tokens.append(piece.token)
                last = now
        self.num_tokens += len(tokens)
        return tuple(tokens)


@dataclass
class Machine:
    """One volunteer's daemon. peer: its id, once it served. is_up: nothing has befallen it, or that is long over."""

    daemon: DaemonProcess
    span: tuple[int, int]
    peer: str = ""
    is_up: bool = True


class Disturber:
    """Strikes machines at random, and brings each back after a while, as volunteers come back.

    lasts_s: how long what befell a machine lasts before anything is done about it. A machine is struck only while
    another one that nothing has befallen serves its blocks.
    """

    def __init__(
        self, swarm: LocalSwarm, client: DaemonProcess, num_blocks: int, rng: Random, lasts_s: float
    ) -> None:
        self._swarm = swarm
        self._client = client
        self._num_blocks = num_blocks
        self._rng = rng
        self._lasts_s = lasts_s
        self._names: Iterator[int] = itertools.count()
        self._under_way: list[threading.Thread] = []
        self.machines: list[Machine] = []
        self.done: Counter[str] = Counter()
        self.returns_s: list[float] = []  # from being brought back to serving again
        self.problems: list[str] = []

    def serve(self, start: int, end: int, *, is_up: bool = True) -> Machine:
        """One more machine."""
        daemon = self._swarm.serve(f"m{next(self._names)}", start, end)
        self.machines.append(Machine(daemon, (start, end), is_up=is_up))
        return self.machines[-1]

    def wait_whole(self) -> None:
        """Wait until every machine serves its blocks again."""
        for thread in self._under_way:
            thread.join()
        for machine in self.machines:
            self._wait_seen(machine)

    def strike(self) -> str:
        """One disturbance; what is done to whom. Waits for a machine that may be struck."""
        wait_until(lambda: bool(self._candidates()), "a machine that another one replaces", RETURN_DEADLINE_S)
        action = self._rng.choice(
            [self._kill, self._stop, self._pause, self._drain, self._join, self._rebalance]
        )
        machine = self._rng.choice(self._candidates())
        machine.is_up = False
        name = action.__name__.lstrip("_")
        self.done[name] += 1
        self._under_way.append(threading.Thread(target=self._befall, args=(machine, action), daemon=True))
        self._under_way[-1].start()
        return f"{name} {machine.daemon.name} of {machine.span}"

    @property
    def num_up(self) -> int:
        """Machines that nothing has befallen."""
        return sum(machine.is_up for machine in self.machines)

    def _candidates(self) -> list[Machine]:
        up = [machine for machine in self.machines if machine.is_up]
        return [machine for machine in up if sum(other.span == machine.span for other in up) > 1]

    def _befall(self, machine: Machine, action: Callable[[Machine], Callable[[], None]]) -> None:
        """A disturbance from its beginning until it is over; what goes wrong is kept for the test."""
        try:
            undo = action(machine)
            # It lasts; that is the pace of the test, and nothing is concluded from it.
            threading.Event().wait(self._lasts_s)
            began = time.monotonic()
            undo()
            if machine in self.machines:
                self._wait_seen(machine)
                self.returns_s.append(time.monotonic() - began)
                machine.is_up = True
        except (CorollaError, DaemonFailedError, TimeoutError) as problem:
            self.problems.append(f"{machine.daemon.name} did not come back: {problem}")

    def _wait_seen(self, machine: Machine) -> None:
        """Wait until the client's daemon knows that a machine serves its blocks."""
        machine.daemon.wait_online()
        machine.peer = machine.peer or machine.daemon.status().peer

        def seen() -> bool:
            with self._client.connect() as daemon:
                spans = daemon.swarm().spans
            mine = [span for span in spans if span.peer == machine.peer and span.state == "online"]
            return any((span.start, span.end) == machine.span for span in mine)

        wait_until(seen, f"{machine.daemon.name} is seen with {machine.span}", RETURN_DEADLINE_S)

    # what may befall a machine: each gives what undoes it

    def _kill(self, machine: Machine) -> Callable[[], None]:
        machine.daemon.kill()
        return machine.daemon.start

    def _stop(self, machine: Machine) -> Callable[[], None]:
        pids = [machine.daemon.pid, *machine.daemon.worker_pids()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)

        def undo() -> None:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

        return undo

    def _pause(self, machine: Machine) -> Callable[[], None]:
        with machine.daemon.connect() as daemon:
            daemon.pause()
        return lambda: _resume(machine.daemon)

    def _drain(self, machine: Machine) -> Callable[[], None]:
        with machine.daemon.connect() as daemon:
            daemon.drain()
        return lambda: _resume(machine.daemon)

    def _join(self, machine: Machine) -> Callable[[], None]:
        """A newcomer takes its place; it says goodbye."""
        newcomer = self.serve(*machine.span, is_up=False)
        self._wait_seen(newcomer)
        self.machines.remove(machine)
        newcomer.is_up = True
        machine.daemon.signal(signal.SIGTERM)
        return lambda: None

    def _rebalance(self, machine: Machine) -> Callable[[], None]:
        """Move to the first blocks and back; a machine of the first blocks moves to the last."""
        width = machine.span[1] - machine.span[0]
        to = (0, width) if machine.span[0] else (self._num_blocks - width, self._num_blocks)
        with machine.daemon.connect() as daemon:
            daemon.rebalance(to=to)

        def undo() -> None:
            machine.daemon.wait_online()
            with machine.daemon.connect() as daemon:
                daemon.rebalance(to=machine.span)

        return undo


class Strike(NamedTuple):
    """When which kind of disturbance was done."""

    at_s: float
    kind: str


@dataclass(frozen=True)
class Figures:
    """What a soak run showed. growth: resident bytes of each lasting process at the end over those before.

    median_gap_s: between two tokens; longest_gap_s: likewise, by the last strike before its end. first_start_s: from
    a writer's first question to its first token, which is waiting for the client's own worker to start; median_start_s,
    longest_start_s: likewise of all others. spacing_s: between two strikes, the median and the longest. return_s: of
    machines from being brought back to serving, likewise.
    """

    num_texts: int
    num_tokens: int
    num_repairs: int
    median_gap_s: float
    longest_gap_s: dict[str, float]
    first_start_s: float
    median_start_s: float
    longest_start_s: float
    slow_starts: tuple[str, ...]
    strikes: dict[str, int]
    spacing_s: tuple[float, float]
    return_s: tuple[float, float]
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
    strikes: list[Strike] = []

    def begun() -> bool:
        return all(writer.num_right or writer.problems for writer in writers)

    try:
        wait_until(begun, "a first text of each", RETURN_DEADLINE_S)
        begin_s = time.monotonic()
        # Beyond the number too, until one has struck where a text was written.
        for number in itertools.count():
            if number >= num_strikes and any(writer.num_repairs for writer in writers):
                break
            if number == num_strikes // 3:
                before = resident(disturber, client)
            num_up = disturber.num_up
            struck = disturber.strike()
            strikes.append(Strike(time.monotonic(), struck.partition(" ")[0]))
            stopping.wait(max(0.0, begin_s + (number + 1) * interval_s - time.monotonic()))
            tell(
                f"{strikes[-1].at_s - begin_s:6.1f} s: {struck}, {num_up} of {len(disturber.machines)} up; "
                + _since(strikes[-1].at_s, writers, _problems(disturber, writers))
            )
        disturber.wait_whole()
        after = resident(disturber, client)
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    return _figures(disturber, writers, strikes, {n: after[n] / before[n] for n in after if n in before})


def _figures(
    disturber: Disturber, writers: list[Writer], strikes: list[Strike], growth: dict[str, float]
) -> Figures:
    gaps = [gap for writer in writers for gap in writer.gaps if not gap.first]
    starts = [[gap.length_s for gap in writer.gaps if gap.first] for writer in writers]
    later_starts = [length_s for lengths in starts for length_s in lengths[1:]]
    spacing = [later.at_s - earlier.at_s for earlier, later in itertools.pairwise(strikes)]
    return Figures(
        num_texts=sum(writer.num_right for writer in writers),
        num_tokens=sum(writer.num_tokens for writer in writers),
        num_repairs=sum(writer.num_repairs for writer in writers),
        median_gap_s=round(median(gap.length_s for gap in gaps), 3),
        longest_gap_s=longest_by_strike(gaps, strikes),
        first_start_s=round(max(lengths[0] for lengths in starts), 1),
        median_start_s=round(median(later_starts), 1),
        longest_start_s=round(max(later_starts), 1),
        slow_starts=tuple(told for writer in writers for told in writer.slow_starts),
        strikes=dict(disturber.done),
        spacing_s=_spread(spacing),
        return_s=_spread(disturber.returns_s),
        growth={name: round(share, 3) for name, share in growth.items()},
        problems=_problems(disturber, writers),
    )


def _spread(values: list[float]) -> tuple[float, float]:
    """The median and the greatest."""
    return (round(median(values), 1), round(max(values), 1)) if values else (0.0, 0.0)


def _problems(disturber: Disturber, writers: list[Writer]) -> tuple[str, ...]:
    return (*(problem for writer in writers for problem in writer.problems), *disturber.problems)


def _since(at_s: float, writers: list[Writer], problems: tuple[str, ...]) -> str:
    """What has come of a strike."""
    gaps = [gap.length_s for writer in writers for gap in writer.gaps if gap.at_s > at_s and not gap.first]
    starts = [gap.length_s for writer in writers for gap in writer.gaps if gap.at_s > at_s and gap.first]
    parts = (
        f"longest gap {max(gaps, default=0.0):.1f} s, longest start {max(starts, default=0.0):.1f} s",
        f"texts {[writer.num_right for writer in writers]}",
        f"repairs {[writer.num_repairs for writer in writers]}",
        *(f"PROBLEM {problem}" for problem in problems),
    )
    return ", ".join(parts)


def longest_by_strike(gaps: list[Gap], strikes: list[Strike]) -> dict[str, float]:
    """The longest gap that ended after a strike of each kind and before the next strike."""
    longest: dict[str, float] = {}
    for gap in gaps:
        kind = next((strike.kind for strike in reversed(strikes) if strike.at_s <= gap.at_s), "none")
        longest[kind] = max(longest.get(kind, 0.0), round(gap.length_s, 1))
    return longest


def resident(disturber: Disturber, client: DaemonProcess) -> dict[str, int]:
    """Memory in bytes of the client's daemon and of each that is up, by what it is and its process."""
    found = {"client's daemon": client.pid}
    for machine in tuple(disturber.machines):
        if machine.is_up:
            found[f"{machine.daemon.name}'s daemon {machine.daemon.pid}"] = machine.daemon.pid
            for worker in machine.daemon.worker_pids():
                found[f"{machine.daemon.name}'s worker {worker}"] = worker
    return {name: size for name, pid in found.items() if (size := resident_bytes(pid))}


def resident_bytes(pid: int) -> int:
    """Memory of one process; 0 of one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _resume(process: DaemonProcess) -> None:
    with process.connect() as daemon:
        daemon.resume()
