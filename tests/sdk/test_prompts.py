"""Soft prompts in decoders of many families, whose blocks run behind a socket, against PEFT."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from peft import PromptTuningConfig, get_peft_model  # noqa: E402

import corolla  # noqa: E402
from corolla.protocol.errors import Code, CorollaError  # noqa: E402
from corolla.sdk.torch import DistributedModelForCausalLM  # noqa: E402

from ..model.tiny import save_tiny  # noqa: E402
from .test_torch import BlocksDaemon, prompt  # noqa: E402

# PEFT asks transformers for a name that it has deprecated, and says that it sets position_ids aside.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gpt_neox", "phi", "bloom", "falcon"])
def test_texts_and_logits_of_each_family_equal_pefts(tmp_path: Path, family: str) -> None:
    whole = save_tiny(tmp_path / "whole", family, seed=3, eos_token_id=None)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted: Any = get_peft_model(deepcopy(whole), config)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    ids = prompt(2, 6)
    given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with BlocksDaemon(tmp_path / "control.sock", whole) as fake, corolla.connect(fake.path) as daemon:
        model: Any = DistributedModelForCausalLM.from_pretrained(
            "tiny", ends=tmp_path / "whole", daemon=daemon, dtype=torch.float32
        )
        model.load_adapter(tmp_path / "adapter")
        with torch.no_grad():
            found, expected = model.generate(ids, **given), adapted.generate(input_ids=ids, **given)
            assert found[:, 6:].tolist() == expected[:, -5:].tolist()
            ours = model(
                ids, use_cache=True, past_key_values=model.new_cache(rows=2, max_length=16), labels=ids
            )
            theirs = adapted(input_ids=ids, labels=ids)
        assert torch.allclose(ours.logits, theirs.logits[:, 3:], atol=1e-3)
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-4)


def test_a_cache_that_is_cropped_to_nothing_or_set_back_keeps_or_loses_the_prompt(tmp_path: Path) -> None:
    whole = save_tiny(tmp_path / "whole", seed=3)
    ids = prompt(1, 6)
    with BlocksDaemon(tmp_path / "control.sock", whole) as fake, corolla.connect(fake.path) as daemon:
        model: Any = DistributedModelForCausalLM.from_pretrained(
            "tiny", ends=tmp_path / "whole", daemon=daemon, dtype=torch.float32
        )
        model.add_adapter(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        cache = model.new_cache(max_length=16)
        with torch.no_grad():
            first = model(ids, past_key_values=cache, use_cache=True).logits
            assert cache.get_seq_length() == 6
            cache.crop(-2)
            assert cache.get_seq_length() == 4
            again = model(ids[:, 4:], past_key_values=cache, use_cache=True).logits
            assert torch.allclose(again, first[:, 4:], atol=1e-4)
            cache.reset()
            assert cache.get_seq_length() == 0
            assert torch.allclose(model(ids, past_key_values=cache, use_cache=True).logits, first, atol=1e-4)


def test_a_loss_through_a_cache_says_that_prompts_get_no_gradient(tmp_path: Path) -> None:
    whole = save_tiny(tmp_path / "whole", seed=3)
    ids = prompt(1, 6)
    with BlocksDaemon(tmp_path / "control.sock", whole) as fake, corolla.connect(fake.path) as daemon:
        model: Any = DistributedModelForCausalLM.from_pretrained(
            "tiny", ends=tmp_path / "whole", daemon=daemon, dtype=torch.float32
        )
        model.add_adapter(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(CorollaError, match="through a cache") as caught:
            model(ids, labels=ids, past_key_values=model.new_cache(max_length=16)).loss.backward()
        assert caught.value.code is Code.UNSUPPORTED
