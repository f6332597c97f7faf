"""`daemonctl demo`: shows the demo's story, drawn live in a terminal, as plain lines otherwise."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final

import click

from ...protocol.errors import Exit
from ..demo import Outcome, Plan, run
from ..demo_swarm import DemoSwarm, Member
from ..output import Output
from ..picture import Bar, gaps, picture

PROMPT: Final = "Why is the sky blue?"
DEFAULT_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"


@click.command()
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="A folder, a GGUF file, or a hub name."
)
@click.option("--prompt", default=PROMPT, show_default=True, help="What the model is asked.")
@click.option(
    "--hops", default=3, show_default=True, help="Daemons that share the blocks; one more stands by."
)
@click.option("--max-new-tokens", "-n", default=64, show_default=True, help="At most so many.")
@click.option("--keep", is_flag=True, help="Leave the swarm running until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Answer as JSON, for programs.")
def demo(model: str, prompt: str, hops: int, max_new_tokens: int, keep: bool, as_json: bool) -> int:
    """A private swarm on this machine: one of its daemons is killed in mid-sentence, the text goes on.

    Ends with exit code 7 if the tokens differ from those of one plain transformers process.
    """
    output = Output(as_json)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)  # end as with Ctrl-C, and leave no daemon behind
    plan = Plan(model, prompt, hops, max_new_tokens)
    kept = (lambda swarm: _keep(swarm, output)) if keep else None
    if sys.stdout.isatty() and not as_json:
        with LiveView(prompt) as live:
            outcome = run(plan, live, keep=kept)
    else:
        outcome = run(plan, PlainView(output), keep=kept)
    if as_json:
        output.envelope(**outcome.envelope())
    else:
        _summary(output, outcome)
    return Exit.OK if outcome.equal else Exit.DEGRADED


class PlainView:
    """The story as lines: the text on stdout, all else on stderr."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._drawn: list[str] = []
        self._in_text = False

    def stage(self, text: str) -> None:
        self._end_line()
        self._output.say(f"-- {text}")

    def swarm(self, num_blocks: int, members: Sequence[Member]) -> None:
        lines = [line for line, _ in drawing(num_blocks, members)]
        if lines != self._drawn:
            self._end_line()
            for line in lines:
                self._output.say("   " + line)
            self._drawn = lines

    def text(self, piece: str) -> None:
        if not self._output.as_json:
            click.echo(piece, nl=False)
            sys.stdout.flush()
            self._in_text = True

    def _end_line(self) -> None:
        if self._in_text and sys.stdout.isatty():
            click.echo()
        self._in_text = False


class LiveView:
    """The story in a terminal: the picture, what goes on, and the text, drawn over and over by rich."""

    def __init__(self, prompt: str) -> None:
        from rich.live import Live

        self._prompt = prompt
        self._picture: list[tuple[str, str]] = []
        self._stages: list[tuple[float, str]] = []
        self._text = ""
        self._began = time.monotonic()
        self._live = Live(auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._live.__exit__(*problem)

    def stage(self, text: str) -> None:
        self._stages.append((time.monotonic() - self._began, text))
        self._draw()

    def swarm(self, num_blocks: int, members: Sequence[Member]) -> None:
        lines = drawing(num_blocks, members)
        if lines != self._picture:
            self._picture = lines
            self._draw()

    def text(self, piece: str) -> None:
        self._text += piece
        self._draw()

    def _draw(self) -> None:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        colours = {
            "online": "green",
            "ready": "cyan",
            "loading": "yellow",
            "killed": "red",
            "gap": "bold red",
        }
        drawn = Text("\n").join(Text(line, style=colours.get(kind, "dim")) for line, kind in self._picture)
        stages = Text("\n").join(Text(f"{at:6.1f} s  {text}", style="dim") for at, text in self._stages[-6:])
        words = Text.assemble((self._prompt + "\n", "bold"), self._text)
        parts = [Panel(drawn, title="who serves which blocks", title_align="left")] if self._picture else []
        self._live.update(
            Group(*parts, stages, Panel(words, title="the text", title_align="left")), refresh=True
        )


def drawing(num_blocks: int, members: Sequence[Member]) -> list[tuple[str, str]]:
    """The picture of the members that lend blocks; between kill and repair with the gap."""
    bars = _bars(members)
    in_use = [(bar.start, bar.end) for bar in bars if bar.state == "in use"]
    return picture(num_blocks, bars, gaps(num_blocks, in_use) if in_use else [])


def _bars(members: Sequence[Member]) -> list[Bar]:
    shown = []
    for member in members:
        if member.blocks is not None:
            shown.append(Bar(member.name, *member.blocks, _state(member)))
    return shown


def _state(member: Member) -> str:
    if member.is_killed:
        return "killed"
    if member.in_use:
        return "in use"
    return "ready" if member.is_ready else "loading"


def _summary(output: Output, outcome: Outcome) -> None:
    same = "the same tokens" if outcome.equal else "DIFFERENT tokens"
    output.line()
    output.facts(
        [
            ("compared with one transformers process", f"{same} ({len(outcome.tokens)})"),
            ("tokens/s of the swarm", f"{outcome.tokens_per_s:.1f}"),
            ("tokens/s of the one process", f"{outcome.local_tokens_per_s:.1f}"),
            ("repair, from SIGKILL to the next token", f"{outcome.repair_s:.2f} s"),
        ]
    )
    if not outcome.killed:
        output.say("nobody was killed: the text ended before; ask for more with --max-new-tokens or --prompt")
    if not outcome.equal:
        output.line(f"  the one process wrote: {outcome.local_text}")


def _keep(swarm: DemoSwarm, output: Output) -> None:
    output.say("the swarm stays until Ctrl-C; ask its client's daemon like this:")
    output.say(f"  daemonctl status --socket {swarm.members[-1].socket}")
    try:
        signal.pause()
    except KeyboardInterrupt:
        return


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
