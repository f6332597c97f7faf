"""The main job on real weights: SmolLM2 over several daemons, one of them killed in mid-sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
