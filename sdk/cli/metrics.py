"""The daemon in numbers: `daemonctl metrics`."""

from __future__ import annotations

import click

from ..client import Daemon
from ..output import Output
from .options import asking


@click.command()
@asking
def metrics(daemon: Daemon, output: Output) -> None:
    """What the daemon counts, in Prometheus' text format: sessions, steps, tokens, caches, bytes, repairs.

    The control socket answers HTTP too, and so does a port of this machine if `metrics_port` names one.
    """
    text = daemon.metrics()
    if output.as_json:
        output.envelope(metrics=_samples(text))
    else:
        click.echo(text, nl=False)


def _samples(text: str) -> dict[str, float]:
    """Name and labels → value."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}
