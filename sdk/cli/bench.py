"""How fast the swarm is for this machine: `daemonctl bench`."""

from __future__ import annotations

import click

from ..bench import bench as measure
from ..client import Daemon
from ..output import Output
from .options import asking, the_model


@click.command()
@click.option("--model", "-m", metavar="NAME", help="Which model, if the swarm serves several.")
@click.option("--prompt-tokens", default=128, show_default=True, help="Length of each prompt.")
@click.option("--new-tokens", "-n", default=64, show_default=True, help="Tokens of each text.")
@click.option("--texts", "num_texts", default=4, show_default=True, help="So many side by side.")
@asking
def bench(
    daemon: Daemon, output: Output, model: str | None, prompt_tokens: int, new_tokens: int, num_texts: int
) -> None:
    """Measure how fast the swarm writes for this machine: one text alone, then several side by side.

    The texts are of chance tokens. What others ask of the swarm meanwhile slows both alike.
    """
    name = the_model(daemon, model)
    output.say(f"writing {num_texts + 1} texts of {new_tokens} tokens with {name}")
    results = measure(
        daemon.model(name), prompt_tokens=prompt_tokens, new_tokens=new_tokens, num_texts=num_texts
    )
    if output.as_json:
        output.envelope(model=name, results=results)
        return
    output.table(
        ["what", "value", "unit", "to one alone"],
        [
            [figure.name.replace("_", " "), f"{figure.value:.2f}", figure.unit, _ratio(figure.ratio)]
            for figure in results
        ],
    )


def _ratio(ratio: float) -> str:
    return f"× {ratio:.2f}" if ratio else ""
