"""LoRA of a model on the Jargon File: its blocks on several daemons, then the same run by PEFT in this process.

    python -m examples.lora                                  SmolLM2-135M on a private swarm of this machine
    python -m examples.lora --kill-every 10                  a daemon is killed and replaced every 10 steps
    python -m examples.lora --socket SOCKET --model NAME     on the swarm of your own daemon

Both runs start from one adapter file and see the same texts, so their losses can be laid on each other. The loop
in `train` is ordinary PyTorch and does not know which of the two it drives. Everything is left in --out: the
adapter, checkpoints (run it again after an interruption: it goes on), the losses and their plot.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from corolla.protocol.errors import CorollaError
from corolla.sdk.checkpoints import Checkpoints
from corolla.sdk.torch import DistributedModelForCausalLM

from . import curves, jargon, machines

TARGETS = ["q_proj", "v_proj"]
SAVE_EVERY = 10  # steps


@dataclass(frozen=True)
class Run:
    """What is learned from. batches: (steps, rows, tokens); held_out: (texts, tokens), never trained on."""

    batches: Tensor
    held_out: Tensor
    learning_rate: float


@dataclass(frozen=True)
class Learned:
    """What came of it. losses: one a step; perplexities of the held-out texts."""

    losses: list[float]
    before: float
    after: float


def train(
    model: Any,
    parameters: list[Tensor],
    run: Run,
    on_step: curves.OnStep,
    checkpoints: Checkpoints | None = None,
    between: Callable[[int], None] | None = None,
) -> list[float]:
    """An ordinary loop; the losses of all its steps. between: called in each after forward, before backward.

    With checkpoints it goes on where an earlier one ended, and is saved before an error ends it.
    """
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(run.batches))
    begun, kept = (0, None) if checkpoints is None else checkpoints.restore(optimizer, scheduler, model)
    losses: list[float] = list(kept or [])

    def save() -> None:
        if checkpoints is not None and losses:
            checkpoints.save(len(losses), optimizer, scheduler, model, notes=losses)

    for step, batch in enumerate(run.batches[begun:], begun + 1):
        try:
            loss = model(input_ids=batch, labels=batch).loss
            if between is not None:
                between(step)
            optimizer.zero_grad()
            loss.backward()
        except CorollaError:
            save()
            raise
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
        on_step(step, losses[-1])
        if step % SAVE_EVERY == 0 or step == len(run.batches):
            save()
    return losses


def perplexity(model: Any, texts: Tensor) -> float:
    """Of tokens that the model has to guess, over all texts."""
    with torch.no_grad():
        losses = [
            float(model(input_ids=text[None], labels=text[None], use_cache=False).loss) for text in texts
        ]
    return math.exp(sum(losses) / len(losses))


def texts(folder: str, options: argparse.Namespace) -> Run:
    """Token batches of the first nine tenths of the text, in a seeded order, and some of the last tenth."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = jargon.text(options.text)
    cut = len(whole) * 9 // 10
    learned, held_out = (_pieces(tokenizer, part, options.tokens) for part in (whole[:cut], whole[cut:]))
    wanted = options.steps * options.rows
    if len(learned) < wanted or not len(held_out):
        sys.exit(f"error: the text has {len(learned)} pieces of {options.tokens} tokens, {wanted} are wanted")
    order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(options.seed))[:wanted]
    batches = learned[order].view(options.steps, options.rows, options.tokens)
    return Run(batches, held_out[: options.held_out], options.learning_rate)


def through_the_swarm(swarm: machines.Machines, options: argparse.Namespace) -> tuple[Learned, Run, str]:
    """Train the swarm's model; also what it learned from, and the folder of the model."""
    with DistributedModelForCausalLM.from_pretrained(
        swarm.model, daemon=swarm.daemon, encoding="float32", dtype=torch.float32
    ) as model:
        folder = str(model.name_or_path)
        run = texts(folder, options)
        start = options.out / "start"
        if not start.exists():
            torch.manual_seed(options.seed)
            model.add_adapter(LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS))
            model.save_adapter(start)
        model.load_adapter(start)

        def between(step: int) -> None:
            if options.kill_every and step % options.kill_every == 0:
                swarm.kill_one()

        before = perplexity(model, run.held_out)
        with curves.bar("swarm", options.steps) as on_step:
            kept = Checkpoints(options.out / "checkpoints")
            losses = train(model, model.adapter_parameters(), run, on_step, kept, between)
        after = perplexity(model, run.held_out)
        model.save_adapter(options.out / "adapter")
    return Learned(losses, before, after), run, folder


def by_peft(folder: str, run: Run, start: Path, steps: int) -> Learned:
    """The same in this process."""
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(whole, str(start), is_trainable=True)
    before = perplexity(model, run.held_out)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with curves.bar("PEFT", steps) as on_step:
        losses = train(model, parameters, run, on_step)
    return Learned(losses, before, perplexity(model, run.held_out))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run both, say what came of them, and give that back."""
    options = _options(arguments)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading: ours are enough
    options.out.mkdir(parents=True, exist_ok=True)
    with machines.chosen(options) as swarm:
        ours, run, folder = through_the_swarm(swarm, options)
    told: dict[str, Any] = {
        "steps": options.steps,
        "losses": ours.losses,
        "perplexity": {"before": ours.before, "after": ours.after},
    }
    drawn = {"swarm": ours.losses}
    print(f"swarm: perplexity of held-out text {ours.before:.2f} → {ours.after:.2f}")
    if not options.no_local:
        theirs = by_peft(folder, run, options.out / "start", options.steps)
        drawn["PEFT, one process"] = theirs.losses
        print(f"PEFT:  perplexity of held-out text {theirs.before:.2f} → {theirs.after:.2f}")
        told["peft"] = {
            "losses": theirs.losses,
            "perplexity": {"before": theirs.before, "after": theirs.after},
        }
        told["largest_difference"] = curves.largest_difference(ours.losses, theirs.losses)
        print(f"largest difference of the losses: {told['largest_difference']:.1e}")
    curves.report(options.out, told, drawn, "LoRA on the Jargon File")
    return told


def _pieces(tokenizer: Any, part: str, length: int) -> Tensor:
    tokens: Tensor = tokenizer(part, return_tensors="pt", verbose=False).input_ids[0]
    return tokens[: len(tokens) // length * length].view(-1, length)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    machines.add_options(parser)
    parser.add_argument("--text", type=Path, help="learn from this file instead of the Jargon File")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=4, help="texts of one step")
    parser.add_argument("--tokens", type=int, default=128, help="of one text")
    parser.add_argument("--held-out", type=int, default=16, help="texts that perplexity is measured on")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-every", type=int, default=0, metavar="STEPS")
    parser.add_argument("--no-local", action="store_true", help="leave out the run by PEFT")
    parser.add_argument("--out", type=Path, default=Path("build/lora"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
