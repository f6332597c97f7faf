"""What commands have in common: `--json`, `--socket`, a connection, the model meant, the words on privacy."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Final

import click

from ...protocol.control import privacy_words
from ...protocol.errors import Code, error
from ...protocol.places import SOCKET_VARIABLE, user_state_folder
from ..client import Daemon, connect
from ..output import Output

_TOLD: Final = {False: "told-about-privacy", True: "told-about-privacy-of-invited"}  # by kind of swarm
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def asking(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command that asks the daemon: called as `function(daemon, output, …)`."""

    @click.option(
        "--socket", metavar="PATH", envvar=SOCKET_VARIABLE, help="The daemon's socket, if not the usual."
    )
    @click.option("--json", "as_json", is_flag=True, help="Answer as JSON, for programs.")
    @wraps(function)
    def command(*, socket: str | None, as_json: bool, **arguments: Any) -> Any:
        with connect(socket) as daemon:
            return function(daemon, Output(as_json), **arguments)

    return command


def as_seconds(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """Seconds, or a number with s, m, h or d."""
    if value is None:
        return None
    text = value.strip().lower()
    unit = _UNITS.get(text[-1:], 0.0)
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise click.BadParameter(f"{value!r} is no time; write it like 90s, 30m, 2h or 7d", context, option)
    return seconds


def the_model(daemon: Daemon, name: str | None) -> str:
    """The model meant: the one named, or the only one that the swarm serves.

    Raises `UNKNOWN_MODEL` if none is served, `AMBIGUOUS_MODEL` if several are.
    """
    if name is not None:
        return name
    models = daemon.models()
    if not models:
        status = daemon.status()
        if status.swarm is None:
            raise error(
                Code.NO_SWARM, "not in a swarm", "daemonctl join TOKEN, or daemonctl swarm create NAME"
            )
        raise error(
            Code.UNKNOWN_MODEL, f"swarm {status.swarm} serves no model", "serve one: corollad --model MODEL"
        )
    if len({model.fingerprint for model in models}) > 1:
        names = ", ".join(model.name for model in models)
        raise error(
            Code.AMBIGUOUS_MODEL, f"the swarm serves {len(models)} models", f"choose by --model: {names}"
        )
    return models[0].name


def tell_privacy(daemon: Daemon, output: Output) -> None:
    """Say who can read what, the first time for this user; once more where that is another kind of swarm."""
    folder = user_state_folder()
    if all((folder / marker).exists() for marker in _TOLD.values()):
        return
    invited = daemon.status().invited
    marker = folder / _TOLD[invited]
    if marker.exists():
        return
    output.say(privacy_words(invited))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as problem:
        output.say(f"(cannot remember having said so: {problem.strerror} {marker})")
