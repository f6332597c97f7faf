"""Commands that use a model: generate, chat."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from ...protocol.control import Piece
from ...protocol.errors import Code, error
from ..client import Daemon, Model
from ..generation import GenerateOptions, Generation
from ..output import Output, event_text
from .options import asking, tell_privacy, the_model


def sampling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of how text is generated, given as keyword arguments of `GenerateOptions`."""
    for option in reversed(
        (
            click.option("--max-new-tokens", "-n", default=256, show_default=True, help="At most so many."),
            click.option("--temperature", "-t", default=0.0, show_default=True, help="0 is greedy."),
            click.option("--top-p", default=1.0, help="Choose among the likeliest, together so probable."),
            click.option("--top-k", default=0, help="Choose among so many."),
            click.option(
                "--min-p", default=0.0, help="Leave out what is less probable than so much of the best."
            ),
            click.option("--repetition-penalty", default=1.0, help="Divides logits of tokens seen before."),
            click.option(
                "--presence-penalty", default=0.0, help="Taken from logits of tokens written before."
            ),
            click.option(
                "--logit-bias",
                multiple=True,
                metavar="TOKEN=NUMBER",
                callback=_biases,
                help="Added to the logit of a token id (repeats).",
            ),
            click.option("--seed", type=int, help="The same seed gives the same text."),
            click.option("--stop", multiple=True, help="A text that ends the answer (repeats)."),
            click.option(
                "--stop-token",
                "stop_token_ids",
                type=int,
                multiple=True,
                help="A token id that ends the answer (repeats).",
            ),
            click.option("--ignore-eos", is_flag=True, help="Write on behind the end of a text."),
            click.option(
                "--logprobs",
                "top_logprobs",
                default=0,
                help="Name so many likeliest tokens each time (--json).",
            ),
            click.option(
                "--adapter",
                metavar="FOLDER",
                type=click.Path(exists=True, file_okay=False),
                help="An adapter to use, LoRA or prompts, as PEFT writes it.",
            ),
            click.option("--encoding", help="Of hidden states: float32, bfloat16, float16, int8."),
            click.option(
                "--wait", "wait_s", default=0.0, help="Seconds to wait for blocks nobody serves yet."
            ),
        )
    ):
        function = option(function)
    return function


def _biases(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[int, float]:
    biases = {}
    for text in given:
        token, _sign, bias = text.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{text!r}, expected TOKEN=NUMBER such as 42=-100") from None
    return biases


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", "-m", "name", help="Its name; not needed if the swarm serves one alone.")
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt into the model's chat template.")
@sampling
@asking
def generate(
    daemon: Daemon, output: Output, prompt: str | None, name: str | None, as_chat: bool, **options: Any
) -> None:
    """Write on after PROMPT, or after what comes from stdin."""
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text:
        raise error(Code.BAD_REQUEST, "an empty prompt", 'daemonctl generate "The capital of France"')
    model = daemon.model(the_model(daemon, name))
    tell_privacy(daemon, output)
    given: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if as_chat else {"prompt": text}
    answer = _write(model, output, given, _options(options))
    if output.as_json:
        output.envelope(model=model.name, generation=answer, text=answer.text)


@click.command()
@click.option("--model", "-m", "name", help="Its name; not needed if the swarm serves one alone.")
@click.option("--system", help="What the model is told before the first turn.")
@sampling
@asking
def chat(daemon: Daemon, output: Output, name: str | None, system: str | None, **options: Any) -> None:
    """Talk with a model, a line a turn. Ctrl-D ends."""
    model = daemon.model(the_model(daemon, name))
    tell_privacy(daemon, output)
    if sys.stdin.isatty():
        output.say(f"talking with {model.name}; Ctrl-D ends")
    messages = [{"role": "system", "content": system}] if system else []
    while (line := _line()) is not None:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        answer = _write(model, output, {"messages": messages}, _options(options))
        messages.append({"role": "assistant", "content": answer.text})
        if output.as_json:
            output.envelope(model=model.name, generation=answer, text=answer.text)


def _options(given: dict[str, Any]) -> GenerateOptions:
    options: GenerateOptions = {}
    options.update(given)  # type: ignore[typeddict-item]  # the names of `sampling` are those of the type
    return options


def _write(model: Model, output: Output, given: dict[str, Any], options: GenerateOptions) -> Generation:
    """Stream to stdout (unless JSON is wanted), events to stderr."""

    def tell(piece: Piece) -> None:
        if piece.event == "notice":  # `tell_privacy` said so already, once for each user
            return
        output.say(click.style(f"\n[{event_text(piece)}]", dim=True))

    with model.generate(stream=True, on_event=tell, **given, **options) as pieces:
        for piece in pieces:
            if not output.as_json:
                click.echo(piece.text, nl=False)
                sys.stdout.flush()
        if not output.as_json:
            click.echo()
        return pieces.result()


def _line() -> str | None:
    """The next line from whoever talks; None at the end."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives `input` a history

            return input(click.style("> ", bold=True))
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except EOFError:
        return None
