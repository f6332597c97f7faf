"""The main job on real weights: SmolLM2 over several daemons, one of them killed in mid-sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODEL = os.environ.get("COROLLA_TEST_MODEL", "")


@pytest.mark.skipif(
    not Path(MODEL).is_file(), reason="COROLLA_TEST_MODEL names no file; packaging/check sets it"
)
@pytest.mark.timeout(900)
def test_tokens_equal_those_of_one_transformers_process_after_a_kill() -> None:
    command = [
        sys.executable,
        "-c",
        "from corolla.sdk.cli import main; main()",
        "demo",
        "--json",
        "--model",
        MODEL,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["equal"]
    assert report["killed"]
    assert report["repair_s"] > 0
    assert report["text"]


@pytest.mark.skipif(
    not Path(MODEL).is_file(), reason="COROLLA_TEST_MODEL names no file; packaging/check sets it"
)
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_text_with_an_adapter_equals_that_of_peft(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from ..processes import local_swarm

    ids = torch.arange(100, 120)[None]
    with local_swarm(Path(MODEL), "--device", "cpu", "--dtype", "float32", "--threads", "1") as swarm:
        client = swarm.found()
        daemons = [swarm.serve("front", 0, 15), swarm.serve("back", 15, 30)]
        for daemon in daemons:
            daemon.wait_online()
        swarm.wait_covered(client, [1] * 30)
        with client.connect() as asked:
            folder = asked.pull(MODEL).folder
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            config = LoraConfig(
                r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
            )
            torch.manual_seed(0)
            adapted: Any = get_peft_model(whole, config)
            adapted.save_pretrained(str(tmp_path))
            with torch.inference_mode():
                theirs = adapted.generate(
                    input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=None
                )
            model = asked.model(asked.models()[0].name)
            ours = model.generate(tokens=ids, max_new_tokens=24, ignore_eos=True, adapter=tmp_path)
            plain = model.generate(tokens=ids, max_new_tokens=24, ignore_eos=True)
    assert list(ours.tokens[0]) == theirs[0, 20:].tolist()
    assert ours.tokens != plain.tokens
