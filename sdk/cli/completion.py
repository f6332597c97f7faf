"""Shell completion: the script that a shell evaluates."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

from ...protocol.errors import Code, error

_HINTS = {
    "bash": 'eval "$(daemonctl completion bash)"    in ~/.bashrc',
    "zsh": 'eval "$(daemonctl completion zsh)"    in ~/.zshrc',
    "fish": "daemonctl completion fish | source    in ~/.config/fish/config.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(sorted(_HINTS)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash: eval "$(daemonctl completion bash)"     in ~/.bashrc
    zsh:  eval "$(daemonctl completion zsh)"      in ~/.zshrc
    fish: daemonctl completion fish | source      in ~/.config/fish/config.fish
    """
    cls: type[ShellComplete] | None = get_completion_class(shell)
    if cls is None:
        raise error(Code.UNSUPPORTED, f"no completion for {shell}")
    click.echo(cls(context.find_root().command, {}, "daemonctl", "_DAEMONCTL_COMPLETE").source())
    if click.get_text_stream("stdout").isatty():
        click.echo(f"put this line where your shell starts:  {_HINTS[shell]}", err=True)
