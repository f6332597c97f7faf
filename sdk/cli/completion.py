"""Shell completion: the script that a shell evaluates."""

from __future__ import annotations

import sys
from typing import Final

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

_CLASSES: Final[dict[str, type[ShellComplete]]] = {
    "bash": BashComplete,
    "fish": FishComplete,
    "zsh": ZshComplete,
}
_HINTS: Final = {
    "bash": 'eval "$(daemonctl completion bash)"    in ~/.bashrc',
    "zsh": 'eval "$(daemonctl completion zsh)"    in ~/.zshrc',
    "fish": "daemonctl completion fish | source    in ~/.config/fish/config.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(sorted(_CLASSES)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash: eval "$(daemonctl completion bash)"     in ~/.bashrc
    zsh:  eval "$(daemonctl completion zsh)"      in ~/.zshrc
    fish: daemonctl completion fish | source      in ~/.config/fish/config.fish
    """
    script = _CLASSES[shell](context.find_root().command, {}, "daemonctl", "_DAEMONCTL_COMPLETE").source()
    click.echo(script)
    if sys.stdout.isatty():
        click.echo(f"put this line where your shell starts:  {_HINTS[shell]}", err=True)
