"""Commands by which a machine lends elsewhere, less, or not: rebalance, drain, pause, resume."""

from __future__ import annotations

import click

from ...protocol.views import Rebalanced
from ..client import Daemon
from ..output import Output, duration
from .options import as_seconds, asking


def _blocks(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """START:END."""
    if value is None:
        return None
    start, colon, end = value.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
        raise click.BadParameter(f"{value!r} is no run of blocks; write it like 0:15", context, option)
    return int(start), int(end)


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what moving would gain.")
@click.option(
    "--to",
    callback=_blocks,
    metavar="START:END",
    help="Serve these blocks, instead of those where it helps most.",
)
@click.option("--worker", type=int, metavar="NUMBER", help="Just this one of several workers.")
@asking
def rebalance(
    daemon: Daemon, output: Output, dry_run: bool, to: tuple[int, int] | None, worker: int | None
) -> None:
    """Move to the blocks where this machine helps most; running sessions go on elsewhere first."""
    spans = daemon.rebalance(dry_run=dry_run, to=to, worker=worker)
    if output.as_json:
        output.envelope(dry_run=dry_run, spans=spans)
        return
    for span in spans:
        output.line(_told(span, dry_run))
        output.line(f"  the model: {_change(span)}")


def _told(span: Rebalanced, dry_run: bool) -> str:
    here, there = f"{span.start}:{span.end}", f"{span.to_start}:{span.to_end}"
    what = f"worker {span.worker}, blocks {here} of {span.model}"
    if not span.moves:
        return f"{what}: stays" + ("" if here == there else f"; {there} would gain too little")
    return f"{what}: {'would move' if dry_run else 'moves'} to {there}"


def _change(span: Rebalanced) -> str:
    parts = [
        f"{name} {before:g} → {after:g}" if before != after else f"{name} {before:g}"
        for name, (before, after) in (
            ("tokens/s", (round(span.tokens_per_s[0], 1), round(span.tokens_per_s[1], 1))),
            ("blocks served by nobody", span.num_gaps),
            ("by one", span.num_single),
        )
    ]
    return ", ".join(parts)


@click.command()
@asking
def drain(daemon: Daemon, output: Output) -> None:
    """Take no new sessions; those that run move to other machines, or finish."""
    daemon.drain()
    if output.as_json:
        output.envelope(draining=True)
    else:
        output.say("no new sessions; daemonctl resume takes them again")


@click.command()
@click.option(
    "--for",
    "for_s",
    callback=as_seconds,
    metavar="TIME",
    help="How long, such as 90s, 30m or 2h; until resume if left out.",
)
@asking
def pause(daemon: Daemon, output: Output, for_s: float | None) -> None:
    """Lend nothing for a while, also over a restart: sessions move, workers exit, their memory is free."""
    daemon.pause(for_s=for_s or 0.0)
    if output.as_json:
        output.envelope(paused=True, for_s=for_s)
    else:
        output.say("paused" + (f" for {duration(for_s)}" if for_s else "") + "; daemonctl resume lends again")


@click.command()
@asking
def resume(daemon: Daemon, output: Output) -> None:
    """Lend again after pause or drain."""
    daemon.resume()
    if output.as_json:
        output.envelope(paused=False)
    else:
        output.say("lending again")
