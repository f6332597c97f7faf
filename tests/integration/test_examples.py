"""The examples on a tiny model: what a newcomer runs gives what PEFT gives, also when daemons are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from corolla.protocol.errors import Code, CorollaError, error  # noqa: E402
from corolla.sdk.checkpoints import Checkpoints  # noqa: E402
from examples import jargon, lora, soft_prompts  # noqa: E402

from ..model.test_worker import save_byte_tokenizer  # noqa: E402
from ..model.tiny import save_tiny  # noqa: E402

TOLERANCE = 1e-4

# PEFT asks transformers for a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ARTICLES = """\
back door
 n.

    [common] A hole in the security of a system deliberately left in place by
    designers or maintainers.

bang
 1. /bang/ , vt. To do

    as one pleases with an exclamation mark, loudly and for no good reason at all.

B1FF
 /bif/ , [Usenet]

    (alt.: BIFF) The most famous pseudo, and the prototypical newbie.

baz
 /baz/ , n.

    See {foo}.
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    save_tiny(folder, "llama", seed=4, eos_token_id=None)
    save_byte_tokenizer(folder)
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "steps",
    [3, pytest.param(5, marks=pytest.mark.long)],  # the latter kill again, once the successor is there
)
def test_lora_through_daemons_that_are_killed_learns_as_peft_does(
    model: Path, tmp_path: Path, steps: int
) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    sizes = ["--steps", str(steps), "--rows", "3", "--tokens", "16", "--held-out", "2", "--rank", "2"]
    out = tmp_path / "out"
    command = ["--model", str(model), "--text", str(text), "--kill-every", "2", "--out", str(out), *sizes]
    told = lora.main(command)
    assert len(told["losses"]) == steps
    assert told["largest_difference"] < TOLERANCE
    assert told["perplexity"]["after"] < told["perplexity"]["before"]
    assert told["perplexity"]["after"] == pytest.approx(told["peft"]["perplexity"]["after"], rel=TOLERANCE)
    start, learned = (load_file(out / name / "adapter_model.safetensors") for name in ("start", "adapter"))
    assert start.keys() == learned.keys()
    assert any(not torch.equal(start[name], learned[name]) for name in start)
    assert Checkpoints(out / "checkpoints").steps() == [steps]


@pytest.mark.timeout(600)
@pytest.mark.long  # minutes; the default suite has soft and deep prompts in test_prompts.py
@pytest.mark.parametrize("is_deep", [False, True], ids=["soft", "deep"])
def test_soft_prompts_learn_through_daemons_as_in_peft(model: Path, tmp_path: Path, is_deep: bool) -> None:
    text = tmp_path / "text"
    hints = (("n", "a thing made of metal, kept by those who like to look at it for hours"),
             ("v", "to do something at great length, and with more noise than is needed here"))  # fmt: skip
    words = [f"word{n}\n {part}.\n\n    {n} {hint}\n\n" for n in range(12) for part, hint in hints]
    text.write_text("".join(words))
    sizes = ["--steps", "3", "--rows", "4", "--tokens", "96", "--held-out", "8", "--virtual-tokens", "3"]
    out = tmp_path / "out"
    options = ["--deep"] if is_deep else []
    told = soft_prompts.main(
        ["--model", str(model), "--text", str(text), "--out", str(out), *sizes, *options]
    )
    assert len(told["losses"]) == 3
    start, learned = (load_file(out / name / "adapter_model.safetensors") for name in ("start", "adapter"))
    assert start.keys() == learned.keys()
    assert all(not torch.equal(start[name], learned[name]) for name in start)
    if not is_deep:
        assert told["largest_difference"] < TOLERANCE
        assert told["accuracy"] == told["peft"]["accuracy"]


def adapted(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    whole = AutoModelForCausalLM.from_pretrained(model)
    return get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"]))


class Saved:
    """A model of PEFT that saves its adapter as ours do."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def save_adapter(self, folder: Any) -> None:
        self.model.save_pretrained(str(folder))


def test_a_run_that_an_error_ended_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    batches = torch.randint(3, 90, (6, 2, 8), generator=torch.Generator().manual_seed(1))
    run = lora.Run(batches, batches[0], 1e-2)

    def trained(checkpoints: Checkpoints | None, between: Any = None) -> list[float]:
        whole = adapted(model)
        parameters = [parameter for parameter in whole.parameters() if parameter.requires_grad]
        return lora.train(Saved(whole), parameters, run, lambda step, loss: None, checkpoints, between)

    def fail(step: int) -> None:
        if step == 4:
            raise error(Code.PEER_LOST, "the last replica is gone")

    kept = Checkpoints(tmp_path / "kept")
    with pytest.raises(CorollaError, match="last replica"):
        trained(kept, fail)
    assert kept.steps() == [3]
    assert trained(kept) == trained(None)


def test_the_jargon_files_words_are_told_apart() -> None:
    assert [(entry.word, entry.part_of_speech) for entry in jargon.entries(ARTICLES)] == [
        ("back door", "n"),
        ("bang", "vt"),
    ]
