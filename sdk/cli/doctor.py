"""`daemonctl doctor`: checks everything on this machine, with or without a daemon, and packs it for helpers."""

from __future__ import annotations

import os
import platform
import socket as sockets
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

import click

from ...protocol.errors import Exit
from ...protocol.places import SOCKET_VARIABLE
from ..bundle import Redactor, write_bundle
from ..doctor import PROBLEM, Check, Facts, diagnose
from ..machine import gather, log_lines
from ..output import Output

_COLOURS: Final = {"ok": "green", "note": "cyan", "problem": "red"}
_RELEVANT: Final = (
    "corolla", "torch", "transformers", "safetensors", "bitsandbytes",
    "libp2p", "trio", "anyio", "cbor2", "cryptography",
)  # fmt: skip


@click.command()
@click.option(
    "--socket", metavar="PATH", envvar=SOCKET_VARIABLE, help="The daemon's socket, if not the usual."
)
@click.option("--json", "as_json", is_flag=True, help="Answer as JSON, for programs.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also pack what was seen into FILE (tar.gz), without keys, tokens and texts, with addresses masked.",
)
def doctor(socket: str | None, as_json: bool, bundle: Path | None) -> int:
    """Check everything on this machine, and name the remedy of what is wrong; works without a daemon too.

    Exits with 7 if something is wrong.
    """
    output = Output(as_json)
    facts = gather(socket)
    checks = diagnose(facts)
    if bundle is not None:
        pack(bundle, facts, checks)
    if as_json:
        output.envelope(checks=checks, bundle=None if bundle is None else str(bundle))
    else:
        _show(checks, output)
        if bundle is not None:
            output.say(f"packed into {bundle}; look through it before you give it away")
    return Exit.DEGRADED if any(check.state == PROBLEM for check in checks) else Exit.OK


def pack(path: Path, facts: Facts, checks: tuple[Check, ...]) -> None:
    """Write the archive. Raises as `write_bundle`."""
    values = {
        "doctor": checks,
        "status": facts.status,
        "config": facts.config if facts.config is not None else facts.offline,
        "netcheck": facts.netcheck,
        "events": facts.events,
        "versions": _versions(facts),
    }
    redactor = Redactor((sockets.gethostname(), os.environ.get("USER", "") if facts.uid else ""))
    write_bundle(path, values, {"log": log_lines(facts.units)}, redactor)


def _versions(facts: Facts) -> dict[str, str]:
    found = {str(name): one.version for one in distributions() if (name := one.metadata["Name"]) in _RELEVANT}
    daemon = facts.status.version if facts.status is not None else "none"
    system = {"system": platform.system(), "kernel": platform.release(), "machine": platform.machine()}
    return {"daemonctl": facts.version, "daemon": daemon, "python": sys.version.split()[0], **system, **found}


def _show(checks: tuple[Check, ...], output: Output) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = click.style(check.state.ljust(7), fg=_COLOURS[check.state])
        output.line(f"{mark}  {check.name.ljust(width)}  {check.text}")
        if check.remedy and check.state != "ok":
            output.line(f"{'':7}  {'':{width}}  remedy: {check.remedy}")
    num_problems = sum(check.state == PROBLEM for check in checks)
    output.say(f"{num_problems or 'no'} problem{'' if num_problems == 1 else 's'} found")
