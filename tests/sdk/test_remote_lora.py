"""What a `LoraConfig` means: the layers, ranks, scalings and names are those that PEFT gives it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model  # noqa: E402

from corolla.protocol.errors import Code, CorollaError  # noqa: E402
from corolla.sdk.adapters import RemoteLora, linears_of  # noqa: E402
from corolla.sdk.parts import read_adapter  # noqa: E402

from ..model.tiny import save_tiny  # noqa: E402

# PEFT asks transformers for a name that it has deprecated, and tells which patterns match nothing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning"),
]


@pytest.mark.parametrize("family", ["llama", "phi3", "falcon"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["o_proj", "dense"], "layers_to_transform": 2, "use_rslora": True},
        {
            "target_modules": ["o_proj", "dense", "down_proj"],
            "layers_to_transform": [0, 3],
            "rank_pattern": {r"0\..*": 5},
            "alpha_pattern": {"o_proj": 3, "dense": 7},
        },
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "dense"]},
    ],
    ids=["all", "one-block", "patterns", "without"],
)
def test_a_config_means_what_it_means_to_peft(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    whole = save_tiny(tmp_path / "whole", family)
    config = LoraConfig(r=2, lora_alpha=6, **options)
    ours = RemoteLora(deepcopy(config), linears_of(whole.config))
    adapted: Any = get_peft_model(whole, config)
    expected = {
        name.replace(".default.", "."): parameter.shape
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert {name: parameter.shape for name, parameter in ours.tensors().items()} == expected
    adapted.save_pretrained(tmp_path / "theirs")
    ours.load(tmp_path / "theirs")  # and then both have the same bytes, scalings too
    files = {block: file for block, file in enumerate(ours.parts()) if file.name}
    theirs = read_adapter(tmp_path / "theirs").files
    assert files == {block: file for block, file in enumerate(theirs) if file.name}


def test_a_rank_of_a_pattern_that_cannot_be_is_refused(tmp_path: Path) -> None:
    linears = linears_of(save_tiny(tmp_path, "llama").config)
    config = LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"q_proj": 0})
    with pytest.raises(CorollaError, match="r=0") as caught:
        RemoteLora(config, linears)
    assert caught.value.code is Code.BAD_REQUEST
