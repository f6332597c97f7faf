"""Adapters as hops get them: PEFT's files read without torch, against what torch and PEFT read."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from corolla.protocol.errors import Code, CorollaError  # noqa: E402
from corolla.protocol.training import NO_PART  # noqa: E402
from corolla.sdk.parts import CONFIG_FILE, WEIGHTS_FILE, as_adapter, read_adapter, read_tensors  # noqa: E402

from ..model.tiny import FAMILIES, random_model  # noqa: E402

# PEFT asks transformers for a name that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def save(folder: Path, family: str = "llama", dtype: Any = None, **options: Any) -> Any:
    """PEFT's model, whose adapter lies in `folder`."""
    adapted = get_peft_model(random_model(FAMILIES[family]()), LoraConfig(init_lora_weights=False, **options))
    adapted.save_pretrained(str(folder))
    if dtype is not None:
        path = folder / WEIGHTS_FILE
        tensors = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path)
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_every_width_are_read_as_torch_does(tmp_path: Path, dtype: Any) -> None:
    tensors = {"one": torch.randn(3, 5).to(dtype), "two": torch.randn(7).to(dtype)}
    safetensors.torch.save_file(tensors, tmp_path / "file")
    found = read_tensors(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, weights in found.items():
        assert weights.shape == tuple(tensors[name].shape)
        assert torch.frombuffer(bytearray(weights.data), dtype=torch.float32).equal(
            tensors[name].float().flatten()
        )


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmo2"])
def test_parts_are_safetensors_files_with_pefts_numbers(tmp_path: Path, family: str) -> None:
    adapted = save(tmp_path, family, r=3, lora_alpha=7, target_modules="all-linear")
    adapter = read_adapter(tmp_path)
    assert adapter.name == tmp_path.name
    assert len(adapter.files) == 4
    modules = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    num_found = 0
    for block, file in enumerate(adapter.files):
        assert file.name == sha256(file.data).digest()
        (tmp_path / "part").write_bytes(file.data)
        with safetensors.safe_open(tmp_path / "part", "pt") as part:
            for name in part.keys():  # noqa: SIM118 - no mapping
                target, _, factor = name.rpartition(".")
                (module,) = [m for full, m in modules.items() if full.endswith(f"layers.{block}.{target}")]
                assert part.get_tensor(name).equal(getattr(module, factor)["default"].weight)
                assert float(part.metadata()[f"{target}.scaling"]) == pytest.approx(module.scaling["default"])
                num_found += 1
    assert num_found == 2 * len(modules)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 40}},
        {"layers_to_transform": [1, 2]},
    ],
    ids=str,
)
def test_what_lora_may_be_is_read_as_peft_means_it(tmp_path: Path, options: dict[str, Any]) -> None:
    adapted = save(tmp_path, r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **options)
    for block, file in enumerate(read_adapter(tmp_path).files):
        layer = adapted.base_model.model.model.layers[block].self_attn
        if not hasattr(layer.q_proj, "scaling"):
            assert file.name == NO_PART
            continue
        length = int.from_bytes(file.data[:8], "little")
        told = json.loads(file.data[8 : 8 + length])["__metadata__"]
        for name in ("q_proj", "v_proj"):
            expected = getattr(layer, name).scaling["default"]
            assert float(told[f"self_attn.{name}.scaling"]) == pytest.approx(expected)


def test_the_same_numbers_have_the_same_names(tmp_path: Path) -> None:
    save(tmp_path, target_modules=["q_proj"])
    first = read_adapter(tmp_path)
    assert as_adapter(tmp_path) == first
    assert as_adapter(first) is first
    assert as_adapter(None) is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_the_hops_do_not_compute_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    save(tmp_path, **{"target_modules": ["q_proj"], **options})
    with pytest.raises(CorollaError, match=named) as caught:
        read_adapter(tmp_path)
    assert caught.value.code is Code.UNSUPPORTED


def spoil_config(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[")


def spoil_kind(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "peft_type": "IA3"}))


def cut_weights(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-4])


def lie_about_the_header(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])


def adapt_the_head(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 64)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)


def drop_a_factor(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    tensors.pop("base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight")
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("spoil", "code", "named"),
    [
        (spoil_config, Code.UNREADABLE, CONFIG_FILE),
        (spoil_kind, Code.UNSUPPORTED, "IA3"),
        (cut_weights, Code.UNREADABLE, WEIGHTS_FILE),
        (lie_about_the_header, Code.UNREADABLE, "header"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), Code.UNREADABLE, WEIGHTS_FILE),
        (adapt_the_head, Code.UNSUPPORTED, "lm_head"),
        (drop_a_factor, Code.BAD_SHAPE, "q_proj of block 2"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path: Path, spoil: Any, code: Code, named: str) -> None:
    save(tmp_path, target_modules=["q_proj"])
    spoil(tmp_path)
    with pytest.raises(CorollaError, match=named) as caught:
        read_adapter(tmp_path)
    assert caught.value.code is code
