"""Soft and deep prompts through real daemons, against PEFT and against prompts added by hand in one process."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

import corolla
from corolla.protocol.errors import Code, CorollaError
from corolla.sdk.client import Daemon
from corolla.sdk.prompts import DeepPromptConfig
from corolla.sdk.torch import DistributedModelForCausalLM

from ..model.tiny import NUM_BLOCKS, save_tiny
from ..processes import local_swarm

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
TOLERANCE = 1e-4
NUM = 5
IDS = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(3))
RIGHT = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6])

# PEFT asks transformers for a name that it has deprecated, and says that it sets position_ids aside.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]


class Setting(NamedTuple):
    whole: Any
    folder: Path
    socket: Path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    whole = save_tiny(folder, "llama", seed=4, eos_token_id=None)
    cache = tmp_path_factory.mktemp("cache")
    with local_swarm(folder, *OPTIONS, "--cache-dir", str(cache)) as swarm:
        client = swarm.found()
        for daemon in (swarm.serve("front", 0, 2), swarm.serve("back", 2, NUM_BLOCKS)):
            daemon.wait_online()
        swarm.wait_covered(client, [1] * NUM_BLOCKS)
        yield Setting(whole, folder, client.socket)


@pytest.fixture
def daemon(setting: Setting) -> Iterator[Daemon]:
    with corolla.connect(setting.socket) as daemon:
        yield daemon


@pytest.fixture
def model(setting: Setting, daemon: Daemon) -> Any:
    return DistributedModelForCausalLM.from_pretrained(
        "tiny", ends=setting.folder, daemon=daemon, dtype=torch.float32
    )


def soft_config() -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def by_hand(whole: Any, model: Any) -> tuple[Any, Tensor, Tensor]:
    """The whole model with the same deep prompts, its soft prompt, and those of its blocks."""
    local = deepcopy(whole)
    local.requires_grad_(False)
    soft = model.blocks.adapter.soft.detach().clone().requires_grad_()
    deep = model.blocks.adapter.factors[0].detach().clone().requires_grad_()

    def adding(block: int) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
            hidden = args[0]
            if hidden.shape[1] > 1:  # not a later step of a text
                hidden = torch.cat([hidden[:, :NUM] + deep[block], hidden[:, NUM:]], 1)
            return (hidden, *args[1:]), kwargs

        return hook

    for block, layer in enumerate(local.model.layers):
        layer.register_forward_pre_hook(adding(block), with_kwargs=True)
    return local, soft, deep


def random_deep(model: Any, size: float = 0.3) -> None:
    """Deep prompts that change the answers; made at zero, they do not."""
    model.add_adapter(DeepPromptConfig(NUM))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.adapter_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.mark.parametrize("mask", [None, RIGHT], ids=["full", "right"])
def test_soft_prompts_learn_as_pefts(
    setting: Setting, model: Any, tmp_path: Path, mask: Tensor | None
) -> None:
    adapted: Any = get_peft_model(deepcopy(setting.whole), soft_config())
    adapted.save_pretrained(str(tmp_path))
    model.load_adapter(tmp_path)
    labels = IDS if mask is None else IDS.masked_fill(mask == 0, -100)
    ours = model(IDS, attention_mask=mask, labels=labels)
    theirs = adapted(input_ids=IDS, attention_mask=mask, labels=labels)
    assert abs(ours.loss.item() - theirs.loss.item()) < 1e-4
    real = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    assert torch.allclose(ours.logits[real], theirs.logits[:, NUM:][real], atol=1e-3)
    ours.loss.backward()
    theirs.loss.backward()
    (found,) = model.adapter_parameters()
    expected = adapted.prompt_encoder["default"].embedding.weight.grad
    assert distance(found.grad, expected) < TOLERANCE


def test_deep_prompts_learn_as_those_added_by_hand(setting: Setting, model: Any) -> None:
    random_deep(model)
    local, soft, deep = by_hand(setting.whole, model)
    embeds = torch.cat([soft.expand(len(IDS), -1, -1), local.get_input_embeddings()(IDS)], 1)
    labels = torch.cat([torch.full((len(IDS), NUM), -100), IDS], 1)
    theirs = local(inputs_embeds=embeds, labels=labels).loss
    ours = model(IDS, labels=IDS).loss
    assert abs(ours.item() - theirs.item()) < 1e-4
    ours.backward()
    theirs.backward()
    adapter = model.blocks.adapter
    assert soft.grad is not None
    assert deep.grad is not None
    assert distance(adapter.soft.grad, soft.grad) < TOLERANCE
    for block in range(NUM_BLOCKS):
        assert distance(adapter.factors[0].grad[block], deep.grad[block]) < TOLERANCE, block


def texts(generate: Any, **options: Any) -> list[list[int]]:
    """Each row's new tokens, where what comes back begins with the text or does not."""
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with torch.no_grad():
        return [row.tolist()[-12:] for row in generate(**given)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_texts_with_soft_prompts_equal_pefts(
    setting: Setting, model: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapted: Any = get_peft_model(deepcopy(setting.whole), soft_config())
    adapted.save_pretrained(str(tmp_path))
    model.load_adapter(tmp_path)
    found = texts(model.generate, input_ids=IDS, **options)
    assert found == texts(adapted.generate, input_ids=IDS, **options)
    assert found != texts(setting.whole.generate, input_ids=IDS, **options)


def test_texts_with_deep_prompts_equal_those_added_by_hand(setting: Setting, model: Any) -> None:
    random_deep(model)
    local, soft, _ = by_hand(setting.whole, model)
    embeds = torch.cat([soft.expand(len(IDS), -1, -1), local.get_input_embeddings()(IDS)], 1)
    found = texts(model.generate, input_ids=IDS)
    assert found == texts(local.generate, inputs_embeds=embeds)
    alone = [texts(model.generate, input_ids=row[None])[0] for row in IDS]
    assert found == alone


@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_a_folder_of_prompts_is_used_by_plain_clients(
    setting: Setting, daemon: Daemon, model: Any, tmp_path: Path, kind: str
) -> None:
    if kind == "soft":
        model.add_adapter(soft_config())
    else:
        random_deep(model)
    model.save_adapter(tmp_path)
    plain = daemon.model("tiny")
    answer = plain.generate(tokens=IDS.tolist(), max_new_tokens=12, adapter=tmp_path)
    assert [list(row) for row in answer.tokens] == texts(model.generate, input_ids=IDS)
    with torch.no_grad():
        embeds = setting.whole.get_input_embeddings()(IDS)
        expected = model(IDS, use_cache=False).logits
        with plain.session(rows=3, max_length=8, adapter=tmp_path) as session:
            pieces = [session.step(embeds[:, :6]), session.step(embeds[:, 6:])]
            assert session.lengths == (8, 8, 8)
            again = session.step(embeds[:, 2:], position=2, reply="last")
            anew = session.step(embeds, position=0)
        for found in (torch.cat(pieces, 1), anew):
            assert torch.allclose(logits_of(setting.whole, found), expected, atol=1e-3)
        assert torch.allclose(logits_of(setting.whole, again), expected[:, -1:], atol=1e-3)
    wrong = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32)
    wrong.save_pretrained(str(tmp_path / "wrong"))
    weights = {"prompt_embeddings": torch.ones(2, 32)}
    save_file(weights, tmp_path / "wrong" / "adapter_model.safetensors")
    with pytest.raises(CorollaError, match="hidden_size 32, expected 64") as caught:
        plain.generate(tokens=IDS[0].tolist(), max_new_tokens=2, adapter=tmp_path / "wrong")
    assert caught.value.code is Code.BAD_SHAPE


def logits_of(whole: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = whole.lm_head(whole.model.norm(hidden))
    return logits


def test_texts_of_rows_of_different_lengths_are_those_of_each_alone(model: Any) -> None:
    random_deep(model)
    lengths = [8, 5, 2]
    rows = [IDS[i, :n] for i, n in enumerate(lengths)]
    padded = torch.stack([torch.cat([torch.zeros(8 - len(row), dtype=torch.int64), row]) for row in rows])
    mask = torch.stack([torch.cat([torch.zeros(8 - n), torch.ones(n)]) for n in lengths]).long()
    together = texts(model.generate, input_ids=padded, attention_mask=mask)
    assert together == [texts(model.generate, input_ids=row[None])[0] for row in rows]


def test_prompts_learned_here_work_in_peft(setting: Setting, model: Any, tmp_path: Path) -> None:
    model.add_adapter(soft_config())
    optimizer = torch.optim.AdamW(model.adapter_parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    model.save_adapter(tmp_path)
    elsewhere = PeftModel.from_pretrained(deepcopy(setting.whole), tmp_path)
    with torch.no_grad():
        ours, theirs = model(IDS, use_cache=False).logits, elsewhere(IDS).logits[:, NUM:]
    assert distance(ours, theirs) < TOLERANCE


def test_deep_prompts_are_kept_in_a_folder(model: Any, tmp_path: Path) -> None:
    random_deep(model)
    kept = [parameter.detach().clone() for parameter in model.adapter_parameters()]
    model.save_adapter(tmp_path)
    model.load_adapter(tmp_path)
    assert all(one.equal(other) for one, other in zip(kept, model.adapter_parameters(), strict=True))
    model.add_adapter(DeepPromptConfig(NUM + 1))
    model.save_adapter(tmp_path / "wider")
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (tmp_path / "wider" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(CorollaError, match=rf"\({NUM + 1}, 64\), expected \({NUM}, 64\)") as caught:
        model.load_adapter(tmp_path)
    assert caught.value.code is Code.BAD_SHAPE


LENGTHS = (3, 8, 5)  # of three texts
PACKED = torch.cat([IDS[row, :n] for row, n in enumerate(LENGTHS)])[None]  # in one row of 16


def layouts() -> dict[str, dict[str, Tensor]]:
    """The three texts padded on the left, packed, and packed in rows of different lengths."""
    padded, mask = torch.zeros(2, 3, 8, dtype=torch.int64)
    for row, n in enumerate(LENGTHS):
        padded[row, 8 - n :], mask[row, 8 - n :] = IDS[row, :n], 1
    told = (mask.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(LENGTHS).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    first, second = PACKED[:, : ends[1]], PACKED[:, ends[1] :]
    behind = (0, first.shape[1] - second.shape[1])
    uneven = torch.cat([first, torch.nn.functional.pad(second, behind)])
    real = torch.cat([torch.ones_like(first), torch.nn.functional.pad(torch.ones_like(second), behind)])
    restarts = torch.cat([positions[:, : ends[1]], torch.arange(first.shape[1])[None]])
    return {
        "left": {"input_ids": padded, "attention_mask": mask},
        "left, positions told": {"input_ids": padded, "attention_mask": mask, "position_ids": told},
        "packed": {"input_ids": PACKED, "position_ids": positions},
        "packed, padded": {"input_ids": uneven, "attention_mask": real, "position_ids": restarts},
    }


@pytest.mark.parametrize("layout", layouts())
def test_texts_padded_or_packed_learn_as_pefts_of_a_row_each(
    setting: Setting, model: Any, tmp_path: Path, layout: str
) -> None:
    adapted: Any = get_peft_model(deepcopy(setting.whole), soft_config())
    adapted.save_pretrained(str(tmp_path))
    model.load_adapter(tmp_path)
    given = layouts()[layout]
    ids = given["input_ids"]
    real = given.get("attention_mask", torch.ones_like(ids)).bool()
    ours = model(**given, labels=ids.masked_fill(~real, -100))
    behind = torch.tensor([[1] * n + [0] * (8 - n) for n in LENGTHS])
    theirs = adapted(input_ids=IDS, attention_mask=behind, labels=IDS.masked_fill(behind == 0, -100))
    assert abs(ours.loss.item() - theirs.loss.item()) < 1e-4
    assert torch.allclose(ours.logits[real], theirs.logits[:, NUM:][behind.bool()], atol=1e-3)
    ours.loss.backward()
    theirs.loss.backward()
    (found,) = model.adapter_parameters()
    assert distance(found.grad, adapted.prompt_encoder["default"].embedding.weight.grad) < TOLERANCE


def test_deep_prompts_of_packed_texts_learn_as_those_of_a_row_each(model: Any) -> None:
    random_deep(model)
    gradients = []
    behind = torch.tensor([[1] * n + [0] * (8 - n) for n in LENGTHS])
    rows = {"input_ids": IDS, "attention_mask": behind, "labels": IDS.masked_fill(behind == 0, -100)}
    for given in (rows, {**layouts()["packed"], "labels": PACKED}):
        model.zero_grad()
        model(**given).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.adapter_parameters()])
    for apart, packed in zip(*gradients, strict=True):
        assert distance(packed, apart) < TOLERANCE


def test_packed_texts_with_prompts_and_a_cache_are_refused(model: Any) -> None:
    model.add_adapter(DeepPromptConfig(NUM))
    with torch.no_grad(), pytest.raises(CorollaError, match="position_ids") as caught:
        model(**layouts()["packed"], use_cache=True)
    assert caught.value.code is Code.UNSUPPORTED


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (DeepPromptConfig(0), "num_virtual_tokens=0"),
        (PrefixTuningConfig(num_virtual_tokens=3), "PREFIX_TUNING"),
    ],
    ids=["none", "prefix"],
)
def test_prompts_that_cannot_be_are_refused_by_name(model: Any, config: Any, named: str) -> None:
    with pytest.raises(CorollaError, match=named):
        model.add_adapter(config)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_get_peft_model_with_lora_names_add_adapter(model: Any, targets: Any) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets)
    with pytest.raises(CorollaError, match="add_adapter") as caught:
        get_peft_model(model, config)
    assert caught.value.code is Code.UNSUPPORTED


def test_get_peft_model_with_soft_prompts_works(setting: Setting, model: Any) -> None:
    torch.manual_seed(5)
    ours: Any = get_peft_model(model, soft_config())
    torch.manual_seed(5)
    theirs: Any = get_peft_model(deepcopy(setting.whole), soft_config())
    for adapted in (ours, theirs):
        adapted.train()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
    found, expected = (m.prompt_encoder["default"].embedding.weight.grad for m in (ours, theirs))
    assert distance(found, expected) < TOLERANCE
