"""Commands about membership: join, leave."""

from __future__ import annotations

from typing import Final

import click

from ...protocol.control import PRIVACY
from ..client import Daemon
from ..output import Output
from .options import asking

RELAYING: Final = (
    "if others can dial this machine, it relays members' connections, within limits: "
    "`daemonctl config set relay false` turns that off"
)


@click.command()
@click.argument("token")
@asking
def join(daemon: Daemon, output: Output, token: str) -> None:
    """Enter a swarm by TOKEN (`daemonctl status` prints it there), or by a member's multiaddress."""
    joined = daemon.join(token)
    output.say(joined.notice or PRIVACY)
    if output.as_json:
        output.envelope(swarm=joined)
    else:
        output.say(f"joined swarm {joined.name} ({joined.swarm_id[:16]}); remembered over restarts")
        output.say(RELAYING)


@click.command()
@asking
def leave(daemon: Daemon, output: Output) -> None:
    """Leave the swarm; the daemon goes on idle."""
    status = daemon.status()
    name = status.swarm
    daemon.leave()
    if output.as_json:
        output.envelope(left=name)
    else:
        output.say(f"left swarm {name}" if name else "was in no swarm")
        if status.owner:
            output.say("its owner comes back by any token of it, also a used one: daemonctl join TOKEN")
