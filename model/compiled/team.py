"""Threads that run one compiled function together, and sleep in between.

A team belongs to the thread that calls `run`, and this one is a member too. Its threads end with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Desk:
    """What the threads of a team share with it: a job and its arguments, or None for the end."""

    calls: tuple[threading.Semaphore, ...]
    job: tuple[Callable[..., object], tuple[Any, ...]] | None = field(default=None)


class Team:
    """num_members: threads that compute together, the caller among them."""

    def __init__(self, num_members: int) -> None:
        self.num_members = num_members
        self._desk = _Desk(tuple(threading.Semaphore(0) for _ in range(1, num_members)))
        for member in range(1, num_members):
            place = (self._desk, member, num_members)
            threading.Thread(target=_serve, args=place, name=f"member {member}", daemon=True).start()
        weakref.finalize(self, _dismiss, self._desk)

    def run(self, function: Callable[..., object], *arguments: Any) -> None:
        """`function(member, num_members, *arguments)` by every member; back when the caller's own call is.

        The function lets go of Python's lock, raises nothing, and ends when the work of all members is done.
        """
        self._desk.job = function, arguments
        for call in self._desk.calls:
            call.release()
        function(0, self.num_members, *arguments)


def _serve(desk: _Desk, member: int, num_members: int) -> None:
    while True:
        desk.calls[member - 1].acquire()
        if desk.job is None:
            return
        function, arguments = desk.job
        function(member, num_members, *arguments)
        del function, arguments


def _dismiss(desk: _Desk) -> None:
    desk.job = None
    for call in desk.calls:
        call.release()
