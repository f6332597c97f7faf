"""Commands of whoever runs the daemon: config, stop."""

from __future__ import annotations

import json
from typing import Any

import click

from ...protocol.bounds import BOUNDS, Bound
from ..client import Daemon, connect
from ..output import Output, num_bytes
from .options import asking


@click.group(invoke_without_command=True)
@click.pass_context
@click.option(
    "--socket", metavar="PATH", envvar="COROLLA_SOCKET", help="The daemon's socket, if not the usual."
)
@click.option("--json", "as_json", is_flag=True, help="Answer as JSON, for programs.")
@click.option("--limits", is_flag=True, help="Show what others may do here at most, which nobody can change.")
def config(context: click.Context, socket: str | None, as_json: bool, limits: bool) -> None:
    """The daemon's configuration; with --limits, the fixed limits of this version, and why they are so."""
    if context.invoked_subcommand is not None:
        return
    output = Output(as_json)
    if limits:
        _show_limits(output)
        return
    with connect(socket) as daemon:
        values = daemon.config()
    if as_json:
        output.envelope(config=values)
        return
    for key, value in sorted(values.items()):
        output.line(f"{key} = {json.dumps(value, default=str)}")


def _show_limits(output: Output) -> None:
    """The table of `protocol.bounds`; it needs no daemon."""
    if output.as_json:
        output.envelope(limits=[bound._asdict() for bound in BOUNDS])
        return
    output.table(
        ["what", "at most", "of", "why"],
        [[bound.name, _amount(bound), bound.of, bound.reason] for bound in BOUNDS],
    )


def _amount(bound: Bound) -> str:
    if bound.unit.startswith("bytes"):
        return num_bytes(int(bound.value)) + bound.unit.removeprefix("bytes")
    return (
        f"{bound.value:,g} {bound.unit}".strip()
        if bound.value < 1e6
        else f"{bound.value:,.0f} {bound.unit}".strip()
    )


@config.command(name="set")
@click.argument("key")
@click.argument("value")
@asking
def set_value(daemon: Daemon, output: Output, key: str, value: str) -> None:
    """Set KEY to VALUE (a JSON value, or else a text); kept over restarts, and in force at once where it can be."""
    parsed = _value(value)
    applied = daemon.set_config(key, parsed)
    if output.as_json:
        output.envelope(key=key, value=parsed, applied=applied)
        return
    output.say(f"{key} = {json.dumps(parsed)}")
    if applied.overridden:
        output.say("a flag or an environment variable of the running daemon says otherwise, and wins")
    elif applied.workers:
        output.say("workers move their sessions and start again with it")
    elif applied.daemon:
        output.say("it counts when the daemon is started again: daemonctl stop, then corollad")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@click.command()
@click.option(
    "--deadline", "deadline_s", default=30.0, show_default=True, help="Seconds for sessions to end."
)
@asking
def stop(daemon: Daemon, output: Output, deadline_s: float) -> None:
    """Take no new sessions, let running ones move or finish, then stop the daemon."""
    pid = daemon.status().pid
    daemon.stop(deadline_s=deadline_s)
    if output.as_json:
        output.envelope(stopping=True, pid=pid)
    else:
        output.say(f"corollad (pid {pid}) stops within {deadline_s:g} s")
