"""The adapters that this machine's daemon keeps: list, show, remove."""

from __future__ import annotations

import click

from ..client import Daemon
from ..output import Output, num_bytes
from .options import asking


@click.group()
def adapter() -> None:
    """Adapters whose parts the daemon keeps, to bring them to the hops that lack them."""


@adapter.command(name="list")
@asking
def list_adapters(daemon: Daemon, output: Output) -> None:
    """The adapters that programs used or trained through this daemon, since it started."""
    kept = daemon.adapters()
    if output.as_json:
        output.envelope(adapters=kept)
        return
    if not kept:
        output.say("no adapter is kept: daemonctl generate --adapter FOLDER, or train one")
        return
    rows = [[view.adapter, str(view.num_parts), num_bytes(view.size_bytes)] for view in kept]
    output.table(["adapter", "parts", "size"], rows)


@adapter.command()
@click.argument("name")
@asking
def show(daemon: Daemon, output: Output, name: str) -> None:
    """The parts of adapter NAME, by their sha256."""
    view = daemon.adapter(name)
    if output.as_json:
        output.envelope(adapter=view)
        return
    output.heading(f"{view.adapter}: {view.num_parts} parts, {num_bytes(view.size_bytes)}")
    for part in view.parts:
        output.line(part)


@adapter.command()
@click.argument("name")
@asking
def remove(daemon: Daemon, output: Output, name: str) -> None:
    """Forget the parts of adapter NAME; texts that use them go on."""
    daemon.remove_adapter(name)
    if output.as_json:
        output.envelope(removed=name)
    else:
        output.say(f"removed {name}")
