"""What `status` says of training."""

from __future__ import annotations

from corolla.daemon.training.jobs import WINDOW_S, Jobs
from corolla.protocol.views import TrainingView


def test_a_job_shows_its_rate_its_tokens_and_its_peers() -> None:
    jobs = Jobs()
    jobs.note_peer("tiny", "b", 100.0)
    jobs.note_peer("tiny", "a", 100.5)
    for i in range(8):
        jobs.note_batch("tiny", 10, 101.0 + i)
    assert jobs.views(110.0) == (TrainingView("tiny", 0.8, 80, ("a", "b")),)


def test_what_only_went_forward_is_no_training() -> None:
    jobs = Jobs()
    jobs.note_peer("tiny", "a", 1.0)
    assert jobs.views(2.0) == ()


def test_the_rate_and_the_peers_are_those_of_the_last_minute() -> None:
    jobs = Jobs()
    jobs.note_peer("tiny", "gone", 0.0)
    jobs.note_batch("tiny", 5, 0.0)
    jobs.note_peer("tiny", "a", 31.0)
    for i in range(30):
        jobs.note_batch("tiny", 5, WINDOW_S + i)
    assert jobs.views(WINDOW_S + 30) == (TrainingView("tiny", 0.5, 155, ("a",)),)


def test_a_job_that_ended_is_no_longer_shown() -> None:
    jobs = Jobs()
    jobs.note_batch("tiny", 5, 0.0)
    jobs.note_batch("other", 5, 30.0)
    assert [view.model for view in jobs.views(WINDOW_S + 1)] == ["other"]
    assert jobs.views(2 * WINDOW_S) == ()
