"""What the service manager hears of us: ready, alive, what we do, stopping. Silent where there is none.

Source: sd_notify(3) and sd_watchdog_enabled(3): datagrams of `KEY=value` lines on the socket that
`NOTIFY_SOCKET` names.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Final

import structlog
import trio

TELL_EVERY_S: Final = 10.0  # the status line, where no watchdog wants to hear more often

_log = structlog.get_logger("corolla.systemd")


class Manager:
    """The service manager that started this process, if any did."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self._every_s = TELL_EVERY_S
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        is_for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._has_watchdog = watchdog_us.isdecimal() and is_for_us
        if self._has_watchdog:
            self._every_s = min(TELL_EVERY_S, int(watchdog_us) / 1e6 / 3)

    async def keep_informed(self, status: Callable[[], str]) -> None:
        """Say that we are ready, then who we are and that we live, until cancelled. status: one line.

        It runs in the loop that everything runs in: when that hangs, so does this, and we are restarted.
        """
        if not self._address:
            return
        self.tell("READY=1", f"STATUS={status()}")
        while True:
            await trio.sleep(self._every_s)
            self.tell(f"STATUS={status()}", *(("WATCHDOG=1",) if self._has_watchdog else ()))

    def stopping(self) -> None:
        """Say that we go on purpose."""
        self.tell("STOPPING=1", "STATUS=stopping")

    def tell(self, *lines: str) -> None:
        """Send lines. A manager that does not listen is none of our troubles."""
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.setblocking(False)
                channel.sendto("\n".join(line.replace("\n", " ") for line in lines).encode(), address)
        except OSError as problem:
            _log.warning("service_manager_deaf", reason=str(problem))
