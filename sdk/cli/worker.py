"""The workers' environment: `daemonctl worker install`."""

from __future__ import annotations

import click

from ..client import Daemon
from ..output import Output
from .options import asking


@click.group()
def worker() -> None:
    """What this machine's workers run in."""


@worker.command()
@asking
def install(daemon: Daemon, output: Output) -> None:
    """Install PyTorch and what else workers need, in the build for this machine's device.

    A daemon without them does so by itself when its first worker starts. Run this to repair the environment,
    or to have it ready before there is anything to serve. It lies in the daemon's state folder.
    """
    daemon.install_worker(output.say)
    if output.as_json:
        output.envelope(installed=True)
    else:
        output.say("workers that wait for it start by themselves")
