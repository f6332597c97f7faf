"""How the machine is used: what logind, the processors and the driver say, and what it means."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from corolla.daemon.lending import occupancy as module
from corolla.daemon.lending import tool as tool_module
from corolla.daemon.lending.occupancy import Occupancy, cpu_seconds, parse_idle_hint, parse_pmon
from corolla.daemon.lending.tool import Tool

pytestmark = pytest.mark.anyio

HEAD = """\
# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command
# Idx           #    C/G      %      %      %      %      %      %    name
"""
OURS, OTHER = 4242, 999


class Pmon(Tool):
    """`nvidia-smi pmon` of a machine whose processes are (GPU, process, percent), or that has none."""

    def __init__(self) -> None:
        super().__init__("nvidia-smi")
        self.shown: list[tuple[int, int, str]] | None = []

    async def ask(self) -> str | None:
        await trio.lowlevel.checkpoint()
        if self.shown is None:
            return None
        rows = [
            f"    {gpu} {process:10}     C {sm:>6}     40      -      -      -      -    python"
            for gpu, process, sm in self.shown
        ]
        return "\n".join(
            [
                HEAD.rstrip(),
                *(rows or ["    0          -     -      -      -      -      -      -      -    -"]),
            ]
        )


class Silent(Tool):
    """A machine without logind."""

    async def ask(self) -> str | None:
        await trio.lowlevel.checkpoint()
        return None


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
    ("shown", "ours", "wanted"),
    [
        ([(0, OURS, "97"), (0, OTHER, "2")], {OURS}, False),  # a desktop that draws
        ([(0, OURS, "97"), (0, OTHER, "-")], {OURS}, False),  # a program that only keeps memory
        ([(0, OURS, "97"), (0, OTHER, "60")], {OURS}, True),  # a game
        ([(0, OURS, "-"), (0, OTHER, "60"), (0, OTHER + 1, "-")], {OURS}, True),
        ([(0, OURS, "-"), (1, OTHER, "60")], {OURS}, False),  # on a GPU that we do not lend
        (
            [(0, OTHER, "60"), (0, OURS, "-"), (1, OTHER, "-")],
            {OURS},
            True,
        ),  # at work on ours, at rest elsewhere
        (
            [(0, OURS, "97"), (0, OTHER, "60")],
            {1},
            False,
        ),  # ours is not listed: the numbers are another namespace's
        ([(0, OURS, "97"), (0, OTHER, "60")], {OURS, OTHER}, False),  # a second worker of ours, which loads
        ([], {OURS}, False),
        (None, {OURS}, False),  # no such tool, or its driver fails
    ],
)
async def test_another_program_on_the_gpu_is_seen(
    shown: list[tuple[int, int, str]] | None, ours: set[int], wanted: bool
) -> None:
    pmon = Pmon()
    pmon.shown = shown
    free_s = await Occupancy(lambda: 7.0, pmon=pmon).gpu_free_s(ours)
    assert free_s == (0.0 if wanted else math.inf)


async def test_lines_that_name_no_process_are_passed_over() -> None:
    assert parse_pmon(HEAD + "    0          -     -      -      -    -\n\nNo devices were found\n") == ()


async def test_without_logind_the_load_of_other_programs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    seconds = iter([(0.0, 0.0), (40.0, 2.0), (80.0, 22.0), (120.0, 23.0)])
    monkeypatch.setattr(module, "cpu_seconds", lambda: next(seconds))
    occupancy = Occupancy(lambda: now[0], logind=Silent("loginctl"))
    idle = []
    for _ in range(4):
        now[0] += 10.0
        idle.append(await occupancy.idle_s())
    assert idle == [10.0, 20.0, 0.0, 10.0]  # busy between the second and the third look


async def test_a_program_comes_to_our_gpu_and_goes() -> None:
    now, pmon = [0.0], Pmon()
    occupancy = Occupancy(lambda: now[0], pmon=pmon)

    async def free_s(at: float, shown: list[tuple[int, int, str]] | None, *ours: int) -> float:
        now[0], pmon.shown = at, shown
        return await occupancy.gpu_free_s(ours)

    assert await free_s(0, [(1, OURS, "90")], OURS) == math.inf
    assert await free_s(15, [(1, OURS, "40"), (1, OTHER, "60")], OURS) == 0.0
    assert await free_s(30, [(1, OTHER, "99"), (0, 7, "99")]) == 0.0  # ours has ended; the game has not
    assert await free_s(45, None) == 15.0  # the driver says nothing for a while
    assert (
        await free_s(60, [(0, 7, "99")]) == 30.0
    )  # the game is over; what runs elsewhere is in nobody's way
    assert await free_s(75, [(1, OURS + 1, "99")], OURS + 1) == 45.0  # a new worker of ours loads
    assert await free_s(90, [(1, OURS + 1, "99")]) == 60.0  # it is about to end
    assert await free_s(105, [(1, OURS + 1, "99")]) == 0.0  # it should have


async def test_our_own_work_is_not_somebody_elses() -> None:
    total, others = cpu_seconds()
    assert 0 <= others < total


async def test_a_tool_that_is_missing_or_fails_says_nothing() -> None:
    assert await Tool("no-such-tool-of-anybody").ask() is None
    assert await Tool("false").ask() is None
    assert await Tool(sys.executable + "x").ask() is None
    assert await Tool("echo", "hello").ask() == "hello\n"


async def test_a_tool_that_takes_too_long_is_ended() -> None:
    tool = Tool("sleep", "600", timeout_s=0.05)
    with trio.fail_after(30):
        assert await tool.ask() is None
        assert await tool.ask() is None
    assert children() == []


async def test_a_tool_that_cannot_be_killed_holds_nobody_up_and_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = tmp_path / "back"
    tool = Tool("sh", "-c", f"[ -e {back} ] && exec echo back; exec sleep 600", timeout_s=0.05)
    monkeypatch.setattr(tool_module, "END_TIMEOUT_S", 0.05)
    with monkeypatch.context() as driver, trio.fail_after(30):
        driver.setattr(trio.Process, "kill", lambda process: None)  # as SIGKILL is to a process in state D
        assert await tool.ask() is None
        (stuck,) = children()
        assert await tool.ask() is None
        assert children() == [stuck]
    back.touch()
    tool.timeout_s = 30.0
    os.kill(stuck, signal.SIGKILL)
    await trio.to_thread.run_sync(os.waitid, os.P_PID, stuck, os.WEXITED | os.WNOWAIT)
    assert await tool.ask() == "back\n"


def children() -> list[int]:
    """Our processes that have not ended."""
    return [
        int(child)
        for task in Path("/proc/self/task").glob("*/children")
        for child in task.read_text().split()
    ]
