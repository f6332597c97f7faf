"""Embeddings, head and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corolla.model.checkpoint import open_checkpoint
from corolla.model.ends import Ends
from corolla.model.families import CERTIFIED
from corolla.model.linear import PackedLinear
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import FAMILIES, VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def load(folder: Path, memory_bytes: int = 0) -> Ends:
    checkpoint = open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), folder)
    return Ends.load(checkpoint, torch.float32, CPU, memory_bytes=memory_bytes)


def save_tokenizer(folder: Path, template: str | None) -> None:
    words = ["<unk>", "<s>", "</s>", "user", "assistant", "hello", "world"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_without_blocks_equal_the_whole_model_without_blocks(tmp_path: Path, family: str) -> None:
    whole: Any = save_tiny(tmp_path, family)
    ends = load(tmp_path)
    ids = torch.arange(VOCAB_SIZE)
    with torch.inference_mode():
        embedded = whole.get_input_embeddings()(ids[None])
        if family.startswith("bloom"):
            embedded = whole.base_model.word_embeddings_layernorm(embedded)
        norm = whole.base_model.get_submodule(CERTIFIED[type(whole).__name__].norm)
        logits = whole.get_output_embeddings()(norm(embedded))[0]
        cap = getattr(whole.config, "final_logit_softcapping", None)
        expected = logits if cap is None else cap * torch.tanh(logits / cap)
    assert torch.equal(ends.embed(ids), embedded[0])
    got = ends.head(ends.embed(ids))
    assert got.dtype is torch.float32
    assert float((got - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "bloom"])
def test_virtual_tokens_reach_the_blocks_as_embeddings_given_to_the_whole_model_do(
    tmp_path: Path, family: str
) -> None:
    whole: Any = save_tiny(tmp_path, family)
    ends = load(tmp_path)
    prompt = torch.randn(3, ends.hidden_size, generator=torch.Generator().manual_seed(1))
    taken: list[torch.Tensor] = []

    def take(_: Any, args: tuple[Any, ...]) -> None:
        taken.append(args[0])

    base = whole.base_model
    (base.h if hasattr(base, "h") else base.layers)[0].register_forward_pre_hook(take)
    with torch.inference_mode():
        base(inputs_embeds=prompt[None], use_cache=False)
    assert torch.allclose(ends.embed_prompt(prompt), taken[0][0], atol=1e-6)
    with pytest.raises(CorollaError, match="hidden_size 5, expected") as caught:
        ends.embed_prompt(torch.zeros(3, 5))
    assert caught.value.code is Code.BAD_SHAPE


def test_a_tied_head_is_packed_beside_the_embedding_table(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    ends = load(tmp_path)
    assert isinstance(ends._head, PackedLinear)
    table = ends.embed(torch.arange(VOCAB_SIZE))
    assert torch.equal(ends._head.dense_weight(), table)
    assert ends.bytes == 2 * table.nbytes + table.shape[1] * 4


def test_ids_and_hidden_states_of_another_size_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    ends = load(tmp_path)
    for ids, named in (([5, VOCAB_SIZE], str(VOCAB_SIZE)), ([3, -1], "-1")):
        with pytest.raises(CorollaError) as caught:
            ends.embed(torch.tensor(ids))
        assert caught.value.code is Code.BAD_REQUEST
        assert named in caught.value.message
    with pytest.raises(CorollaError) as caught:
        ends.head(torch.zeros(1, 63))
    assert caught.value.code is Code.BAD_SHAPE
    assert ends.embed(torch.empty(0, dtype=torch.int64)).shape == (0, 64)
    assert ends.head(torch.empty(0, 64)).shape == (0, VOCAB_SIZE)


def test_ends_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    size = load(tmp_path).bytes
    assert load(tmp_path, memory_bytes=size).bytes == size
    with pytest.raises(CorollaError) as caught:
        load(tmp_path, memory_bytes=size - 1)
    assert caught.value.code is Code.DOES_NOT_FIT


def test_a_model_without_tokenizer_says_so_when_it_is_asked(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    ends = load(tmp_path)
    assert not ends.has_chat_template
    with pytest.raises(CorollaError) as caught:
        _ = ends.tokenizer
    assert caught.value.code is Code.UNREADABLE


def test_a_chat_is_written_by_the_models_own_template(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    save_tokenizer(tmp_path, TEMPLATE)
    ends = load(tmp_path)
    assert ends.has_chat_template
    assert ends.chat_tokens([{"role": "user", "content": "hello world"}]) == [3, 5, 6, 4]


@pytest.mark.parametrize(("template", "role"), [(None, "user"), (TEMPLATE, "robot")])
def test_a_chat_that_cannot_be_written_is_refused(tmp_path: Path, template: str | None, role: str) -> None:
    save_tiny(tmp_path)
    save_tokenizer(tmp_path, template)
    ends = load(tmp_path)
    assert ends.tokenizer.eos_token == "</s>"
    with pytest.raises(CorollaError) as caught:
        ends.chat_tokens([{"role": role, "content": "hello"}])
    assert caught.value.code is Code.BAD_REQUEST
