"""Tiny random models of every certified family, with a fixed seed, as safetensors folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Ernie4_5Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GPTNeoXConfig,
    GptOssConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    Starcoder2Config,
)

NUM_BLOCKS = 4
VOCAB_SIZE = 96
_HEADS: dict[str, Any] = {"head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Windows of 8 tokens, so that short tests reach beyond them; layer types that differ from block to block.
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen2": lambda: Qwen2Config(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, **_HEADS),
    "mistral": lambda: MistralConfig(**_COMMON, sliding_window=8),
    "phi3": lambda: Phi3Config(**_COMMON, sliding_window=None),
    "olmo2": lambda: Olmo2Config(**_COMMON),
    "gemma2": lambda: Gemma2Config(
        **_COMMON, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_COMMON,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mixtral": lambda: MixtralConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_COMMON,
        **_HEADS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        mlp_only_layers=[1],
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=_MIXED,
        rope_parameters=_ROPE,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_without_kv_heads()),
    "apertus": lambda: ApertusConfig(**_COMMON),
    "arcee": lambda: ArceeConfig(**_COMMON),
    "ernie4_5": lambda: Ernie4_5Config(**_COMMON, **_HEADS),
    "exaone4": lambda: Exaone4Config(**_COMMON, sliding_window=8, layer_types=_MIXED),
    "gemma": lambda: GemmaConfig(**_COMMON, **_HEADS),
    "glm": lambda: GlmConfig(**_COMMON, **_HEADS),
    "glm4": lambda: Glm4Config(**_COMMON, **_HEADS),
    "helium": lambda: HeliumConfig(**_COMMON, **_HEADS),
    "hunyuan": lambda: HunYuanDenseV1Config(**_COMMON, **_HEADS),
    "olmo": lambda: OlmoConfig(**_COMMON, clip_qkv=1.0),
    "olmo3": lambda: Olmo3Config(**_COMMON, sliding_window=8, layer_types=_MIXED),
    "olmoe": lambda: OlmoeConfig(**_COMMON, num_experts=4, num_experts_per_tok=2),
    "phi": lambda: PhiConfig(**_COMMON, qk_layernorm=True),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=48,
        mlp_only_layers=[2],
    ),
    "seed_oss": lambda: SeedOssConfig(**_COMMON, **_HEADS),
    "smollm3": lambda: SmolLM3Config(**_COMMON, no_rope_layers=[1, 1, 0, 1]),
    "starcoder2": lambda: Starcoder2Config(**_COMMON, sliding_window=8),
    "bloom": lambda: BloomConfig(**_without_kv_heads(), pretraining_tp=2),
    "bloom_normed_residual": lambda: BloomConfig(
        **_without_kv_heads(), apply_residual_connection_post_layernorm=True
    ),
    # As falcon-40b, falcon-11B, falcon-7b and falcon-rw-1b, and what lies between them.
    "falcon": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon_one_norm": lambda: _falcon(
        new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon_new_alibi": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=1, alibi=True),
    "falcon_multi_query": lambda: _falcon(multi_query=True),
    "falcon_alibi": lambda: _falcon(multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "falcon_sequential": lambda: _falcon(multi_query=True, parallel_attn=False, bias=True),
}


def _without_kv_heads() -> dict[str, Any]:
    return {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}


def _falcon(**options: Any) -> PretrainedConfig:
    return FalconConfig(**_without_kv_heads(), ffn_hidden_size=96, **options)


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The whole model in float32, with weights large enough that an error in any of them shows."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and "bias" not in name and "sinks" not in name:
                parameter.add_(0.1 * noise)  # norms: around what they are initialized to
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.tie_weights()
    model.train(False)
    return model


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write a tiny model of `family` to `folder`, and return the whole model, to compare with.

    changes: fields of the configuration, such as `num_hidden_layers`.
    """
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = random_model(config, seed)
    model.save_pretrained(folder)
    return model
