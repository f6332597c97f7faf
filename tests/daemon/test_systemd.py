"""The service manager hears that we are ready, alive and stopping."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from corolla.daemon.systemd import Manager


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(10)
        yield channel


def heard(channel: socket.socket) -> list[str]:
    return channel.recv(4096).decode().split("\n")


@pytest.mark.anyio
async def test_it_is_told_when_we_are_ready_and_then_that_we_live(channel: socket.socket) -> None:
    manager = Manager({"NOTIFY_SOCKET": channel.getsockname(), "WATCHDOG_USEC": "30000"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.keep_informed, lambda: "in swarm\nbees")
        assert await trio.to_thread.run_sync(heard, channel) == ["READY=1", "STATUS=in swarm bees"]
        assert await trio.to_thread.run_sync(heard, channel) == ["STATUS=in swarm bees", "WATCHDOG=1"]
        nursery.cancel_scope.cancel()
    manager.stopping()
    assert "STOPPING=1" in heard(channel)


@pytest.mark.anyio
async def test_a_watchdog_of_another_process_is_not_fed(channel: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": channel.getsockname(), "WATCHDOG_USEC": "30000"}
    manager = Manager({**environment, "WATCHDOG_PID": str(os.getpid() + 1)})
    with trio.move_on_after(0.1):
        await manager.keep_informed(lambda: "")
    assert heard(channel) == ["READY=1", "STATUS="]
    channel.setblocking(False)
    with pytest.raises(BlockingIOError):
        channel.recv(1)


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0corolla-test-{os.getpid()}")
        channel.settimeout(10)
        Manager({"NOTIFY_SOCKET": f"@corolla-test-{os.getpid()}"}).tell("READY=1")
        assert heard(channel) == ["READY=1"]


@pytest.mark.anyio
async def test_without_a_manager_nothing_is_said() -> None:
    manager = Manager({})
    await manager.keep_informed(lambda: "nobody asks")
    manager.stopping()


def test_a_manager_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    Manager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).tell("READY=1")
