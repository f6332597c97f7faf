"""What all tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """The daemon runs on trio; tests of asynchronous code do too unless they say otherwise."""
    return "trio"
