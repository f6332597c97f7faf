"""How architectures fall into blocks and ends, and which are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)

from corolla.model.cache import CacheShape
from corolla.model.families import CERTIFIED, Skeleton, architecture
from corolla.protocol.errors import Code, CorollaError

from .tiny import FAMILIES, NUM_BLOCKS


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_ends_hold_every_tensor_of_the_model_once(family: str) -> None:
    skeleton = Skeleton(FAMILIES[family]())
    assert skeleton.num_blocks == NUM_BLOCKS
    prefixes = [skeleton.block_prefix(block) for block in range(NUM_BLOCKS)]
    prefixes += skeleton.end_prefixes.values()
    for name in skeleton.tensors:
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name
    total = sum(tensor.numel() for tensor in skeleton.tensors.values())
    sizes = [skeleton.block_bytes(block, torch.bfloat16) for block in range(NUM_BLOCKS)]
    assert sum(sizes) + skeleton.ends_bytes(torch.bfloat16) == 2 * total


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_weighs_nothing_and_hands_out_each_block_once(family: str) -> None:
    skeleton = Skeleton(FAMILIES[family]())
    assert all(tensor.is_meta for tensor in skeleton.tensors.values())
    block = skeleton.take_block(2)
    names = {name.removeprefix(skeleton.block_prefix(2)) for name in skeleton.tensors}
    assert {name for name, _ in block.named_parameters()} <= names
    assert not list(skeleton.take_block(2).parameters())


# Where they are not two, as the configurations say.
KEY_HEADS = {
    "gpt_neox": 4,
    "bloom": 4,
    "bloom_normed_residual": 4,
    "falcon_new_alibi": 1,
    "falcon_multi_query": 1,
    "falcon_alibi": 4,
    "falcon_sequential": 1,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_shape_is_that_of_the_keys(family: str) -> None:
    skeleton = Skeleton(FAMILIES[family]())
    heads = KEY_HEADS.get(family, 2)
    assert skeleton.cache_shape(skeleton.take_block(1)) == CacheShape(heads, 16, 16)


def test_a_block_has_the_layer_type_of_its_own_index() -> None:
    """Gemma 3 chooses layer types by the index of a loop, which a span cut out by itself would get wrong."""
    config = FAMILIES["gemma3"]()
    assert isinstance(config, Gemma3TextConfig)
    skeleton = Skeleton(config)
    for index, kind in enumerate(config.layer_types or ()):
        attention: Any = skeleton.take_block(index).get_submodule("self_attn")
        assert attention.layer_idx == index
        assert attention.is_sliding == (kind == "sliding_attention")


def refused(config: PretrainedConfig) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        Skeleton(config)
    assert caught.value.code is Code.UNSUPPORTED_FAMILY
    return caught.value


def test_a_family_that_is_not_certified_is_refused_by_name() -> None:
    problem = refused(GPT2Config(architectures=["GPT2LMHeadModel"]))
    assert "GPT2LMHeadModel" in problem.message
    assert all(name in problem.remedy for name in CERTIFIED)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"new_decoder_architecture": True, "parallel_attn": False}, "without parallel attention"),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "3 norms"),
        ({"num_ln_in_parallel_attn": 2}, "2 norms"),
        (
            {"multi_query": False, "num_kv_heads": 2, "hidden_size": 64, "num_attention_heads": 4},
            "2 key heads",
        ),
    ],
)
def test_variants_of_falcon_that_transformers_cannot_run_are_refused(
    options: dict[str, Any], named: str
) -> None:
    assert named in refused(FalconConfig(architectures=["FalconForCausalLM"], **options)).message


def test_bloom_without_its_biases_is_refused() -> None:
    config = BloomConfig(architectures=["BloomForCausalLM"], slow_but_exact=True, pretraining_tp=4)
    assert "slow_but_exact" in refused(config).message


def test_weights_stored_quantized_are_refused_by_method() -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    config.quantization_config = {"quant_method": "gptq"}
    assert "gptq" in refused(config).message


def test_bidirectional_attention_is_refused() -> None:
    config = FAMILIES["gemma3"]()
    config.architectures = ["Gemma3ForCausalLM"]
    config.use_bidirectional_attention = True
    assert "bidirectional" in refused(config).message


def test_the_architecture_is_the_class_that_the_model_was_saved_as() -> None:
    assert architecture(LlamaConfig(architectures=["LlamaForCausalLM"])) == "LlamaForCausalLM"
    assert architecture(LlamaConfig()) == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "MistralForCausalLM"])
def test_a_class_that_is_not_the_configurations_own_is_refused(name: str) -> None:
    assert name in refused(LlamaConfig(architectures=[name])).message


# README

README = Path(__file__).parents[2] / "README.md"
COLUMNS = 4
WRITE = "COROLLA_WRITE_TABLES"  # set it to have the table written instead of compared


def families_table() -> str:
    """The certified architectures, four a row."""
    names = [name.removesuffix("ForCausalLM") for name in sorted(CERTIFIED, key=str.casefold)]
    names += [""] * (-len(names) % COLUMNS)
    rows = [names[first : first + COLUMNS] for first in range(0, len(names), COLUMNS)]
    rule = "|" + "---|" * COLUMNS
    return "\n".join([f"| {' | '.join(rows[0])} |", rule, *(f"| {' | '.join(row)} |" for row in rows[1:])])


def test_the_readme_lists_just_the_certified_families() -> None:
    text = README.read_text("utf-8")
    start, end = "<!-- families: made by tests/model/test_families.py -->\n", "\n<!-- /families -->"
    before, found = text.split(start)[0], text.split(start)[1].split(end)[0]
    if WRITE in os.environ:
        README.write_text(before + start + families_table() + end + text.split(end)[1], "utf-8")
    else:
        assert found == families_table(), f"run this test once with {WRITE}=1"
