"""Models: what the swarm serves, and fetching files."""

from __future__ import annotations

import sys

import click

from ...protocol.control import PullProgress
from ...protocol.views import ModelView
from ..client import Daemon
from ..output import Output, num_bytes
from ..picture import gaps
from .options import asking


@click.group()
def model() -> None:
    """The models of the swarm."""


@model.command(name="list")
@asking
def list_models(daemon: Daemon, output: Output) -> None:
    """The models that the swarm serves."""
    served = daemon.models()
    if output.as_json:
        output.envelope(models=served)
        return
    if not served:
        output.say("no model is served: corollad --model MODEL, or join a swarm that serves one")
        return
    output.table(
        ["model", "blocks", "served", "licence", "fingerprint", "hub"],
        [
            [
                view.name,
                str(view.num_blocks),
                _served(view),
                view.licence or "",
                view.fingerprint[:12],
                view.hub_id or "",
            ]
            for view in served
        ],
    )


def _served(view: ModelView) -> str:
    covered = [(block, block + 1) for block, count in enumerate(view.replicas) if count]
    missing = gaps(view.num_blocks, covered)
    if missing:
        return "lacks " + ", ".join(f"{start}:{end}" for start, end in missing)
    return f"whole, {min(view.replicas)} times"


@model.command()
@click.argument("name")
@click.option("--revision", help="Of a hub model; its main branch if not given.")
@asking
def pull(daemon: Daemon, output: Output, name: str, revision: str | None) -> None:
    """Fetch the files of model NAME (a hub id, or one that the swarm serves) to this machine."""
    shown = ""

    def show(progress: PullProgress) -> None:
        nonlocal shown
        total = f" of {num_bytes(progress.total_bytes)}" if progress.total_bytes else ""
        line = f"{progress.stage} {num_bytes(progress.done_bytes)}{total}"
        if sys.stderr.isatty():
            click.echo(f"\r{line:<60}", err=True, nl=False)
        elif progress.stage != shown:
            output.say(line)
        shown = progress.stage

    pulled = daemon.pull(name, revision=revision, on_progress=show)
    if shown and sys.stderr.isatty():
        click.echo(err=True)
    if output.as_json:
        output.envelope(model=name, folder=pulled.folder)
    else:
        output.line(pulled.folder)
