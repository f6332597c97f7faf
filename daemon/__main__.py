"""`corollad`: reads what its owner wants, takes its state folder, and runs until it is stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..protocol.errors import CorollaError, Exit, exit_code
from ..protocol.places import (
    SERVICE_CONFIG,
    user_cache_folder,
    user_config_file,
    user_socket,
    user_state_folder,
)
from .config import Config, load_config
from .store import Store, open_store


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML file with these settings."
)
@click.option("--model", metavar="MODEL", help="What to serve: a folder, a hub id, or a GGUF file.")
@click.option("--blocks", metavar="auto|START:END|none", help="Which blocks of it; none serves nothing.")
@click.option("--listen", multiple=True, metavar="ADDRESS", help="Multiaddress to listen on; may repeat.")
@click.option("--announce", multiple=True, metavar="ADDRESS", help="Address that others should try first.")
@click.option("--join", metavar="TOKEN", help="Enter this swarm: a token, or a member's multiaddress.")
@click.option("--state-dir", type=click.Path(path_type=Path), metavar="DIR", help="Identity and memory.")
@click.option("--socket", type=click.Path(path_type=Path), metavar="PATH", help="The control socket.")
@click.option("--cache-dir", metavar="DIR", help="Where fetched and converted weights are kept.")
@click.option("--device", multiple=True, metavar="DEVICE", help="auto, cpu, cuda:0, …; one worker each.")
@click.option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; the device's best if left out.")
@click.option("--quantization", metavar="KIND", help="How weights are kept; none in this version.")
@click.option("--threads", type=int, metavar="N", help="CPU threads of each worker.")
@click.option("--memory-bytes", type=int, metavar="N", help="Memory of each worker, for weights and caches.")
@click.option("--cache-tokens", type=int, metavar="N", help="Tokens that each worker's KV cache holds.")
@click.option(
    "--replacement-wait-s", type=float, metavar="S", help="How long a broken session waits for help."
)
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
@click.option("--log-format", metavar="FORM", help="text, json, or auto: text in a terminal.")
@click.version_option(__version__, prog_name="corollad")
def main(config: Path | None, state_dir: Path | None, socket: Path | None, **flags: Any) -> None:
    """Join a swarm and serve a run of a model's blocks, in the foreground.

    Each setting is also a key of the configuration file (~/.config/corolla/config.toml, or
    /etc/corolla/config.toml) and a variable COROLLA_NAME; flags win over variables, variables over the file.
    Talk to it with daemonctl.
    """
    given = {key: value for key, value in flags.items() if value not in (None, ())}
    try:
        with open_store(state_dir or _folder("COROLLA_STATE_DIR", user_state_folder())) as store:
            run(store, config, socket, given)
    except CorollaError as problem:
        click.echo(f"corollad: {problem}", err=True)
        sys.exit(exit_code(problem.code))
    except ModuleNotFoundError as problem:
        click.echo(f"corollad: {problem}: install it with pip install 'corolla[daemon,worker]'", err=True)
        sys.exit(Exit.ERROR)


def run(store: Store, config_file: Path | None, socket: Path | None, flags: dict[str, Any]) -> None:
    """Run the daemon with a state folder that is ours. Raises ModuleNotFoundError without its extra."""
    import anyio  # here, so that a bare `pip install corolla` can say what is missing

    from .log import set_up_logging

    config = load_config(config_file or _usual_config(), os.environ, flags, store.state.settings)
    set_up_logging(config.log_level, config.log_format)
    cache_folder = Path(config.cache_dir).expanduser() if config.cache_dir else user_cache_folder()
    anyio.run(
        _live, config, store, socket or _folder("COROLLA_SOCKET", user_socket()), cache_folder, backend="trio"
    )


async def _live(config: Config, store: Store, socket: Path, cache_folder: Path) -> None:
    from .node import Node  # here, so that --help and errors of the configuration need not wait for libp2p

    await Node(config, store, socket, cache_folder).run()


def _usual_config() -> Path | None:
    """The user's configuration, else the service's; None if there is neither."""
    return next((path for path in (user_config_file(), SERVICE_CONFIG) if path.exists()), None)


def _folder(variable: str, usual: Path) -> Path:
    return Path(os.environ[variable]) if variable in os.environ else usual


if __name__ == "__main__":
    main()
