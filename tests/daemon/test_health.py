"""What a daemon says of itself in a few words."""

from __future__ import annotations

import pytest

from corolla.daemon.health import reach_words, wrong_with
from corolla.protocol.views import ReachView, RelayUse, WorkerStatus

LOST = {"code": "device_lost", "message": "the device is lost", "remedy": "see what its driver says"}
RELAYS = (RelayUse("peer", "/ip4/10.0.0.1/tcp/1"),)


def test_a_daemon_that_is_well_has_nothing_to_say() -> None:
    assert wrong_with([WorkerStatus(0, "online", "tiny", 0, 4)], []) == ()


def test_what_is_wrong_is_told_once_with_its_remedy() -> None:
    workers = [
        WorkerStatus(0, "failed", "tiny", 0, 4, error=LOST),
        WorkerStatus(1, "loading", "tiny", 0, 4, error=LOST),
        WorkerStatus(2, "failed", "tiny", 0, 4),
    ]
    assert wrong_with(workers, ["no room", "no room"]) == (
        "worker 0 failed: the device is lost (see what its driver says)",
        "worker 1 is started again: the device is lost (see what its driver says)",
        "worker 2 failed: it says not why",
        "no room",
    )


@pytest.mark.parametrize(
    ("reach", "words"),
    [
        (ReachView(), "unknown: not known yet"),
        (ReachView("unknown", relays=RELAYS), "unknown: not known yet, meanwhile through 1 relay"),
        (ReachView("public"), "public: others can dial it"),
        (
            ReachView("public", proven=("/ip4/10.0.0.1/tcp/1",)),
            "public: others can dial it, as they have proved",
        ),
        (ReachView("private", True), "private by its configuration: through no relay yet"),
        (ReachView("private", relays=RELAYS * 2), "private: through 2 relays"),
    ],
    ids=str,
)
def test_reach_is_told_in_words(reach: ReachView, words: str) -> None:
    assert reach_words(reach) == words
