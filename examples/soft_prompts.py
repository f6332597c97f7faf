"""A classifier with soft prompts: is a word of the Jargon File a noun or a verb, told by its definition.

    python -m examples.soft_prompts                              on a private swarm of this machine
    python -m examples.soft_prompts --deep                       with prompts in every block, as in the Petals paper
    python -m examples.soft_prompts --socket SOCKET --model NAME   on the swarm of your own daemon

The model is asked for one word after each definition, and the loss compares just its logits for " noun" and
" verb". A few virtual tokens before the text are all that is trained. Then the same is done by PEFT in this process
(soft prompts alone: PEFT has no deep ones of this kind), so that the losses can be laid on each other.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from corolla.sdk.prompts import DeepPromptConfig
from corolla.sdk.torch import DistributedModelForCausalLM

from . import curves, jargon, machines

CLASSES: Final = {" noun": ("n",), " verb": ("v", "vt", "vi")}
BEGIN: Final = "Tell whether the word that is defined is a noun or a verb."
QUESTION: Final = "Definition: {definition}\nPart of speech:"


@dataclass(frozen=True)
class Examples:
    """Questions, padded on the right, and their classes. ids, mask: (num, tokens); labels: (num,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def part(self, first: int, last: int) -> Examples:
        """Some of them."""
        return Examples(self.ids[first:last], self.mask[first:last], self.labels[first:last])


@dataclass(frozen=True)
class Learned:
    """losses: one a step. before, after: the share of held-out words that were told right."""

    losses: list[float]
    before: float
    after: float


def scores(model: Any, examples: Examples, answers: Tensor) -> Tensor:
    """(num, classes): logits of the classes' words after each question."""
    out = model(input_ids=examples.ids, attention_mask=examples.mask, use_cache=False)
    ends = examples.mask.sum(1) - 1  # the last token of each question
    logits = out.logits[:, -examples.ids.shape[1] :]  # PEFT gives those of the virtual tokens too
    last: Tensor = logits[torch.arange(len(ends)), ends]
    return last[:, answers]


def accuracy(model: Any, held_out: Examples, answers: Tensor, rows: int) -> float:
    """The share of words told right."""
    right = 0
    with torch.no_grad():
        for first in range(0, len(held_out.labels), rows):
            part = held_out.part(first, first + rows)
            right += int((scores(model, part, answers).argmax(-1) == part.labels).sum())
    return right / len(held_out.labels)


def train(
    model: Any,
    parameters: list[Tensor],
    data: tuple[Examples, Examples],
    answers: Tensor,
    options: argparse.Namespace,
) -> Learned:
    """An ordinary loop, over the examples once. data: learned from, held out."""
    learned, held_out = data
    before = accuracy(model, held_out, answers, options.rows)
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate)
    losses = []
    label = "swarm" if isinstance(model, DistributedModelForCausalLM) else "PEFT"
    with curves.bar(label, options.steps) as on_step:
        for step in range(options.steps):
            part = learned.part(step * options.rows, (step + 1) * options.rows)
            loss = cross_entropy(scores(model, part, answers), part.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
            on_step(step + 1, losses[-1])
    return Learned(losses, before, accuracy(model, held_out, answers, options.rows))


def questions(tokenizer: Any, options: argparse.Namespace) -> tuple[Examples, Examples]:
    """As many nouns as verbs, in a seeded order; the last ones are held out."""
    entries = list(jargon.entries(jargon.text(options.text)))
    groups = [[entry for entry in entries if entry.part_of_speech in parts] for parts in CLASSES.values()]
    generator = torch.Generator().manual_seed(options.seed)
    wanted = options.steps * options.rows + options.held_out
    each = min(-(-wanted // len(groups)), *map(len, groups))
    picked = []
    for label, group in enumerate(groups):
        order = torch.randperm(len(group), generator=generator)[:each].tolist()
        picked += [(group[place].definition, label) for place in order]
    if len(picked) < wanted:
        sys.exit(
            f"error: the text has {len(picked)} words for {options.steps} steps of {options.rows}; take fewer"
        )
    order = torch.randperm(len(picked), generator=generator)[:wanted].tolist()
    tokens = [_tokens(tokenizer, picked[place][0], options.tokens) for place in order]
    ids = torch.zeros(wanted, options.tokens, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(tokens):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    whole = Examples(ids, mask, torch.tensor([picked[place][1] for place in order]))
    cut = options.steps * options.rows
    return whole.part(0, cut), whole.part(cut, wanted)


def answer_tokens(tokenizer: Any) -> Tensor:
    """(classes,): the first tokens at which the classes' words differ."""
    words = [tokenizer(word, add_special_tokens=False).input_ids for word in CLASSES]
    return torch.tensor(next(tokens for tokens in zip(*words, strict=False) if len(set(tokens)) > 1))


def _tokens(tokenizer: Any, definition: str, limit: int) -> list[int]:
    """A question of at most so many tokens: a long definition is cut, not what is asked."""
    asked = QUESTION.partition("{definition}")
    head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in (asked[0], asked[2]))
    body: list[int] = tokenizer(definition, add_special_tokens=False).input_ids
    return [*head, *body[: limit - len(head) - len(tail)], *tail]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run both, say what came of them, and give that back."""
    options = _options(arguments)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading: ours are enough
    options.out.mkdir(parents=True, exist_ok=True)
    start = options.out / "start"
    with (
        machines.chosen(options) as swarm,
        DistributedModelForCausalLM.from_pretrained(
            swarm.model, daemon=swarm.daemon, encoding="float32", dtype=torch.float32
        ) as model,
    ):
        folder = str(model.name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        answers = answer_tokens(tokenizer)
        data = questions(tokenizer, options)
        if not start.exists():
            torch.manual_seed(options.seed)
            model.add_adapter(_config(folder, options))
            model.save_adapter(start)
        model.load_adapter(start)
        ours = train(model, model.adapter_parameters(), data, answers, options)
        model.save_adapter(options.out / "adapter")
    print(f"swarm: {ours.before:.1%} of held-out words told right → {ours.after:.1%}")
    told: dict[str, Any] = {"losses": ours.losses, "accuracy": {"before": ours.before, "after": ours.after}}
    drawn = {"swarm": ours.losses}
    if not options.deep and not options.no_local:
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        local: Any = get_peft_model(whole, _config(folder, options))
        set_peft_model_state_dict(local, load_file(start / "adapter_model.safetensors"))
        parameters = [parameter for parameter in local.parameters() if parameter.requires_grad]
        theirs = train(local, parameters, data, answers, options)
        print(f"PEFT:  {theirs.before:.1%} of held-out words told right → {theirs.after:.1%}")
        drawn["PEFT, one process"] = theirs.losses
        told["peft"] = {"losses": theirs.losses, "accuracy": {"before": theirs.before, "after": theirs.after}}
        told["largest_difference"] = curves.largest_difference(ours.losses, theirs.losses)
        print(f"largest difference of the losses: {told['largest_difference']:.1e}")
    curves.report(options.out, told, drawn, "Noun or verb, by soft prompts")
    return told


def _config(folder: str, options: argparse.Namespace) -> Any:
    if options.deep:
        return DeepPromptConfig(options.virtual_tokens)
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=options.virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT,  # random vectors are far from any token's
        prompt_tuning_init_text=BEGIN,
        tokenizer_name_or_path=folder,
    )


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    machines.add_options(parser)
    parser.add_argument("--text", type=Path, help="another file of the Jargon File's form")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8, help="words of one step")
    parser.add_argument("--tokens", type=int, default=64, help="of one question")
    parser.add_argument("--held-out", type=int, default=80, help="words that are not trained on")
    parser.add_argument("--virtual-tokens", type=int, default=8)
    parser.add_argument("--deep", action="store_true", help="prompts in every block too")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-local", action="store_true", help="leave out the run by PEFT")
    parser.add_argument("--out", type=Path, default=Path("build/soft-prompts"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
