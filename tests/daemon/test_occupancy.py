"""How the machine is used: what logind, the processors and the driver say, and what it means."""

from __future__ import annotations

import math

import pytest
import trio

from corolla.daemon.lending import occupancy as module
from corolla.daemon.lending.occupancy import Occupancy, cpu_seconds, is_gpu_wanted, parse_idle_hint, run_tool

pytestmark = pytest.mark.anyio

PMON = """\
# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command
# Idx           #    C/G      %      %      %      %      %      %    name
    0       4242     C     97     40      -      -      -      -    python
    0        999     G      {desktop}      1      -      -      -      -    Xorg
"""


@pytest.mark.parametrize(
    ("text", "idle_s"),
    [
        ("IdleHint=yes\nIdleSinceHintMonotonic=40000000\n", 60.0),
        ("IdleHint=yes\n", math.inf),
        ("IdleHint=no\nIdleSinceHintMonotonic=40000000\n", 0.0),
        ("", None),
        ("Failed to connect to bus", None),
    ],
)
async def test_logind_tells_since_when_nobody_sits_here(text: str, idle_s: float | None) -> None:
    assert parse_idle_hint(text, now_s=100.0) == idle_s


@pytest.mark.parametrize(
    ("desktop", "ours", "wanted"),
    [
        ("2", {4242}, False),  # a desktop that draws
        ("60", {4242}, True),  # a game
        ("-", {4242}, False),
        ("60", {1}, False),  # ours is not listed: the numbers are another namespace's
        ("2", set(), True),  # we lend nothing, so 4242 is somebody else's
    ],
)
async def test_another_program_on_the_gpu_is_seen(desktop: str, ours: set[int], wanted: bool) -> None:
    assert is_gpu_wanted(PMON.format(desktop=desktop), ours) is wanted


async def test_without_logind_the_load_of_other_programs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(command: object) -> None:
        await trio.lowlevel.checkpoint()

    now = [1000.0]
    seconds = iter([(0.0, 0.0), (40.0, 2.0), (80.0, 22.0), (120.0, 23.0)])
    monkeypatch.setattr(module, "run_tool", nothing)
    monkeypatch.setattr(module, "cpu_seconds", lambda: next(seconds))
    occupancy = Occupancy(lambda: now[0])
    idle = []
    for _ in range(4):
        now[0] += 10.0
        idle.append(await occupancy.idle_s())
    assert idle == [10.0, 20.0, 0.0, 10.0]  # busy between the second and the third look


async def test_the_gpu_stays_somebodys_for_as_long_as_it_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now, listing = [0.0], ["60"]

    async def pmon(command: object) -> str:
        await trio.lowlevel.checkpoint()
        return PMON.format(desktop=listing[0])

    monkeypatch.setattr(module, "run_tool", pmon)
    occupancy = Occupancy(lambda: now[0])
    assert await occupancy.gpu_free_s({4242}) == 0.0
    now[0], listing[0] = 50.0, "0"
    assert await occupancy.gpu_free_s({4242}) == 50.0


async def test_our_own_work_is_not_somebody_elses() -> None:
    total, others = cpu_seconds()
    assert 0 <= others < total


async def test_a_tool_that_is_missing_or_fails_says_nothing() -> None:
    assert await run_tool(["no-such-tool-of-anybody"]) is None
    assert await run_tool(["false"]) is None
    assert await run_tool(["echo", "hello"]) == "hello\n"
