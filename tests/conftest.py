"""What all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Triton's kernels run in its interpreter, on tensors of a CPU. It looks here when it is first imported, by whomever:
# bitsandbytes does it too. On a GPU, `TRITON_INTERPRET=0 pytest tests/model/test_on_gpu.py` runs them there.
os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes, or drawing one, tells of the machine, which tests share with others.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture
def anyio_backend() -> str:
    """The daemon runs on trio; tests of asynchronous code do too unless they say otherwise."""
    return "trio"
