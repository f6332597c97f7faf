"""The program: which commands there are, in which group of the help, and how an error leaves it.

A command's file is imported when the command is run or when help is printed.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Final, NamedTuple

import click

from ...protocol.errors import CorollaError, Exit, exit_code
from ..output import print_error


class Command(NamedTuple):
    """One row of the list. module: the file that holds it, with a click command of the same name."""

    group: str
    name: str
    module: str
    summary: str


COMMANDS: Final = (
    Command("See", "status", "see", "This machine's daemon in one screen"),
    Command("See", "swarm", "see", "Who serves which blocks; `swarm create NAME [--invited]` founds one"),
    Command("See", "model", "models", "The models of the swarm: list, pull"),
    Command("See", "peers", "network", "The members of the swarm: who, how far, direct or through whom"),
    Command("See", "ping", "network", "Measure the round trip to a member"),
    Command("See", "netcheck", "network", "How this machine is reached, what is wrong, and the remedy"),
    Command("See", "doctor", "doctor", "Check everything on this machine; --bundle packs it without secrets"),
    Command("See", "metrics", "metrics", "The daemon in numbers, as Prometheus reads them"),
    Command("See", "events", "see", "What happened, and with --follow what happens"),
    Command("Use", "generate", "use", "Write on after a prompt"),
    Command("Use", "chat", "use", "Talk with a model"),
    Command("Use", "bench", "bench", "How fast the swarm writes for this machine"),
    Command("Use", "adapter", "adapter", "Adapters that the daemon keeps: list, show, remove"),
    Command("Lend", "config", "lend", "Show the configuration; `config set KEY VALUE` changes it"),
    Command("Lend", "rebalance", "moving", "Move to the blocks where this machine helps most"),
    Command("Lend", "drain", "moving", "Take no new sessions; let those that run move or finish"),
    Command("Lend", "pause", "moving", "Lend nothing for a while; the device's memory is free in seconds"),
    Command("Lend", "resume", "moving", "Lend again after pause or drain"),
    Command("Lend", "worker", "worker", "What workers run in: `worker install`"),
    Command("Lend", "stop", "lend", "Let sessions finish, then stop the daemon"),
    Command("Belong", "join", "belong", "Enter a swarm by its token or a member's address"),
    Command("Belong", "leave", "belong", "Leave the swarm"),
    Command("Belong", "invite", "guests", "Let a machine into an invited swarm of yours"),
    Command("Belong", "revoke", "guests", "End the membership of a peer, or of an invitation's guests"),
    Command("Belong", "ban", "guests", "Have nothing to do with a peer, from this daemon"),
    Command("Belong", "unban", "guests", "End a ban"),
    Command("Try", "demo", "demo", "A swarm on this machine; one daemon is killed in mid-sentence"),
    Command("Try", "completion", "completion", "Completion for bash, zsh or fish"),
)


class Commands(click.Group):
    """Commands found by the list, helped in its groups."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [row.name for row in COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for row in COMMANDS:
            if row.name == cmd_name:
                command = getattr(import_module(f".{row.module}", __package__), row.name)
                return command if isinstance(command, click.Command) else None
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in dict.fromkeys(row.group for row in COMMANDS):
            with formatter.section(group):
                formatter.write_dl([(row.name, row.summary) for row in COMMANDS if row.group == group])


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="The daemon is found by COROLLA_SOCKET, else it is your own, else this machine's (/run/corolla)."
    "  Exit codes: 0 ok, 1 error, 2 usage, 3 no daemon, 4 permission, 5 timeout, 6 not ready, 7 degraded.",
)
@click.version_option(package_name="corolla", prog_name="daemonctl")
def daemonctl() -> None:
    """Ask the Corolla daemon on this machine: see the swarm, use its models, lend your hardware.

    Data goes to stdout, talk to stderr; every command takes --json.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = daemonctl.main(words, prog_name="daemonctl", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else Exit.OK)
    except CorollaError as problem:
        print_error(problem, "--json" in words)
        sys.exit(exit_code(problem.code))
    except click.ClickException as problem:
        problem.show()
        sys.exit(problem.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)  # as shells count SIGINT
    except BrokenPipeError:  # `daemonctl … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.OK)
