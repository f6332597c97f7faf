"""The daemon's events: bounded, in order, and followed without missing one."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from corolla.daemon.events import MAX_EVENTS, EventLog
from corolla.protocol.views import DaemonEvent

pytestmark = pytest.mark.anyio


async def test_reading_gives_what_happened_and_ends() -> None:
    log = EventLog()
    log.emit("one", "first", number=1)
    log.emit("two", "second")
    events = [event async for event in log.read(follow=False)]
    assert [(event.kind, event.text, event.detail) for event in events] == [
        ("one", "first", {"number": 1}),
        ("two", "second", None),
    ]
    assert events[0].unix_s <= events[1].unix_s


async def test_only_the_latest_are_kept() -> None:
    log = EventLog()
    for number in range(MAX_EVENTS + 5):
        log.emit("tick", str(number))
    texts = [event.text async for event in log.read(follow=False)]
    assert texts == [str(number) for number in range(5, MAX_EVENTS + 5)]


async def test_following_hears_each_event_once_and_in_order() -> None:
    log = EventLog()
    log.emit("tick", "before")
    heard: list[str] = []

    async def follow() -> None:
        async for event in log.read(follow=True):
            heard.append(event.text)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        assert heard == ["before"] * 2
        log.emit("tick", "a")
        log.emit("tick", "b")
        await trio.testing.wait_all_tasks_blocked()
        log.emit("tick", "c")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sorted(heard[2:]) == ["a", "a", "b", "b", "c", "c"]
    assert [text for text in heard if text in "ab"][:2] == ["a", "b"]


async def test_a_slow_reader_misses_the_oldest_and_nothing_else() -> None:
    log = EventLog()
    log.emit("tick", "0")
    reader = log.read(follow=False)
    first: DaemonEvent = await anext(reader)
    for number in range(1, MAX_EVENTS + 11):
        log.emit("tick", str(number))
    rest = [event.text async for event in reader]
    assert first.text == "0"
    assert rest == [str(number) for number in range(11, MAX_EVENTS + 11)]
