"""`corollad`: reads what its owner wants, takes its state folder, and runs until it is stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from .. import __version__
from ..protocol.errors import Code, CorollaError, Exit, exit_code
from ..protocol.places import (
    SERVICE_CONFIG,
    user_cache_folder,
    user_config_file,
    user_socket,
    user_state_folder,
)
from .config import Config, load_config
from .store import Store, open_store

if TYPE_CHECKING:
    from .reloading import Sources

# What another start would not cure ends with a code after which the service manager makes none; see the unit's
# RestartPreventExitStatus.
_HOPELESS: Final = {Code.UNREADABLE: Exit.PERMISSION, Code.UNKNOWN_MODEL: Exit.USAGE}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    type=click.Path(path_type=Path, readable=False),  # whoever opens it says why it cannot be read
    metavar="FILE",
    envvar="COROLLA_CONFIG",
    help="TOML file with these settings.",
)
@click.option("--model", metavar="MODEL", help="What to serve: a folder, a hub id, or a GGUF file.")
@click.option("--blocks", metavar="auto|START:END|none", help="Which blocks of it; none serves nothing.")
@click.option("--listen", multiple=True, metavar="ADDRESS", help="Multiaddress to listen on; may repeat.")
@click.option("--announce", multiple=True, metavar="ADDRESS", help="Address that others should try first.")
@click.option(
    "--reachability",
    metavar="auto|public|private",
    help="private: behind a NAT or firewall; others come through relays.",
)
@click.option(
    "--relay/--no-relay", default=None, help="Whether to carry others' connections if we are public."
)
@click.option("--mdns/--no-mdns", default=None, help="Whether to look for members in the local network.")
@click.option("--upnp/--no-upnp", default=None, help="Whether to ask the router to forward a port.")
@click.option("--join", metavar="TOKEN", help="Enter this swarm: a token, or a member's multiaddress.")
@click.option("--state-dir", metavar="DIR", help="Identity and memory: one daemon's own.")
@click.option("--socket", metavar="PATH", help="The control socket.")
@click.option("--cache-dir", metavar="DIR", help="Where fetched and converted weights are kept.")
@click.option("--device", multiple=True, metavar="DEVICE", help="auto, cpu, cuda:0, …; one worker each.")
@click.option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; the device's best if left out.")
@click.option("--quantization", metavar="KIND", help="Keep weights in fewer bits: int8, int4 (CPU), nf4.")
@click.option("--threads", type=int, metavar="N", help="CPU threads of each worker.")
@click.option("--memory-bytes", type=int, metavar="N", help="Memory of each worker, for weights and caches.")
@click.option("--cache-tokens", type=int, metavar="N", help="Tokens that each worker's KV cache holds.")
@click.option(
    "--upload-bytes-per-s", type=int, metavar="N", help="Most that leaves this machine each second."
)
@click.option("--hours", metavar="HH:MM-HH:MM", help="When to lend, in local time, such as 22:00-07:00.")
@click.option(
    "--idle-minutes", type=float, metavar="N", help="Lend only when nobody used the machine so long."
)
@click.option(
    "--replacement-wait-s", type=float, metavar="S", help="How long a broken session waits for help."
)
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
@click.option("--log-format", metavar="FORM", help="text, json, or auto: text in a terminal.")
@click.option("--check-config", is_flag=True, help="Print the settings as JSON, if they are right, and end.")
@click.version_option(__version__, prog_name="corollad")
def main(config: Path | None, check_config: bool, **flags: Any) -> None:
    """Join a swarm and serve a run of a model's blocks, in the foreground.

    Each setting is also a key of the configuration file (~/.config/corolla/config.toml, or
    /etc/corolla/config.toml) and a variable COROLLA_NAME; flags win over variables, variables over the file.
    Talk to it with daemonctl.
    """
    given = {key: value for key, value in flags.items() if value not in (None, ())}
    try:
        if check_config:
            click.echo(json.dumps(described(config or _usual_config(), given)))
            return
        with _leaving_at_once():
            run(config or _usual_config(), given)
    except CorollaError as problem:
        click.echo(f"corollad: {problem}", err=True)
        sys.exit(_HOPELESS.get(problem.code, exit_code(problem.code)))
    except ModuleNotFoundError as problem:
        click.echo(f"corollad: {problem}: install it with pip install 'corolla[daemon,worker]'", err=True)
        sys.exit(Exit.ERROR)


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Until the daemon hears signals itself there is nothing to end in order: a signal just ends us.

    An exception would not do: Python remembers one that cut an import short, and dies of the signal at its end.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: os._exit(Exit.OK))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(config_file: Path | None, flags: dict[str, Any]) -> None:
    """Run the daemon until it is stopped. Raises ModuleNotFoundError without its extra."""
    import anyio  # here, so that a bare `pip install corolla` can say what is missing

    from .log import set_up_logging

    folder = load_config(config_file, os.environ, flags).state_dir
    with open_store(_place(folder, user_state_folder())) as store:
        sources = partial(load_config, config_file, os.environ, flags)
        config = sources(store.state.settings)
        set_up_logging(config.log_level, config.log_format)
        socket = _place(config.socket, user_socket())
        cache_folder = _place(config.cache_dir, user_cache_folder())
        anyio.run(_live, config, store, socket, cache_folder, sources, backend="trio")


def described(config_file: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What a daemon started so would do, without what `config.set` kept: its settings, file and folders.

    Raises as `load_config`; takes no lock and changes nothing.
    """
    config = load_config(config_file, os.environ, flags)
    return {
        "version": 1,
        "file": None if config_file is None else str(config_file),
        "config": dataclasses.asdict(config),
        "state_folder": str(_place(config.state_dir, user_state_folder())),
        "cache_folder": str(_place(config.cache_dir, user_cache_folder())),
        "socket": str(_place(config.socket, user_socket())),
    }


async def _live(config: Config, store: Store, socket: Path, cache_folder: Path, sources: Sources) -> None:
    # Here, so that --help and errors of the configuration need not wait for libp2p.
    from .answers.methods import handlers, pages
    from .node import Node

    await Node(config, store, socket, cache_folder, handlers, pages, sources).run()


def _usual_config() -> Path | None:
    """The user's configuration, else the service's; None if there is neither. One we may not read counts."""
    for path in (user_config_file(), SERVICE_CONFIG):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:  # whoever opens it says why it cannot be read
            return path
        return path
    return None


def _place(given: str, usual: Path) -> Path:
    return Path(given).expanduser().absolute() if given else usual


if __name__ == "__main__":
    main()
