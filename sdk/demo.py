"""The demo's story: a model split over daemons writes on when one of them is killed.

Start a swarm, let the client's daemon write, kill a hop in the middle of the route in mid-sentence, and
compare the tokens with those of one plain transformers process. What the user sees of it is a `View`'s
business, the processes are `demo_swarm`'s.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol

from ..protocol.control import Piece
from ..protocol.errors import Code, error, error_from_wire
from .demo_swarm import DemoSwarm, Member
from .generation import GenerateOptions
from .output import event_text

FOUNDER: Final = "first"
SPARE: Final = "spare"
CLIENT: Final = "client"


class View(Protocol):
    """What shows the story."""

    def stage(self, text: str) -> None:
        """What goes on now."""

    def swarm(self, num_blocks: int, members: Sequence[Member]) -> None:
        """Who serves what; told more often than it changes."""

    def text(self, piece: str) -> None:
        """More of the text."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do. hops: daemons that share the blocks; a spare stands by for the one that is killed."""

    model: str
    prompt: str
    hops: int = 3
    max_new_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen. tokens_per_s leaves out the repair; repair_s is from SIGKILL to the next new token."""

    model: str
    prompt: str
    text: str
    local_text: str
    tokens: tuple[int, ...]
    local_tokens: tuple[int, ...]
    tokens_per_s: float
    local_tokens_per_s: float
    repair_s: float
    killed: str

    @property
    def equal(self) -> bool:
        """Whether both wrote the same tokens."""
        return self.tokens == self.local_tokens

    def envelope(self) -> dict[str, Any]:
        """The fields of `daemonctl demo --json`; results in the form of the benchmarks."""
        ratio = self.tokens_per_s / self.local_tokens_per_s if self.local_tokens_per_s else None
        return {
            "machine": machine(),
            "model": self.model,
            "equal": self.equal,
            "tokens_per_s": self.tokens_per_s,
            "local_tokens_per_s": self.local_tokens_per_s,
            "repair_s": self.repair_s,
            "text": self.text,
            "killed": self.killed,
            "results": [
                _result("equal tokens", float(self.equal), "", None, None, 1.0, self.equal),
                _result("decode", self.tokens_per_s, "tokens/s", self.local_tokens_per_s, ratio, None, None),
                _result("repair", self.repair_s, "s", None, None, None, None),
            ],
        }


def run(plan: Plan, view: View, *, keep: Callable[[DemoSwarm], object] | None = None) -> Outcome:
    """Tell the whole story. keep: called with the swarm before it is stopped.

    Raises `CorollaError` when the model cannot be had or the swarm does not come up.
    """
    view.stage("looking at the model (a GGUF file is converted once)")
    facts = plain(plan.model)
    num_blocks = int(facts["num_blocks"])
    spans = split(num_blocks, plan.hops)
    chat = bool(facts["has_chat_template"])
    with DemoSwarm(plan.model) as swarm:
        view.stage(f"starting {plan.hops + 2} daemons, which load {facts['name']} between them")
        _start(swarm, spans, num_blocks, view)
        story = Story(swarm, num_blocks, view, plan.max_new_tokens)
        story.write(str(facts["name"]), plan.prompt, chat)
        if keep is not None:
            keep(swarm)
        view.stage("stopping the daemons")
    view.stage("writing the same in one plain transformers process")
    arguments = ["--prompt", plan.prompt, "--max-new-tokens", str(plan.max_new_tokens)]
    local = plain(plan.model, *arguments, *(["--chat"] if chat else []))
    return Outcome(
        model=str(facts["name"]),
        prompt=plan.prompt,
        text=story.text,
        local_text=str(local["text"]),
        tokens=tuple(story.tokens),
        local_tokens=tuple(local["tokens"]),
        tokens_per_s=story.tokens_per_s(),
        local_tokens_per_s=float(local["tokens_per_s"]),
        repair_s=story.repair_s(),
        killed=story.victim.name if story.victim else "",
    )


def machine() -> dict[str, Any]:
    """What it was seen on."""
    return {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}


def split(num_blocks: int, hops: int) -> list[tuple[int, int]]:
    """Spans of nearly equal length. Raises `BAD_REQUEST` unless each gets a block."""
    if not 1 <= hops <= num_blocks:
        raise error(Code.BAD_REQUEST, f"--hops {hops}, expected 1 to {num_blocks}, the number of blocks")
    edges = [num_blocks * hop // hops for hop in range(hops + 1)]
    return list(pairwise(edges))


def _start(swarm: DemoSwarm, spans: list[tuple[int, int]], num_blocks: int, view: View) -> None:
    middle = spans[len(spans) // 2]
    names = _names(len(spans))
    members: list[tuple[str, tuple[int, int] | None]] = [*zip(names, spans, strict=True)]
    members += [(SPARE, middle), (CLIENT, None)]

    def show() -> None:
        view.swarm(num_blocks, swarm.members)

    swarm.start(members, show)
    swarm.wait(swarm.is_serving, show)
    client = swarm.members[-1]

    def client_sees_all() -> bool:
        with client.connect() as daemon:
            spans_seen = [span for span in daemon.swarm().spans if span.state == "online"]
        return len({span.peer for span in spans_seen}) == len(swarm.members) - 1

    swarm.wait(client_sees_all, show)


def _names(hops: int) -> list[str]:
    if hops == 1:
        return [FOUNDER]
    between = ["middle"] if hops == 3 else [f"hop-{number}" for number in range(2, hops)]
    return [FOUNDER, *between, "last"]


class Story:
    """The text while it comes, with times, and the kill in the middle of it."""

    def __init__(self, swarm: DemoSwarm, num_blocks: int, view: View, max_new_tokens: int) -> None:
        self._swarm = swarm
        self._num_blocks = num_blocks
        self._view = view
        self._max_new_tokens = max_new_tokens
        self._kill_after = max(2, min(12, max_new_tokens // 3))
        self._times_s: list[float] = []
        self._killed_at_s: float | None = None
        self._repaired_by: int | None = None  # index of the first token that the repaired route gave
        self._repairing = False
        self.tokens: list[int] = []
        self.text = ""
        self.victim: Member | None = None

    def write(self, name: str, prompt: str, chat: bool) -> None:
        """Generate on the client, and kill a hop on the way. Raises `BAD_REQUEST` if the text was too short for it."""
        options: GenerateOptions = {
            "max_new_tokens": self._max_new_tokens,
            "encoding": "float32",
            "wait_s": 30.0,
        }
        given: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        )
        self._view.stage(f"{name} writes; the client's daemon loads the ends first")
        with self._swarm.members[-1].connect() as daemon:
            model = daemon.model(name)
            with model.generate(stream=True, on_event=self._event, **given, **options) as pieces:
                for piece in pieces:
                    self._take(piece)
                answer = pieces.result()
        self.tokens, self.text = list(answer.tokens[0]), answer.text
        if self._repaired_by is None:
            raise error(
                Code.BAD_REQUEST,
                f"the text had ended, after {len(self.tokens)} tokens, before it missed a daemon that was killed",
                "ask for a longer one, by --prompt or -n",
            )

    def tokens_per_s(self) -> float:
        """Of decoding, without the gap that the kill made."""
        gaps = [later - earlier for earlier, later in pairwise(self._times_s)]
        if self._repaired_by is not None and gaps:
            del gaps[self._repaired_by - 1]
        return len(gaps) / sum(gaps) if gaps and sum(gaps) else 0.0

    def repair_s(self) -> float:
        """From SIGKILL to the next token that needed the repair; 0 if there was none."""
        if self._killed_at_s is None or self._repaired_by is None:
            return 0.0
        return self._times_s[self._repaired_by] - self._killed_at_s

    def _take(self, piece: Piece) -> None:
        self._times_s.append(time.monotonic())
        self._view.text(piece.text)
        num_tokens = len(self._times_s)
        if self._killed_at_s is not None and self._repaired_by is None and self._repairing:
            self._repaired_by = num_tokens - 1
            self._repairing = False
            self._swarm.note_use()
            self._show()
        if num_tokens == 1:
            self._choose_victim()
            self._show()
            self._view.stage("writing")
        if num_tokens == self._kill_after and self.victim is not None:
            self._kill(self.victim)

    def _choose_victim(self) -> None:
        """As soon as the route is known: to ask again at the kill would take time in which the text goes on."""
        self._swarm.note_use()
        serving = [member for member in self._swarm.members if member.in_use]
        middle = next(member for member in self._swarm.members if member.name == SPARE).blocks
        self.victim = next((member for member in serving if member.blocks == middle), None)

    def _kill(self, victim: Member) -> None:
        self._swarm.kill(victim)
        self._killed_at_s = time.monotonic()
        self._view.stage(f"killed {victim.name!r} with SIGKILL in mid-sentence")
        self._show()

    def _event(self, piece: Piece) -> None:
        if piece.event == "notice":  # of privacy: this swarm is one machine's own
            return
        text = event_text(piece)
        for member in self._swarm.members:
            if member.peer:
                text = text.replace(member.peer, member.name)
        self._view.stage(text)
        if self._killed_at_s is not None and self._repaired_by is None:
            self._repairing = True
        self._show()

    def _show(self) -> None:
        self._view.swarm(self._num_blocks, self._swarm.members)


def plain(model: str, *arguments: str) -> dict[str, Any]:
    """What `corolla.model.plain` says, in a process of its own. Raises its error, or `INTERNAL`."""
    command = [sys.executable, "-m", "corolla.model.plain", model, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise error(
            Code.INTERNAL,
            f"transformers in a process of its own failed: {last}",
            "the demo needs the worker's libraries: pip install 'corolla[daemon,worker]'",
        ) from None
    if "error" in answer:
        raise error_from_wire(answer["error"])
    return answer


def _result(
    name: str,
    value: float,
    unit: str,
    beside: float | None,
    ratio: float | None,
    target: float | None,
    holds: bool | None,
) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "beside": beside,
        "ratio": ratio,
        "target": target,
        "holds": holds,
    }
