"""The line's speed, found by transfers over a link of a known rate."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lab import Host, Lab, Quality, why_not

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(why_not()), reason=why_not())]

PROGRAM = str(Path(__file__).with_name("transfer.py"))
RATE = 1_000_000


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def transferred(lab: Lab, size: int, piece: int, *limit: int) -> dict[str, float]:
    """What the sender of so many bytes found, on a line of `RATE` with a round trip of 40 ms."""
    server, home = lab.host("a"), lab.host("h", quality=Quality(delay_s=0.02, bytes_per_s=RATE))
    process = subprocess.Popen(
        server.command(sys.executable, PROGRAM, "sink"), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return sent(home, f"/ip4/{server.address}/tcp/4517", size, piece, *limit)
    finally:
        process.kill()
        process.communicate()


def sent(home: Host, *words: object) -> dict[str, float]:
    found: dict[str, float] = json.loads(home.run(sys.executable, PROGRAM, "send", *map(str, words)))
    return found


def test_a_long_transfer_measures_the_line(lab: Lab) -> None:
    found = transferred(lab, 6 * RATE, 6 * RATE)
    assert 0.6 * RATE <= found["up_bytes_per_s"] <= 1.2 * RATE, found


def test_small_steps_measure_nothing(lab: Lab) -> None:
    found = transferred(lab, RATE, 4000)
    assert found["up_bytes_per_s"] == 0, found


def test_a_limit_holds_on_a_real_line(lab: Lab) -> None:
    found = transferred(lab, 4 * RATE, 4 * RATE, RATE // 2)
    assert found["took_s"] >= (4 * RATE - (1 << 20)) / (RATE // 2), found
